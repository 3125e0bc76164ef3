"""Tensors on a GPU as the arrays of the CUDA backend, which are CuPy's: both share their memory.

Experimental: no kernel has run on a GPU yet (docs/cuda.md).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fusedrnn import backends
from fusedrnn.backends import cuda
from fusedrnn.backends.cuda import cupy_device
from fusedrnn.backends.protocol import Backend

HALVES = (torch.float16, torch.bfloat16)  # dtypes that only a GPU's kernels take


def backend() -> Backend:
    """The CUDA backend."""
    return backends.get("cuda")


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Within the block CuPy works on this GPU, on PyTorch's current stream and with PyTorch's memory; for the
    CPU there is nothing to do.

    So nothing waits, a graph that PyTorch captures has it all, and memory goes back to where it came from.
    """
    if device.type == "cpu":
        yield
        return
    import cupy

    pointer = torch.cuda.current_stream(device).cuda_stream
    stream = SimpleNamespace(__cuda_stream__=lambda: (0, pointer))  # older PyTorch has no such method
    with (
        torch.cuda.device(device),
        cupy.cuda.Device(device.index),
        cupy.cuda.Stream.from_external(stream),
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
    name = str(dtype).removeprefix("torch.")
    if dtype not in HALVES or name in [known.name for known in cuda.dtypes_of(cupy_device.current())]:
        return None
    return "it needs compute capability 8.0, and bfloat16 the package ml_dtypes"


def array(t: Tensor) -> Any:
    """The tensor's memory as an array, strides and all."""
    import cupy

    if t.dtype is torch.bfloat16:  # which CuPy does not take from DLPack in all versions
        return cupy.from_dlpack(t.view(torch.int16)).view(importlib.import_module("ml_dtypes").bfloat16)
    return cupy.from_dlpack(t)


def tensor(a: Any) -> Tensor:
    """The array's memory as a tensor."""
    if a.dtype.name == "bfloat16":
        return from_dlpack(a.view(np.int16)).view(torch.bfloat16)
    return from_dlpack(a)
