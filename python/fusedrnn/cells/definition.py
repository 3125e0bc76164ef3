"""A cell: a short Python function, and everything that is derived from it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import pickle
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NoReturn, overload

from fusedrnn.cells import fusion, saved, text
from fusedrnn.cells.fusion import Operation
from fusedrnn.cells.gradient import Gradient, derive
from fusedrnn.cells.graph import Node, reach
from fusedrnn.cells.rounds import rounds
from fusedrnn.cells.symbols import kind, refuse
from fusedrnn.cells.trace import Trace, trace

# The parameters of products.
PLAIN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # of dense products
OF_PRODUCTS = (*PLAIN, "weight_hr")  # and of a projection


class Cell:
    """A cell: a function and its options. The decorator ``cell`` makes it.

    Two cells are equal if their functions and options are equal. Everything else is derived from the function
    when it is first used.

    Attributes:
        name: The name of the function.
        function: The function that was passed to ``cell``.
        options: The values of the options, by name.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any] | None = None) -> None:
        self.function = function
        self.name, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__
        self.__name__, self.__qualname__ = function.__name__, function.__qualname__
        parameters = inspect.signature(function).parameters.values()
        known = {
            a.name: a.default for a in parameters if a.kind == a.KEYWORD_ONLY and a.default is not a.empty
        }
        for name in options or {}:
            if name not in known:
                expected = ", ".join(known) or "none"
                refuse(f"{name}: expected an option of {self.name}: {expected}")
        self.options = known | dict(options or {})
        for name, value in self.options.items() if self.is_builtin else ():
            if not isinstance(value, bool):
                refuse(f"{name}: expected True or False, got {kind(value)}")
        chosen = tuple(self.options.items())
        _check_options(self.name, self.options)
        self._key = function, chosen, repr(chosen)
        self._hash = hash(self._key)
        self._lock = threading.Lock()

    def with_options(self, **options: Any) -> Cell:
        """The cell with other values of some options.

        Args:
            options: The values by name. The options are the function's keyword arguments with a default.

        Raises:
            CellError: The cell has no option of this name, or a value cannot be hashed.
        """
        chosen = tuple((self.options | options).items())
        _check_options(self.name, options)
        return variant(self.function, chosen, repr(chosen))

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(
            "a cell cannot be called; write fusedrnn.layers.Recurrent("
            f"{self.name}, hidden_size) for a layer, or {self.name}.function(p, x, h) for its values "
            "in another cell"
        )

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Cell) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        if "<locals>" in self.__qualname__:
            raise pickle.PicklingError(
                f"the cell {self.name} is defined inside a function; define it at the top of a module"
            )
        try:
            _named(self.__module__, self.__qualname__, self.options, self.digest)
        except (ImportError, AttributeError, pickle.UnpicklingError) as error:
            raise pickle.PicklingError(
                f"the cell {self.name} is not what {self.__module__}.{self.__qualname__} is now ({error})"
            ) from error
        return _named, (self.__module__, self.__qualname__, self.options, self.digest)

    def __deepcopy__(self, memo: Any) -> Cell:
        return self

    @cached_property
    def states(self) -> tuple[str, ...]:
        """The names of the states; the first is the output."""
        return tuple(self.trace.states)

    @cached_property
    def blocks(self) -> dict[str, int]:
        """The number of blocks of H rows (P rows for weight_hr) of each parameter, by its name.

        Weights and biases come first, then weight_hr, then all others.
        """
        found = {name: len(owners) for name, owners in self.trace.blocks.items()}
        return {name: found[name] for name in OF_PRODUCTS if name in found} | found

    @cached_property
    def vectors(self) -> tuple[str, ...]:
        """The names of the parameters that do not belong to a product. Each has one axis."""
        return tuple(name for name in self.blocks if name not in OF_PRODUCTS)

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """The names of the row scalars, such as ``dt``."""
        return tuple(self.trace.scalars)

    @property
    def is_builtin(self) -> bool:
        """Whether the cell is part of this package, with any options."""
        return self.__module__ == "fusedrnn.cells.builtin"

    @property
    def projects(self) -> bool:
        """Whether the first state is a projection, with P columns; else P is H."""
        return "weight_hr" in self.blocks

    def shapes(self, I: Any, H: Any, P: Any) -> dict[str, tuple[Any, ...]]:
        """The shape of each parameter for these sizes, by its name."""
        columns = {"weight_ih": (I,), "weight_hh": (P,), "weight_hr": (H,)}
        return {
            name: (count * (P if name == "weight_hr" else H), *columns.get(name, ()))
            for name, count in self.blocks.items()
        }

    def widths(self, H: Any, P: Any) -> tuple[Any, ...]:
        """The number of columns of each state. The first one has P, the others H."""
        return (P, *[H] * (len(self.states) - 1))

    @cached_property
    def digest(self) -> str:
        """A hash of what a step computes and of the order of the parameters, 16 hexadecimal digits."""
        t, number = self.trace, {n: k for k, n in enumerate(self.forward_nodes)}
        lines = [(n.op, repr(n.attribute), *(number[a] for a in n.args)) for n in number]
        ends = [(name, t.start[name], number[n]) for name, n in t.after.items()]
        text = repr((lines, ends, list(self.blocks.items()), self.scalars))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def two_biases(self) -> bool:
        """Whether the cell needs bias_hh in addition to bias_ih.

        It does if a product with a state is not simply added to a product with x.
        """
        return self.trace.separate

    @cached_property
    def trace(self) -> Trace:
        """What one step computes."""
        # If two threads run the function at the same time, both get the first result: nodes of one do not
        # match those of the other.
        return vars(self).setdefault("trace", trace(self.function, self.options))

    @cached_property
    def gradient(self) -> Gradient:
        """What one step of backward computes."""
        t = self.trace
        with self._lock:  # it adds nodes to the graph; another thread finds them there
            return derive(t)

    @cached_property
    def forward_nodes(self) -> list[Node]:
        """The values of a step, each after the values that it is computed from."""
        return reach(self.trace.after.values())

    @cached_property
    def backward_nodes(self) -> list[Node]:
        """The values of a step of backward that forward does not compute, in the same order."""
        forward = set(self.forward_nodes)
        return [n for n in reach(self.gradient.outputs) if n not in forward]

    @cached_property
    def fused(self) -> dict[Node, Node]:
        """For each sum that is computed with a product as one FMA, the product."""
        forward, backward = self.forward_nodes, self.backward_nodes
        # What needs no product of a matrix is computed in the first round too.
        first = {n: max(r, 1) for n, r in rounds(forward).items()}
        found = fusion.fusions(forward, self.trace.after.values(), first)
        return found | fusion.fusions(backward, self.gradient.outputs, rounds(backward, known=forward))

    @cached_property
    def saved(self) -> list[Node]:
        """The values that forward saves for backward, besides the states."""
        return saved.choose(self.trace, self.gradient, set(self.fused.values()))

    @cached_property
    def forward(self) -> list[Operation]:
        """The operations of a step."""
        t = self.trace
        known = [*t.states.values(), *t.scalars.values(), t.x]
        return fusion.lower(t.after.values(), known, self.fused)

    @cached_property
    def backward(self) -> list[Operation]:
        """The operations of a step of backward, from the states before and after and the saved values."""
        t, gradient = self.trace, self.gradient
        known = [*t.states.values(), *t.after.values(), *t.scalars.values(), t.x, *self.saved]
        return fusion.lower(gradient.outputs, [*known, *gradient.upstream.values()], self.fused)

    def __str__(self) -> str:
        return text.describe(self)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.name}({options})"


