"""Run a cell's function once on symbols: its parameters, its states and what one step computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fusedrnn.cells.graph import ROW, TUPLE, UNIT, VECTOR, Graph, Node, reach
from fusedrnn.cells.symbols import CellError, Input, Symbol, line_of_cell, refuse

Start = (
    float | tuple[float, float] | Callable[..., Any]
)  # a number, a range to draw from, a function of a shape


class Dense(NamedTuple):
    """A gate's products with its operands, as blocks of H rows of the parameters.

    These are weight_ih and bias_ih where the operand is x, else weight_hh and bias_hh.
    """

    gate: str
    weights: tuple[int, ...]  # of each operand
    biases: tuple[int, ...]  # likewise, or empty


class Norm(NamedTuple):
    """``layer``: less the mean, over the standard deviation. ``rms``: over the root mean square."""

    kind: str
    eps: float


@dataclass
class Trace:
    """What one step of a cell is."""

    name: str
    graph: Graph
    x: Node
    states: dict[str, Node] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)  # of each state, where none is given
    after: dict[str, Node] = field(default_factory=dict)  # the new states
    scalars: dict[str, Node] = field(default_factory=dict)  # one number for each row and step, such as dt
    blocks: dict[str, list[str]] = field(
        default_factory=dict
    )  # of each parameter, whose its blocks of H rows are
    begin: dict[str, Start] = field(default_factory=dict)  # what vectors, gains and their biases start from
    separate: bool = False  # there is a product with a state that is not added to one with x


class Parameters:
    """A cell's parameters: ``p`` in its function."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._graph, self._x = trace, trace.graph, trace.x
        self._products: set[tuple[str, int]] = set()  # gate and operand
        self.lines: dict[
            str, tuple[Node, str]
        ] = {}  # of each gate or vector a node and the line that names it

    def dense(self, names: str, *operands: Any, bias: bool = True, layer_norm: bool = False) -> Any:
        """``weight_ih x + bias_ih + weight_hh h + bias_hh`` of one gate, or a list of those of several.

        Args:
            names: of the gates, separated by spaces. A gate has H rows of weight_ih if x is an operand, and
                H rows of weight_hh for each other operand, in the order in which they are first named.
            operands: x, values of the cell (B, H), or both.
            bias: False for gates without biases.
            layer_norm: True to normalise the product with each operand over all units and gates named here,
                then to multiply with a gain, and to add the bias after that (Ba, Kiros and Hinton 2016).
        """
        gates = names.split() if isinstance(names, str) else []
        if not gates or not all(g.isidentifier() for g in gates) or len(set(gates)) < len(gates):
            refuse(f"p.dense: expected different names of gates, separated by spaces, got {names!r}")
        values = sorted(map(self._value, operands), key=lambda v: v is not self._x)  # x first
        if not values or len(set(values)) < len(values):
            refuse("p.dense: expected x, values of the cell or both, each once")
        for gate in gates:
            for v in values:
                if (gate, v.id) in self._products:
                    refuse(f"p.dense: gate {gate} has a product with this operand already")
                self._products.add((gate, v.id))
        self._trace.separate |= self._x not in values
        sides = ["ih" if v is self._x else "hh" for v in values]
        weights = [[self._block(f"weight_{side}", g) for g in gates] for side in sides]  # [operand][gate]
        biases = [[self._block(f"bias_{side}", g) for g in gates] for side in sides] if bias else []
        if not layer_norm:
            rows = [(tuple(w[k] for w in weights), tuple(b[k] for b in biases)) for k in range(len(gates))]
            return self._symbols(self._product(g, values, *r) for g, r in zip(gates, rows, strict=True))
        sums: list[Node] = []
        for n, (v, side) in enumerate(zip(values, sides, strict=True)):
            products = [self._product(g, [v], (w,), ()) for g, w in zip(gates, weights[n], strict=True)]
            gains = [self._vector(f"gain_{side}", self._block(f"gain_{side}", g, 1.0)) for g in gates]
            added = [self._vector(f"bias_{side}", row) for row in biases[n]] if bias else []
            parts = self._normalise(Norm("layer", 1e-5), products, gains, added)
            sums = [self._graph.add(a, b) for a, b in zip(sums, parts, strict=True)] if sums else parts
        return self._symbols(sums)

    def vector(self, name: str, init: Start = 0.0) -> Symbol:
        """One number for each unit (H,), such as a peephole.

        Args:
            name: of the parameter.
            init: what it starts from: a number, a range (low, high) to draw from, or a function that takes
                the shape and gives an array.
        """
        blocks = self._trace.blocks
        if not isinstance(name, str) or not name.isidentifier():
            refuse(f"p.vector: expected a name, got {name!r}")
        if name not in blocks:
            self._block(name, name, init)
        elif blocks[name] != [name] or self._trace.begin.get(name) != init:
            refuse(f"p.vector: {name} is another parameter already, or starts from something else")
        node = self._vector(name, 0)
        self.lines.setdefault(name, (node, line_of_cell()))
        return Symbol(self._graph, node)

    def layer_norm(self, name: str, *values: Any, bias: bool = True, eps: float = 1e-5) -> Any:
        """``gain_name * (v - mean) / sqrt(variance + eps) + bias_name`` of one value, or a list of several.

        Mean and variance are those of a row, over all units of all values together.
        """
        return self._norm(Norm("layer", float(eps)), name, values, bias)

    def rms_norm(self, name: str, *values: Any, bias: bool = False, eps: float = 1e-5) -> Any:
        """``gain_name * v / sqrt(mean of v * v + eps)`` of one value, or a list of several.

        The mean is that of a row, over all units of all values together.
        """
        return self._norm(Norm("rms", float(eps)), name, values, bias)

    def _norm(self, norm: Norm, name: str, values: Sequence[Any], bias: bool) -> Any:
        nodes = [self._value(v) for v in values]
        if not nodes or self._x in nodes:
            refuse(f"p.{norm.kind}_norm: expected values of the cell")
        if not isinstance(name, str) or not name.isidentifier() or f"gain_{name}" in self._trace.blocks:
            refuse(f"p.{norm.kind}_norm: expected a name that no other norm has, got {name!r}")
        gains = [self._vector(f"gain_{name}", self._block(f"gain_{name}", name, 1.0)) for _ in nodes]
        biases = [self._vector(f"bias_{name}", self._block(f"bias_{name}", name, 0.0)) for _ in nodes if bias]
        return self._symbols(self._normalise(norm, nodes, gains, biases))

    def _normalise(self, norm: Norm, values: list[Node], gains: list[Node], biases: list[Node]) -> list[Node]:
        g = self._graph
        normed = g.node("normalise", *values, attribute=norm, shape=TUPLE)
        parts = [g.mul(gain, g.node("item", normed, attribute=k, shape=UNIT)) for k, gain in enumerate(gains)]
        return [g.add(a, b) for a, b in zip(parts, biases, strict=True)] if biases else parts

    def _product(
        self, gate: str, values: list[Node], weights: tuple[int, ...], biases: tuple[int, ...]
    ) -> Node:
        node = self._graph.node("dense", *values, attribute=Dense(gate, weights, biases), shape=UNIT)
        self.lines[f"{gate} {len(self.lines)}"] = (node, line_of_cell())
        return node

    def _block(self, parameter: str, whose: str, init: Start | None = None) -> int:
        """The number of a new block of H rows."""
        blocks = self._trace.blocks.setdefault(parameter, [])
        blocks.append(whose)
        if init is not None:
            self._trace.begin[parameter] = init
        return len(blocks) - 1

    def _vector(self, parameter: str, block: int) -> Node:
        return self._graph.node("vector", attribute=(parameter, block), shape=VECTOR)

    def _value(self, value: Any) -> Node:
        if isinstance(value, Input):
            return self._x
        if not isinstance(value, Symbol) or value.node.shape != UNIT:
            refuse("expected x or a value of each row and unit, such as a state")
        return value.node

    def _symbols(self, nodes: Any) -> Any:
        found = [Symbol(self._graph, n) for n in nodes]
        return found if len(found) > 1 else found[0]


