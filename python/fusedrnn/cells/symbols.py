"""What a cell's function computes with: symbols that write down each operation, and clear errors.

The operations are ``+ - * / tanh sigmoid exp log sqrt softplus relu absolute maximum minimum where``.
"""

from __future__ import annotations

import linecache
import numbers
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fusedrnn.cells.graph import Graph, Node

_OURS = {str(Path(__file__).with_name(f"{name}.py")) for name in ("symbols", "trace", "graph", "definition")}


class CellError(TypeError):
    """A cell's function cannot be turned into kernels; the message names its line."""


def line_of_cell() -> str:
    """The line of the user's code that is running, as ``file:line: source``."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in _OURS:
        frame = frame.f_back
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{path}:{line}: {linecache.getline(path, line).strip()}"


def refuse(message: str) -> NoReturn:
    """Raise an error that names the user's line."""
    raise CellError(f"{line_of_cell()}\n{message}")


class _Refusing:
    """Refuses what would end the recording of operations, or go by it unnoticed."""

    what = "a value of the cell"

    def __bool__(self) -> bool:
        refuse(
            f"`if`, `and`, `or` and `not` need {self.what} as a number, which is known only when the cell "
            "runs; use where(a > b, x, y). Options of the cell, keyword arguments with a default, are known."
        )

    def __float__(self) -> float:
        refuse(f"expected a number, got {self.what}; use the functions of fusedrnn.cells, not those of math")

    __int__ = __index__ = __complex__ = __float__

    def __iter__(self) -> NoReturn:
        refuse(f"{self.what} is not a sequence; p.dense gives one value for each gate that it names")

    def __getitem__(self, key: object) -> NoReturn:
        refuse(f"{self.what} has no parts: a cell computes all units alike")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(f"expected an array, got {self.what}; use the functions of fusedrnn.cells, not NumPy's")

    def __array_ufunc__(self, ufunc: Any, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(f"NumPy's {ufunc.__name__} does not know {self.what}; use the functions of fusedrnn.cells")

    def __array_function__(self, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(f"NumPy's {function.__name__} does not know {self.what}; use the functions of fusedrnn.cells")

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        name = getattr(function, "__name__", "function")
        refuse(f"PyTorch's {name} does not know {cls.what}; use the functions of fusedrnn.cells")

    def __pow__(self, other: object) -> NoReturn:
        refuse("** is not an operation of cells; write x * x, or exp(b * log(a))")

    __rpow__ = __pow__

    def __matmul__(self, other: object) -> NoReturn:
        refuse("@ is not an operation of cells; products with a matrix are p.dense(...)")

    __rmatmul__ = __matmul__

    def __eq__(self, other: object) -> bool:
        refuse("compare with > >= < or <=, in where(a > b, x, y)")

    __ne__ = __eq__
    __hash__ = object.__hash__


class Symbol(_Refusing):
    """A value of the cell: what has been computed so far."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node

    def __add__(self, other: Any) -> Symbol:
        return _binary("add", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return _binary("add", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return _binary("sub", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return _binary("sub", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return _binary("mul", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return _binary("mul", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return _binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return _binary("div", other, self)

    def __neg__(self) -> Symbol:
        return Symbol(self.graph, self.graph.neg(self.node))

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return Symbol(self.graph, self.graph.node("absolute", self.node))

    def __gt__(self, other: Any) -> Condition:
        return _compare("greater", self, other)

    def __lt__(self, other: Any) -> Condition:
        return _compare("greater", other, self)

    def __ge__(self, other: Any) -> Condition:
        return _compare("greater_equal", self, other)

    def __le__(self, other: Any) -> Condition:
        return _compare("greater_equal", other, self)


class Condition(_Refusing):
    """What ``a > b`` gives: the first argument of ``where``, and nothing else."""

    what = "a condition"

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node


class Input(_Refusing):
    """The step's input x, which only ``p.dense`` takes."""

    what = "x"

    def _refused(self, *others: object) -> NoReturn:
        refuse("x stands in p.dense(...) alone; whatever else is done to it belongs before the layer")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refused
    __neg__ = __pos__ = __abs__ = __gt__ = __lt__ = __ge__ = __le__ = _refused


def _graph_of(values: Sequence[Any]) -> Graph:
    for value in values:
        if isinstance(value, Symbol):
            return value.graph
    refuse(f"expected a value of the cell, got {_kind(values[0])}; of plain numbers take those of math")


def _node(graph: Graph, value: Any) -> Node:
    if isinstance(value, Input):
        value._refused()
    if isinstance(value, Condition):
        refuse("a condition is the first argument of where(...), and nothing else")
    if isinstance(value, Symbol):
        if value.graph is not graph:
            refuse("a value of another cell, or of another run of this one")
        return value.node
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        refuse(f"expected a value of the cell or a number, got {_kind(value)}")
    try:
        return graph.constant(float(value))
    except ValueError as error:
        refuse(str(error))


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _binary(op: str, a: Any, b: Any) -> Symbol:
    graph = _graph_of((a, b))
    left, right = _node(graph, a), _node(graph, b)
    try:
        return Symbol(graph, getattr(graph, op)(left, right))
    except ValueError as error:
        refuse(str(error))


def _compare(op: str, a: Any, b: Any) -> Condition:
    graph = _graph_of((a, b))
    return Condition(graph, graph.node(op, _node(graph, a), _node(graph, b)))


def _unary(op: str, x: Any) -> Any:
    """The operation on one value, or on each of several."""
    if isinstance(x, list | tuple):
        return [_unary(op, value) for value in x]
    graph = _graph_of((x,))
    return Symbol(graph, graph.node(op, _node(graph, x)))


def tanh(x: Any) -> Any:
    """Hyperbolic tangent, of one value or of each of a list, as all functions of one argument here."""
    return _unary("tanh", x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))"""
    return _unary("sigmoid", x)


def exp(x: Any) -> Any:
    """e to the x."""
    return _unary("exp", x)


def log(x: Any) -> Any:
    """Natural logarithm."""
    return _unary("log", x)


def sqrt(x: Any) -> Any:
    """Square root."""
    return _unary("sqrt", x)


def softplus(x: Any) -> Any:
    """log(1 + exp(x))"""
    return _unary("softplus", x)


def relu(x: Any) -> Any:
    """x where it is positive or NaN, else 0."""
    return _unary("relu", x)


def absolute(x: Any) -> Any:
    """abs(x); its gradient at 0 is 0."""
    return _unary("absolute", x)


def maximum(a: Any, b: Any) -> Symbol:
    """The larger one; NaN where one is NaN. Where both are equal, a has the gradient."""
    graph = _graph_of((a, b))
    return Symbol(graph, graph.node("maximum", _node(graph, a), _node(graph, b)))


def minimum(a: Any, b: Any) -> Symbol:
    """The smaller one; NaN where one is NaN. Where both are equal, a has the gradient."""
    graph = _graph_of((a, b))
    return Symbol(graph, graph.node("minimum", _node(graph, a), _node(graph, b)))


def where(condition: Any, a: Any, b: Any) -> Symbol:
    """a where the condition (``x > y`` and the like) holds, else b."""
    if not isinstance(condition, Condition):
        refuse(f"where: expected a condition such as x > 0, got {_kind(condition)}")
    graph = condition.graph
    return Symbol(graph, graph.node("where", condition.node, _node(graph, a), _node(graph, b)))
