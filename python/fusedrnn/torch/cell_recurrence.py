"""One layer in one direction of any cell in ``torch.autograd``: its operators joined to a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.torch import cell_ops
from fusedrnn.torch.cell_ops import CellCall
from fusedrnn.torch.recurrence import IN_PLACE

OPTIONS = 10  # of Recurrence, before its tensors


def recurrence(call: CellCall, states: int, return_states: bool) -> list[Tensor]:
    """Run one layer in one direction of a cell with so many states.

    Returns:
        y (T, B, P); then the final state, (B, P) and (B, H) each; then with ``return_states`` those of every
        step, with T first.
    """
    tensors = [call.x, *call.state0, *call.weights, *call.scalars]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        counts = len(call.state0), len(call.weights), 1 + states * (1 + return_states)
        more = call.lengths, call.reset, call.seed
        return list(Recurrence.apply(*counts, return_states, *call[7:], *tensors, *more))  # type: ignore[no-untyped-call]
    return cell_ops.forward(call, return_states, False)


def _call(n0: int, nw: int, options: Sequence[Any], tensors: Sequence[Any]) -> CellCall:
    """The call of the arguments of ``Recurrence``."""
    x, *rest = tensors[:-3]
    parts = rest[:n0], rest[n0 : n0 + nw], rest[n0 + nw :]
    return CellCall(x, *parts, *tensors[-3:], *options)


class Recurrence(torch.autograd.Function):
    """The node: what backward needs are tensors, asked for their memory anew when it runs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """The results of a call, by the kernels."""
        n0, nw, results, return_states, *options = arguments[:OPTIONS]
        tensors = arguments[OPTIONS:]
        outputs = cell_ops.forward(_call(n0, nw, options, tensors), return_states, True)
        tape = outputs[results] if len(outputs) > results else None
        ctx.save_for_backward(*tensors, outputs[0], tape)
        ctx.counts, ctx.options = (n0, nw), options
        ctx.set_materialize_grads(False)
        return tuple(outputs[:results])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of every argument, None for those that need none."""
        try:
            *tensors, y, tape = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" in str(error):
                raise RuntimeError(f"{error}\n{IN_PLACE}") from error
            raise
        need = list(ctx.needs_input_grad[OPTIONS:-3])
        n0, nw = ctx.counts
        call, again = _call(n0, nw, ctx.options, tensors), torch.is_grad_enabled()
        found: Sequence[Tensor | None]
        if torch.compiler.is_compiling() or not (again or _batched(upstream)):
            found = cell_ops.backward(call, y, tape, list(upstream), need)
        else:  # create_graph, or a batch of upstream gradients: PyTorch's operations do both
            with torch.enable_grad():
                own = [
                    t if t is None or not n else t.view_as(t) if again else t.detach().requires_grad_()
                    for t, n in zip(tensors[:-3], need, strict=True)
                ]
            found = cell_ops.gradients_of_steps(cell_ops.with_tensors(call, own), upstream, own, again)
        grads = [d if n else None for d, n in zip(found, need, strict=True)]
        return (*[None] * OPTIONS, *grads, None, None, None)


def _batched(upstream: Sequence[Tensor | None]) -> bool:
    return not all(d is None or torch._C._has_storage(d) for d in upstream)
