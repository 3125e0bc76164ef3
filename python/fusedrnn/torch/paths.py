"""Which implementation a layer runs, and how fallbacks are reported."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import backends
from fusedrnn.backends.arguments import check_bool
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.cells import Cell
from fusedrnn.torch import gpu
from fusedrnn.torch.keys import CELLS

FUSED = "fused"
STEPS = "its steps in PyTorch's operations"
STATES = ("h_0", "c_0")  # PyTorch's names of what a state is made of


class FallbackWarning(UserWarning):
    """A layer ran PyTorch's implementation, or its steps in PyTorch's operations, instead of our kernels."""


class _Settings(threading.local):
    forced = False


_settings = _Settings()
_errors = False
_told: set[tuple[str, str]] = set()


def set_fallback_errors(on: bool) -> None:
    """Set whether a fallback raises a RuntimeError. Otherwise it warns once for each class and reason."""
    global _errors
    _errors = check_bool("on", on)


@contextlib.contextmanager
def fallback() -> Iterator[None]:
    """Within the block, layers of the calling thread run PyTorch's implementation, without a warning."""
    before, _settings.forced = _settings.forced, True
    try:
        yield
    finally:
        _settings.forced = before


def fall_back(module: torch.nn.Module, reason: str, original: Callable[..., Any], *args: Any) -> Any:
    """Run PyTorch's implementation and warn, or raise an error. Only for ``forward``."""
    output = original(*args)
    module.__dict__["last_path"] = f"fallback: {reason}"
    tell(module, reason)
    return output


def record(module: torch.nn.Module, reason: str | None) -> None:
    """Record that a layer runs our kernels, or, with a reason, its steps in PyTorch's operations.

    With a reason it warns, or raises an error. Only for ``forward``.
    """
    path = FUSED if reason is None else f"steps in PyTorch: {reason}"
    if torch.compiler.is_compiling():  # the operator warns when it runs
        module.last_path = path  # type: ignore[assignment]
        return
    module.__dict__["last_path"] = path
    if reason is not None:
        tell(module, reason, STEPS)


def all_asked_for(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were passed to a call."""
    return {name: value for name, value in options.items() if value is not None and value is not False}


def asked_for(options: dict[str, Any]) -> str | None:
    """The name of the first of these options, or None."""
    return next(iter(all_asked_for(options)), None)


def tell(module: torch.nn.Module | str, reason: str, what: str = "PyTorch's own implementation") -> None:
    """Warn of a fallback, once for each class (or name) and reason, or raise an error."""
    if _settings.forced:
        return
    kind = module if isinstance(module, str) else type(module).__name__
    text = f"{kind} runs {what}: {reason}"
    if _errors:
        raise RuntimeError(text)
    if (kind, reason) not in _told:
        _told.add((kind, reason))
        # The caller of the module, two frames above forward.
        warnings.warn(text, FallbackWarning, stacklevel=6)


def mode() -> str | None:
    """Why no kernel can run now with any tensors, or None."""
    if _settings.forced:
        return "fusedrnn.torch.fallback()"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is at work"
    return None


def vmapped() -> bool:
    """Whether torch.func.vmap is active, which PyTorch's layers do not support."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def unrecordable(tensors: Sequence[Tensor]) -> str | None:
    """Why PyTorch's operations do not support these tensors either, or None."""
    if _settings.forced:
        return "fusedrnn.torch.fallback()"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces"
    first = tensors[0]
    if not first.is_floating_point() or any(t.dtype is not first.dtype for t in tensors):
        return "dtypes differ, or are not of floating-point numbers"
    return None if all(t.device == first.device for t in tensors) else "devices differ"


def has_bfloat16(key: str) -> bool:
    """Whether the CPU kernels of a cell support bfloat16 on this processor."""
    backend = backends.usable(None)
    return key in CELLS and isinstance(backend, CpuBackend) and backend.has_bfloat16()


has_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as ``ops.refused``


def unsupported(
    dtype: torch.dtype,
    device: torch.device,
    tensors: Iterable[Tensor | None],
    names: Iterable[str],
    key: str = "",
    other: str = "the input",
) -> str | None:
    """Why the kernels do not support these tensors, or None.

    All must have the dtype and device of ``other``. ``key`` is that of a layer's cell, whose CPU kernels may
    support bfloat16.
    """
    on_cpu = device.type == "cpu"
    if (
        dtype is not torch.float32
        and dtype is not torch.float64
        and not (dtype is torch.bfloat16 and has_bfloat16(key) if on_cpu else dtype in gpu.HALVES)
    ):
        return f"the dtype is {dtype}"
    if not on_cpu:
        if device.type != "cuda":
            return f"the device is {device.type}"
        if (reason := gpu.backend().unavailable()) is not None:
            return f"the device is cuda: {reason}"
        if (reason := gpu.lacks(dtype)) is not None:
            return f"the dtype is {dtype}: {reason}"
    for i, t in enumerate(tensors):
        if t is None:
            continue
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter and not _traced(t):
            return f"a tensor is a {type(t).__name__}, a subclass of torch.Tensor"
        if not t.is_cpu if on_cpu else t.device != device:
            return f"the devices are {device} and {t.device}"
        if t.layout is not torch.strided or t.is_nested or t.is_neg():
            return "a tensor's memory is not plainly strided"
        if t.dtype is not dtype:
            return f"{[*names][i]} is {t.dtype}, {other} is {dtype}"
    return None


def unsupported_weights(
    input: Tensor, weights: Sequence[Any], cell: Cell, I: int, H: int, P: int, key: str = ""
) -> str | None:
    """Why the kernels do not support these weights of one layer and direction with this input, or None.

    Raises:
        RuntimeError: One has a wrong shape; PyTorch's implementation may read past its end.
    """
    reason = unsupported(input.dtype, input.device, weights, cell.blocks, key)
    if reason is not None:
        return reason
    for w, (name, shape) in zip(weights, _shapes(cell, I, H, P), strict=True):
        if w is not None and w.shape != shape:
            raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(w.shape)}")
    return None


