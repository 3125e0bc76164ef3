"""The cells: what one step computes. Cells know no time, time loops know no gates.

A cell is one function, made a cell by ``cell`` (``fusedrnn.cells.builtin`` has the built-in ones); it
computes with ``+ - * /`` and the operations named here. Everything else is derived from it: the gradient
(``gradient``), what forward saves (``saved``), in which round a value is known (``rounds``), which products
and sums round once (``fusion``). ``print`` shows what was found.

The classes here name the built-in cells with their options: they are what layers and backends are given.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

from fusedrnn.cells import builtin
from fusedrnn.cells.definition import Definition, cell
from fusedrnn.cells.symbols import (
    CellError,
    absolute,
    exp,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)


class _Cell:
    """A built-in cell with its options."""

    name: ClassVar[str]
    function: ClassVar[Definition]

    @cached_property
    def definition(self) -> Definition:
        """The cell's function with these options."""
        return self.function.with_options(**{f.name: getattr(self, f.name) for f in fields(self)})  # type: ignore[arg-type]

    @cached_property
    def states(self) -> tuple[str, ...]:
        """The names of the states; the first is the output."""
        return tuple(self.definition.trace.states)

    @cached_property
    def gates(self) -> int:
        """The number of gates: weight_ih has H rows for each."""
        return len(self.definition.trace.blocks["weight_ih"])

    @cached_property
    def vectors(self) -> tuple[str, ...]:
        """The parameters beside ``weight_ih weight_hh bias_ih bias_hh``: those of layer norm."""
        plain = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return tuple(name for name in self.definition.trace.blocks if name not in plain)

    @property
    def two_biases(self) -> bool:
        """Whether bias_hh is of use beside bias_ih: a product with a state is not added to one with x."""
        return self.definition.trace.separate

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class RNN(_Cell):
    """Elman's cell, with tanh or relu."""

    relu: bool = False
    layer_norm: bool = False

    name = "rnn"
    function = builtin.rnn


@dataclass(frozen=True)
class LSTM(_Cell):
    """LSTM cell with input, forget and output gate."""

    layer_norm: bool = False

    name = "lstm"
    function = builtin.lstm


@dataclass(frozen=True)
class GRU(_Cell):
    """GRU cell; ``reset_after`` says whether r multiplies the recurrent product (PyTorch) or h before it."""

    reset_after: bool = True
    layer_norm: bool = False

    name = "gru"
    function = builtin.gru


Cell: TypeAlias = RNN | LSTM | GRU

CELLS: dict[str, type[Cell]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "CellError",
    "absolute",
    "cell",
    "exp",
    "log",
    "maximum",
    "minimum",
    "relu",
    "sigmoid",
    "softplus",
    "sqrt",
    "tanh",
    "where",
]
