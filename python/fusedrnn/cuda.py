"""The module of an array, NumPy or CuPy, and copies to a GPU and back.

CuPy is imported when something is first moved to a GPU.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np

from fusedrnn import backends
from fusedrnn.backends.arguments import NUMPY, Kind, bfloat16
from fusedrnn.backends.protocol import Array


def __getattr__(name: str) -> Any:
    if name == "gpu_enable":  # whether the CUDA backend can run here
        return backends.get("cuda").unavailable() is None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_array_module(x: Any) -> ModuleType:
    """The module ``cupy`` for CuPy arrays and variables that have one, else ``numpy``."""
    return sys.modules["cupy"] if on_gpu(getattr(x, "_data", x)) else np


def on_gpu(x: Any) -> bool:
    """Whether x is a CuPy array."""
    if type(x) is np.ndarray:
        return False
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def is_array(x: Any) -> bool:
    """Whether x is a NumPy or CuPy array."""
    return isinstance(x, np.ndarray) or on_gpu(x)


def as_array(x: Any, dtype: Any = None) -> Any:
    """x as an array, cast to ``dtype`` if it is given. A CuPy array stays on its GPU."""
    if type(x) is np.ndarray and (dtype is None or x.dtype is dtype):
        return x
    if on_gpu(x):
        return x if dtype is None else x.astype(dtype, copy=False)
    return np.asarray(x, dtype)


def as_numbers(name: str, x: Any) -> Any:
    """x as an array of numbers, or a TypeError or ValueError that names it."""
    try:
        array = as_array(x)
    except ValueError as error:
        raise ValueError(f"{name}: expected numbers in rows of the same length, got others") from error
    if array.dtype.kind not in "fiubc" and array.dtype not in bfloat16():
        got = f"{type(x).__name__} of {array.dtype}" if array.ndim else type(x).__name__
        raise TypeError(f"{name}: expected a Variable or numbers, got {got}")
    return array


def as_numpy(x: Any) -> Array:
    """A NumPy array; a CuPy array is copied."""
    return x.get() if on_gpu(x) else np.asarray(x)


def as_cupy(x: Any) -> Any:
    """A CuPy array on the current GPU; a NumPy array is copied.

    Raises:
        RuntimeError: There is no GPU, or something is missing; the message says what.
    """
    require_gpu("as_cupy")
    return importlib.import_module("cupy").asarray(x)


def like(x: Any, other: Any) -> Any:
    """x on the device of the other array; copied only if it is on another device."""
    if on_gpu(x) == on_gpu(other):
        return x
    return as_cupy(x) if on_gpu(other) else as_numpy(x)


def kind(gpu: bool) -> Kind:
    """How to check and copy arrays of a GPU, or NumPy arrays."""
    if not gpu:
        return NUMPY
    return Kind("a CuPy array", on_gpu, lambda a: a, lambda a: a.copy(order="C"), as_cupy)


def require_gpu(what: str) -> None:
    """Raise a RuntimeError, whose message begins with ``what``, if the CUDA backend cannot run."""
    reason = backends.get("cuda").unavailable()
    if reason is not None:
        raise RuntimeError(f"{what}: {reason}")
