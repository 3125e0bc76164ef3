"""Which array module an array belongs to: the one place where CuPy will come in."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

import numpy as np

gpu_enable = False  # there is no CUDA backend yet


def get_array_module(x: Any) -> ModuleType:
    """NumPy, for every array and variable that can exist here."""
    return np


def require_gpu(what: str) -> NoReturn:
    """Refuse ``what``, by name."""
    raise NotImplementedError(f"{what}: the CUDA backend does not exist yet; arrays live on the CPU")
