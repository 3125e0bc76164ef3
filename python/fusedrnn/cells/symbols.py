"""The symbols with which a cell's function computes: they record each operation, and raise clear errors.

The operations are ``+ - * / tanh sigmoid exp log sqrt softplus relu absolute maximum minimum where``.
"""

from __future__ import annotations

import linecache
import numbers
import operator
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fusedrnn.cells.graph import Graph, Node

_OURS = {str(Path(__file__).with_name(f"{name}.py")) for name in ("symbols", "trace", "graph", "definition")}
_LIBRARIES = {"numpy", "torch", *sys.stdlib_module_names}


class CellError(TypeError):
    """A cell's function cannot be turned into kernels; the message names its line."""


def line_of_cell() -> str:
    """The line of the user's code that is running, as ``file:line: source``."""
    frame = first = sys._getframe(1)
    while _is_not_the_users(frame) and frame.f_back is not None:
        frame = frame.f_back
    if _is_not_the_users(frame):  # the cell is part of a library
        frame = first
        while frame.f_code.co_filename in _OURS and frame.f_back is not None:
            frame = frame.f_back
    return line_of(frame.f_code.co_filename, frame.f_lineno)


def line_of(path: str, line: int) -> str:
    """A line of a file, as ``file:line: source``."""
    return f"{path}:{line}: {linecache.getline(path, line).strip()}"


def _is_not_the_users(frame: FrameType) -> bool:
    """Whether it is a line of this package, or of a library that was called with a value of the cell."""
    module: str = frame.f_globals.get("__name__", "")
    if module.startswith("fusedrnn.") and not module.startswith("fusedrnn.cells"):  # which has cells itself
        return True
    return frame.f_code.co_filename in _OURS or module.partition(".")[0] in _LIBRARIES


def refuse(message: str) -> NoReturn:
    """Raise an error that names the user's line."""
    raise CellError(f"{line_of_cell()}\n{message}")


# For NumPy's operators with a NumPy scalar on their left: the same as for a number.
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "less": operator.lt,
    "less_equal": operator.le,
}
_REFUSED = {"matmul": "__matmul__", "power": "__pow__", "equal": "__eq__", "not_equal": "__ne__"}


