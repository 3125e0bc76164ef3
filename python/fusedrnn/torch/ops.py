"""One layer in one direction as operators of PyTorch: ``torch.ops.fusedrnn.recurrence`` and its backward.

Both are functions of their tensors alone: no aliases, nothing kept between calls, so weights are packed, or
read as they lie, in every call. They have no derivatives of their own: ``recurrence.Recurrence`` joins them.
So tracers, counters and compilers see one operator, whatever called it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fusedrnn import backends, cells
from fusedrnn.backends.arguments import booleans, check_lengths
from fusedrnn.backends.cpu import WEIGHTS, CpuBackend
from fusedrnn.backends.protocol import Regularization
from fusedrnn.cells import Cell
from fusedrnn.torch import gpu
from fusedrnn.torch.memory import array, contiguous, contiguous_features, given, tensor

CELLS: dict[str, Cell] = {  # by PyTorch's name
    "LSTM": cells.lstm,
    "GRU": cells.gru,
    "RNN_TANH": cells.rnn,
    "RNN_RELU": cells.rnn.with_options(relu=True),
}
NORMED = "_LAYER_NORM"  # ends the names of cells with layer norm
CELLS |= {f"{name}{NORMED}": cell.with_options(layer_norm=True) for name, cell in CELLS.items()}
PROJECTED = "_PROJECTED"  # likewise with a projection
CELLS[f"LSTM{PROJECTED}"] = cells.lstm.with_options(project=True)

Weights = tuple[Any, ...]  # of one layer and direction in the order of WEIGHTS, None where there is none

_CALL = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? gain_ih, Tensor? gain_hh, Tensor? gain_c, Tensor? bias_c, Tensor? weight_hr,"
    " Tensor? lengths, Tensor? reset, Tensor? seed,"
    " str cell, bool reverse, bool recompute, int? detach_every, float[] rates, int stream"
)
# Returns y, the final states, those of every step, and the tape: as there are.
torch.library.define(
    "fusedrnn::recurrence",
    f"({_CALL}, bool return_states, SymInt? tape_rows) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
# Returns the gradients of x, h0, c0 and the weights; empty ones where they are not needed. They are no list,
# so that PyTorch can run it for a batch of upstream gradients.
torch.library.define(
    "fusedrnn::recurrence_backward",
    f"({_CALL}, Tensor y, Tensor? tape, Tensor? tape2, Tensor? dy, Tensor? dhT, Tensor? dcT,"
    " Tensor? dh_states, Tensor? dc_states, bool[12] need) -> (Tensor dx, Tensor dh0, Tensor dc0,"
    " Tensor dweight_ih, Tensor dweight_hh, Tensor dbias_ih, Tensor dbias_hh, Tensor dgain_ih,"
    " Tensor dgain_hh, Tensor dgain_c, Tensor dbias_c, Tensor dweight_hr)",
    tags=torch.Tag.pt2_compliant_tag,
)


class Call(NamedTuple):
    """What both operators begin with. What is missing is None.

    x is (T, B, I); or (B, I), one step, whose y is not returned: it is the final h.
    """

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
    weight_hr: Tensor | None
    lengths: Tensor | None  # (B,), on the CPU
    reset: Tensor | None  # (T, B)
    seed: Tensor | None  # of the masks; None: evaluation
    cell: str  # out of CELLS
    reverse: bool = False
    recompute: bool = False
    detach_every: int | None = None
    rates: Sequence[float] = ()  # of recurrent dropout and of zoneout of h and c, or none
    stream: int = 0  # of layer and direction: their masks differ

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: w for name, w in zip(WEIGHTS, self[3:LEARNED], strict=True) if w is not None}

    def rows(self) -> tuple[Any, Any]:
        """``lengths`` and ``reset`` as arrays, values checked."""
        lengths = reset = None
        if self.x.is_meta:  # tensors without values
            return self.lengths, self.reset
        if self.lengths is not None:
            lengths = check_lengths(array(contiguous(self.lengths)), self.x.size(0), self.x.size(1))
        if self.reset is not None:
            given = self.reset if self.reset.dtype is torch.bool else booleans("reset", self.reset)
            reset = array(contiguous(given.to(self.x.device)))
        return lengths, reset

    def regularization(self) -> Regularization | None:
        """The rates, the seed and the stream of a call, or None without any."""
        if not self.rates:
            return None
        dropout, zoneout_h, zoneout_c = self.rates
        seed = None if self.seed is None else int(self.seed)
        return Regularization(dropout, zoneout_h, zoneout_c, seed, self.stream)

    def cpu_arguments(self, packed: Any = None) -> tuple[Any, ...]:
        """As ``CpuBackend.run_forward`` and ``run_backward`` take it, of packed weights or of these."""
        lengths, reset = (None, None) if self.lengths is self.reset is None else self.rows()
        if packed is None:
            weights = [w if w is None or w.is_contiguous() else w.contiguous() for w in self[3:LEARNED]]
            packed = tuple(given(weights))
        return (
            CELLS[self.cell],
            packed,
            *given([contiguous_features(self.x), contiguous(self.h0), contiguous(self.c0)]),
            lengths,
            reset,
            self.reverse,
            self.recompute,
            self.detach_every or 0,
            self.regularization() if self.rates else None,
        )

    def other_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As other backends take it: the cell, x, the weights, the initial state; and by name."""
        lengths, reset = self.rows()
        x = array(contiguous_features(self.x))
        state0 = tuple([array(contiguous(s)) for s in (self.h0, self.c0) if s is not None])
        weights = {name: array(contiguous(w)) for name, w in self.weights.items()}
        options = {
            "lengths": lengths,
            "reset": reset,
            "reverse": self.reverse,
            "detach_every": self.detach_every,
            "regularization": self.regularization(),
        }
        return (CELLS[self.cell], x if x.ndim == 3 else x[None], weights, state0 or None), options

    def sizes(self) -> tuple[Any, Any, Any, Any, Any]:
        """T, B, I, H, P, which may be symbols."""
        T, B, I = self.x.shape if self.x.dim() == 3 else (1, *self.x.shape)
        P = self.weight_hh.size(1)
        return T, B, I, P if self.weight_hr is None else self.weight_hr.size(1), P

    def results(self, return_states: bool) -> int:
        """How many tensors there are but the tape."""
        return (self.x.dim() == 3) + len(CELLS[self.cell].states) * (1 + return_states)

    def backend(self) -> Any:
        """The backend that runs a call: that of a GPU for tensors there."""
        return backends.usable(None) if self.x.is_cpu else gpu.backend()

    def tape_width(self) -> int:
        """Elements of the tape for each of its rows."""
        return _tape_width(self.cell, int(self.sizes()[3]), self.recompute, bool(self.rates))

    def tape_rows(self) -> int | None:
        """Rows of the tape, of tensors whose values are known."""
        T, B, *_ = sizes = self.sizes()
        if self.recompute and self.x.is_cpu:
            kind, acts, float64 = CELLS[self.cell], bool(self.rates), self.x.dtype is torch.float64
            return CPU.tape_shape(kind, sizes, recompute=True, regularized=acts, float64=float64)[0]
        return T * B if self.lengths is None else int(self.lengths.sum())


