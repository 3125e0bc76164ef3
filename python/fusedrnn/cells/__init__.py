"""The cells: what one step computes, forward and backward. Cells know no time, time loops know no gates.

Each file holds one cell: plain functions on scalars or arrays (one source for NumPy of every dtype and for
Numba, hence only arithmetic, ``ONE`` and the functions of ``activations``), and a frozen class that names the
cell, carries its options and puts the functions together into a step on whole gates:

- ``step(ax, state, hidden, norm) -> state, saved``: ``ax`` is the input part of each gate; ``hidden(v,
  first, last)`` gives the recurrent part ``weight_hh v + bias_hh`` of the gates first..last-1, one array
  each; ``norm(c)`` is ``LN(c; gain_c) + bias_c``, of an LSTM with layer norm.
- ``step_backward(dstate, saved, before, after, product, norm) -> dstate_before, da_x, da_h``: ``before`` and
  ``after`` are the states before and after the step, ``product(da, first, last)`` is ``da weight_hh`` over
  the gates first..last-1, ``norm(dm)`` the gradient of c from that of ``norm(c)``; ``da_x`` and ``da_h`` are
  the gradients of each gate's input and recurrent part. With layer norm both parts come normalised
  (``fusedrnn.cells.layer_norm``), and their gradients are those of the normalised parts.
- ``operands(saved, h_prev)``: ``[(first, last, v), ...]``, what weight_hh multiplied, for its gradient.

Gates in memory order: RNN one, LSTM ``i f g o``, GRU ``r z n``; ``norms`` are the groups of gates, first to
last-1, that layer norm takes together. A new cell is a file here and a line in ``CELLS``.
"""

from __future__ import annotations

from typing import TypeAlias

from fusedrnn.cells.gru import GRU
from fusedrnn.cells.lstm import LSTM
from fusedrnn.cells.rnn import RNN

Cell: TypeAlias = RNN | LSTM | GRU

CELLS: dict[str, type[Cell]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}

__all__ = ["CELLS", "GRU", "LSTM", "RNN", "Cell"]