class _Refusing:
    """Raises an error for what cannot be recorded as an operation."""

    what = "a value of the cell"
    conditions = (
        "`if`, `while`, `and`, `or`, `not`, max and min need {what} as a number, which is known only when "
        "the cell runs; write where(a > b, x, y), maximum(a, b) or minimum(a, b). An option of the cell (a "
        "keyword argument with a default) is known: `if` may use that."
    )

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node

    def __repr__(self) -> str:
        return self.what

    def __bool__(self) -> bool:
        refuse(self.conditions.format(what=self.what))

    def __float__(self) -> float:
        refuse(
            f"expected a number, got {self.what}; import tanh, exp, ... from fusedrnn.cells, not from math"
        )

    __complex__ = __float__

    def __int__(self) -> int:
        refuse(
            f"expected an integer, got {self.what}, which is known only when the cell runs; for a number "
            "that is known before, use an option of the cell, a keyword argument with a default"
        )

    __index__ = __int__

    def _rounded(self, *args: object) -> NoReturn:
        refuse(f"{self.what} cannot be rounded: rounding has no useful gradient")

    __round__ = __floor__ = __ceil__ = __trunc__ = _rounded

    def __iter__(self) -> NoReturn:
        refuse(
            f"{self.what} is not a sequence and cannot be unpacked; p.dense returns as many values as it "
            'names gates; write i, f = p.dense("i f", x, h)'
        )

    __len__ = __iter__

    def __getitem__(self, key: object) -> NoReturn:
        refuse(
            f"{self.what} cannot be indexed: a cell computes all rows and units in the same way; to "
            'get several values write several gates: i, f = p.dense("i f", x, h)'
        )

    def __setitem__(self, key: object, value: object) -> NoReturn:
        self.__getitem__(key)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # Python and NumPy look for their own methods
            raise AttributeError(name)
        refuse(
            f"{self.what} has no attribute {name}, since it is neither an array nor a tensor; write tanh(h), "
            "with a function of fusedrnn.cells, not h.tanh()"
        )

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(
            f"{self.what} is not an array: a cell's function runs once, before there are values; use "
            "+ - * / and the functions of fusedrnn.cells, not with NumPy"
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc.__name__ in _REFUSED:
            getattr(self, _REFUSED[ufunc.__name__])(None)
        if ufunc.__name__ in _OPERATORS and method == "__call__" and not kwargs:
            return _OPERATORS[ufunc.__name__](*map(_without_numpy, inputs))
        return self.__array_function__(ufunc)

    def __array_function__(self, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(f"NumPy's {function.__name__} cannot take {self.what}; {self._functions()}")

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        name = getattr(function, "__name__", "function")
        refuse(f"PyTorch's {name} cannot take {cls.what}; {cls._functions()}")

    @staticmethod
    def _functions() -> str:
        return (
            "a cell computes with + - * /, p.dense and, from fusedrnn.cells, tanh sigmoid exp log sqrt "
            "softplus relu absolute maximum minimum where"
        )

    def __pow__(self, other: object) -> NoReturn:
        refuse("a cell does not support **; write x * x, sqrt(x), or exp(b * log(a)) for a positive a")

    __rpow__ = __pow__

    def __matmul__(self, other: object) -> NoReturn:
        refuse('a cell does not support @; write p.dense("a", h) for the product with a matrix')

    __rmatmul__ = __matmul__

    def _no_operator(self, *others: object) -> NoReturn:
        refuse(f"a cell does not support // and %; {self._functions()}")

    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __divmod__ = __rdivmod__ = _no_operator

    def _no_logic(self, *others: object) -> NoReturn:
        refuse(
            "a cell does not support & | ^ and ~; write where(a > 0, where(b > 0, x, y), y) for `a > 0 and "
            "b > 0`, where(a > 0, y, x) for `not a > 0`"
        )

    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _no_logic

    def __eq__(self, other: object) -> bool:
        refuse(
            "a cell does not support == and !=, which depend on rounding errors; write where(a > b, x, y), "
            "with > >= < or <="
        )

    __ne__ = __eq__
    __hash__ = object.__hash__


def _both(op: str) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """The methods of an operator, with the value on its left and on its right."""
    return lambda self, other: _binary(op, self, other), lambda self, other: _binary(op, other, self)


class Symbol(_Refusing):
    """A value of the cell."""

    __add__, __radd__ = _both("add")
    __sub__, __rsub__ = _both("sub")
    __mul__, __rmul__ = _both("mul")
    __truediv__, __rtruediv__ = _both("div")
    __gt__, __lt__ = _both("greater")
    __ge__, __le__ = _both("greater_equal")

    def __neg__(self) -> Symbol:
        return Symbol(self.graph, self.graph.neg(self.node))

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return Symbol(self.graph, self.graph.node("absolute", self.node))


def _without_numpy(value: Any) -> Any:
    """An operand that NumPy hands on: its scalars as numbers; of comparisons it has made them arrays."""
    if isinstance(value, _Refusing):
        return value
    if getattr(value, "shape", None) == ():
        value = value.item()
    return float(value) if _is_number(value) else refuse_constant(value)


class _NoArithmetic(_Refusing):
    """Raises the same error for every operation."""

    def refused(self, *others: object) -> NoReturn:
        """Raise the error of an operation on this value."""
        raise NotImplementedError

    def _operator(self, *others: object) -> NoReturn:
        self.refused()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _operator
    __neg__ = __pos__ = __abs__ = __gt__ = __lt__ = __ge__ = __le__ = _operator


class Condition(_NoArithmetic):
    """The result of ``a > b``, which can only be the first argument of ``where``."""

    what = "a condition"
    conditions = (
        "whether a condition holds is known only when the cell runs, and differs between units, but `if`, "
        "`while`, `and`, `or`, `not`, max, min and a chained comparison such as 0 < a < 1 need it now; write "
        "where(a > b, x, y), maximum(a, b) or minimum(a, b)"
    )

    def refused(self, *others: object) -> NoReturn:
        refuse(
            "a condition such as a > b can only be the first argument of where; write "
            "where(a > b, 1, 0) for the number 1 or 0"
        )


class Input(_NoArithmetic):
    """The input x of the step, which only ``p.dense`` takes."""

    what = "the input x"

    def refused(self, *others: object) -> NoReturn:
        refuse(
            "the second argument of a cell is the input x, which has a size of its own: only p.dense takes "
            'it, as in p.dense("a", x, h); do everything else before the layer'
        )


class Projected(_NoArithmetic):
    """The result of ``p.project``: the new first state, whose size is P."""

    what = "a projected value"

    def refused(self, *others: object) -> NoReturn:
        refuse(
            "the result of p.project has its own size and can only be the new first state, nothing else; "
            "write return p.project(h), c"
        )


def _graph_of(values: Sequence[Any]) -> Graph:
    """The graph of the first value, if all are values or numbers."""
    for value in values:
        if isinstance(value, Symbol):
            return value.graph
    for value in values:
        if not _is_number(value):
            refuse_constant(value)
    refuse("none of the arguments is a value of the cell; use the functions of math for plain numbers")


def _node(graph: Graph, value: Any) -> Node:
    if isinstance(value, Symbol):
        return own(graph, value)
    if not _is_number(value):
        refuse_constant(value)
    try:
        return graph.constant(float(value))
    except ValueError as error:
        refuse(f"{error}; constants of a cell must be finite")
    except OverflowError:
        refuse("expected a number in the range of a double, got a larger integer")


def own(graph: Graph, value: Symbol | Condition | Projected) -> Node:
    """The value's node, if it belongs to this run of the cell's function."""
    if value.graph is not graph:
        refuse(
            "expected a value of this run, got one from another cell, or from an earlier run of this one; "
            "a cell's function must compute everything from its arguments, without global variables"
        )
    return value.node


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def refuse_constant(value: Any) -> NoReturn:
    """Raise an error for an operand that is neither a value of the cell nor a number."""
    if isinstance(value, _NoArithmetic):
        value.refused()
    if isinstance(value, list | tuple):
        refuse(
            "expected one value, got several; only functions of one argument, such as tanh, take a list. "
            'Unpack it first: i, f = p.dense("i f", x, h)'
        )
    if isinstance(value, bool):
        refuse(f"expected a value of the cell or a number, got {value}; write 1.0 if {value} else 0.0")
    if hasattr(value, "shape"):
        refuse(
            f"expected a value of the cell or a number, got a {kind(value)}; a cell cannot use arrays: write "
            'p.vector("name") for one number per unit, p.dense("name", h) for a product with a matrix'
        )
    refuse(f"expected a value of the cell or a number, got {kind(value)}")


def kind(value: Any) -> str:
    """The type of a value, for messages."""
    if isinstance(value, _Refusing):
        return value.what
    if value is None:
        return "None"
    found = type(value)
    return found.__name__ if found.__module__ == "builtins" else f"{found.__module__}.{found.__name__}"


def _binary(op: str, a: Any, b: Any) -> Any:
    graph = _graph_of((a, b))
    left, right = _node(graph, a), _node(graph, b)
    make = getattr(graph, op, partial(graph.node, op))  # the graph simplifies add, sub, mul and div
    try:
        return (Condition if op.startswith("greater") else Symbol)(graph, make(left, right))
    except ValueError:
        refuse("a value is divided by the number 0; expected another divisor")


def _unary(op: str, x: Any) -> Any:
    """The operation on one value, or on each of several."""
    if isinstance(x, list | tuple):
        return [_unary(op, value) for value in x]
    graph = _graph_of((x,))
    return Symbol(graph, graph.node(op, _node(graph, x)))


def tanh(x: Any) -> Any:
    """Hyperbolic tangent of one value, or of each of a list, like all functions of one argument here."""
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


def maximum(a: Any, b: Any) -> Any:
    """The larger one; NaN if either is NaN. a gets the gradient if b is not larger."""
    return _binary("maximum", a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller one; NaN if either is NaN. a gets the gradient if b is not smaller."""
    return _binary("minimum", a, b)


def where(condition: Any, a: Any, b: Any) -> Symbol:
    """a where the condition, such as ``x > y``, holds, else b; the gradient of the other one is 0.

    The values from which the other one is computed get 0 times its derivative. That is NaN if the derivative
    is infinite, as in PyTorch: write ``where(x > 0, sqrt(maximum(x, 1e-6)), 0)``.
    """
    if not isinstance(condition, Condition):
        refuse(f"where: expected a condition such as a > 0 as the first argument, got {kind(condition)}")
    graph = condition.graph
    return Symbol(graph, graph.node("where", condition.node, _node(graph, a), _node(graph, b)))
