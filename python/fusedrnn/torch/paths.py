"""Which path a layer takes, and what becomes of fallbacks."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

FUSED = "fused"


class Fallback(UserWarning):
    """A layer ran PyTorch's own implementation."""


class _Settings(threading.local):
    forced = False


_settings = _Settings()
_errors = False
_told: set[tuple[str, str]] = set()


def set_fallback_errors(on: bool) -> None:
    """Whether a fallback is a RuntimeError; else it warns, once for each kind of layer and reason."""
    global _errors
    _errors = bool(on)


@contextlib.contextmanager
def fallback() -> Iterator[None]:
    """Within the block the calling thread's layers run PyTorch's own implementation, without a warning."""
    before, _settings.forced = _settings.forced, True
    try:
        yield
    finally:
        _settings.forced = before


def forced() -> bool:
    """Whether the calling thread is within ``fallback()``."""
    return _settings.forced


def tell(kind: str, reason: str) -> None:
    """Say that a layer falls back, or refuse."""
    text = f"{kind} runs PyTorch's own implementation: {reason}"
    if _errors:
        raise RuntimeError(text)
    if (kind, reason) not in _told:
        _told.add((kind, reason))
        warnings.warn(text, Fallback, stacklevel=4)


def unsupported(tensors: tuple[Any, ...]) -> str | None:
    """Why the kernels cannot take these tensors, or None. The first is the input, whose dtype rules."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is at work"
    dtype = tensors[0].dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return f"the dtype is {dtype}"
    for t in tensors:
        if t is None:
            continue
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return f"a tensor is a {type(t).__name__}"
        if t.device.type != "cpu":
            return f"the device is {t.device.type}"
        if t.layout is not torch.strided or t.is_neg():
            return "a tensor's memory is not plainly strided"
    return None
