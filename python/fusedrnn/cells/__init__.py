"""The cells: what one step computes, forward and backward. Cells know no time, time loops know no gates.

Each file holds one cell: plain functions on scalars or arrays (one source for NumPy of every dtype and for
Numba, hence only arithmetic, ``ONE`` and the functions of ``activations``), and a frozen class that names the
cell, carries its options and puts the functions together into a step on whole gates:

- ``step(ax, state, hidden) -> state, saved``: ``ax`` is the input part of each gate; ``hidden(v, first,
  last)`` gives the recurrent part ``weight_hh v + bias_hh`` of the gates first..last-1, one array each.
- ``step_backward(dstate, saved, before, after, product) -> dstate_before, da_x, da_h``: ``before`` and
  ``after`` are the states before and after the step, ``product(da, first, last)`` is ``da weight_hh`` over
  the gates first..last-1; ``da_x`` and ``da_h`` are the gradients of each gate's input and recurrent part.
- ``operands(saved, h_prev)``: ``[(first, last, v), ...]``, what weight_hh multiplied, for its gradient.

Gates in memory order: RNN one, LSTM ``i f g o``, GRU ``r z n``. A new cell is
a file here and a line in ``CELLS``.
"""

from __future__ import annotations

from typing import TypeAlias

from fusedrnn.cells.gru import GRU
from fusedrnn.cells.lstm import LSTM
from fusedrnn.cells.rnn import RNN

Cell: TypeAlias = RNN | LSTM | GRU

CELLS: dict[str, type[Cell]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}

__all__ = ["CELLS", "GRU", "LSTM", "RNN", "Cell"]
