"""Cells: what one step computes.

A cell is one function with the decorator ``cell`` (``fusedrnn.cells.builtin`` has the built-in ones). It
computes with ``+ - * /`` and the operations in this module. Everything else is derived from it: the gradient
(``gradient``), what forward saves (``saved``), in which round a value is known (``rounds``), which products
and sums are rounded once (``fusion``). ``print`` shows the result.
"""

from __future__ import annotations

from fusedrnn.cells.builtin import gru, lstm, rnn
from fusedrnn.cells.definition import Cell, cell
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

CELLS = {"rnn": rnn, "lstm": lstm, "gru": gru}

__all__ = [
    "CELLS",
    "Cell",
    "CellError",
    "absolute",
    "cell",
    "exp",
    "gru",
    "log",
    "lstm",
    "maximum",
    "minimum",
    "relu",
    "rnn",
    "sigmoid",
    "softplus",
    "sqrt",
    "tanh",
    "where",
]
