"""One layer in one direction in ``torch.autograd``: the operators as one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fusedrnn.torch import ops
from fusedrnn.torch.keys import CELLS
from fusedrnn.torch.ops import Call

IN_PLACE = (
    "fusedrnn: backward needs the inputs, the weights and the output of the layer as they were; if it is the "
    "output, apply operations that are not in place, as torch.relu for torch.relu_, or clone it before"
)
OPTIONS = 10  # of Recurrence, before its tensors


def recurrence(
    call: Call, return_states: bool = False, packed: Any = None, recorded: bool = False
) -> list[Tensor]:
    """Run one layer in one direction.

    With ``recorded`` it runs step by step in PyTorch's operations, else in the kernels. It records a graph
    unless weights are ``packed``.

    Returns:
        y (T, B, P); then the final state, (B, P) and (B, H) each; then with ``return_states`` those of every
        step, with T first. For one step only the final state.
    """
    if recorded:
        return ops.steps(call, return_states)
    if packed is not None:
        return ops.run(call, return_states, None, packed)
    if torch.is_grad_enabled():
        learned = call.learned()
        for t in learned:
            if t is not None and t.requires_grad:
                # A compiler knows no values: it keeps what the longest rows need, or runs forward again.
                if torch.compiler.is_compiling():
                    T, B, *_ = call.sizes()
                    rows = None if call.recompute else T * B
                    learned = [  # to it one tensor in two places is an error
                        t.view_as(t) if t is not None and any(t is other for other in learned[:k]) else t
                        for k, t in enumerate(learned)
                    ]
                else:
                    rows = call.tape_rows()
                    learned = [  # autograd saves no tensor that was made in inference mode
                        t.clone() if t is not None and t.is_inference() else t for t in learned
                    ]
                counts = len(call.state0), len(call.weights)
                tensors = *learned, call.lengths, call.reset, call.seed
                return list(Recurrence.apply(*counts, return_states, rows, *call[7:], *tensors))  # type: ignore[no-untyped-call]
    return ops.forward(call, return_states, None)


def _call(counts: tuple[int, int], options: Sequence[Any], tensors: Sequence[Any]) -> Call:
    """The call from the tensors that a node keeps: those with gradients, lengths, reset and seed."""
    a = 1 + counts[0]
    b = a + counts[1]
    split = tensors[0], tensors[1:a], tensors[a:b], tensors[b:-3], *tensors[-3:]
    return Call(*split, *options)


class Recurrence(torch.autograd.Function):
    """The node. What backward needs is kept as tensors, whose memory is looked up when it runs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """The results of a call, computed by the kernels."""
        n0, nw, return_states, rows, *options = arguments[:OPTIONS]
        tensors = arguments[OPTIONS:]
        call = _call((n0, nw), options, tensors)
        outputs = ops.forward(call, return_states, rows)
        n = call.results(return_states)
        tape = outputs[n:]
        # Backward reads only the shapes of biases: programs may write to them, as with torch.nn's layers.
        free = call.cell in CELLS and nw < 6 and tape and not call.recompute  # there is no layer norm
        ctx.biases = (3 + n0, 4 + n0) if free else ()
        kept = [None if k in ctx.biases else t for k, t in enumerate(tensors)]
        ctx.there = [tensors[k] is not None for k in ctx.biases]
        ctx.second = [] if torch.compiler.is_compiling() else [_versioned(tensors[k]) for k in ctx.biases]
        ctx.save_for_backward(*kept, outputs[0], *tape)
        ctx.counts, ctx.options = (n0, nw), options
        ctx.set_materialize_grads(False)
        return tuple(outputs[:n])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of every argument, or None if it needs none."""
        try:
            saved = list(ctx.saved_tensors)
        except RuntimeError as error:
            if "inplace" in str(error):
                raise RuntimeError(f"{error}\n{IN_PLACE}") from error
            raise
        need = list(ctx.needs_input_grad[OPTIONS:-3])
        end = len(need) + 3
        tensors, y, tape = saved[:end], saved[end], saved[end + 1 :]
        for k, there in zip(ctx.biases, ctx.there, strict=True):
            weight = tensors[2 + ctx.counts[0]]
            tensors[k] = weight.new_zeros((weight.size(0),)) if there else None
        found: Sequence[Tensor | None]
        batched = not torch.compiler.is_compiling() and any(map(_is_batch, upstream))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            for k, (bias, version) in zip(ctx.biases, ctx.second, strict=True):
                if bias is not None and _versioned(bias)[1] != version:
                    raise RuntimeError(
                        "fusedrnn: a bias has been modified by an inplace operation since forward, and "
                        f"derivatives of derivatives need it as it was\n{IN_PLACE}"
                    )
                tensors[k] = bias
            if batched:  # a Function would not record operations on these
                own = [None if t is None else t.view_as(t) for t in tensors[:-3]]
                call = _call(ctx.counts, ctx.options, [*own, *tensors[-3:]])
                found = ops.gradients_of_steps(call, upstream, own, True)
            else:
                how = ctx.counts, ctx.options, len(tape), need
                found = Differentiable.apply(*how, *tensors, y, *tape, *upstream)  # type: ignore[no-untyped-call]
        else:
            call = _call(ctx.counts, ctx.options, tensors)
            func = torch._C._functorch.peek_interpreter_stack() is not None  # the operator has a rule for it
            found = (_each if batched and not func else ops.backward)(call, y, tape, upstream, need)
        grads = [d if n else None for d, n in zip(found, need, strict=True)]
        return (*[None] * OPTIONS, *grads, None, None, None)


def _is_batch(d: Tensor | None) -> TypeGuard[Tensor]:
    """Whether this is a batch of upstream gradients, of ``is_grads_batched`` or ``torch.func.vmap``."""
    return d is not None and not torch._C._has_storage(d)


def _each(
    call: Call, y: Tensor, tape: Sequence[Tensor], upstream: Sequence[Tensor | None], need: Sequence[bool]
) -> list[Tensor]:
    """Run backward for each of a batch of upstream gradients of ``is_grads_batched``.

    PyTorch's batching rules do not support an operator that returns a list.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batches = {k: torch._remove_batch_dim(d, level, 1, 0) for k, d in enumerate(upstream) if _is_batch(d)}
    found = []
    for ds in zip(*batches.values(), strict=True):
        alone = dict(enumerate(upstream)) | dict(zip(batches, ds, strict=True))
        found.append(ops.backward(call, y, tape, list(alone.values()), need))
    return [torch._add_batch_dim(torch.stack(ts), 0, level) for ts in zip(*found, strict=True)]


