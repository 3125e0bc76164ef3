"""One layer in one direction as registered operators, which ``torch.compile`` takes into its graph whole.

``torch.ops.fusedrnn.recurrence`` and ``recurrence_backward`` are functions of their tensors alone: fixed
arity, no aliases, nothing kept between calls, so weights are packed in every call. What forward saves is an
output of its own, whose size follows from the sizes of the inputs. A missing result is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import backends, cells
from fusedrnn.backends.protocol import NEED, Array, State, Weights
from fusedrnn.torch.recurrence import TWICE, array

CELLS: dict[str, cells.Cell] = {
    "LSTM": cells.LSTM(),
    "GRU": cells.GRU(),
    "RNN_TANH": cells.RNN(),
    "RNN_RELU": cells.RNN(relu=True),
}

_INPUTS = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? lengths, Tensor? reset"
)

_NEED = (*NEED[:5], "state0")  # of cells without layer norm

torch.library.define(
    "fusedrnn::recurrence",
    f"({_INPUTS}, str cell, bool reverse, bool return_states, bool save)"
    " -> (Tensor y, Tensor hT, Tensor cT, Tensor h_states, Tensor c_states, Tensor tape)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fusedrnn::recurrence_backward",
    f"({_INPUTS}, Tensor y, Tensor tape, Tensor? dy, Tensor? dhT, Tensor? dcT, Tensor? dh_states,"
    " Tensor? dc_states, str cell, bool reverse, bool[6] need)"
    " -> (Tensor dx, Tensor dweight_ih, Tensor dweight_hh, Tensor dbias_ih, Tensor dbias_hh, Tensor dh0,"
    " Tensor dc0)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _sequence(t: Tensor | None) -> Any:
    """As an array that kernels read where it lies, if its features are contiguous."""
    if t is None:
        return None
    t = t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()
    return array(t) if t.requires_grad else t.numpy()


def _whole(t: Tensor | None) -> Any:
    if t is None:
        return None
    t = t.contiguous()
    return array(t) if t.requires_grad else t.numpy()


def _state0(h0: Tensor | None, c0: Tensor | None) -> State | None:
    return None if h0 is None else (_whole(h0),) if c0 is None else (_whole(h0), _whole(c0))


def _rows(lengths: Tensor | None, reset: Tensor | None) -> tuple[Array | None, Array | None]:
    if reset is not None and reset.dtype is not torch.bool:
        if not bool(((reset == 0) | (reset == 1)).all()):
            raise ValueError("reset: expected booleans, or 0 and 1 alone, got other values")
        reset = reset != 0
    return _whole(None if lengths is None else lengths.to(torch.int64)), _whole(reset)


def tape_width(cell: str, hidden_size: int) -> int:
    """Of a tape, for each step and row; 0 where the backend has none in an array, and runs forward again."""
    width = getattr(backends.usable(None), "tape_width", None)
    return 0 if width is None else int(width(CELLS[cell], hidden_size))


@torch.library.impl("fusedrnn::recurrence", "cpu")
def _forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: bool,
    return_states: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    backend, kind = backends.usable(None), CELLS[cell]
    rows, cuts = _rows(lengths, reset)
    save = save and hasattr(backend, "tape_width")
    out = backend.forward(
        kind,
        _sequence(x),
        backend.pack(kind, Weights(*map(_whole, (weight_ih, weight_hh, bias_ih, bias_hh)))),
        _state0(h0, c0),
        lengths=rows,
        reset=cuts,
        reverse=reverse,
        return_states=return_states,
        save="array" if save else None,
    )
    found = (out.y, *_pair(out.stateT), *_pair(out.states), out.tape if save else None)
    tensors = [x.new_empty((0,)) if a is None else torch.from_numpy(a) for a in found]
    if not save:
        tensors[-1] = x.new_empty((*x.shape[:2], 0))
    return tuple(tensors)


def _pair(states: Any) -> tuple[Any, Any]:
    return (None, None) if states is None else (states[0], states[1] if len(states) == 2 else None)


@torch.library.register_fake("fusedrnn::recurrence")  # type: ignore[untyped-decorator]
def _forward_fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: bool,
    return_states: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    T, B, H = x.size(0), x.size(1), weight_hh.size(1)
    two = cell == "LSTM"
    sizes: tuple[tuple[Any, ...], ...] = (
        (T, B, H),
        (B, H),
        (B, H) if two else (0,),
        (T, B, H) if return_states else (0,),
        (T, B, H) if return_states and two else (0,),
        (T, B, tape_width(cell, int(H)) if save else 0),
    )
    return tuple(map(x.new_empty, sizes))


@torch.library.impl("fusedrnn::recurrence_backward", "cpu")
def _backward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    tape: Tensor,
    dy: Tensor | None,
    dhT: Tensor | None,
    dcT: Tensor | None,
    dh_states: Tensor | None,
    dc_states: Tensor | None,
    cell: str,
    reverse: bool,
    need: list[bool],
) -> tuple[Tensor, ...]:
    backend: Any = backends.usable(None)
    kind = CELLS[cell]
    n = len(kind.states)
    rows, cuts = _rows(lengths, reset)
    weights = Weights(*map(_whole, (weight_ih, weight_hh, bias_ih, bias_hh)))
    states = dh_states is not None or dc_states is not None
    common = {"lengths": rows, "reset": cuts, "reverse": reverse, "return_states": states}
    arguments = (_sequence(x), weights, _state0(h0, c0))
    if hasattr(backend, "tape") and tape.size(2) == tape_width(cell, weight_hh.size(1)):
        kept = backend.tape(kind, _whole(tape), _whole(y), *arguments, **common)
    else:
        kept = backend.forward(kind, *arguments, **common).tape
    dx, dweights, dstate0 = backend.backward(
        kept,
        _sequence(dy),
        (_whole(dhT), _whole(dcT))[:n],
        (_sequence(dh_states), _sequence(dc_states))[:n] if states else None,
        need=[name for name, wanted in zip(_NEED, need, strict=True) if wanted],
    )
    found = (dx, *dweights[:4], *_pair(dstate0))
    return tuple(x.new_empty((0,)) if a is None else torch.from_numpy(a) for a in found)


@torch.library.register_fake("fusedrnn::recurrence_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    tape: Tensor,
    dy: Tensor | None,
    dhT: Tensor | None,
    dcT: Tensor | None,
    dh_states: Tensor | None,
    dc_states: Tensor | None,
    cell: str,
    reverse: bool,
    need: list[bool],
) -> tuple[Tensor, ...]:
    state = (x.size(1), weight_hh.size(1))
    sizes: tuple[tuple[Any, ...], ...] = (
        tuple(x.shape) if need[0] else (0,),
        tuple(weight_ih.shape) if need[1] else (0,),
        tuple(weight_hh.shape) if need[2] else (0,),
        tuple(bias_ih.shape) if need[3] and bias_ih is not None else (0,),
        tuple(bias_hh.shape) if need[4] and bias_hh is not None else (0,),
        state if need[5] else (0,),
        state if need[5] and cell == "LSTM" else (0,),
    )
    return tuple(map(x.new_empty, sizes))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.cell, ctx.reverse, return_states, _ = inputs
    y, _, cT, h_states, c_states, tape = output
    two = ctx.cell == "LSTM"
    empty = [
        t
        for t, there in ((cT, two), (h_states, return_states), (c_states, two and return_states))
        if not there
    ]
    ctx.mark_non_differentiable(*empty, tape)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, y, tape)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, h0, c0, *rest = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:7]  # x, h0, c0, the weights
    need = [wanted[0], *wanted[3:7], wanted[1] or wanted[2]]
    dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0 = torch.ops.fusedrnn.recurrence_backward(
        x, h0, c0, *rest, *grads[:5], ctx.cell, ctx.reverse, need
    )
    found = (dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh)
    return (*(g if w else None for g, w in zip(found, wanted, strict=True)), *(None,) * 6)


def _twice(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(TWICE)


torch.library.register_autograd("fusedrnn::recurrence", _differentiate, setup_context=_keep)
torch.library.register_autograd("fusedrnn::recurrence_backward", _twice)
