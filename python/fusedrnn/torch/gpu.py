"""Tensors on a GPU as the arrays of the CUDA backend, which are CuPy's: both share their memory.

Experimental: no kernel has run on a GPU yet (docs/cuda.md).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fusedrnn import backends
from fusedrnn.backends import cuda
from fusedrnn.backends.cuda import cupy_device
from fusedrnn.backends.protocol import Backend

NOTHING = contextlib.nullcontext()
HALVES = (torch.float16, torch.bfloat16)  # dtypes that only a GPU's kernels take


def unavailable() -> str | None:
    """Why no kernel can run on a GPU here, or None."""
    return backends.get("cuda").unavailable()


def backend() -> Backend:
    """The CUDA backend."""
    return backends.get("cuda")


def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within the block CuPy works on this GPU, on PyTorch's current stream and with PyTorch's memory; for the
    CPU there is nothing to do.

    So nothing waits, a graph that PyTorch captures has it all, and memory goes back to where it came from.
    """
    return NOTHING if device.type == "cpu" else _on(device)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    import cupy

    stream = torch.cuda.current_stream(device)
    with (
        torch.cuda.device(device),
        cupy.cuda.Device(device.index),
        cupy.cuda.ExternalStream(stream.cuda_stream, device.index),
        cupy.cuda.using_allocator(_allocate),
    ):
        yield


def _allocate(size: int) -> Any:
    """Memory of PyTorch's allocator for CuPy."""
    import cupy

    memory = torch.empty(size, dtype=torch.uint8, device="cuda")
    unowned = cupy.cuda.UnownedMemory(memory.data_ptr(), size, memory, memory.device.index)
    return cupy.cuda.MemoryPointer(unowned, 0)


def lacks(dtype: torch.dtype) -> str | None:
    """Why the current GPU's kernels do not take this dtype, or None."""
    if dtype not in HALVES:
        return None
    names = [found.name for found in cuda.dtypes_of(cupy_device.current())]
    if str(dtype).removeprefix("torch.") in names:
        return None
    return "ml_dtypes is not installed" if "float16" in names else "the GPU's compute capability is below 8.0"


def array(t: Tensor) -> Any:
    """The tensor's memory as an array, strides and all."""
    if t.dtype is torch.bfloat16:  # of which NumPy knows only through another package
        return _array(t.view(torch.int16)).view(importlib.import_module("ml_dtypes").bfloat16)
    return _array(t)


def tensor(a: Any) -> Tensor:
    """The array's memory as a tensor."""
    if a.dtype.name == "bfloat16":
        return _tensor(a.view(np.int16)).view(torch.bfloat16)
    return _tensor(a)


def _array(t: Tensor) -> Any:
    import cupy

    return cupy.from_dlpack(t)


def _tensor(a: Any) -> Tensor:
    return from_dlpack(a)