def _versioned(t: Any) -> tuple[Tensor | None, int]:
    return t, 0 if t is None or t.is_inference() else t._version


class Differentiable(torch.autograd.Function):
    """Gradients by the kernels, and their derivatives by PyTorch's operations."""

    @staticmethod
    def forward(
        ctx: Any, counts: Any, options: Any, tapes: int, need: Any, *tensors: Any
    ) -> tuple[Tensor, ...]:
        """The gradients of a call, computed by the kernels."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.how, end = (counts, options, len(need)), len(need) + 3
        ctx.upstream = end + 1 + tapes
        tape, upstream = tensors[end + 1 : ctx.upstream], tensors[ctx.upstream :]
        call = _call(counts, options, tensors[:end])
        return tuple(ops.backward(call, tensors[end], tape, upstream, need))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of these gradients, computed by PyTorch's operations."""
        tensors, again, (counts, options, n) = list(ctx.saved_tensors), torch.is_grad_enabled(), ctx.how
        places = [k for k in (*range(n), *range(ctx.upstream, len(tensors))) if tensors[k] is not None]
        found: list[Tensor | None] = [None] * len(tensors)
        with torch.enable_grad():
            for k in places:  # each separately, even if one tensor is in two places
                t = tensors[k]
                tensors[k] = t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()
            call, upstream = _call(counts, options, tensors[: n + 3]), tensors[ctx.upstream :]
            first = ops.gradients_of_steps(call, upstream, tensors[:n], True)
            pairs = [(d, g) for d, g in zip(first, grads, strict=True) if d is not None and g is not None]
            pairs = [(d, g) for d, g in pairs if d.requires_grad]
            if pairs:
                second = torch.autograd.grad(
                    [d for d, _ in pairs],
                    [tensors[k] for k in places],
                    [g for _, g in pairs],
                    create_graph=again,
                    allow_unused=True,
                )
                for k, g in zip(places, second, strict=True):
                    found[k] = g
        return (None, None, None, None, *found)
