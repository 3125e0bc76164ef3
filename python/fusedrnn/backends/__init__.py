"""The backends, and which one runs. ``fusedrnn.backends.protocol`` says what a backend is."""

from __future__ import annotations

import functools
import importlib
import os

import numpy as np

from fusedrnn.backends.arguments import check_cell
from fusedrnn.backends.protocol import Backend, Unsupported
from fusedrnn.cells import Cell
from fusedrnn.cells.builtin import COMPILED

_CLASSES = {
    "cpu": "CpuBackend",
    "numba": "NumbaBackend",
    "reference": "ReferenceBackend",
    "cuda": "CudaBackend",
}

NAMES = tuple(_CLASSES)
FOR_NUMPY = NAMES[:-1]  # in the order in which they are tried; the last one is for arrays on a GPU


def get(name: str | None = None) -> Backend:
    """Return a backend.

    Args:
        name: "cpu", "numba", "reference" or "cuda". Such a backend is returned even if it cannot run, so that
            ``get(name).unavailable()`` can say why. None: the environment variable FUSEDRNN_BACKEND, else the
            first of ``FOR_NUMPY`` that can run.

    Raises:
        ValueError: The name is not one of ``NAMES``.
        TypeError: The name is not a string.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend: expected a name out of {NAMES} or None, got {type(name).__name__}")
    source = "backend"
    if name is None:
        source, name = "environment variable FUSEDRNN_BACKEND", os.environ.get("FUSEDRNN_BACKEND") or None
    if name is None:
        return _first()
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {NAMES}, got {name!r}")
    return _load(name)


def usable(name: str | None = None) -> Backend:
    """Like ``get``, but raise a RuntimeError with the reason if the backend cannot run."""
    backend = get(name)
    reason = backend.unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {backend.name!r} cannot run here: {reason}")
    return backend


def refuses(name: str, cell: Cell) -> str | None:
    """Why a backend does not run a cell on this machine, in one line, or None if it does.

    Raises:
        TypeError, ValueError: There is no backend of this name, or ``cell`` is not a cell.
    """
    backend = get(name)
    check_cell(cell)
    if (reason := backend.unavailable()) is not None:
        return reason
    if name == "cuda":  # whose arrays are not NumPy's
        if cell in COMPILED.values() and not cell.projects:
            return None
        return f"cell: {cell!r} is not supported by the cuda backend"
    try:
        backend.pack(cell, {k: np.zeros(shape) for k, shape in cell.shapes(1, 1, 1).items()})
    except Unsupported as error:
        return str(error)
    return None


@functools.cache
def _load(name: str) -> Backend:
    module = importlib.import_module(f"fusedrnn.backends.{name}")
    return getattr(module, _CLASSES[name])()


@functools.cache
def _first() -> Backend:
    return next(b for b in map(_load, FOR_NUMPY) if b.unavailable() is None)
