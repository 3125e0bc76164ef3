"""One layer in one direction on tensors: the kernels behind ``torch.autograd``.

Tensors on the CPU go to the backend in use there, tensors on a GPU to ``cuda``. Tensors and arrays share
their memory, so nothing is copied that a kernel can read where it lies: x may be batch first, sliced or
expanded over time and batch.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedrnn import backends, cells
from fusedrnn.backends.arguments import booleans, check_lengths
from fusedrnn.backends.protocol import Array, Backend, Forward, Weights
from fusedrnn.cells import Cell
from fusedrnn.torch import gpu, paths

TWICE = (
    "fusedrnn: the kernels have no second derivatives; use fusedrnn.torch.to_torch(model), or run forward "
    "within fusedrnn.torch.fallback()"
)
CELLS: dict[str, Cell] = {  # by PyTorch's name
    "LSTM": cells.LSTM(),
    "GRU": cells.GRU(),
    "RNN_TANH": cells.RNN(),
    "RNN_RELU": cells.RNN(relu=True),
}
NORMED = "_LAYER_NORM"  # ends the names of cells with layer norm
CELLS |= {f"{name}{NORMED}": dataclasses.replace(cell, layer_norm=True) for name, cell in CELLS.items()}
# Of each weight this many elements are compared at every call; all of a small one, because gradient checks
# write single elements through .data.
SAMPLE, SMALL = 32, 512


class WeightSnapshot(NamedTuple):
    """What a weight was when it was packed, to see whether it has changed."""

    tensor: weakref.ref[Tensor]
    version: int
    address: int
    sample: Array | None  # a view of some elements; none on a GPU, for which the CPU would have to wait
    sample_bytes: bytes

    @classmethod
    def of(cls, w: Tensor) -> WeightSnapshot:
        n = w.numel()
        if not w.is_cpu:
            return cls(weakref.ref(w), w._version, w.data_ptr(), None, b"")
        sample = whole(w).reshape(-1)[:: 1 if n <= SMALL else n // SAMPLE | 1]  # odd: of more than one column
        return cls(weakref.ref(w), w._version, w.data_ptr(), sample, sample.tobytes())


class Packed(NamedTuple):
    """The weights of one layer and direction as a kernel reads them."""

    cell: Cell
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    weights: Any  # what the backend packed
    snapshots: tuple[WeightSnapshot | None, ...]

    def fresh(self, weights: Sequence[Tensor | None]) -> bool:
        """Whether these are still the weights, and unchanged."""
        for w, snapshot in zip(weights, self.snapshots, strict=True):
            if snapshot is None:
                if w is not None:
                    return False
                continue
            tensor, version, address, sample, sample_bytes = snapshot
            if (
                tensor() is not w
                or w is None
                or w._version != version
                or w.data_ptr() != address
                or not w.is_contiguous()
                or (sample is not None and sample.tobytes() != sample_bytes)
            ):
                return False
        return True


class PackedWeights:
    """Packed weights, kept as long as they are the same.

    They are taken for the same while they are the same tensors with the same version and place in memory, and
    a sample of their elements has the same bits: a write through ``.data`` leaves no other trace. One that
    misses the sample is not noticed; after it, call ``refresh()``.

    Several threads may use one object: what is kept is only ever replaced as a whole.
    """

    def __init__(self) -> None:
        self._kept: Packed | None = None

    def of(self, cell: Cell, input: Tensor, weights: Sequence[Tensor | None], I: int, H: int) -> Packed | str:
        """The packed weights, made anew where they have changed; or why the kernels cannot take them beside
        such an input."""
        kept, dtype, device = self._kept, input.dtype, input.device
        if kept is not None and kept.fresh(weights) and kept.cell is cell:
            if kept.dtype is not dtype:
                return "dtypes differ"
            return kept if kept.device == device else f"the devices are {device} and {kept.device}"
        reason = paths.unsupported(dtype, device, weights)
        if reason is not None:
            return reason
        rows = cell.gates * H
        shapes = ((rows, I), (rows, H), (rows,), (rows,), (rows,), (rows,), (H,), (H,))
        for name, w, shape in zip(Weights._fields, weights, shapes, strict=True):
            if w is not None and w.shape != shape:  # PyTorch's own may read past the end of such a one
                raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(w.shape)}")
        # A tensor of inference mode has no version.
        keep = not any(w is not None and (w.is_inference() or not w.is_contiguous()) for w in weights)
        snapshots = tuple(WeightSnapshot.of(w) if keep and w is not None else None for w in weights)
        packed = Packed(cell, dtype, device, *_packed(cell, weights), snapshots)
        if keep:
            self._kept = packed
        return packed

    def refresh(self) -> None:
        """Forget the packed weights."""
        self._kept = None

    def __deepcopy__(self, memo: Any) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> Any:
        return PackedWeights, ()


def _packed(cell: Cell, weights: Sequence[Tensor | None]) -> tuple[Backend, Any]:
    """The backend of where the weights are, and what it packs."""
    first = weights[0]
    assert first is not None, "every cell has weight_ih"
    if first.is_cpu:
        backend = backends.usable(None)
        return backend, backend.pack(cell, Weights(*map(whole, weights)))
    with gpu.on(first.device):
        backend = gpu.backend()
        return backend, backend.pack(cell, Weights(*map(whole, weights)))


def array(t: Tensor) -> Any:
    """The tensor's memory as an array of the backend."""
    t = t.detach() if t.requires_grad else t
    return t.numpy() if t.is_cpu else gpu.array(t)


