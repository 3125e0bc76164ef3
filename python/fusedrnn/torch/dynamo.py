"""What the layers do while ``torch.compile`` or ``torch.export`` traces them.

The code here does not read values, which are not known then. The operators do so when they run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.torch import paths
from fusedrnn.torch.ops import Weights

# The options of a call with default values.
NONE = {"lengths": None, "reset": None, "return_states": False, "detach_every": None}


def unsupported(input: Any, state: tuple[Any, ...] | None, weights: list[Weights], key: str) -> str | None:
    """Why the operators do not support this call of the cell ``key``, or None. The layer checks sizes."""
    if isinstance(input, PackedSequence):
        return "a PackedSequence; pass padded input and lengths="
    states = [*zip(paths.STATES, state or (), strict=False)]
    tensors = [input, *(state or ()), *(w for each in weights for w in each if w is not None)]
    if not all(isinstance(t, Tensor) for t in tensors):
        return "the input or the state is not made of tensors"
    low = input.dtype is torch.bfloat16 and paths.has_bfloat16(key)
    if not low and input.dtype not in (torch.float32, torch.float64):
        return f"the dtype is {input.dtype}"
    for name, t in [*states, *[("a weight", w) for w in tensors[1 + len(states) :]]]:
        if t.dtype != input.dtype:
            return f"{name} is {t.dtype}, the input is {input.dtype}"
    if any(t.device.type != "cpu" for t in tensors):
        return f"the device is {input.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return None


@_disable_dynamo  # torch.compiler.disable would import the compiler, which takes a second
def _outside(module: Any, *args: Any, **options: Any) -> Any:
    return module.forward(*args, **options)


def leave_graph(module: Any, reason: str, *args: Any, **options: Any) -> Any:
    """Break the graph and run without the compiler; with ``fullgraph=True`` this raises an error."""
    text = f"fusedrnn: {type(module).__name__} does not compile here: {reason}"
    if not torch.compiler.is_dynamo_compiling():  # torch.export, which cannot break the graph
        raise RuntimeError(text)
    torch._dynamo.graph_break(msg=text)
    return _outside(module, *args, **options)


def leave_alone(function: Callable[..., Any]) -> None:
    """Let the compiler run a function, and all that it calls, without tracing."""
    frames = torch._C._dynamo.eval_frame
    with contextlib.suppress(AttributeError):  # PyTorch before 2.7: the compiler tries and stops
        skip = frames._FrameAction.SKIP
        strategy = frames._FrameExecStrategy(skip, skip)
        frames.set_code_exec_strategy(function.__code__, strategy)


def call(module: Any, input: Any, hx: Any, **options: Any) -> Any:
    """``forward`` of a named layer or cell; a call that the operators do not support breaks the graph."""
    if torch.onnx.is_in_onnx_export():  # which knows only PyTorch's operators
        if given := paths.asked_for(options) or module._only_ours():
            raise RuntimeError(f"{given}: ONNX export takes torch.nn's layer, which has none; see to_torch")
        return module.torch_class.forward(module, input, hx)
    weights = module._weights()
    state0 = None if hx is None else paths.state(hx, module.mode == "LSTM")
    reason = unsupported(input, state0, weights, module._key)
    if reason is None:
        reason = module._misshapen(input, state0)
    if reason is not None:
        return leave_graph(module, reason, input, hx, **options)
    module.last_path = paths.FUSED
    return module._run(input, state0, weights, **({"options": options} if options else {}))
