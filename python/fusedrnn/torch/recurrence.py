"""One layer in one direction on tensors: the kernels behind ``torch.autograd``.

Tensors and arrays share their memory, so nothing is copied that a kernel can read where it lies: x may be
batch first, sliced or expanded over time and batch.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedrnn.backends.protocol import NEED, Array, Backend, Forward, Weights
from fusedrnn.cells import Cell

TWICE = (
    "fusedrnn: the kernels have no second derivatives; use fusedrnn.torch.to_torch(model), or run forward within "
    "fusedrnn.torch.fallback()"
)


class PackedWeights:
    """The weights of one layer and direction as a kernel reads them, kept as long as they are the same.

    They are taken for the same while they are the same tensors with the same version and place in memory. A
    write through ``.data`` changes none of these: after one, call ``refresh()``.
    """

    def __init__(self) -> None:
        self._key: list[tuple[Any, int, int]] = []
        self._packed: Any = None

    def of(self, backend: Backend, cell: Cell, weights: tuple[Tensor | None, ...]) -> Any:
        """The packed weights, made anew where they have changed."""
        if self._packed is not None and self._fresh(weights):
            return self._packed
        self.refresh()
        packed = backend.pack(cell, Weights(*(None if w is None else array(w) for w in weights)))
        if not any(w is not None and w.is_inference() for w in weights):  # those have no version
            self._key = [(_reference(w), *_place(w)) for w in weights]
            self._packed = packed
        return packed

    def refresh(self) -> None:
        """Forget the packed weights."""
        self._packed = None

    def _fresh(self, weights: tuple[Tensor | None, ...]) -> bool:
        for (reference, version, place), w in zip(self._key, weights, strict=True):
            if reference() is not w or (w is not None and (w._version != version or w.data_ptr() != place)):
                return False
        return True

    def __deepcopy__(self, memo: Any) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> Any:
        return PackedWeights, ()


def _reference(w: Tensor | None) -> Any:
    return (lambda: None) if w is None else weakref.ref(w)


def _place(w: Tensor | None) -> tuple[int, int]:
    return (0, 0) if w is None else (w._version, w.data_ptr())


def array(t: Tensor) -> Array:
    """The tensor's memory as an array."""
    found: Array = t.detach().numpy()
    return found


@dataclass
class Call:
    """What there is beside tensors; ``lengths`` (B,) int64 and ``reset`` (T, B) bool are arrays."""

    backend: Backend
    cell: Cell
    packed: PackedWeights
    lengths: Array | None = None
    reset: Array | None = None
    reverse: bool = False
    return_states: bool = False
    recompute: bool = False

    def run(
        self,
        x: Tensor,
        state0: tuple[Tensor, ...] | None,
        weights: tuple[Tensor | None, ...],
        save: str | None,
    ) -> Forward:
        return self.backend.forward(
            self.cell,
            array(x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()),
            self.packed.of(self.backend, self.cell, weights),
            None
            if state0 is None
            else tuple(array(s if s.is_contiguous() else s.contiguous()) for s in state0),
            lengths=self.lengths,
            reset=self.reset,
            reverse=self.reverse,
            return_states=self.return_states,
            save=save,
        )


def recurrence(
    call: Call, x: Tensor, state0: tuple[Tensor, ...] | None, weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """Run one layer in one direction.

    Args:
        call: The cell and the options.
        x: (T, B, I), float32 or float64, on the CPU.
        state0: (h,) or (h, c), each (B, H), of x's dtype; None is zeros.
        weights: weight_ih (G*H, I), weight_hh (G*H, H), bias_ih and bias_hh (G*H,) or None, of x's dtype.

    Returns:
        y (T, B, H); then the final state, (B, H) each; then with ``return_states`` those of every step,
        (T, B, H) each.
    """
    inputs = (x, *(state0 or ()), *weights)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        found: tuple[Tensor, ...] = Recurrence.apply(call, len(state0 or ()), *inputs)  # type: ignore[no-untyped-call]
        return found
    out = call.run(x, state0, weights, None)
    return tuple(map(torch.from_numpy, (out.y, *out.stateT, *(out.states or ()))))


class Recurrence(torch.autograd.Function):
    """The node: the kernel forward, the kernel back."""

    @staticmethod
    def forward(ctx: Any, call: Call, states: int, *inputs: Any) -> tuple[Tensor, ...]:
        x, state0, weights = inputs[0], inputs[1 : 1 + states] or None, inputs[1 + states :]
        out = call.run(x, state0, weights, "borders" if call.recompute else "all")
        outputs = tuple(map(torch.from_numpy, (out.y, *out.stateT, *(out.states or ()))))
        ctx.call, ctx.states = call, states
        tape = torch.empty(0)  # carries ours, so that autograd lets go of it when it lets go of the rest
        tape.fusedrnn_tape = out.tape  # type: ignore[attr-defined]
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            ctx.tape = out.tape  # hooks may give back another tensor, which carries none
        # What the tape only borrows: autograd finds out whether somebody writes into it before backward.
        ctx.save_for_backward(tape, outputs[0], *inputs)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tape = ctx.saved_tensors[0]
        tape = tape.fusedrnn_tape if hasattr(tape, "fusedrnn_tape") else ctx.tape
        call, states = ctx.call, ctx.states
        wanted = ctx.needs_input_grad[2:]
        need = [name for name, want in zip(NEED, (wanted[0], *wanted[1 + states :]), strict=False) if want]
        if any(wanted[1 : 1 + states]):
            need.append("state0")
        arrays = [None if g is None else array(g if g.stride(-1) == 1 else g.contiguous()) for g in grads]
        n = len(call.cell.states)
        final = tuple(
            None if a is None else a.copy() if not a.flags.c_contiguous else a for a in arrays[1 : 1 + n]
        )
        dx, dweights, dstate0 = call.backend.backward(
            tape, arrays[0], final, tuple(arrays[1 + n :]) or None, need=need
        )
        found = (dx, *((dstate0 or (None,) * states) if states else ()), *dweights)
        results = tuple(
            None if a is None or not want else torch.from_numpy(a)
            for a, want in zip(found, wanted, strict=True)
        )
        if torch.is_grad_enabled():  # create_graph: first derivatives that say what a second one needs
            results = _delayed(results)
        return (None, None, *results)


def _delayed(results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The results, as the outputs of a node whose backward is an error."""
    tensors = [r for r in results if r is not None]
    error = torch._C._functions.DelayedError(TWICE, len(tensors))
    fakes = iter(error(*(t.detach().requires_grad_() for t in tensors)))
    return tuple(None if r is None else next(fakes) for r in results)
