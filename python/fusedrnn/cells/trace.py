"""Run a cell's function once on symbols: its parameters, its states and what one step computes."""

from __future__ import annotations

import dis
import inspect
import linecache
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from fusedrnn.cells.graph import CONSTANT, PROJECTED, ROW, TUPLE, UNIT, VECTOR, Graph, Node, reach
from fusedrnn.cells.symbols import (
    CellError,
    Input,
    Projected,
    Symbol,
    kind,
    line_of,
    line_of_cell,
    own,
    refuse,
)

# A number, a range (low, high) to draw from, or a function of a shape.
Start = float | tuple[float, float] | Callable[..., Any]


class Dense(NamedTuple):
    """The products of a gate with its operands, as blocks of H rows of the parameters.

    The parameters are weight_ih and bias_ih if the operand is x, else weight_hh and bias_hh.
    """

    gate: str
    weights: tuple[int, ...]  # of each operand
    biases: tuple[int, ...]  # likewise, or empty


def side(operand: Node) -> str:
    """Which weights and biases multiply an operand: weight_ih and bias_ih, or weight_hh and bias_hh."""
    return "ih" if operand.op == "input" else "hh"


class Norm(NamedTuple):
    """``layer``: subtract mean, divide by standard deviation. ``rms``: divide by root mean square."""

    kind: str
    eps: float


@dataclass
class Trace:
    """One step of a cell."""

    name: str
    graph: Graph
    x: Node
    states: dict[str, Node] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)  # the initial value of each state
    after: dict[str, Node] = field(default_factory=dict)  # the new states
    scalars: dict[str, Node] = field(default_factory=dict)  # one number for each row and step, such as dt
    blocks: dict[str, list[str]] = field(default_factory=dict)  # of each parameter, its rows' owners
    begin: dict[str, Start] = field(default_factory=dict)  # initial values of vectors, gains and their biases
    separate: bool = False  # there is a product with a state that is not added to one with x


