"""What is saved with the weights of a cell of the user's own, and compared when they are loaded.

The rows of a parameter have the order in which the function names the gates. So a function that was rewritten
may give the rows of one gate to another, without any change of a shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from fusedrnn.cells.definition import Cell

STATES, DIGEST = "the states", "the digest"  # no names of parameters, which have no spaces


def describe(cell: Cell) -> dict[str, str]:
    """The names of the states, the gates of each parameter in the order of its rows, and the digest."""
    gates = {name: " ".join(owners) for name, owners in cell.trace.blocks.items()}
    return {STATES: " ".join(cell.states)} | gates | {DIGEST: cell.digest}


def difference(cell: Cell, saved: Mapping[str, str]) -> str | None:
    """Why weights saved with this description do not fit the cell, or None.

    A parameter that only one of them has is left to the checks of the names. If nothing but the digest
    differs, there is a warning.
    """
    now = describe(cell)
    changed = [name for name in now if name != DIGEST and saved.get(name, now[name]) != now[name]]
    if changed:
        orders = "; ".join(f"{name}: expected {now[name]}, got {saved[name]}" for name in changed)
        return f"{cell.name} has other gates or states, or another order, than the saved weights: {orders}"
    if saved.get(DIGEST, now[DIGEST]) != now[DIGEST]:
        text = f"the cell {cell.name} computes something else than when the weights were saved"
        warnings.warn(text, stacklevel=4)
    return None
