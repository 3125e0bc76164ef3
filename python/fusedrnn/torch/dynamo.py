"""What the layers do while ``torch.compile`` or ``torch.export`` traces them: calls of ``ops``.

Nothing here looks at values, which are not known then; the operators do, when they run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.backends.protocol import Weights
from fusedrnn.torch import ops, paths
from fusedrnn.torch.recurrence import of_stream, weights_of

# The options of a call without any.
NONE = {"lengths": None, "reset": None, "return_states": False, "detach_every": None, "regularization": None}


def unsupported(input: Any, state: tuple[Any, ...] | None, weights: list[Weights]) -> str | None:
    """Why the operators cannot take this call, or None; what sizes have to be is the layer's to say."""
    if isinstance(input, PackedSequence):
        return "a PackedSequence; pass padded input and lengths="
    tensors = [input, *(state or ()), *(w for four in weights for w in four if w is not None)]
    if not all(isinstance(t, Tensor) for t in tensors):
        return "the input or the state is not made of tensors"
    if input.dtype not in (torch.float32, torch.float64):
        return f"the dtype is {input.dtype}"
    if any(t.dtype != input.dtype for t in tensors):
        return "dtypes differ"
    if any(t.device.type != "cpu" for t in tensors):
        return f"the device is {input.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return None


def recurrence(
    cell: str,
    x: Tensor,
    state0: tuple[Tensor, ...] | None,
    weights: Weights,
    options: dict[str, Any],
    reverse: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """One layer in one direction by the operator: y, the final state, and of every step with
    ``return_states``."""
    h0, c0 = (*(state0 or ()), None, None)[:2]
    regularization = options["regularization"]
    inputs = [t for t in (x, h0, c0, *weights) if t is not None]
    save = not recompute and torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    states = options["return_states"]
    found = torch.ops.fusedrnn.recurrence(
        x,
        h0,
        c0,
        *weights,
        options["lengths"],
        options["reset"],
        None if regularization is None else regularization.seed,
        cell,
        reverse,
        states,
        save,
        options["detach_every"],
        [] if regularization is None else list(regularization[:3]),
        0 if regularization is None else regularization.stream,
    )
    return tuple([t for t, there in zip(found, ops.results(cell, states), strict=False) if there])


@torch.compiler.disable(reason="fusedrnn: see above")  # type: ignore[no-untyped-call, untyped-decorator]
def _outside(module: Any, *args: Any, **options: Any) -> Any:
    return module.forward(*args, **options)


def _break(module: Any, reason: str, *args: Any, **options: Any) -> Any:
    """Leave the graph, and run as without a compiler; with ``fullgraph=True`` that is an error."""
    text = f"fusedrnn: {type(module).__name__} does not compile here: {reason}"
    if not torch.compiler.is_dynamo_compiling():  # torch.export, which has no other way
        raise RuntimeError(text)
    torch._dynamo.graph_break(msg=text)
    return _outside(module, *args, **options)


def layer(module: Any, input: Any, hx: Any, options: dict[str, Any]) -> Any:
    """``Recurrent.forward``; what the operators cannot take breaks the graph."""
    weights = module._weights()
    state0 = None if hx is None else paths.state(hx, module.mode == "LSTM")
    reason = unsupported(input, state0, weights)
    if reason is None:
        reason = module._misshapen(input, state0)
    if reason is not None:
        return _break(module, reason, input, hx, **options)
    module.last_path = paths.FUSED
    options = {**options, "regularization": module._regularization()}
    x, state0, options = module._to_kernels(input, state0, options)

    def run(j: int, reverse: bool, x: Tensor, begin: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        own = of_stream(options, j)
        y, *states = recurrence(module.kind, x, begin, weights[j], own, reverse, module.recompute)
        return y, *[s[None] for s in states]

    return module._from_kernels(input, module._run_layers(x, state0, run))


def cell(module: Any, input: Any, hx: Any) -> Any:
    """``CellMixin.forward``."""
    weights = weights_of(module, Weights._fields)
    state0 = None if hx is None else paths.state(hx, module.mode == "LSTM")
    reason = unsupported(input, state0, [weights])
    if reason is None:
        reason = module._misshapen(input, state0)
    if reason is not None:
        return _break(module, reason, input, hx)
    module.last_path = paths.FUSED
    return module._batched(
        input, state0, lambda x, begin: recurrence(module.mode, x[None], begin, weights, NONE)[1:]
    )
