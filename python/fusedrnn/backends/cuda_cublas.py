"""cuBLAS's products in a stream that is being captured.

CuPy's functions refuse such a stream with a NotImplementedError, in CuPy 14 still. cuBLAS itself takes it, as
long as it is given a workspace: without one its graph would allocate memory at every launch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

INT, POINTER = ctypes.c_int, ctypes.c_void_p
SIZES = POINTER, INT, INT, INT, INT, INT  # the handle, two operations, m, n, k
GEMM = *SIZES, POINTER, POINTER, INT, POINTER, INT, POINTER, POINTER, INT
GEMM_EX = *SIZES, POINTER, POINTER, INT, INT, POINTER, INT, INT, POINTER, POINTER, INT, INT, INT, INT
FUNCTIONS = {  # by CuPy's names; CuPy's arguments have the same order
    "setStream": ("cublasSetStream_v2", (POINTER, POINTER)),
    "setWorkspace": ("cublasSetWorkspace_v2", (POINTER, POINTER, ctypes.c_size_t)),
    "sgemm": ("cublasSgemm_v2", GEMM),
    "dgemm": ("cublasDgemm_v2", GEMM),
    "gemmEx": ("cublasGemmEx", GEMM_EX),
}


def captured(name: str, arguments: tuple[Any, ...], stream: int, workspace: int, size: int) -> None:
    """A product by the function that CuPy calls ``name``, recorded by ``stream``.

    It changes the stream and the workspace of CuPy's handle; CuPy sets the stream before every call of its
    own, and with that cuBLAS takes its own workspace again.
    """
    handle = arguments[0]
    _call("setStream", handle, stream)
    _call("setWorkspace", handle, workspace, size)  # after the stream, which resets it
    _call(name, *arguments)


def _call(name: str, *arguments: Any) -> None:
    symbol, types = FUNCTIONS[name]
    function = getattr(_library(), symbol)
    function.argtypes = types
    status = function(*arguments)
    if status:
        raise RuntimeError(f"{symbol}: status {status}")


@functools.cache
def _library() -> ctypes.CDLL:
    """The cuBLAS that CuPy has loaded: both are told by NVIDIA's cuda-pathfinder which."""
    loaded = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("cublas")
    return ctypes.CDLL(loaded.abs_path)