def trace(function: Callable[..., Any], options: Mapping[str, Any]) -> Trace:
    """Run a cell's function on symbols.

    Raises:
        CellError: what the function does cannot be turned into kernels; the message names its line.
    """
    graph = Graph()
    t = Trace(function.__name__, graph, graph.node("input", shape="input"))
    code = inspect.unwrap(function).__code__
    here = f"{code.co_filename}:{code.co_firstlineno}: cell {t.name}"
    p = Parameters(t)
    args: list[Any] = [p, Input()]
    keywords = dict(options)
    for k, argument in enumerate(inspect.signature(function).parameters.values()):
        name = argument.name
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise CellError(f"{here}\nexpected the arguments p, x and each state by name, got *{name}")
        if argument.kind == argument.KEYWORD_ONLY:
            if name not in keywords and argument.default is argument.empty:
                t.scalars[name] = t.graph.node("scalar", attribute=name, shape=ROW)
                keywords[name] = Symbol(t.graph, t.scalars[name])
        elif k >= len(args):
            t.states[name] = t.graph.node("state", attribute=name, shape=UNIT)
            t.start[name] = 0.0 if argument.default is argument.empty else float(argument.default)
            args.append(Symbol(t.graph, t.states[name]))
    if not t.states:
        raise CellError(f"{here}\nexpected the arguments p, x and at least one state")
    found = function(*args, **keywords)
    new = found if isinstance(found, tuple) else (found,)
    if len(new) != len(t.states):
        raise CellError(
            f"{here}\nexpected the new {', '.join(t.states)} to be returned, got {len(new)} values"
        )
    for name, value in zip(t.states, new, strict=True):
        if not isinstance(value, Symbol) or value.node.shape != UNIT:
            raise CellError(
                f"{here}\nexpected the new {name} to be a value of each row and unit, got {value!r}"
            )
        t.after[name] = value.node
    used = reach(t.after.values())
    for name, (node, line) in p.lines.items():
        if node not in used:
            raise CellError(f"{line}\nno state depends on {name.split()[0]}")
    if t.x not in used:
        raise CellError(f"{here}\nno state depends on x")
    return t
