"""Products of matrices by cuBLAS.

It is called by itself, since CuPy's functions refuse a stream that is being captured, in CuPy 14 still.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fusedrnn.backends.protocol import Array

INT, POINTER = ctypes.c_int, ctypes.c_void_p
FUNCTIONS = {
    "cublasSetStream_v2": (POINTER, POINTER),
    "cublasSetWorkspace_v2": (POINTER, POINTER, ctypes.c_size_t),
    # The handle, two operations, m, n, k; alpha, a, b, beta and c, matrices with their dtype and step.
    "cublasGemmEx": (
        *(POINTER, INT, INT, INT, INT, INT, POINTER, POINTER, INT, INT, POINTER, INT, INT, POINTER),
        *(POINTER, INT, INT, INT, INT),
    ),
}
# Of the toolkit's headers: cudaDataType, and cublasComputeType_t by the precision of float32 factors. Sums
# are float32 in all of them.
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
FLOAT32, FLOAT64 = 68, 70
COMPUTE = {"ieee": FLOAT32, "fp16": 74, "bf16": 75, "tf32": 77}
DEFAULT_ALGORITHM = -1


def multiply(
    cuda: Any,
    pointer: Callable[[Any], int],
    workspace: Array | None,
    a: Array,
    b: Array,
    out: Array,
    precision: str,
) -> None:
    """``out = a b``, as ``cupy_device.CupyDevice.matmul`` has it.

    cuBLAS's matrices lie column by column: to it this is ``out.T = b.T a.T``. It changes the stream and the
    workspace of the handle, which is CuPy's. CuPy sets the stream before every call of its own, and with that
    cuBLAS takes its own workspace again.

    Args:
        cuda: The module of CuPy.
        pointer: Of an array.
        workspace: What cuBLAS works in, uint8. None: its own, which a graph that records the product would
            allocate at every launch.
    """
    compute = FLOAT64 if a.dtype == np.float64 else COMPUTE[precision] if a.dtype == np.float32 else FLOAT32
    number = ctypes.c_double if compute == FLOAT64 else ctypes.c_float
    one, zero = (ctypes.byref(number(x)) for x in (1, 0))
    (a_op, a_step), (b_op, b_step) = _as_columns(a), _as_columns(b)
    (m, n), k = out.shape, a.shape[1]
    factor, sums = (DTYPES[array.dtype.name] for array in (a, out))
    handle = cuda.device.get_cublas_handle()
    _call("cublasSetStream_v2", handle, cuda.get_current_stream().ptr)
    if workspace is not None:
        _call(
            "cublasSetWorkspace_v2", handle, pointer(workspace), workspace.nbytes
        )  # after the stream, which resets it
    _call(
        "cublasGemmEx",
        *(handle, b_op, a_op, n, m, k, one, pointer(b), factor, b_step),
        *(pointer(a), factor, a_step, zero, pointer(out), sums, n),
        *(compute, DEFAULT_ALGORITHM),
    )


def _as_columns(a: Any) -> tuple[int, int]:
    """For a matrix read column by column: 0 where it so is the transpose, else 1; and its column's step."""
    row, column = (stride // a.itemsize for stride in a.strides)
    rows, columns = a.shape
    if column == 1 or columns == 1:
        return 0, max(row if rows > 1 else 1, columns)
    return 1, max(column, rows)


def _call(name: str, *arguments: Any) -> None:
    function = getattr(_library(), name)
    function.argtypes = FUNCTIONS[name]
    status = function(*arguments)
    if status:
        raise RuntimeError(f"{name}: status {status}")


@functools.cache
def _library() -> ctypes.CDLL:
    """The cuBLAS that CuPy has loaded: both are told by NVIDIA's cuda-pathfinder which."""
    loaded = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("cublas")
    return ctypes.CDLL(loaded.abs_path)