class Parameters:
    """The parameters of a cell: ``p`` in its function."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._graph, self._x = trace, trace.graph, trace.x
        self._products: set[tuple[str, int]] = set()  # gate and operand
        self.lines: list[tuple[str, Node, str]] = []  # what must be used, its node, its line
        self.projection = ""  # its line

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        refuse(f"p has no {name}; use p.dense, p.vector, p.layer_norm, p.rms_norm or p.project")

    def dense(self, names: str, *operands: Any, bias: bool = True, layer_norm: bool = False) -> Any:
        """``weight_ih x + bias_ih + weight_hh h + bias_hh`` (B, H) of one gate, or a list for several gates.

        Args:
            names: The names of the gates, separated by spaces. A gate has H rows of weight_ih if x is an
                operand, and H rows of weight_hh for each other operand, in the order of their first use.
            operands: x, values of the cell (B, H), or both.
            bias: False: no biases.
            layer_norm: True: normalize the product with each operand over all units and these gates, then
                multiply it by a gain and add the bias (Ba, Kiros and Hinton 2016).

        Raises:
            CellError: An argument is wrong. The other methods raise it too.
        """
        gates = names.split() if isinstance(names, str) else []
        if not gates or not all(g.isidentifier() for g in gates):
            refuse(
                "p.dense: expected the names of the gates in one string first, separated by spaces, as in "
                f'p.dense("i f", x, h), got {names!r}'
            )
        for gate in gates:
            if gates.count(gate) > 1:
                refuse(f"p.dense: expected different names of gates, got {gate} twice")
        values = [self._operand("p.dense", v) for v in operands]
        if not values:
            refuse('p.dense: expected what to multiply after the names, as in p.dense("i f", x, h)')
        if len(set(values)) < len(values):
            refuse("p.dense: expected different operands, got one twice; its two products would be one")
        values.sort(key=lambda v: v is not self._x)  # x first
        for gate in gates:
            for v in values:
                if (gate, v.id) in self._products:
                    operand = "x" if v is self._x else "this operand"
                    refuse(
                        f"p.dense: gate {gate} has a product with {operand} already; use its result again, "
                        "or give this gate another name"
                    )
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
            what = [f"the normalised gate {g}" for g in gates]
            parts = self._normalise(Norm("layer", 1e-5), products, gains, added, what)
            sums = [self._graph.add(a, b) for a, b in zip(sums, parts, strict=True)] if sums else parts
        return self._symbols(sums)

    def vector(self, name: str, init: Start = 0.0) -> Symbol:
        """One number for each unit (H,), such as a peephole.

        Args:
            name: The name of the parameter.
            init: The initial values: a number, a range (low, high) to draw from, or a function that takes
                the shape and returns an array.
        """
        self._check_name("p.vector", name)
        if name.startswith(("weight_", "bias_", "gain_")):
            refuse(
                "p.vector: the names of other parameters begin with weight_, bias_ and gain_; expected "
                f"another name, got {name}"
            )
        if name in self._trace.states:
            refuse(f"p.vector: {name} is the name of a state; expected another name")
        if name in _taken(self._trace):
            refuse(f"p.vector: {name} is the name of the input or of an initial state; expected another name")
        _check_start(init)
        if name not in self._trace.blocks:
            self._block(name, name, init)
            self.lines.append((f"the vector {name}", self._vector(name, 0), line_of_cell()))
        elif self._trace.begin[name] != init:
            old, new = ("a function" if callable(s) else s for s in (self._trace.begin[name], init))
            if old == new:
                new = "another one; define it once, before the cell"
            refuse(
                f"p.vector: {name} started from {old} before, now it starts from {new}; give both the same "
                "init, or this one another name"
            )
        return Symbol(self._graph, self._vector(name, 0))

    def project(self, value: Any) -> Projected:
        """``weight_hr value``, which is (B, P) instead of (B, H).

        It can only be returned as the new first state. That state can then only be an operand of p.dense.
        """
        if self.projection:
            refuse("p.project: expected one projection, that of the first state, got a second one")
        if isinstance(value, Input):
            refuse("p.project: expected a value of the cell, got x; project it before the layer")
        node = self._operand("p.project", value)
        self.projection = line_of_cell()
        self._block("weight_hr", next(iter(self._trace.states)))
        projected = self._graph.node("project", node, shape=PROJECTED)
        self.lines.append(("the projection", projected, self.projection))
        return Projected(self._graph, projected)

    def layer_norm(self, name: str, *values: Any, bias: bool = True, eps: float = 1e-5) -> Any:
        """``gain_name * (v - mean) / sqrt(variance + eps) + bias_name`` of one value, or a list of several.

        Mean and variance of each row are over all units of all values together.
        """
        return self._norm("layer", eps, name, values, bias)

    def rms_norm(self, name: str, *values: Any, bias: bool = False, eps: float = 1e-5) -> Any:
        """``gain_name * v / sqrt(mean of v * v + eps)`` of one value, or a list of several.

        The mean of each row is over all units of all values together.
        """
        return self._norm("rms", eps, name, values, bias)

    def _norm(self, kind: str, eps: float, name: str, values: Sequence[Any], bias: bool) -> Any:
        call = f"p.{kind}_norm"
        self._check_name(call, name)
        nodes = [self._operand(call, v) for v in values]
        if not nodes:
            refuse(f'{call}: expected what to normalise after the name, as in {call}("c", c)')
        if self._x in nodes:
            refuse(f"{call}: expected values of the cell, got x; normalise it before the layer")
        if name in ("ih", "hh"):
            refuse(f"{call}: gain_{name} is the gain of p.dense(..., layer_norm=True); expected another name")
        if f"gain_{name}" in self._trace.blocks:
            refuse(
                f"{call}: another norm is called {name} already; give this one another name, or pass both "
                f'values in one call to share mean and variance: a, b = {call}("{name}", a, b)'
            )
        if not _is_finite(eps) or eps < 0:
            refuse(f"{call}: expected a number of at least 0 for eps, got {eps!r}")
        gains = [self._vector(f"gain_{name}", self._block(f"gain_{name}", name, 1.0)) for _ in nodes]
        biases = [self._vector(f"bias_{name}", self._block(f"bias_{name}", name, 0.0)) for _ in nodes if bias]
        what = [f"value {k + 1} of the norm {name}" for k in range(len(nodes))]
        return self._symbols(self._normalise(Norm(kind, float(eps)), nodes, gains, biases, what))

    def _normalise(
        self, norm: Norm, values: list[Node], gains: list[Node], biases: list[Node], names: list[str]
    ) -> list[Node]:
        g = self._graph
        normed = g.node("normalise", *values, attribute=norm, shape=TUPLE)
        parts = []
        for k, (name, gain) in enumerate(zip(names, gains, strict=True)):
            item = g.node("item", normed, attribute=k, shape=UNIT)
            self.lines.append((name, item, line_of_cell()))
            parts.append(g.mul(gain, item))
        return [g.add(a, b) for a, b in zip(parts, biases, strict=True)] if biases else parts

    def _product(
        self, gate: str, values: list[Node], weights: tuple[int, ...], biases: tuple[int, ...]
    ) -> Node:
        node = self._graph.node("dense", *values, attribute=Dense(gate, weights, biases), shape=UNIT)
        self.lines.append((f"gate {gate}", node, line_of_cell()))
        return node

    def _block(self, parameter: str, whose: str, init: Start | None = None) -> int:
        """Add a block of H rows and return its index."""
        blocks = self._trace.blocks.setdefault(parameter, [])
        blocks.append(whose)
        if init is not None:
            self._trace.begin[parameter] = init
        return len(blocks) - 1

    def _vector(self, parameter: str, block: int) -> Node:
        return self._graph.node("vector", attribute=(parameter, block), shape=VECTOR)

    def _operand(self, call: str, value: Any) -> Node:
        """The node of x or a value, as an operand of a product or a norm."""
        if isinstance(value, Input):
            return self._x
        if isinstance(value, list | tuple):
            refuse(f"{call}: expected values one by one, got a {kind(value)} of them; write *values")
        if not isinstance(value, Symbol):
            refuse(f"{call}: expected x or a value of the cell, such as a state, got {kind(value)}")
        node = own(self._graph, value)
        if node.shape != UNIT:
            refuse(
                f"{call}: expected a number for each row and unit, such as a state, got {_SIZES[node.shape]}"
            )
        return node

    def _check_name(self, call: str, name: object) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            refuse(f'{call}: expected a name, such as {call}("c", ...), got {name!r}')

    def _symbols(self, nodes: Any) -> Any:
        found = [Symbol(self._graph, n) for n in nodes]
        return found if len(found) > 1 else found[0]


_SIZES = {
    CONSTANT: "one number",
    VECTOR: "one number for each unit, a vector",
    ROW: "a row scalar, one number for each row",
}


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_start(init: Any) -> None:
    pair = isinstance(init, tuple) and len(init) == 2 and all(map(_is_finite, init)) and init[0] <= init[1]
    if not (_is_finite(init) or pair or callable(init)):
        refuse(
            "p.vector: expected init to be a finite number, a pair of them (low, high), or a function that "
            f"takes a shape, got {init!r}"
        )


class _Lines:
    """Lines of a cell's function that are in no frame: before it runs and after it has returned."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.code = inspect.unwrap(function).__code__

    def definition(self) -> str:
        path, first = self.code.co_filename, self.code.co_firstlineno
        lines = range(first, first + 20)  # decorators come first
        found = (n for n in lines if linecache.getline(path, n).lstrip().startswith(("def ", "async def ")))
        return line_of(path, next(found, first))

    def result(self) -> str:
        """The line with ``return``, if there is only one."""
        found = {
            i.positions.lineno
            for i in dis.get_instructions(self.code)
            if "RETURN_" in i.opname and i.positions
        }
        line = found.pop() if len(found) == 1 else None
        return self.definition() if line is None else line_of(self.code.co_filename, line)