N = len(Call._fields)
# So many of these, from the first on, may have a gradient: x, the state and the weights; and so many are
# tensors. (A sum is no constant for mypy.)
LEARNED: Final = 12
TENSORS: Final = 15
CPU = CpuBackend()
LARGE = 1 << 16  # bytes


@functools.cache
def _tape_width(cell: str, H: int, recompute: bool, regularized: bool) -> int:
    sizes = (1, 1, 1, H, H)  # P changes nothing
    return CPU.tape_shape(CELLS[cell], sizes, recompute=recompute, regularized=regularized)[1]


def _allocated(
    call: Call,
    return_states: bool,
    tape_rows: Any,
    new_tape: Callable[[Tensor, Any, int], Tensor] = lambda x, rows, width: x.new_empty((rows, width)),
) -> list[Tensor | None]:
    """Memory for the results of forward: y, hT, cT, h_states, c_states, tape; None for those that the call
    does not have."""
    T, B, _, H, P = call.sizes()
    x, two = call.x, len(CELLS[call.cell].states) == 2
    return [
        x.new_empty((T, B, P)) if x.dim() == 3 else None,
        x.new_empty((B, P)),
        x.new_empty((B, H)) if two else None,
        x.new_empty((T, B, P)) if return_states else None,
        x.new_empty((T, B, H)) if return_states and two else None,
        None if tape_rows is None else new_tape(x, tape_rows, call.tape_width()),
    ]