@functools.cache
def _shapes(cell: Cell, I: int, H: int, P: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The shapes of the weights by name."""
    return tuple(cell.shapes(I, H, P).items())


def _traced(t: Any) -> bool:
    """Whether this represents a plain tensor while PyTorch traces."""
    return type(t).__module__.startswith("torch._subclasses") and isinstance(t, Tensor)


def is_proxy(value: Any) -> bool:
    """Whether torch.fx traces and this represents a value."""
    return isinstance(value, torch.fx.Proxy)


def call_module(module: torch.nn.Module, input: Any, *args: Any, **options: Any) -> Any:
    """Add a call of a layer to the graph of torch.fx. The layer is a leaf, as in ``torch.nn``."""
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *args), options)  # type: ignore[attr-defined]


def autocast(t: Tensor) -> bool:
    """Whether autocast would change this tensor's dtype."""
    kind, dtype = t.device.type, t.dtype
    return (
        torch.is_autocast_enabled(kind)
        and dtype.is_floating_point
        and dtype is not torch.float64
        and dtype is not torch.get_autocast_dtype(kind)
    )


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block without autocast. PyTorch has no autocast for some devices, such as meta."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def lowers(key: str) -> bool:
    """Whether autocast has CPU calls of the cell ``key`` run in bfloat16, and the kernels support that."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and mode() is None
        and has_bfloat16(key)
    )


def lowered(input: Any, state0: Any, weights: list[Any], key: str = "") -> tuple[Any, Any, list[Any]]:
    """The tensors of a call in the dtype of autocast, if the kernels support that: those of a GPU, or on a
    CPU those of the cell ``key``."""
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor):
        return input, state0, weights
    kind = data.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return input, state0, weights
    dtype = torch.get_autocast_dtype(kind)
    if data.is_cpu and (data.dtype is torch.float16 or not lowers(key)):
        return input, state0, weights
    data = _lower(data, dtype)
    return (
        input._replace(data=data) if isinstance(input, PackedSequence) else data,
        None if state0 is None else tuple([_lower(s, dtype) for s in state0]),
        [tuple([_lower(w, dtype) for w in given]) for given in weights],
    )


def widened(input: Any, state0: Any, weights: Sequence[Sequence[Any]]) -> tuple[Any, Any, torch.dtype | None]:
    """Input and state in float32, and the dtype of the results, or None to leave that as it is.

    Only for layers whose float32 state stays float32 within autocast in PyTorch. There the results have the
    dtype of c_0, h_0 or without a state of the input. Only CPU tensors in float32 or autocast's dtype change.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    tensors, weight = (data, *(state0 or ())), weights[0][0]
    if not torch.is_autocast_enabled("cpu") or not all(
        isinstance(t, Tensor) and t.is_cpu for t in (*tensors, weight)
    ):
        return input, state0, None
    low = torch.get_autocast_dtype("cpu")
    dtypes = {t.dtype for t in tensors}
    if low not in dtypes or not dtypes <= {low, torch.float32} or weight.dtype is not torch.float32:
        return input, state0, None
    data = data.float()
    return (
        input._replace(data=data) if isinstance(input, PackedSequence) else data,
        None if state0 is None else tuple([s.float() for s in state0]),
        tensors[-1].dtype,
    )


def rounded(result: Any, dtype: torch.dtype | None) -> Any:
    """What ``forward`` returns, in this dtype; with None as it is."""
    if dtype is None:
        return result
    if isinstance(result, PackedSequence):
        return result._replace(data=result.data.to(dtype))
    if isinstance(result, tuple):
        return tuple([rounded(each, dtype) for each in result])
    return result.to(dtype)


def _lower(t: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in the dtype. Like autocast, do not change float64 and other objects."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype is torch.float64:
        return t
    return t.to(dtype)


def state(hx: Any, pair: bool) -> tuple[Any, ...]:
    """The tensors of a state as a tuple, for the LSTM from a pair; they are not checked here."""
    return tuple(hx) if pair and isinstance(hx, tuple | list) else (hx,)