def trace(function: Callable[..., Any], options: Mapping[str, Any]) -> Trace:
    """Run a cell's function on symbols.

    Raises:
        CellError: the function cannot be turned into kernels; the message names the line.
    """
    graph = Graph()
    t = Trace(function.__name__, graph, graph.node("input", shape="input"))
    lines = _Lines(function)
    p = Parameters(t)
    args: list[Any] = [p, Input(graph, t.x)]
    keywords = dict(options)
    for k, argument in enumerate(inspect.signature(function).parameters.values()):
        name = argument.name
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            stars = "*" if argument.kind == argument.VAR_POSITIONAL else "**"
            raise CellError(
                f"{lines.definition()}\n{t.name}: expected each argument by name, as a layer must know the "
                f"states and options: p, x, the states, keyword arguments after *; got {stars}{name}"
            )
        if argument.kind == argument.KEYWORD_ONLY:
            if name not in keywords and argument.default is argument.empty:
                t.scalars[name] = t.graph.node("scalar", attribute=name, shape=ROW)
                keywords[name] = Symbol(t.graph, t.scalars[name])
        elif k >= len(args):
            if name == "x":
                raise CellError(
                    f"{lines.definition()}\n{t.name}: expected the input x as the second argument, before "
                    "the states; got a state of that name"
                )
            if name.startswith(("weight_", "bias_", "gain_")):
                raise CellError(
                    f"{lines.definition()}\n{t.name}: the names of parameters begin with weight_, bias_ and "
                    f"gain_; expected another name of a state, got {name}"
                )
            start = 0.0 if argument.default is argument.empty else argument.default
            if not _is_finite(start):
                raise CellError(
                    f"{lines.definition()}\n{t.name}: the default of a state is its initial value; expected "
                    f"a finite number for {name}, got {start!r}. Options come after *"
                )
            t.states[name] = t.graph.node("state", attribute=name, shape=UNIT)
            t.start[name] = float(start)
            args.append(Symbol(t.graph, t.states[name]))
    if not t.states:
        raise CellError(
            f"{lines.definition()}\n{t.name}: expected the arguments p (parameters), x (input) and at least "
            f"one state, as in `def {t.name}(p, x, h):`"
        )
    try:
        found = function(*args, **keywords)
    except ValueError as error:
        if "values to unpack" not in str(error):
            raise
        *_, last = traceback.extract_tb(error.__traceback__)
        raise CellError(
            f"{line_of(last.filename, last.lineno or 0)}\n{error}; p.dense returns one value for each gate "
            "that it names, and a norm one for each value that it takes, so write as many names before ="
        ) from error
    for name, value in zip(t.states, _returned(t, found, lines), strict=True):
        t.after[name] = own(graph, value)
    used = reach(t.after.values())
    first = next(iter(t.states))
    if t.after[first].op == "project" and not _is_operand(t, t.states[first], used):
        raise CellError(
            f"{p.projection}\n{t.name}: the state {first}, a projection, has a size of its own; use it only "
            "in p.dense, and another state for what is needed unit by unit"
        )
    for what, node, line in p.lines if t.after[first].op == "project" else ():
        if node.op == "dense" and not set(node.args) <= {t.x, t.states[first]}:
            raise CellError(
                f"{line}\n{what}: with a projection weight_hh has a column for each of its units; expected "
                f"only x and the state {first} as operands"
            )
    for what, node, line in p.lines:
        if node not in used:
            raise CellError(f"{line}\n{what} is not used: no new state depends on it; use it or leave it out")
    for name, node in t.scalars.items():
        if node not in used:
            raise CellError(
                f"{lines.definition()}\n{t.name}: {name} is not used: no new state depends on it. After * an "
                "argument without default is a row scalar; an option has a default"
            )
        if name in t.blocks or name in _taken(t):
            raise CellError(
                f"{lines.definition()}\n{t.name}: expected another name than {name} for a row scalar; "
                "gradients of parameters, of the input and of the initial state have these names"
            )
    if t.x not in used:
        raise CellError(
            f"{lines.definition()}\n{t.name}: no new state depends on the input x; expected it in p.dense, "
            'as in p.dense("a", x, h)'
        )
    return t