def tensor(a: Any) -> Tensor:
    """The memory of a backend's array as a tensor."""
    return torch.from_numpy(a) if type(a) is np.ndarray else gpu.tensor(a)


def whole(t: Tensor | None) -> Any:
    """The tensor's memory as an array in one piece, copied only where it is not."""
    return None if t is None else array(t.contiguous())


def sequence(t: Tensor | None) -> Any:
    """The tensor's memory as an array with contiguous features, which is all that the kernels ask."""
    if t is None or (t.stride(-1) != 1 and t.size(-1) != 1):
        return whole(t)
    return array(t)


def known(options: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The options of a call on x (T, B, I) with ``lengths``, ``reset`` and ``regularization`` as the backend
    of its device takes them, values checked. ``lengths`` stay on the CPU, where nobody waits for
    their values."""
    lengths, reset, regularization = options["lengths"], options["reset"], options["regularization"]
    if lengths is None and reset is None and regularization is None:
        return options
    if regularization is not None and regularization.seed is not None:
        regularization = regularization._replace(seed=int(regularization.seed))
    if lengths is not None:
        lengths = check_lengths(whole(lengths), len(x), x.size(1))
    if reset is not None:
        if reset.dtype is not torch.bool:
            reset = booleans("reset", reset)
        reset = whole(reset.to(x.device))
    return {**options, "lengths": lengths, "reset": reset, "regularization": regularization}


def of_stream(options: dict[str, Any], j: int) -> dict[str, Any]:
    """The options for layer and direction number j: masks differ."""
    regularization = options["regularization"]
    return (
        options
        if regularization is None
        else {**options, "regularization": regularization._replace(stream=j)}
    )


def weights_of(module: torch.nn.Module, names: Sequence[str]) -> Weights:
    """The weights of one layer and direction, None where there is none, as they are now: a parametrization, a
    functional call or a tied weight may have put others in place of the parameters."""
    own = module._parameters
    return Weights(*[own[name] if name in own else getattr(module, name, None) for name in names])


@dataclasses.dataclass(slots=True)
class Call:
    """What there is beside tensors."""

    packed: Packed
    options: dict[str, Any]  # of the backend's forward, for every layer and direction
    reverse: bool = False
    recompute: bool = False
    step: bool = False  # x is one step, (B, I), and y is not returned: it is the final h

    @property
    def save(self) -> str:
        """What a tape keeps."""
        return "boundary_states" if self.recompute else "all"

    def run(self, x: Tensor, state0: Sequence[Tensor] | None, save: str | None) -> Forward:
        """The kernel forward."""
        if x.is_cpu:
            return self._run(x, state0, save)
        with gpu.on(x.device):
            return self._run(x, state0, save)

    def _run(self, x: Tensor, state0: Sequence[Tensor] | None, save: str | None) -> Forward:
        packed, data = self.packed, sequence(x)
        return packed.backend.forward(
            packed.cell,
            data[None] if self.step else data,
            packed.weights,
            None if state0 is None else tuple([whole(s) for s in state0]),
            reverse=self.reverse,
            save=save,
            **self.options,
        )

    def tensors(self, out: Forward) -> tuple[Tensor, ...]:
        """What ``recurrence`` returns."""
        # With the axis that several layers and directions are joined by: to add it here costs least.
        found = out.stateT if self.step else [out.y, *[s[None] for s in (*out.stateT, *(out.states or ()))]]
        return tuple([tensor(a) for a in found])


def recurrence(
    call: Call, x: Tensor, state0: Sequence[Tensor] | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Run one layer in one direction.

    Args:
        call: The packed weights and the options.
        x: (T, B, I), or (B, I) with ``call.step``; on the CPU, of the weights' dtype.
        state0: (h,) or (h, c), each (B, H), of that dtype; None is zeros.
        weights: The tensors that were packed, for their gradients.

    Returns:
        y (T, B, H); then the final state, (1, B, H) each; then with ``return_states`` those of every step,
        (1, T, B, H) each. With ``call.step`` the final state alone, (B, H) each.
    """
    if torch.is_grad_enabled():
        inputs = (x, *(state0 or ()), *weights)
        for t in inputs:
            if t is not None and t.requires_grad:
                found: tuple[Tensor, ...] = Recurrence.apply(call, len(state0 or ()), *inputs)  # type: ignore[no-untyped-call]
                return found
    return call.tensors(call.run(x, state0, None))


class Recurrence(torch.autograd.Function):
    """The node: the kernel forward, the kernel back."""

    @staticmethod
    def forward(ctx: Any, call: Call, states: int, *inputs: Any) -> tuple[Tensor, ...]:
        out = call.run(inputs[0], inputs[1 : 1 + states] or None, call.save)
        outputs = call.tensors(out)
        ctx.call, ctx.states = call, states
        tape = torch.empty(0)  # carries ours, so that autograd releases it with the rest
        tape.fusedrnn_tape = out.tape  # type: ignore[attr-defined]
        # What the tape only borrows: autograd finds out whether somebody writes into it before backward.
        ctx.save_for_backward(tape, *(() if call.step else outputs[:1]), *inputs)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, states = ctx.call, ctx.states
        tape = _tape(call, states, ctx.saved_tensors)
        wanted = ctx.needs_input_grad[2:]
        names = ("x", *["state0"] * states, *Weights._fields)
        need = {name for name, want in zip(names, wanted, strict=True) if want}
        n = len(call.packed.cell.states)
        dy, of_states = None, grads
        if not call.step:
            dy, of_states = grads[0], tuple([None if g is None else g[0] for g in grads[1:]])
        with gpu.on(call.packed.device):
            dx, dweights, dstate0 = call.packed.backend.backward(
                tape,
                sequence(dy),
                tuple([whole(g) for g in of_states[:n]]),
                tuple([sequence(g) for g in of_states[n:]]) or None,
                need=need,
            )
        if call.step and dx is not None:
            dx = dx[0]
        results = tuple(
            [
                None if a is None or not want else tensor(a)
                for a, want in zip(
                    (dx, *((dstate0 or (None,) * states) if states else ()), *dweights),
                    wanted,
                    strict=True,
                )
            ]
        )
        if torch.is_grad_enabled():  # create_graph: first derivatives that say what a second one needs
            results = _delayed(results)
        return (None, None, *results)


def _tape(call: Call, states: int, saved: tuple[Any, ...]) -> Any:
    """The tape of forward.

    A hook on saved tensors that gives others back, as checkpointing and offloading do, has let go of it, to
    save memory; it is made once more.
    """
    found = getattr(saved[0], "fusedrnn_tape", None)
    if found is not None:
        return found
    x, *rest = saved[1 if call.step else 2 :]
    packed = call.packed._replace(weights=_packed(call.packed.cell, rest[states:])[1])
    return dataclasses.replace(call, packed=packed).run(x, rest[:states] or None, call.save).tape


def _delayed(results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The results, as the outputs of a node whose backward is an error."""
    tensors = [r for r in results if r is not None]
    error = torch._C._functions.DelayedError(TWICE, len(tensors))
    fakes = iter(error(*(t.detach().requires_grad_() for t in tensors)))
    return tuple(None if r is None else next(fakes) for r in results)
