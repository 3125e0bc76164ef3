"""One layer in one direction as registered operators, which ``torch.compile`` takes into its graph whole.

``torch.ops.fusedrnn.recurrence`` and ``recurrence_backward`` are functions of their tensors alone: fixed
arity, no aliases, nothing kept between calls, so weights are packed in every call. What forward saves is an
output of its own, whose size follows from the sizes of the inputs. A missing result is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusedrnn import backends
from fusedrnn.backends.protocol import NEED, Regularization, Weights
from fusedrnn.torch.recurrence import CELLS, TWICE, known, sequence, whole

More = TypeVar("More", "ForwardInputs", "BackwardInputs")

_INPUTS = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? gain_ih, Tensor? gain_hh, Tensor? gain_c, Tensor? bias_c,"
    " Tensor? lengths, Tensor? reset, Tensor? seed"
)
# rates: of recurrent dropout and of zoneout of h and c, or empty; stream: of layer and direction.
_OPTIONS = "int? detach_every=None, float[] rates=[], int stream=0"

torch.library.define(
    "fusedrnn::recurrence",
    f"({_INPUTS}, str cell, bool reverse, bool return_states, bool save, {_OPTIONS})"
    " -> (Tensor y, Tensor hT, Tensor cT, Tensor h_states, Tensor c_states, Tensor tape)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fusedrnn::recurrence_backward",
    f"({_INPUTS}, Tensor y, Tensor tape, Tensor? dy, Tensor? dhT, Tensor? dcT, Tensor? dh_states,"
    f" Tensor? dc_states, str cell, bool reverse, bool[10] need, {_OPTIONS})"
    " -> (Tensor dx, Tensor dweight_ih, Tensor dweight_hh, Tensor dbias_ih, Tensor dbias_hh, Tensor dgain_ih,"
    " Tensor dgain_hh, Tensor dgain_c, Tensor dbias_c, Tensor dh0, Tensor dc0)",
    tags=torch.Tag.pt2_compliant_tag,
)


class Inputs(NamedTuple):
    """The arguments that both operators begin with; what there is not is None."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    gain_ih: Tensor | None
    gain_hh: Tensor | None
    gain_c: Tensor | None
    bias_c: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    seed: Tensor | None

    @property
    def weights(self) -> Weights:
        return Weights(*[getattr(self, name) for name in Weights._fields])

    def arrays(self) -> tuple[Any, Any, Any]:
        """x, the weights and the initial state as the backends take them."""
        state0 = tuple([whole(s) for s in (self.h0, self.c0) if s is not None])
        return sequence(self.x), Weights(*map(whole, self.weights)), state0 or None

    def options(self, call: Any, return_states: bool) -> dict[str, Any]:
        """Those of the backends' forward, but ``reverse``."""
        options = {
            "lengths": self.lengths,
            "reset": self.reset,
            "return_states": return_states,
            "detach_every": call.detach_every,
            "regularization": _regularization(call, self.seed),
        }
        return known(options, self.x)


class ForwardInputs(NamedTuple):
    """What else ``recurrence`` takes. Arguments that have their default may be left out in a call."""

    cell: str
    reverse: bool
    return_states: bool
    save: bool
    detach_every: int | None = None
    rates: Sequence[float] = ()
    stream: int = 0


class BackwardInputs(NamedTuple):
    """What else ``recurrence_backward`` takes."""

    y: Tensor
    tape: Tensor
    dy: Tensor | None
    dhT: Tensor | None
    dcT: Tensor | None
    dh_states: Tensor | None
    dc_states: Tensor | None
    cell: str
    reverse: bool
    need: list[bool]  # x, the weights, the state
    detach_every: int | None = None
    rates: Sequence[float] = ()
    stream: int = 0


def _split(arguments: tuple[Any, ...], rest: type[More]) -> tuple[Inputs, More]:
    n = len(Inputs._fields)
    return Inputs(*arguments[:n]), rest(*arguments[n:])


def results(cell: str, return_states: bool) -> tuple[bool, ...]:
    """Which there are of y, hT, cT, h_states and c_states."""
    two = len(CELLS[cell].states) == 2
    return True, True, two, return_states, two and return_states


def _regularization(call: ForwardInputs | BackwardInputs, seed: Any) -> Regularization | None:
    if not call.rates:
        return None
    recurrent_dropout, zoneout_h, zoneout_c = call.rates
    return Regularization(recurrent_dropout, zoneout_h, zoneout_c, seed, call.stream)


def tape_width(call: ForwardInputs | BackwardInputs, hidden_size: int) -> int:
    """Of a tape, for each step and row; 0 where the backend has none in an array, and runs forward again."""
    width = getattr(backends.usable(None), "tape_width", None)
    if width is None:
        return 0
    # Whether a seed is there makes no difference: rates that do nothing are not passed.
    return int(width(CELLS[call.cell], hidden_size, _regularization(call, 0)))


