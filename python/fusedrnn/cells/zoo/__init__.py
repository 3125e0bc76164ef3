"""Published cells, each a function of a few lines; docs/zoo.md lists them.

::

    import fusedrnn.layers as L
    from fusedrnn.cells.zoo import peephole_lstm

    layer = L.Recurrent(peephole_lstm, 32)

The first paragraph of a cell's docstring is its paper. Nothing is derived from a cell before it is used.
"""

# ruff: noqa: F403, F405

from fusedrnn.cells.definition import Cell
from fusedrnn.cells.zoo.dynamics import *
from fusedrnn.cells.zoo.gated import *
from fusedrnn.cells.zoo.light import *
from fusedrnn.cells.zoo.lstms import *

__all__ = [
    "ALL",
    "antisymmetric_rnn",
    "atr",
    "augru",
    "brc",
    "cfc",
    "cfn",
    "co_rnn",
    "coupled_lstm",
    "dreamer_gru",
    "e_lstm",
    "fast_grnn",
    "fast_rnn",
    "fs_lstm",
    "gated_antisymmetric_rnn",
    "gru_d",
    "ind_rnn",
    "indy_lstm",
    "janet",
    "leaky_rnn",
    "lem",
    "li_gru",
    "lipschitz_rnn",
    "lstm_1997",
    "lstmp",
    "ltc",
    "mgu",
    "mgu1",
    "mgu2",
    "mgu3",
    "min_gru",
    "min_lstm",
    "minimal_rnn",
    "multiplicative_lstm",
    "mut1",
    "mut3",
    "nas",
    "nbrc",
    "peephole_lstm",
    "pl_rnn",
    "qrnn",
    "qrnn_2",
    "ran",
    "residual_lstm",
    "rhn",
    "scrn",
    "slstm",
    "sru",
    "star",
    "t_gru",
    "t_lstm",
    "t_rnn",
    "time_aware_lstm",
    "ugrnn",
    "unicornn",
    "wmc_lstm",
]

ALL: tuple[Cell, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Cell))