def _own_tape(x: Tensor, rows: int, width: int) -> Tensor:
    """Memory for a tape: if large, the kernels' own, which is used again. PyTorch's would be new pages of the
    system's in every call, which cost as much as filling them."""
    if rows * width * x.element_size() < LARGE:
        return x.new_empty((rows, width))
    return torch.from_numpy(CPU.empty(rows, width, x.dtype is torch.float64))


def forward(call: Call, return_states: bool, tape_rows: int | None) -> list[Tensor]:
    """The operator ``recurrence``; by PyTorch's dispatcher, which takes 7 us, only where that is watched."""
    if watched(call.x):
        found: list[Tensor] = torch.ops.fusedrnn.recurrence(*call, return_states, tape_rows)
        return found
    return run(call, return_states, tape_rows)


def watched(x: Tensor) -> bool:
    """Whether a mode, a compiler, a profiler or a kind of tensor of its own has to meet operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _forward(*arguments: Any) -> list[Tensor]:
    return run(Call(*arguments[:N]), *arguments[N:])


def run(
    call: Call, return_states: bool, tape_rows: int | None, packed: tuple[Any, Any] | None = None
) -> list[Tensor]:
    """Forward, of the call's weights or of a backend and what it packed of them."""
    backend, weights = (call.backend(), None) if packed is None else packed
    if isinstance(backend, CpuBackend):
        out = _allocated(call, return_states, tape_rows, _own_tape)
        backend.run_forward(*call.cpu_arguments(None if weights is None else weights.core), *given(out))
        return [t for t in out if t is not None]
    with gpu.on(call.x.device):
        (cell, x, own, state0), options = call.other_arguments()
        first = cell, x, own if weights is None else weights, state0
        save = None if tape_rows is None else "boundary_states" if call.recompute else "all"
        found = backend.forward(*first, **options, return_states=return_states, save=save)
        kept = backend.saved(found.tape) if save == "all" and not call.x.is_cpu else []
        y = [found.y] if call.x.dim() == 3 else []
        return [tensor(a) for a in (*y, *found.stateT, *(found.states or ()), *kept)]


