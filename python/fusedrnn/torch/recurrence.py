"""One layer in one direction in ``torch.autograd``: the operators joined to a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.backends.protocol import Weights
from fusedrnn.torch import ops
from fusedrnn.torch.ops import CELLS, Call, N

TWICE = (
    "fusedrnn: the kernels have no second derivatives; use fusedrnn.torch.to_torch(model), or run forward "
    "within fusedrnn.torch.fallback()"
)
IN_PLACE = (
    "fusedrnn: backward needs the inputs, the weights and the output of the layer as they were; if it is the "
    "output, apply operations that are not in place, as torch.relu for torch.relu_, or clone it before"
)

PLAIN = Weights._fields[:4]  # without layer norm


def weights_of(module: torch.nn.Module, names: Sequence[str] = PLAIN) -> Weights:
    """The weights of one layer and direction, None where there is none, as they are now: a parametrization, a
    functional call or a tied weight may have put others in place of the parameters."""
    own = module._parameters
    return Weights(*[own[name] if name in own else getattr(module, name, None) for name in names])


def recurrence(call: Call, return_states: bool = False) -> list[Tensor]:
    """Run one layer in one direction.

    Returns:
        y (T, B, H); then the final state, (B, H) each; then with ``return_states`` those of every step,
        (T, B, H) each. Of one step the final state alone.
    """
    if torch.is_grad_enabled():
        for t in call[:11]:
            if t is not None and t.requires_grad:
                # A compiler knows no values: it keeps what the longest rows need, or runs forward again.
                if torch.compiler.is_compiling():
                    T, B, _, _ = call.sizes()
                    rows = None if call.recompute else T * B
                else:
                    rows = call.tape_rows()
                return list(Recurrence.apply(*call, return_states, rows))  # type: ignore[no-untyped-call]
    return ops.forward(call, return_states, None)


class Recurrence(torch.autograd.Function):
    """The node: what backward needs are tensors, asked for their memory anew when it runs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        call, (return_states, rows) = Call(*arguments[:N]), arguments[N:]
        outputs = ops.forward(call, return_states, rows)
        n = call.results(return_states)
        tape, tape2 = (*outputs[n:], None, None)[:2]
        # Of biases backward reads the shapes alone: programs may write to them, as with torch.nn's layers.
        ctx.biases = () if call.recompute or call.gain_ih is not None or tape is None else (5, 6)
        kept = [None if k in ctx.biases else t for k, t in enumerate(call[:14])]
        ctx.there = [call[k] is not None for k in ctx.biases]
        ctx.save_for_backward(*kept, outputs[0], tape, tape2)
        ctx.options = call[14:]
        ctx.states = len(CELLS[call.cell].states)
        ctx.set_materialize_grads(False)
        return tuple(outputs[:n])

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        try:
            saved = list(ctx.saved_tensors)
        except RuntimeError as error:
            if "inplace" in str(error):
                raise RuntimeError(f"{error}\n{IN_PLACE}") from error
            raise
        for k, there in zip(ctx.biases, ctx.there, strict=True):
            weight = saved[4]
            saved[k] = weight.new_zeros((weight.size(0),)) if there else None
        dy, *grads = given if saved[0].dim() == 3 else (None, *given)
        of_final = (*grads[: ctx.states], None)[:2]
        of_every = (*grads[ctx.states :], None, None)[:2]
        need = ctx.needs_input_grad[:11]
        run: Any = ops.backward
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            run = Once.apply
        found = run(*saved[:14], *ctx.options, *saved[14:], dy, *of_final, *of_every, need)
        return (*[g if n else None for g, n in zip(found, need, strict=True)], *[None] * (N - 11 + 2))


class Once(torch.autograd.Function):
    """First derivatives, whose own are an error that says what they need."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return ops.backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(TWICE)
