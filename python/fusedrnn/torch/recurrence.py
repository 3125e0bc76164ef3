"""One layer in one direction in ``torch.autograd``: the operators joined to a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.backends.cpu import WEIGHTS
from fusedrnn.torch import differentiable, ops, paths
from fusedrnn.torch.ops import CELLS, LEARNED, TENSORS, Call, N, Weights

IN_PLACE = (
    "fusedrnn: backward needs the inputs, the weights and the output of the layer as they were; if it is the "
    "output, apply operations that are not in place, as torch.relu for torch.relu_, or clone it before"
)

PLAIN = WEIGHTS[:4]  # without layer norm and projection


def weights_of(module: torch.nn.Module, names: Sequence[str] = PLAIN) -> Weights:
    """The weights of one layer and direction, None where there is none, as they are now: a parametrization, a
    functional call or a tied weight may have put others in place of the parameters."""
    own = module._parameters
    found = [own[name] if name in own else getattr(module, name, None) for name in names]
    return (*found, *[None] * (len(WEIGHTS) - len(found)))


def recurrence(call: Call, return_states: bool = False) -> list[Tensor]:
    """Run one layer in one direction.

    Returns:
        y (T, B, P); then the final state, h (B, P) and c (B, H); then with ``return_states`` those of every
        step, with T first. Of one step the final state alone.
    """
    if torch.is_grad_enabled():
        for t in call[:LEARNED]:
            if t is not None and t.requires_grad:
                # A compiler knows no values: it keeps what the longest rows need, or runs forward again.
                if torch.compiler.is_compiling():
                    T, B, *_ = call.sizes()
                    rows = None if call.recompute else T * B
                else:
                    rows = call.tape_rows()
                return list(Recurrence.apply(*call, return_states, rows))  # type: ignore[no-untyped-call]
    return ops.forward(call, return_states, None)


class Recurrence(torch.autograd.Function):
    """The node: what backward needs are tensors, asked for their memory anew when it runs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """The results of a call, by the kernels."""
        call, (return_states, rows) = Call(*arguments[:N]), arguments[N:]
        outputs = ops.forward(call, return_states, rows)
        n = call.results(return_states)
        tape, tape2 = (*outputs[n:], None, None)[:2]
        # Of biases backward reads the shapes alone: programs may write to them, as with torch.nn's layers.
        ctx.biases = () if call.recompute or call.gain_ih is not None or tape is None else (5, 6)
        kept = [None if k in ctx.biases else t for k, t in enumerate(call[:TENSORS])]
        ctx.there = [call[k] is not None for k in ctx.biases]
        ctx.second = [] if torch.compiler.is_compiling() else [_versioned(call[k]) for k in ctx.biases]
        ctx.save_for_backward(*kept, outputs[0], tape, tape2)
        ctx.options = call[TENSORS:]
        ctx.states = len(CELLS[call.cell].states)
        ctx.set_materialize_grads(False)
        return tuple(outputs[:n])

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of every argument, None for those that need none."""
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
        need, rest = ctx.needs_input_grad[:LEARNED], [None] * (N - LEARNED + 2)
        run: Any = ops.backward
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            run = Differentiable.apply
            for k, (bias, version) in zip(ctx.biases, ctx.second, strict=True):
                if bias is not None and _versioned(bias)[1] != version:
                    raise RuntimeError(
                        "fusedrnn: a bias has been modified by an inplace operation since forward, and "
                        f"derivatives of derivatives need it as it was\n{IN_PLACE}"
                    )
                saved[k] = bias
            upstream = [dy, *of_final, *of_every]
            if not all(d is None or torch._C._has_storage(d) for d in upstream):
                # A batch of upstream gradients: a Function would not record what it does with them.
                call = Call(*saved[:TENSORS], *ctx.options)
                own: list[Any] = [None if t is None else t.view_as(t) for t in saved[:LEARNED]]
                first = _first(Call._make([*own, *call[LEARNED:]]), upstream, own)
                return (*[d if n else None for d, n in zip(first, need, strict=True)], *rest)
        found = run(*saved[:TENSORS], *ctx.options, *saved[TENSORS:], dy, *of_final, *of_every, need)
        return (*[g if n else None for g, n in zip(found, need, strict=True)], *rest)


def _versioned(t: Any) -> tuple[Tensor | None, int]:
    return t, 0 if t is None or t.is_inference() else t._version


def steps(call: Call, return_states: bool = False) -> list[Tensor]:
    """What ``recurrence`` returns, a step at a time in PyTorch's own operations, which record themselves."""
    cell = CELLS[call.cell]
    lengths, reset = call.lengths, call.reset
    if torch._C._functorch.peek_interpreter_stack() is None:  # a transform's tensors have no values to check
        lengths, reset = call.rows()
    with paths.without_autocast(call.x.device):
        y, final, every = differentiable.recurrence(
            cell,
            call.x if call.x.dim() == 3 else call.x[None],
            call.weights,
            (call.h0, call.c0)[: len(cell.states)],
            lengths=lengths,
            reset=reset,
            reverse=call.reverse,
            return_states=return_states,
            detach_every=call.detach_every,
            regularization=call.regularization(),
        )
    return [*([y] if call.x.dim() == 3 else []), *final, *(every or [])]


def _first(
    call: Call, upstream: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the inputs of a call, recorded; None where there is none.

    ``upstream`` are those of y, of both final states and of both states of every step.
    """
    n = len(CELLS[call.cell].states)
    results = steps(call, upstream[3] is not None or upstream[4] is not None)
    given = [*upstream[: 1 + n], *upstream[3 : 3 + n]] if call.x.dim() == 3 else upstream[1 : 1 + n]
    used = [(y, d) for y, d in zip(results, given, strict=False) if d is not None and y.requires_grad]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    ys, ds = [y for y, _ in used], [d for _, d in used]
    found = iter(torch.autograd.grad(ys, wanted, ds, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


class Differentiable(torch.autograd.Function):
    """The gradients by the kernels, their derivatives by PyTorch's own operations."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """The gradients of a call, by the kernels."""
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(a, Tensor) for a in arguments]
        ctx.save_for_backward(*[a for a in arguments if isinstance(a, Tensor)])
        ctx.others = [None if isinstance(a, Tensor) else a for a in arguments]
        return ops.backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of these gradients, by PyTorch's operations."""
        tensors, again = iter(ctx.saved_tensors), torch.is_grad_enabled()
        arguments = [next(tensors) if t else a for t, a in zip(ctx.is_tensor, ctx.others, strict=True)]
        places = [k for k in (*range(LEARNED), *range(N + 3, N + 8)) if arguments[k] is not None]
        with torch.enable_grad():
            for k in places:  # each in its own place, also where one tensor stands in two
                t = arguments[k]
                arguments[k] = t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()
            call, upstream = Call(*arguments[:N]), arguments[N + 3 : N + 8]
            first = _first(call, upstream, arguments[:LEARNED])
            pairs = [(d, g) for d, g in zip(first, grads, strict=True) if d is not None and g is not None]
            pairs = [(d, g) for d, g in pairs if d.requires_grad]
            found: list[Tensor | None] = [None] * len(arguments)
            if pairs:
                second = torch.autograd.grad(
                    [d for d, _ in pairs],
                    [arguments[k] for k in places],
                    [g for _, g in pairs],
                    create_graph=again,
                    allow_unused=True,
                )
                for k, g in zip(places, second, strict=True):
                    found[k] = g
        return tuple(found)
