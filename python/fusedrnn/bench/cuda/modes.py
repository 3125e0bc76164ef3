"""The precisions in which a case runs: for PyTorch a dtype and a switch, for ours a dtype and a precision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from fusedrnn.backends.cuda import PRECISION


class Mode(NamedTuple):
    """One precision."""

    dtype: str  # of all arrays
    itemsize: int
    tf32: bool  # whether PyTorch may round the factors of float32 products to TF32, as it does by default
    precision: str  # ours, where the arrays are float32
    tolerance: float  # of every library, relative to a tensor's largest entry; rounding adds up over T


MODES = {
    "fp32": Mode("float32", 4, False, "ieee", 1e-4),
    "tf32": Mode("float32", 4, True, "tf32", 2e-2),
    "bf16": Mode("bfloat16", 2, False, "bf16", 1e-1),
    "fp16": Mode("float16", 2, False, "fp16", 2e-2),
}


@contextlib.contextmanager
def use(mode: Mode) -> Iterator[None]:
    """Within the block PyTorch and our backend multiply as the mode says."""
    import torch

    # Not by torch.backends.cudnn.allow_tf32, which refuses once somebody has called disable_global_flags().
    products: Any = torch.backends.cuda.matmul
    before = torch.backends.cudnn.allow_tf32, products.allow_tf32
    with environment(PRECISION, mode.precision):
        try:
            torch._C._set_cudnn_allow_tf32(mode.tf32)
            products.allow_tf32 = mode.tf32
            yield
        finally:
            torch._C._set_cudnn_allow_tf32(before[0])
            products.allow_tf32 = before[1]


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Within the block an environment variable is this."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
