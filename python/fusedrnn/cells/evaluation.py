"""One step of a cell in NumPy, forward and backward: the derived operations, one after the other.

Arrays are of any dtype, complex ones too, so that a derivative can be taken by a complex step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusedrnn.cells.activations import OPERATIONS
from fusedrnn.cells.definition import Definition
from fusedrnn.cells.graph import Node, number
from fusedrnn.cells.trace import Norm

Array = npt.NDArray[Any]


GIVEN = {"input", "state", "scalar", "upstream"}  # operations that compute nothing


class Normed(NamedTuple):
    """Normalised values and what they were multiplied with."""

    x: list[Array]  # each (B, H)
    inverse: Array  # (B, 1), 1 / sqrt(variance or mean square + eps)


def normalise(norm: Norm, values: Sequence[Array]) -> Normed:
    """The values of a row, over all units of all of them together."""
    v = np.concatenate(values, axis=-1)
    if norm.kind == "layer":
        v = v - v.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt((v * v).mean(axis=-1, keepdims=True) + norm.eps)
    return Normed(np.split(v * inverse, len(values), axis=-1), inverse)


def normalise_gradient(norm: Norm, normed: Normed, gradients: Sequence[Array]) -> list[Array]:
    """Of the values from that of the normalised ones.

    It is less its mean, and less its part along x, which the variance keeps fixed.
    """
    x, dx = np.concatenate(normed.x, axis=-1), np.concatenate(gradients, axis=-1)
    d = dx - dx.mean(axis=-1, keepdims=True) if norm.kind == "layer" else dx
    d = d - x * (dx * x).mean(axis=-1, keepdims=True)
    return np.split(normed.inverse * d, len(gradients), axis=-1)


class Evaluation:
    """The values of one step.

    Args:
        cell: what is computed.
        weights: by name, each with blocks of H rows; a bias may be None or missing.
        x: (B, I), the step's input.
        before: the states before the step, each (B, H).
        scalars: numbers of each row, by name, each (B, 1).
        dropout: (B, H), what recurrent dropout multiplies each operand of a product with but x; or None.
    """

    def __init__(
        self,
        cell: Definition,
        weights: Mapping[str, Array | None],
        x: Array,
        before: Sequence[Array],
        scalars: Mapping[str, Array] | None = None,
        dropout: Array | None = None,
    ) -> None:
        self.cell, self.weights, self.x, self.dropout = cell, weights, x, dropout
        self.shape = before[0].shape
        self.values: dict[Node, Any] = dict(zip(cell.trace.states.values(), before, strict=True))
        self.values |= {node: (scalars or {})[name] for name, node in cell.trace.scalars.items()}
        self._compute(cell.forward_nodes)

    @property
    def after(self) -> tuple[Array, ...]:
        """The new states."""
        return tuple(self.values[n] for n in self.cell.trace.after.values())

    def backward(self, upstream: Sequence[Array]) -> tuple[Array, ...]:
        """The gradients of the states before from those of the new states; the others wait in ``values``."""
        gradient = self.cell.gradient
        self.values |= dict(zip(gradient.upstream.values(), upstream, strict=True))
        self._compute(self.cell.backward_nodes)
        found = []
        for name in self.cell.trace.states:
            parts = [self.of(d[name]) for d in (gradient.chain, gradient.direct) if name in d]
            found.append(sum(parts[1:], start=parts[0]) if parts else np.zeros(self.shape, self.x.dtype))
        return tuple(found)

    def of(self, n: Node) -> Array:
        """The value of a node for each row and unit (B, H)."""
        return np.broadcast_to(self.values[n], self.shape)

    def operand(self, n: Node) -> Array:
        """What a product multiplies: x, or a value as recurrent dropout leaves it."""
        return self.x if n.op == "input" else self._dropped(self.values[n])

    def block(self, parameter: str, number: int) -> Array | None:
        """A block of H rows of a parameter; None of one that is not there."""
        values, H = self.weights.get(parameter), self.shape[1]
        return None if values is None else values[number * H : (number + 1) * H]

    def products(self) -> Iterator[tuple[str, int, int | None, Node, Array]]:
        """Of each product with each operand: "ih" or "hh", blocks of weight and bias, operand, gradient."""
        for n, d in self.cell.gradient.dense.items():
            biases = n.attribute.biases or [None] * len(n.args)
            for operand, weight, bias in zip(n.args, n.attribute.weights, biases, strict=True):
                yield side(operand), weight, bias, operand, self.of(d)

    def _compute(self, nodes: Sequence[Node]) -> None:
        for n in nodes:
            if n.op not in GIVEN:
                self.values[n] = self._value(n)

    def _dropped(self, v: Array) -> Array:
        return v if self.dropout is None else v * self.dropout

    def _value(self, n: Node) -> Any:
        args = [self.values[a] for a in n.args if a.op != "input"]
        match n.op:
            case "constant":
                return np.asarray(number(n), self.x.real.dtype)
            case "vector":
                block = self.block(*n.attribute)
                return np.zeros((), self.x.dtype) if block is None else block
            case "dense":
                return self._dense(n)
            case "transposed":
                return self._transposed(*n.attribute)
            case "normalise":
                return normalise(n.attribute, args)
            case "normalise_gradient":
                return normalise_gradient(
                    n.attribute, args[0], [np.broadcast_to(d, self.shape) for d in args[1:]]
                )
            case "item":
                return (args[0].x if isinstance(args[0], Normed) else args[0])[n.attribute]
        return OPERATIONS[n.op](*args)

    def _dense(self, n: Node) -> Array:
        """weight_ih x + bias_ih + weight_hh h + bias_hh, as far as the product has them."""
        parts = []
        for k, operand in enumerate(n.args):
            weight = self.block(f"weight_{side(operand)}", n.attribute.weights[k])
            bias = self.block(f"bias_{side(operand)}", n.attribute.biases[k]) if n.attribute.biases else None
            assert weight is not None
            product = self.operand(operand) @ weight.T
            parts.append(product if bias is None else product + bias)
        total: Array = sum(parts[1:], start=parts[0])
        return total

    def _transposed(self, operand: Node, products: Sequence[Node]) -> Array:
        """The gradient of an operand of some products."""
        total = np.zeros(self.shape, self.x.dtype)
        for n in products:
            weight = self.block("weight_hh", n.attribute.weights[n.args.index(operand)])
            total = total + self.of(self.cell.gradient.dense[n]) @ weight
        return self._dropped(total)


def side(operand: Node) -> str:
    """Which weights and biases multiply an operand: weight_ih and bias_ih, or weight_hh and bias_hh."""
    return "ih" if operand.op == "input" else "hh"