def _gradients(tensors: Sequence[Tensor | None], need: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients that are needed."""
    return [t.new_empty(t.shape) if n and t is not None else None for t, n in zip(tensors, need, strict=True)]


def _with_empty(found: Sequence[Tensor | None], x: Tensor) -> tuple[Tensor, ...]:
    return tuple([x.new_empty((0,)) if t is None else t for t in found])


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator ``recurrence_backward``, as ``forward``; by the dispatcher also for a batch of upstream
    gradients, which have no memory of their own."""
    if watched(arguments[0]) or not all(d is None or torch._C._has_storage(d) for d in arguments[-6:-1]):
        found: tuple[Tensor, ...] = torch.ops.fusedrnn.recurrence_backward(*arguments)
        return found
    return _backward(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call, (y, tape, tape2, *upstream, need) = Call(*arguments[:N]), arguments[N:]
    backend = call.backend()
    dy, dhT, dcT, dh_states, dc_states = upstream
    if isinstance(backend, CpuBackend):
        if tape is None:  # compiled code asks for none where its size would depend on values
            call = call._replace(recompute=False)
            tape = run(call, False, call.tape_rows())[-1]
        out = _gradients(call[:LEARNED], need)
        dx, dh0, dc0, *dweights = given(out)
        dy, dh_states, dc_states = (contiguous_features(d) for d in (dy, dh_states, dc_states))
        rest = [contiguous(y), contiguous(tape), dy, contiguous(dhT), contiguous(dcT), dh_states, dc_states]
        backend.run_backward(*call.cpu_arguments(), *given(rest), [dx, *dweights, dh0, dc0])
        return _with_empty(out, call.x)
    states = dh_states is not None or dc_states is not None
    with gpu.on(call.x.device):
        first, options = call.other_arguments()
        if tape is not None:
            saved = array(tape), array(tape2)
            kept = backend.tape(*first, **options, y=array(y), saved=saved, return_states=states)
        else:
            kept = backend.forward(*first, **options, return_states=states).tape
        n = len(CELLS[call.cell].states)
        need_x, need_h, need_c, *need_weights = need
        wanted = {"x": need_x, "state0": need_h or need_c} | dict(zip(WEIGHTS, need_weights, strict=True))
        dx, dw, dstate0, _ = backend.backward(
            kept,
            array(contiguous(dy)) if call.x.dim() == 3 else None,
            tuple([array(contiguous(d)) for d in (dhT, dcT)])[:n],
            tuple([array(contiguous(d)) for d in (dh_states, dc_states)])[:n] if states else None,
            need=[name for name in ("x", *call.weights, "state0") if wanted[name]],
        )
        if dx is not None and call.x.dim() == 2:
            dx = dx[0]
        found = (dx, *(*(dstate0 or (None,)), None)[:2], *map(dw.get, WEIGHTS))
        return _with_empty([tensor(a) if n else None for a, n in zip(found, need, strict=True)], call.x)


for _device in ("CPU", "CUDA"):
    torch.library.impl("fusedrnn::recurrence", _device, _forward)
    torch.library.impl("fusedrnn::recurrence_backward", _device, _backward)


def refuse_onnx(what: str) -> None:
    """Raise while ONNX exports. In compiled code PyTorch's answer is always no; it meets the operators."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(f"ONNX export knows no {what}; it takes torch.nn's layers")


@torch.library.register_fake("fusedrnn::recurrence")  # type: ignore[untyped-decorator]
def _forward_fake(*arguments: Any) -> list[Tensor]:
    refuse_onnx("torch.ops.fusedrnn.recurrence")
    call, (return_states, tape_rows) = Call(*arguments[:N]), arguments[N:]
    if not isinstance(call.backend(), CpuBackend):  # others have none, and run forward again
        tape_rows = None
    return [t for t in _allocated(call, return_states, tape_rows) if t is not None]


@torch.library.register_fake("fusedrnn::recurrence_backward")  # type: ignore[untyped-decorator]
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _with_empty(_gradients(arguments[:LEARNED], arguments[-1]), arguments[0])


def _products(shapes: Sequence[Any]) -> tuple[int, int, int]:
    """Operations of the products of all steps with weight_ih, weight_hh and weight_hr. A multiply and an add
    are two, as PyTorch counts."""
    x, ih, hh, hr = shapes[0], shapes[3], shapes[4], shapes[LEARNED - 1] or (0, 0)
    rows = 2 * int(x[0] * x[1] if len(x) == 3 else x[0])
    return rows * int(ih[0] * ih[1]), rows * int(hh[0] * hh[1]), rows * int(hr[0] * hr[1])


@register_flop_formula(torch.ops.fusedrnn.recurrence)
def _forward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return sum(_products(shapes))


@register_flop_formula(torch.ops.fusedrnn.recurrence_backward)
def _backward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    ih, hh, hr = _products(shapes)
    dx, _, _, dih, dhh, *_, dhr = shapes[-1]
    return ih * (dx + dih) + hh * (1 + dhh) + hr * (1 + dhr)
