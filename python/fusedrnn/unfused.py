"""A recurrent layer with a node of the graph for each operation, to read and to compare with.

A step is the cell's function (``fusedrnn.cells``), evaluated on Variables.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from fusedrnn import cuda
from fusedrnn import functions as F
from fusedrnn.autograd import Array, Variable, as_variable
from fusedrnn.backends.arguments import check_lengths, check_reset
from fusedrnn.cells.evaluation import Step
from fusedrnn.cells.graph import Node
from fusedrnn.cells.trace import Norm, side

if TYPE_CHECKING:
    from fusedrnn.recurrent import Recurrent

State = tuple[Variable, ...]

# By their names in a cell's graph. Conditions are arrays, without a gradient.
OPERATIONS: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
    "exp": F.exp,
    "log": F.log,
    "sqrt": lambda a: a**0.5,
    "softplus": lambda a: F.where(_data(a) > 30, a, F.log(1 + F.exp(F.where(_data(a) > 30, 0.0, a)))),
    "relu": F.relu,
    "absolute": lambda a: a * cuda.get_array_module(_data(a)).sign(_data(a)),
    "maximum": lambda a, b: F.where(_second(_data(b), _data(a)), b, a),
    "minimum": lambda a, b: F.where(_second(-_data(b), -_data(a)), b, a),
    "where": F.where,
    "greater": lambda a, b: _data(a) > _data(b),
    "greater_equal": lambda a, b: _data(a) >= _data(b),
}


class UnfusedStep(Step):
    """One step on Variables. The matrices are transposed, once for all steps."""

    operations = OPERATIONS

    def constant(self, value: float) -> Variable:
        """A number in the dtype of the weights."""
        weight = self.weights["weight_ih"]
        return as_variable(cuda.get_array_module(weight).asarray(value, weight.dtype))

    def units(self) -> int:
        return self.weights["weight_ih"].shape[1] // self.cell.blocks["weight_ih"]

    def project(self, value: Variable) -> Variable:
        return F.linear(value, self.weights["weight_hr"])

    @functools.cached_property
    def _products(self) -> dict[Node, tuple[int, Variable]]:
        """For each operand the first of its blocks of weights, and its product with all of them."""
        return {}

    def product(self, n: Node, k: int) -> Variable:
        """The product with one operand and its bias; one operation for all gates of the operand."""
        operand, dense, H = n.args[k], n.attribute, self.shape[1]
        if operand not in self._products:
            users = [m for m in self.cell.forward_nodes if m.op == "dense" and operand in m.args]
            blocks = [m.attribute.weights[m.args.index(operand)] for m in users]
            columns = slice(min(blocks) * H, (max(blocks) + 1) * H)
            weight = self.weights[f"weight_{side(operand)}"][:, columns]
            self._products[operand] = min(blocks), F.linear(self.operand(operand), weight)
        first, products = self._products[operand]
        column = (dense.weights[k] - first) * H
        found: Variable = products[:, column : column + H]
        bias = self.block(f"bias_{side(operand)}", dense.biases[k]) if dense.biases else None
        return found if bias is None else found + bias

    def normalise(self, norm: Norm, values: list[Variable]) -> list[Variable]:
        """The normalised values, before the gains."""
        v = F.concatenate(values, axis=1) if len(values) > 1 else values[0]
        count, H = v.shape[1], self.shape[1]
        d = v - v.sum(axis=1, keepdims=True) / count if norm.kind == "layer" else v
        x = d / ((d * d).sum(axis=1, keepdims=True) / count + norm.eps) ** 0.5
        return [x[:, k * H : (k + 1) * H] for k in range(len(values))]


def run(
    layer: Recurrent,
    x: Variable,
    begin: State | None,
    lengths: Any,
    reset: Any,
    masks: list[Array] | None,
    scalars: list[Variable],
) -> tuple[Variable, State, State]:
    """Run a sequence: return y, the final states, the states of every step.

    ``masks`` are those of dropout between layers, ``scalars`` the row scalars, each (T, B), in the cell's
    order.
    """
    T, B, _ = x.shape
    n, D = len(layer.cell.states), 2 if layer.bidirectional else 1
    if T == 0:
        raise ValueError("x: expected at least one time step with fused=False, got none")
    kind = cuda.kind(layer.gpu)
    reset = None if reset is None else check_reset(reset, T, B, kind)
    active = None
    inputs = [x[t] for t in range(T)]
    if lengths is not None:
        active = layer.xp.arange(T)[:, None] < layer.to_device(check_lengths(lengths, T, B, kind))
        # a NaN in the padding would otherwise reach the gradients of the weights, as 0 * NaN
        inputs = [F.where(active[t][:, None], inputs[t], _zero(layer)) for t in range(T)]
        one = _zero(layer) + 1  # a cell may divide by it
        scalars = [F.where(active, s, one) for s in scalars]
    rows = [
        {n: F.reshape(s[t], (B, 1)) for n, s in zip(layer.cell.scalars, scalars, strict=True)}
        for t in range(T)
    ]
    ends: list[State] = []
    states: list[list[State]] = []  # of each layer and direction, step by step
    for k in range(layer.num_layers):
        if k and masks is not None:
            inputs = [y * mask for y, mask in zip(inputs, masks[k - 1], strict=True)]
        outputs: list[list[Variable]] = []
        for direction in range(D):
            slot = k * D + direction
            first = _first(layer, begin, slot, B)
            ys, end, every = _through_time(layer, slot, inputs, rows, first, active, reset, direction == 1)
            outputs.append(ys)
            ends.append(end)
            states.append(every)
        inputs = [F.concatenate(ys, axis=1) if D > 1 else ys[0] for ys in zip(*outputs, strict=True)]
    y = F.stack(inputs)
    steps = [tuple(F.stack([s[j] for s in every]) for j in range(n)) for every in states]
    if len(layer.suffixes) == 1:
        return y, ends[0], steps[0]
    ended, stepped = (tuple(F.stack([s[j] for s in part]) for j in range(n)) for part in (ends, steps))
    return y, ended, stepped


def _through_time(
    layer: Recurrent,
    slot: int,
    inputs: list[Variable],
    scalars: list[dict[str, Variable]],
    state: State,
    active: Array | None,
    reset: Array | None,
    reverse: bool,
) -> tuple[list[Variable], State, list[State]]:
    """One layer in one direction: its y at every step, the final state, the state after every step."""
    cell, zero = layer.cell, _zero(layer)
    w = {n: p if p.ndim == 1 else p.T for n, p in layer.weights_of(layer.suffixes[slot]).items()}
    T, start = len(inputs), cell.trace.start.values()
    ys: list[Any] = [None] * T
    every: list[Any] = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        # a reset at t cuts between t-1 and t: in reverse that is before step t-1
        cut = reset[t] if reset is not None and not reverse else None
        if reset is not None and reverse and t + 1 < T:
            cut = reset[t + 1] if active is None else reset[t + 1] & active[t + 1]
        if cut is not None:
            if active is not None:
                cut = cut & active[t]
            state = tuple(F.where(cut[:, None], zero + n, s) for n, s in zip(start, state, strict=True))
        after = UnfusedStep(cell, w, inputs[t], state, scalars[t]).after
        if active is None:
            ys[t], every[t], state = after[0], after, after
        else:
            row = active[t][:, None]
            ys[t] = F.where(row, after[0], zero)
            # in the padding a state does not change, and gradients there are ignored
            every[t] = tuple(F.where(row, a, s._data) for a, s in zip(after, state, strict=True))
            state = tuple(F.where(row, a, s) for a, s in zip(after, state, strict=True))
    return ys, state, every


def _first(layer: Recurrent, begin: State | None, slot: int, batch: int) -> State:
    if begin is None:
        starts = zip(layer.cell.trace.start.values(), layer._widths.values(), strict=True)
        return tuple(as_variable(layer.xp.full((batch, width), n, layer.dtype)) for n, width in starts)
    begin = tuple(s if s.dtype == layer.dtype else F.cast(s, layer.dtype) for s in begin)
    return begin if len(layer.suffixes) == 1 else tuple(s[slot] for s in begin)


def _zero(layer: Recurrent) -> Array:
    return layer.xp.zeros((), layer.dtype)


def _second(b: Any, a: Any) -> Any:
    """True where b is larger than a, or NaN."""
    return (b > a) | (b != b)


def _data(a: Any) -> Any:
    return a._data if isinstance(a, Variable) else a
