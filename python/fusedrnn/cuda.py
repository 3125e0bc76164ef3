"""Which array module an array belongs to, and the way to a GPU and back: the one place that knows CuPy.

CuPy is imported when something is first moved to a GPU, or by the user; until then every array is NumPy's.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from fusedrnn import backends
from fusedrnn.backends.arguments import NUMPY, Kind

Array = npt.NDArray[Any]


def __getattr__(name: str) -> Any:
    if name == "gpu_enable":  # whether the CUDA backend can run here
        return backends.get("cuda").unavailable() is None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_array_module(x: Any) -> ModuleType:
    """CuPy for its arrays and for variables that hold one, else NumPy."""
    return sys.modules["cupy"] if on_gpu(getattr(x, "_data", x)) else np


def on_gpu(x: Any) -> bool:
    """Whether this is a CuPy array."""
    if type(x) is np.ndarray:
        return False
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def is_array(x: Any) -> bool:
    """Whether this is an array of NumPy or CuPy."""
    return isinstance(x, np.ndarray) or on_gpu(x)


def as_array(x: Any, dtype: Any = None) -> Any:
    """Arrays where they are, in the dtype; anything else as a NumPy array."""
    if on_gpu(x):
        return x if dtype is None else x.astype(dtype, copy=False)
    return np.asarray(x, dtype)


def as_numpy(x: Any) -> Array:
    """A NumPy array; of a CuPy array its copy."""
    return x.get() if on_gpu(x) else np.asarray(x)


def as_cupy(x: Any) -> Any:
    """A CuPy array on the current GPU; of a NumPy array its copy.

    Raises:
        RuntimeError: There is no GPU, or something is missing; the message says what.
    """
    require_gpu("as_cupy")
    return importlib.import_module("cupy").asarray(x)


def like(x: Any, other: Any) -> Any:
    """The array where the other one is; itself where it is there."""
    if on_gpu(x) == on_gpu(other):
        return x
    return as_cupy(x) if on_gpu(other) else as_numpy(x)


def kind(gpu: bool) -> Kind:
    """The arrays of a GPU, or NumPy's, as checks of arguments know them."""
    if not gpu:
        return NUMPY
    return Kind("a CuPy array", on_gpu, lambda a: a, lambda a: a.copy(order="C"), as_cupy)


def require_gpu(what: str) -> None:
    """A RuntimeError, which begins with ``what``, where the CUDA backend cannot run."""
    reason = backends.get("cuda").unavailable()
    if reason is not None:
        raise RuntimeError(f"{what}: {reason}")