@torch.library.impl("fusedrnn::recurrence", "cpu")
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    given, call = _split(arguments, ForwardInputs)
    backend, kind = backends.usable(None), CELLS[call.cell]
    x, weights, state0 = given.arrays()
    save = call.save and hasattr(backend, "tape_width")
    out = backend.forward(
        kind,
        x,
        backend.pack(kind, weights),
        state0,
        reverse=call.reverse,
        save="array" if save else None,
        **given.options(call, call.return_states),
    )
    found = (out.y, *_pair(out.stateT), *_pair(out.states), out.tape if save else None)
    tensors = [given.x.new_empty((0,)) if a is None else torch.from_numpy(a) for a in found]
    if not save:
        tensors[-1] = given.x.new_empty((*given.x.shape[:2], 0))
    return tuple(tensors)


def _pair(states: Any) -> tuple[Any, Any]:
    return (None, None) if states is None else (states[0], states[1] if len(states) == 2 else None)


@torch.library.register_fake("fusedrnn::recurrence")  # type: ignore[untyped-decorator]
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given, call = _split(arguments, ForwardInputs)
    T, B, H = given.x.size(0), given.x.size(1), given.weight_hh.size(1)
    every, one = (T, B, H), (B, H)
    sizes = [
        size if there else (0,)
        for size, there in zip(
            (every, one, one, every, every), results(call.cell, call.return_states), strict=True
        )
    ]
    sizes.append((T, B, tape_width(call, int(H)) if call.save else 0))
    return tuple([given.x.new_empty(size) for size in sizes])


@torch.library.impl("fusedrnn::recurrence_backward", "cpu")
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    given, call = _split(arguments, BackwardInputs)
    backend: Any = backends.usable(None)
    kind, arrays = CELLS[call.cell], given.arrays()
    n = len(kind.states)
    states = call.dh_states is not None or call.dc_states is not None
    options = given.options(call, states)
    if hasattr(backend, "tape") and call.tape.size(2) == tape_width(call, given.weight_hh.size(1)):
        kept = backend.tape(kind, whole(call.tape), whole(call.y), *arrays, reverse=call.reverse, **options)
    else:
        kept = backend.forward(kind, *arrays, reverse=call.reverse, **options).tape
    dx, dweights, dstate0 = backend.backward(
        kept,
        sequence(call.dy),
        (whole(call.dhT), whole(call.dcT))[:n],
        (sequence(call.dh_states), sequence(call.dc_states))[:n] if states else None,
        need=[name for name, wanted in zip(NEED, call.need, strict=True) if wanted],
    )
    found = (dx, *dweights, *_pair(dstate0))
    return tuple([given.x.new_empty((0,)) if a is None else torch.from_numpy(a) for a in found])


@torch.library.register_fake("fusedrnn::recurrence_backward")  # type: ignore[untyped-decorator]
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given, call = _split(arguments, BackwardInputs)
    state = (given.x.size(1), given.weight_hh.size(1))
    *of_inputs, of_state = call.need
    sizes: list[tuple[Any, ...]] = [
        (0,) if t is None or not wanted else tuple(t.shape)
        for t, wanted in zip((given.x, *given.weights), of_inputs, strict=True)
    ]
    two = len(CELLS[call.cell].states) == 2
    sizes += [state if of_state else (0,), state if of_state and two else (0,)]
    return tuple([given.x.new_empty(size) for size in sizes])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, call = _split(inputs, ForwardInputs)
    ctx.call, ctx.inputs = call, len(inputs)
    y, tape = output[0], output[-1]
    there = results(call.cell, call.return_states)
    ctx.mark_non_differentiable(
        *[t for t, is_there in zip(output, there, strict=False) if not is_there], tape
    )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, y, tape)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    call = ctx.call
    n = 3 + len(Weights._fields)
    x, h0, c0, *weights = wanted = ctx.needs_input_grad[:n]
    found = torch.ops.fusedrnn.recurrence_backward(
        *ctx.saved_tensors,
        *grads[:5],
        call.cell,
        call.reverse,
        [x, *weights, h0 or c0],
        call.detach_every,
        call.rates,
        call.stream,
    )
    dx, *dweights, dh0, dc0 = found
    gradients = (dx, dh0, dc0, *dweights)
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *(None,) * (ctx.inputs - n))


def _twice(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(TWICE)


torch.library.register_autograd("fusedrnn::recurrence", _differentiate, setup_context=_keep)
torch.library.register_autograd("fusedrnn::recurrence_backward", _twice)
