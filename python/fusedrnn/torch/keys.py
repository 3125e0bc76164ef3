"""What stands for a cell in the operators: a string."""

from __future__ import annotations

import ast
import importlib
import threading
from typing import Any

from fusedrnn import cells
from fusedrnn.cells import Cell

CELLS: dict[str, Cell] = {  # those with compiled kernels, by PyTorch's names
    "LSTM": cells.lstm,
    "GRU": cells.gru,
    "RNN_TANH": cells.rnn,
    "RNN_RELU": cells.rnn.with_options(relu=True),
}
NORMED = "_LAYER_NORM"  # ends the names of cells with layer norm
CELLS |= {f"{name}{NORMED}": cell.with_options(layer_norm=True) for name, cell in CELLS.items()}
PROJECTED = "_PROJECTED"  # likewise with a projection
CELLS[f"LSTM{PROJECTED}"] = cells.lstm.with_options(project=True)
CELLS["GRU_RESET_BEFORE"] = cells.gru.with_options(reset_after=False)  # only of ``own``

_keys = {cell: key for key, cell in CELLS.items()}
_known = dict(CELLS)
_lock = threading.Lock()


def key_of(cell: Cell) -> str:
    """Its name above; or where it is found in any process, and a digest of what it computes, so that compiled
    code is not that of another version of it; or a number."""
    _ = cell.states, cell.blocks, cell.scalars  # known before a compiler asks, which cannot derive them
    if cell not in _keys:
        key = f"{cell.__module__}:{cell.__qualname__}:{cell.digest}"
        if cell.options:
            key += f":{tuple(cell.options.items())!r}"
        try:
            found = _found(key)
        except (ImportError, AttributeError, ValueError, TypeError, SyntaxError):
            found = None
        with _lock:  # two cells must not get the same number
            if cell not in _keys:
                key = key if found == cell else f"{cell.name}:{len(_keys)}"
                _known[key] = cell  # first, since another thread may ask for it as soon as there is a key
                _keys[cell] = key
    return _keys[cell]


for _cell in CELLS.values():  # whose layers ask for no key
    key_of(_cell)


def cell_of(key: str) -> Cell:
    """The cell of such a key."""
    if (cell := _known.get(key)) is None:
        try:
            cell = _known[key] = _found(key)
        except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
            raise RuntimeError(
                f"cell: {key!r} is not found in this process ({error}); define the cell at the top of a "
                "module that can be imported"
            ) from error
    return cell


def _found(key: str) -> Cell:
    module, name, digest, *options = key.split(":", 3)
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, Cell):
        raise TypeError(f"it is of type {type(found).__name__}")
    if options:
        found = found.with_options(**dict(ast.literal_eval(options[0])))
    if found.digest != digest:
        raise ValueError("it computes something else than it did")
    return found
