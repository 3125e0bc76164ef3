"""Published cells, each a function of a few lines; docs/zoo.md lists them.

::

    import fusedrnn.layers as L
    from fusedrnn.cells.zoo import peephole_lstm

    layer = L.Recurrent(peephole_lstm, 32)

The docstring of a cell begins with its paper. ``ALL`` is a tuple of all cells.
"""

# ruff: noqa: F403

from fusedrnn.cells.definition import Cell
from fusedrnn.cells.zoo.dynamics import *
from fusedrnn.cells.zoo.gated import *
from fusedrnn.cells.zoo.light import *
from fusedrnn.cells.zoo.lstms import *

ALL: tuple[Cell, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Cell))

__all__ = ["ALL", *(cell.name for cell in ALL)]