@overload
def cell(function: Callable[..., Any]) -> Cell: ...


@overload
def cell() -> Callable[[Callable[..., Any]], Cell]: ...


def cell(function: Callable[..., Any] | None = None) -> Cell | Callable[[Callable[..., Any]], Cell]:
    """Make a cell from a function of the parameters ``p``, the input ``x`` and each state.

    ::

        @cell
        def lstm(p, x, h, c):
            i, f, g, o = p.dense("i f g o", x, h)
            c = sigmoid(f) * c + sigmoid(i) * tanh(g)
            return sigmoid(o) * tanh(c), c

    The function returns the new states in the order of its arguments; the first is the output. It is run
    once, on symbols. A state may have a default, which is its initial value (else 0). Keyword-only arguments
    with a default are options. Those without a default are row scalars, one number for each row and step,
    such as the time since the previous step.

    Raises:
        CellError: The function cannot be turned into kernels; the message names the line. A function that has
            options, or uses a name that is defined after it, is run at its first use instead of here.
    """
    if function is None:  # @cell()
        return cell
    if not inspect.isfunction(function):
        refuse(f"cell: expected a function of p, x and the states, got {kind(function)}")
    made = Cell(function)
    if not made.options:  # whose defaults may never be used
        with contextlib.suppress(NameError):
            _ = made.trace
    return made


@functools.cache
def variant(function: Callable[..., Any], options: tuple[tuple[str, Any], ...], said: str) -> Cell:
    """The cell with these options, cached. Their text ``said`` distinguishes 1 from True, 0.0 from -0.0."""
    return Cell(function, dict(options))


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    try:
        hash(tuple(options.values()))
    except TypeError:
        refuse(f"{name}: expected hashable options, such as numbers, got {dict(options)}")


def _named(module: str, name: str, options: dict[str, Any], digest: str) -> Cell:
    """Find a cell that was pickled, by its module and name."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    chosen: Cell = found.with_options(**options)
    if chosen.digest != digest:
        raise pickle.UnpicklingError(f"{module}.{name} does not compute the same as before")
    return chosen
