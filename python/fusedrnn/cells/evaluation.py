"""One step of a cell, operation by operation: forward on arrays of any library, and backward in NumPy.

NumPy arrays may have any dtype, also a complex one, for complex-step derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from fusedrnn.cells.activations import OPERATIONS
from fusedrnn.cells.definition import Cell
from fusedrnn.cells.graph import Node, number
from fusedrnn.cells.trace import Norm, side

Array = npt.NDArray[Any]
GIVEN = {"input", "state", "scalar", "upstream"}  # operations without a computation


class Normed(NamedTuple):
    """Normalised values and their factor."""

    x: list[Array]  # each (B, H)
    inverse: Array  # (B, 1), 1 / sqrt(variance or mean square + eps)


def normalise(norm: Norm, values: Sequence[Array]) -> Normed:
    """Normalise the values of each row, over all units of all of them together."""
    v = np.concatenate(values, axis=-1)
    if norm.kind == "layer":
        v = v - v.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt((v * v).mean(axis=-1, keepdims=True) + norm.eps)
    return Normed(np.split(v * inverse, len(values), axis=-1), inverse)


def normalise_gradient(norm: Norm, normed: Normed, gradients: Sequence[Array]) -> list[Array]:
    """The gradients of the values from those of the normalised ones.

    The mean is subtracted, and so is the part in the direction of x, which the variance cancels.
    """
    x, dx = np.concatenate(normed.x, axis=-1), np.concatenate(gradients, axis=-1)
    d = dx - dx.mean(axis=-1, keepdims=True) if norm.kind == "layer" else dx
    d = d - x * (dx * x).mean(axis=-1, keepdims=True)
    return np.split(normed.inverse * d, len(gradients), axis=-1)


class Step:
    """The values of one step, as arrays of any library.

    Args:
        cell: what is computed.
        weights: by name, each with blocks of H rows; a bias may be None or missing.
        x: (B, I), the input of the step.
        before: the states before the step, each (B, H); with a projection, the first one (B, P).
        scalars: row scalars, by name, each (B, 1).
        dropout: (B, H), the mask of recurrent dropout, by which each operand of a product except x is
            multiplied; or None.
    """

    operations: ClassVar[Mapping[str, Callable[..., Any]]] = OPERATIONS

    def __init__(
        self,
        cell: Cell,
        weights: Mapping[str, Any],
        x: Any,
        before: Sequence[Any],
        scalars: Mapping[str, Any] | None = None,
        dropout: Any = None,
    ) -> None:
        self.cell, self.weights, self.x, self.dropout = cell, weights, x, dropout
        self.shape = before[0].shape[0], self.units()
        self.values: dict[Node, Any] = dict(zip(cell.trace.states.values(), before, strict=True))
        self.values |= {node: (scalars or {})[name] for name, node in cell.trace.scalars.items()}
        self.compute(cell.forward_nodes)

    @property
    def after(self) -> tuple[Any, ...]:
        """The new states."""
        return tuple(self.values[n] for n in self.cell.trace.after.values())

    def units(self) -> Any:
        """H"""
        return self.weights["weight_ih"].shape[0] // self.cell.blocks["weight_ih"]

    def compute(self, nodes: Sequence[Node]) -> None:
        """Compute some values, each after its arguments."""
        for n in nodes:
            if n.op not in GIVEN:
                self.values[n] = self.value(n)

    def value(self, n: Node) -> Any:
        """Compute one value from its arguments."""
        args = [self.values[a] for a in n.args if a.op != "input"]
        match n.op:
            case "constant":
                return self.constant(number(n))
            case "vector":
                block = self.block(*n.attribute)
                return self.constant(0.0) if block is None else block
            case "dense":
                parts = [self.product(n, k) for k in range(len(n.args))]
                return sum(parts[1:], start=parts[0])
            case "project":
                return self.project(args[0])
            case "normalise":
                return self.normalise(n.attribute, args)
            case "item":
                return args[0][n.attribute]
        return self.operations[n.op](*args)

    def constant(self, value: float) -> Any:
        """A number as an operand."""
        return value

    def product(self, n: Node, k: int) -> Any:
        """The product with one operand, and its bias."""
        operand, dense = n.args[k], n.attribute
        weight = self.block(f"weight_{side(operand)}", dense.weights[k])
        bias = self.block(f"bias_{side(operand)}", dense.biases[k]) if dense.biases else None
        product = self.operand(operand) @ weight.T
        return product if bias is None else product + bias

    def project(self, value: Any) -> Any:
        """The product with weight_hr."""
        return value @ self.weights["weight_hr"].T

    def normalise(self, norm: Norm, values: list[Any]) -> Any:
        """The normalised values, by index."""
        raise NotImplementedError

    def operand(self, n: Node) -> Any:
        """The operand of a product: x, or a value after recurrent dropout."""
        if n.op == "input":
            return self.x
        return self.dropped(self.values[n])

    def dropped(self, value: Any) -> Any:
        """An operand, or its gradient, after recurrent dropout."""
        return value if self.dropout is None else value * self.dropout[:, : value.shape[1]]

    def block(self, parameter: str, number: int, of: Mapping[str, Any] | None = None) -> Any:
        """A block of H rows of a parameter, or of its gradient; None if the parameter is missing."""
        values, H = (self.weights if of is None else of).get(parameter), self.shape[1]
        return None if values is None else values[number * H : (number + 1) * H]


class Evaluation(Step):
    """The values of one step and of its gradient, in NumPy."""

    def backward(self, upstream: Sequence[Array]) -> tuple[Array, ...]:
        """The gradients of the states before from those of the new states; others are kept in ``values``."""
        gradient = self.cell.gradient
        self.values |= dict(zip(gradient.upstream.values(), upstream, strict=True))
        self.compute(self.cell.backward_nodes)
        found = []
        for name, state in self.cell.trace.states.items():
            parts = [self.values[d[name]] for d in (gradient.chain, gradient.direct) if name in d]
            zeros = self.zeros(state)
            found.append(sum(parts[1:], start=np.broadcast_to(parts[0], zeros.shape)) if parts else zeros)
        return tuple(found)

    def of(self, n: Node) -> Array:
        """The value of a node for each row and unit (B, H)."""
        return np.broadcast_to(self.values[n], self.shape)

    def zeros(self, n: Node) -> Array:
        """Zeros of the shape of an operand."""
        return np.zeros(self.values[n].shape if n.op == "state" else self.shape, self.x.dtype)

    def add_weight_gradients(self, dweights: Mapping[str, Array]) -> None:
        """Add the gradients of this step to ``dweights``, by name."""
        for which, weight, bias, operand, d in self.products():
            if (dweight := self.block(f"weight_{which}", weight, dweights)) is not None:
                dweight += d.T @ self.operand(operand)
            if bias is not None and (dbias := self.block(f"bias_{which}", bias, dweights)) is not None:
                dbias += d.sum(axis=0)
        if (dweight := dweights.get("weight_hr")) is not None:
            h = next(iter(self.cell.trace.states))
            (value,) = self.cell.trace.after[h].args
            dweight += self.values[self.cell.gradient.upstream[h]].T @ self.of(value)
        for n, dn in self.cell.gradient.vectors.items():
            if (dvector := self.block(n.attribute[0], n.attribute[1], dweights)) is not None:
                dvector += self.of(dn).sum(axis=0)

    def input_gradient(self) -> Array:
        """The gradient of x (B, I)."""
        total = np.zeros(self.x.shape, self.x.dtype)
        for which, weight, _, _, d in self.products():
            if which == "ih":
                total += d @ self.block("weight_ih", weight)
        return total

    def scalar_gradient(self, name: str) -> Array:
        """The gradient of a row scalar (B,): the sum over the units."""
        d = self.cell.gradient.scalars.get(name)
        return np.zeros(self.shape[0], self.x.dtype) if d is None else self.of(d).sum(axis=1)

    def products(self) -> Iterator[tuple[str, int, int | None, Node, Array]]:
        """For each product with each operand: "ih" or "hh", blocks of weight and bias, operand, gradient."""
        for n, d in self.cell.gradient.dense.items():
            biases = n.attribute.biases or [None] * len(n.args)
            for operand, weight, bias in zip(n.args, n.attribute.weights, biases, strict=True):
                yield side(operand), weight, bias, operand, self.of(d)

    def value(self, n: Node) -> Any:
        match n.op:
            case "transposed":
                return self.transposed(*n.attribute)
            case "project_transposed":
                return self.values[n.args[0]] @ self.weights["weight_hr"]
            case "normalise_gradient":
                normed, *dx = n.args
                return normalise_gradient(n.attribute, self.values[normed], [self.of(d) for d in dx])
            case "item" if isinstance(normed := self.values[n.args[0]], Normed):
                return normed.x[n.attribute]
        return super().value(n)

    def constant(self, value: float) -> Array:
        """A number in the dtype of x."""
        return np.asarray(value, self.x.real.dtype)

    def normalise(self, norm: Norm, values: list[Array]) -> Normed:
        """The normalised values, and what else backward needs."""
        return normalise(norm, values)

    def transposed(self, operand: Node, products: Sequence[Node]) -> Array:
        """The gradient of an operand of some products."""
        total = self.zeros(operand)
        for n in products:
            weight = self.block("weight_hh", n.attribute.weights[n.args.index(operand)])
            total = total + self.of(self.cell.gradient.dense[n]) @ weight
        return self.dropped(total)