def _taken(t: Trace) -> tuple[str, ...]:
    """The names of the input and of the initial states where a gradient is asked for or returned."""
    return ("x", "state0", *(f"{state}0" for state in t.states))


def _is_operand(t: Trace, state: Node, used: Sequence[Node]) -> bool:
    """Whether a state is only an operand of products."""
    return state not in t.after.values() and all(n.op == "dense" for n in used if state in n.args)


def _returned(t: Trace, found: Any, lines: _Lines) -> Sequence[Symbol | Projected]:
    """The new states, if the function returned them."""
    states = ", ".join(t.states)
    expected = f"{lines.result()}\n{t.name}: expected `return` with the new {states}, in this order"
    if found is None:
        raise CellError(f"{expected}, got nothing")
    if isinstance(found, list):
        raise CellError(
            f"{expected}, got a list; write the values after `return` without brackets, and unpack what "
            'p.dense returns: i, f = p.dense("i f", x, h)'
        )
    new = found if isinstance(found, tuple) else (found,)
    if len(new) != len(t.states):
        values = "1 value" if len(new) == 1 else f"{len(new)} values"
        hint = ""
        if len(new) < len(t.states):
            hint = "; write what is not a state, such as a time gap, after *: `*, dt`"
        raise CellError(f"{expected} and nothing else, got {values}{hint}")
    for k, (name, value) in enumerate(zip(t.states, new, strict=True)):
        projected = isinstance(value, Projected) and k == 0
        if not isinstance(value, Symbol) and not projected:
            raise CellError(f"{expected}; the new {name} must be a value of the cell, got {kind(value)}")
        if value.graph is not t.graph:
            raise CellError(
                f"{expected}; the new {name} is a value from another cell, or from an earlier run of this one"
            )
        if value.node.shape != UNIT and not projected:
            raise CellError(
                f"{expected}; the new {name} must be a number for each row and unit, got "
                f"{_SIZES[value.node.shape]}"
            )
    return new
