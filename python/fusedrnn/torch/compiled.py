"""What the layers do while ``torch.compile`` or ``torch.export`` traces them: calls of ``ops``.

Nothing here looks at values, which are not known then; the operators do, when they run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.torch import ops  # noqa: F401, registers the operators
from fusedrnn.torch.paths import FUSED


def unsupported(input: Any, state: tuple[Any, ...], weights: list[Any]) -> str | None:
    """Why the operators cannot take this call, or None; what sizes have to be is the layer's to say."""
    if isinstance(input, PackedSequence):
        return "a PackedSequence; pass padded input and lengths="
    tensors = [input, *state, *(w for w in weights if w is not None)]
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
    weights: list[Tensor | None],
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    return_states: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One layer in one direction: y, the final state, the states of every step or nothing."""
    h0, c0 = (None, None) if state0 is None else state0 if len(state0) == 2 else (state0[0], None)
    inputs = [t for t in (x, h0, c0, *weights) if t is not None]
    save = not recompute and torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y, hT, cT, h_states, c_states, _ = torch.ops.fusedrnn.recurrence(
        x, h0, c0, *weights, lengths, reset, cell, reverse, return_states, save
    )
    if cell == "LSTM":
        return y, (hT, cT), (h_states, c_states) if return_states else ()
    return y, (hT,), (h_states,) if return_states else ()


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


def layer(module: Any, input: Any, hx: Any, lengths: Any, reset: Any, return_states: bool) -> Any:
    """``Recurrent.forward``; what the operators cannot take breaks the graph."""
    weights: list[Any] = []
    for names in module._all_weights:
        weights += [getattr(module, name) for name in names] + [None] * (4 - len(names))
    state = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    reason = "proj_size" if module.proj_size else unsupported(input, state, weights)
    if reason is None:
        reason = module._misshapen(input, state or None)
    if reason is not None:
        return _break(module, reason, input, hx, lengths=lengths, reset=reset, return_states=return_states)
    module.last_path = FUSED
    batched, mode, batch_first = input.dim() == 3, module.mode, module.batch_first
    x = input if batched else input.unsqueeze(1)
    if batched and batch_first:
        x = x.transpose(0, 1)
    state0 = state if batched else tuple(s.unsqueeze(1) for s in state)
    T, B = x.size(0), x.size(1)
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths: expected whole numbers, got {lengths.dtype}")
        if lengths.shape != ((B,) if batched else ()):
            raise ValueError(f"lengths: expected shape {(B,) if batched else ()}, got {tuple(lengths.shape)}")
        lengths = lengths.reshape(B)
    if reset is not None:
        reset = torch.as_tensor(reset).detach()
        expected = (T,) if not batched else (B, T) if batch_first else (T, B)
        if reset.shape != expected:
            raise ValueError(f"reset: expected shape {expected}, got {tuple(reset.shape)}")
        reset = reset.unsqueeze(1) if not batched else reset.transpose(0, 1) if batch_first else reset
    D = 2 if module.bidirectional else 1
    ends: list[tuple[Tensor, ...]] = []
    every: list[tuple[Tensor, ...]] = []
    for k in range(0, len(weights) // 4, D):
        if k and module.dropout:
            x = torch.nn.functional.dropout(x, module.dropout, module.training)
        halves = []
        for j in range(k, k + D):
            y, end, states = recurrence(
                mode,
                x,
                tuple(s[j] for s in state0) or None,
                weights[4 * j : 4 * j + 4],
                lengths,
                reset,
                j > k,
                return_states,
                module.recompute,
            )
            halves.append(y)
            ends.append(end)
            every.append(states)
        x = halves[0] if D == 1 else torch.cat(halves, 2)
    final = tuple(torch.stack(s) for s in zip(*ends, strict=True))
    states = tuple(torch.stack(s) for s in zip(*every, strict=True))
    if lengths is not None and return_states:
        padding = torch.arange(T)[:, None] >= lengths
        states = tuple(s.masked_fill(padding[:, :, None], 0) for s in states)
    if not batched:
        x, final = x.squeeze(1), tuple(s.squeeze(1) for s in final)
        states = tuple(s.squeeze(2) for s in states)
    elif batch_first:
        x, states = x.transpose(0, 1), tuple(s.transpose(1, 2) for s in states)
    two = mode == "LSTM"
    if return_states:
        return x, final if two else final[0], states if two else states[0]
    return x, final if two else final[0]


def cell(module: Any, input: Any, hx: Any) -> Any:
    """``CellMixin.forward``."""
    weights = [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh]
    state = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    reason = unsupported(input, state, weights)
    if reason is None:
        reason = module._misshapen(input, state or None)
    if reason is not None:
        return _break(module, reason, input, hx)
    module.last_path = FUSED
    mode = (
        "LSTM"
        if isinstance(module, torch.nn.LSTMCell)
        else "GRU"
        if isinstance(module, torch.nn.GRUCell)
        else "RNN_RELU"
        if module.nonlinearity == "relu"
        else "RNN_TANH"
    )
    batched = input.dim() == 2
    x = input if batched else input[None]
    state0 = state if batched else tuple(s[None] for s in state)
    _, end, _ = recurrence(mode, x[None], state0 or None, weights)
    if not batched:
        end = tuple(s[0] for s in end)
    return end if mode == "LSTM" else end[0]
