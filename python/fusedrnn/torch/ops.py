"""One layer in one direction as operators of PyTorch: ``torch.ops.fusedrnn.recurrence`` and its backward.

Both are functions of their tensors alone: no aliases, nothing kept between calls, so weights are packed, or
read as they lie, in every call. They have no derivatives of their own: ``recurrence.Recurrence`` joins them.
So tracers, counters and compilers see one operator, whatever called it. What no kernel runs they run a step
at a time in PyTorch's operations. The tape of a call in bfloat16 on a CPU is float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import register_flop_formula

from fusedrnn import backends
from fusedrnn.backends import cpu
from fusedrnn.backends.arguments import booleans, check_lengths
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.backends.protocol import Regularization, Unsupported
from fusedrnn.torch import differentiable, gpu, paths
from fusedrnn.torch.keys import CELLS, cell_of
from fusedrnn.torch.memory import (
    array,
    bits,
    contiguous,
    contiguous_features,
    given,
    plain,
    tensor,
    with_copies,
)

Weights = tuple[Any, ...]  # of one layer and direction in the order of cell.blocks, None where there is none

_CALL = (
    "Tensor x, Tensor[] state0, Tensor?[] weights, Tensor[] scalars, Tensor? lengths, Tensor? reset,"
    " Tensor? seed, str cell, bool reverse, bool recompute, int? detach_every, float[] rates, int stream"
)
# Returns y, the final states, those of every step, and the tape: as there are.
torch.library.define(
    "fusedrnn::recurrence",
    f"({_CALL}, bool return_states, SymInt? tape_rows) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
# ``upstream`` are the gradients of what forward returned but the tape. Returns those of x, state0, the
# weights and the scalars; empty ones where they are not needed.
torch.library.define(
    "fusedrnn::recurrence_backward",
    f"({_CALL}, Tensor y, Tensor[] tape, Tensor?[] upstream, bool[] need) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


class Call(NamedTuple):
    """What both operators begin with. What is missing is None.

    x is (T, B, I); or (B, I), one step, whose y is not returned: it is the final state's first.
    """

    x: Tensor
    state0: Sequence[Tensor]  # of each state (B, ·); or empty, for where they start
    weights: Sequence[Tensor | None]  # in the order of cell.blocks; biases may be missing
    scalars: Sequence[Tensor] = ()  # (T, B) each, in the order of cell.scalars
    lengths: Tensor | None = None  # (B,), on the CPU
    reset: Tensor | None = None  # (T, B)
    seed: Tensor | None = None  # of the masks; None: evaluation
    cell: str = ""  # a key
    reverse: bool = False
    recompute: bool = False
    detach_every: int | None = None
    rates: Sequence[float] = ()  # of recurrent dropout and of zoneout of h and c, or none
    stream: int = 0  # of layer and direction: their masks differ

    def learned(self) -> list[Tensor | None]:
        """What may have a gradient."""
        return [self.x, *self.state0, *self.weights, *self.scalars]

    def with_learned(self, tensors: Sequence[Any]) -> Call:
        """The call with others in their place."""
        x, *rest = tensors
        a = len(self.state0)
        b = a + len(self.weights)
        return self._replace(x=x, state0=rest[:a], weights=rest[a:b], scalars=rest[b:])

    def by_name(self) -> dict[str, Tensor]:
        """The weights that there are."""
        pairs = zip(cell_of(self.cell).blocks, self.weights, strict=True)
        return {name: w for name, w in pairs if w is not None}

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

    def units(self) -> Any:
        """H, which may be a symbol."""
        return self.weights[0].size(0) // cell_of(self.cell).blocks["weight_ih"]  # type: ignore[union-attr]

    def sizes(self) -> tuple[Any, Any, Any, Any, Any]:
        """T, B, I, H, P, which may be symbols."""
        x, blocks, H = self.x, cell_of(self.cell).blocks, self.units()
        T, B, I = x.shape if x.dim() == 3 else (1, *x.shape)
        return T, B, I, H, self.by_name()["weight_hr"].size(0) if "weight_hr" in blocks else H

    def results(self, return_states: bool) -> int:
        """How many tensors there are but the tape."""
        return (self.x.dim() == 3) + len(cell_of(self.cell).states) * (1 + return_states)

    def backend(self) -> Any:
        """The backend that runs a call: that of a GPU for tensors there."""
        return backends.usable(None) if self.x.is_cpu else gpu.backend()

    def refused(self) -> str | None:
        """Why no kernel runs it, or None."""
        x = self.x
        if self.cell in CELLS:
            if not x.is_cpu:
                return gpu.backend().unavailable() if x.is_cuda else None
            if x.dtype in FLOATS or (x.dtype is torch.bfloat16 and paths.has_bfloat16(self.cell)):
                return None
        detached = self.detach_every is not None
        return refused(self.cell, x.device.type, str(x.dtype), bool(self.rates), detached)

    def masks(self) -> Regularization | None:
        """A regularization with masks as the call's, whatever the seed, which a compiler does not know.

        Rates are all the same, as results are kept for each and a schedule may have many.
        """
        if not self.rates:
            return None
        dropout, zoneout_h, zoneout_c = (0.5 if rate else 0.0 for rate in self.rates)
        return Regularization(dropout, zoneout_h, zoneout_c, None if self.seed is None else 0)

    def tape_width(self) -> int:
        """Elements of the tape for each of its rows."""
        return _tape_width(self.cell, int(self.units()), self.recompute, self.masks())

    def tape_rows(self) -> int | None:
        """Rows of the tape, of tensors whose values are known; None: there is none."""
        T, B, *_ = sizes = self.sizes()
        own = self.cell not in CELLS
        if own and (self.refused() or not isinstance(self.backend(), CpuBackend)):
            return None
        if self.recompute and self.x.is_cpu and isinstance(self.backend(), CpuBackend):
            cell, dtype = cell_of(self.cell), self.x.dtype
            kind = {"float64": dtype is torch.float64, "bfloat16": dtype is torch.bfloat16}
            return CPU.tape_shape(cell, sizes, recompute=True, regularization=self.masks(), **kind)[0]
        if own or self.lengths is None or self.lengths.is_floating_point() or self.lengths.is_complex():
            return T * B  # wrong lengths are refused later
        return min(max(0, int(self.lengths.sum())), T * B)


N = len(Call._fields)
CPU = CpuBackend()
LARGE = 1 << 16  # bytes
FLOATS = (torch.float32, torch.float64)


@functools.cache
def _tape_width(key: str, H: int, recompute: bool, regularization: Regularization | None) -> int:
    sizes = (1, 1, 1, H, H)  # P changes nothing
    return CPU.tape_shape(cell_of(key), sizes, recompute=recompute, regularization=regularization)[1]


def refused(key: str, device: str, dtype: str, regularized: bool, detached: bool) -> str | None:
    """Why no kernel runs such calls of a cell, or None."""
    if device != "cpu":
        return f"the device is {device}"
    if dtype not in ("torch.float32", "torch.float64"):
        return f"the dtype is {dtype}"
    backend = backends.usable(None).name
    return _refused(key, backend, dtype.removeprefix("torch."), regularized, detached)


# For the compiler, which knows all that it is given (``torch.compiler.assume_constant_result``, which imports
# the compiler).
refused._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _refused(key: str, backend: str, dtype: str, regularized: bool, detached: bool) -> str | None:
    """A backend that cannot tell before is tried, once."""
    cell = cell_of(key)
    regularization = None
    if regularized:
        dropout, h, c = ("weight_hh" in cell.blocks), ("h" in cell.states), ("c" in cell.states)
        regularization = Regularization(dropout / 2, h / 2, c / 2, seed=0)
    try:
        if backend == CpuBackend.name:
            cpu.machine.plan(cell)
            cpu.machine.plan_of(cell, regularization)  # the largest program
        else:
            weights = {name: np.zeros(shape, dtype) for name, shape in cell.shapes(1, 1, 1).items()}
            backends.get(backend).forward(
                cell,
                np.zeros((1, 1, 1), dtype),
                weights,
                detach_every=1 if detached else None,
                regularization=regularization,
                scalars={name: np.zeros((1, 1), dtype) for name in cell.scalars} or None,
            )
    except Unsupported as error:
        return str(error).partition("; use")[0]
    return None


def watched(x: Tensor) -> bool:
    """Whether a mode, a compiler, a profiler or a kind of tensor of its own has to meet operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def forward(call: Call, return_states: bool, tape_rows: int | None) -> list[Tensor]:
    """The operator ``recurrence``; by PyTorch's dispatcher, which takes 7 us, only where that is watched."""
    if watched(call.x):
        found: list[Tensor] = torch.ops.fusedrnn.recurrence(*call, return_states, tape_rows)
        return found
    return run(call, return_states, tape_rows)


def backward(call: Call, y: Tensor, tape: Any, upstream: Any, need: Any) -> list[Tensor]:
    """The operator ``recurrence_backward``, likewise."""
    if watched(call.x):
        found: list[Tensor] = torch.ops.fusedrnn.recurrence_backward(*call, y, tape, upstream, need)
        return found
    return run_backward(call, y, tape, upstream, need)


def _allocated(call: Call, return_states: bool) -> list[Tensor]:
    """Memory for y, the final states and those of every step."""
    T, B, _, H, P = call.sizes()
    x, widths = call.x, cell_of(call.cell).widths(H, P)
    out = [x.new_empty((T, B, P))] if x.dim() == 3 else []
    out += [x.new_empty((B, width)) for width in widths]
    return out + [x.new_empty((T, B, width)) for width in widths] if return_states else out


def _as_bits(call: Call) -> Call:
    """A call in bfloat16 as the compiled module takes it."""
    return call.with_learned([bits(t) for t in call.learned()])


def _tape(call: Call, rows: int) -> Tensor:
    """Memory for a tape: if large, the kernels' own, which is used again. PyTorch's would be new pages of the
    system's in every call, which cost as much as filling them."""
    width, dtype = call.tape_width(), torch.float64 if call.x.dtype is torch.float64 else torch.float32
    if rows * width * dtype.itemsize < LARGE:
        return call.x.new_empty((rows, width), dtype=dtype)
    return torch.from_numpy(CPU.empty(rows, width, dtype is torch.float64))


@functools.cache
def _places(key: str) -> tuple[int | None, ...]:
    """Of the weights that the CPU's kernels take, in their order, where each stands among those of a call."""
    cell = cell_of(key)
    order = {name: k for k, name in enumerate(cell.blocks)}
    return tuple([order.get(name) for name in cpu.names(cell)])


def _cpu_weights(call: Call) -> tuple[Any, ...]:
    own = call.weights
    ordered = [
        None if k is None or (w := own[k]) is None else w if w.is_contiguous() else w.contiguous()
        for k in _places(call.cell)
    ]
    return tuple(given(ordered))


def _arguments(call: Call) -> tuple[Any, ...]:
    """As ``CpuBackend.run_forward`` and ``run_backward`` take it, after the weights."""
    return (
        given([contiguous_features(call.x)])[0],
        tuple(given([contiguous(s) for s in call.state0])),
        tuple(given([contiguous(s) for s in call.scalars])),
        *((None, None) if call.lengths is call.reset is None else call.rows()),
        call.reverse,
        call.detach_every or 0,
        call.regularization(),
        call.recompute,
    )


def _other_arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As other backends take it: the cell, x, the weights, the initial state; and by name."""
    cell, (lengths, reset) = cell_of(call.cell), call.rows()
    x = array(contiguous_features(call.x))
    weights = {name: array(contiguous(w)) for name, w in call.by_name().items()}
    state0 = tuple([array(contiguous(s)) for s in call.state0])
    scalars = [array(contiguous(s)) for s in call.scalars]
    options = {
        "lengths": lengths,
        "reset": reset,
        "reverse": call.reverse,
        "detach_every": call.detach_every,
        "regularization": call.regularization(),
        "scalars": dict(zip(cell.scalars, scalars, strict=True)) or None,
    }
    return (cell, x if x.ndim == 3 else x[None], weights, state0 or None), options


@with_copies
def run(
    call: Call, return_states: bool, tape_rows: int | None, packed: tuple[Any, Any] | None = None
) -> list[Tensor]:
    """Forward, of the call's weights or of a backend and what it packed of them."""
    x, compiled = call.x, call.cell in CELLS
    plain, low = compiled and x.is_cpu and x.dtype in FLOATS, x.dtype is torch.bfloat16
    if not plain and (reason := call.refused()) is not None:
        paths.tell(cell_of(call.cell).name, reason, paths.STEPS)
        with torch.no_grad():
            found = steps(call, return_states)
        at = int(x.dim() == 3)  # states may be views, and one another's
        return [*found[:at], *[s.clone(memory_format=torch.contiguous_format) for s in found[at:]]]
    backend, weights = (call.backend(), None) if packed is None else packed
    if isinstance(backend, CpuBackend):
        into = out = _allocated(call, return_states)
        tape = None if tape_rows is None else _tape(call, tape_rows)
        if low:
            call, into = _as_bits(call), [bits(t) for t in out]
        cell, at = cell_of(call.cell), int(x.dim() == 3)
        end = at + len(cell.states)
        y, kept = given([into[0] if at else None, tape])
        first = cell, _cpu_weights(call) if weights is None else weights.core, *_arguments(call)
        backend.run_forward(*first, y, given(into[at:end]), given(into[end:]), kept, low)
        return out if tape is None else [*out, tape]
    with gpu.on(x.device):
        (cell, given_x, own, state0), options = _other_arguments(call)
        first = cell, given_x, own if weights is None else weights, state0
        save = None if tape_rows is None or x.is_cpu else "boundary_states" if call.recompute else "all"
        done = backend.forward(*first, **options, return_states=return_states, save=save)
        kept = backend.saved(done.tape) if save == "all" else []
        return [tensor(a) for a in (*[done.y][: x.dim() == 3], *done.stateT, *(done.states or ()), *kept)]


def _gradients(tensors: Sequence[Tensor | None], need: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients that are needed."""
    pairs = zip(tensors, need, strict=True)
    return [t.new_empty(t.shape) if n and t is not None else None for t, n in pairs]


@with_copies
def run_backward(
    call: Call, y: Tensor, tape: Sequence[Tensor], upstream: Sequence[Tensor | None], need: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x, state0, the weights and the scalars."""
    x, cell, learned = call.x, cell_of(call.cell), call.learned()
    backend = CPU if tape and x.is_cpu else call.backend()  # the one that wrote the tape
    step = x.dim() == 2
    n, n0, scalars = len(cell.states), len(call.state0), 1 + len(call.state0) + len(call.weights)
    upstream = [plain(d) for d in upstream]
    dy, *states = [None, *upstream] if step else upstream
    found: list[Tensor | None]
    if not tape and call.refused() is not None:  # a tape is of a kernel, whatever hooks made of the tensors
        with _recording():
            inputs = [
                None if t is None else t.detach().requires_grad_(wanted)
                for t, wanted in zip(learned, need, strict=True)
            ]
            found = gradients_of_steps(call.with_learned(inputs), upstream, inputs, False)
        found = [  # zeros where no step used what was asked for
            torch.zeros_like(t) if d is None and w and t is not None else d
            for t, d, w in zip(learned, found, need, strict=True)
        ]
    elif isinstance(backend, CpuBackend):
        if not tape:  # compiled code asks for none where its size would depend on values
            call = call._replace(recompute=False)
            tape = run(call, False, call.tape_rows())[-1:]
        low = call.x.dtype is torch.bfloat16
        found = into = _gradients(learned, need)
        if low:
            call, y, dy, *states = _as_bits(call), *[bits(t) for t in (y, dy, *states)]
            into = [bits(d) for d in found]
        dweights = given([None if k is None else into[1 + n0 + k] for k in _places(call.cell)])
        final, every = [contiguous(d) for d in states[:n]], [contiguous_features(d) for d in states[n:]]
        first = cell, _cpu_weights(call), *_arguments(call)
        read = given([contiguous(y), contiguous(tape[0]), contiguous_features(dy)])
        dx, dstate0 = given(into[:1]), given(into[1 : 1 + n0])
        backend.run_backward(
            *first,
            *read,
            tuple(given(final)),
            tuple(given(every)),
            *dx,
            dweights,
            dstate0,
            given(into[scalars:]),
            low,
        )
    else:
        with gpu.on(call.x.device):
            first, options = _other_arguments(call)
            of_final, of_every = (tuple(array(contiguous(d)) for d in ds) for ds in (states[:n], states[n:]))
            if tape and not call.x.is_cpu:  # one of the CPU's kernels is none of another backend's
                saved = [array(t) for t in tape]
                kept = backend.tape(*first, **options, y=array(y), saved=saved, return_states=bool(of_every))
            else:
                kept = backend.forward(*first, **options, return_states=bool(of_every)).tape
            names = ["x", *["state0"] * n0, *cell.blocks, *cell.scalars]
            there = [t is not None and w for t, w in zip(learned, need, strict=True)]
            wanted = list(dict.fromkeys(m for m, w in zip(names, there, strict=True) if w))
            back = backend.backward(kept, array(contiguous(dy)), of_final, of_every or None, need=wanted)
            dx = back.dx[0] if step and back.dx is not None else back.dx
            arrays = [dx, *(back.dstate0 or [None] * n0)[:n0]]
            arrays += [*map(back.dweights.get, cell.blocks), *map(back.dscalars.get, cell.scalars)]
            found = [tensor(a) if w else None for a, w in zip(arrays, there, strict=True)]
    return _with_empty(found, need, x)


def _with_empty(found: Sequence[Tensor | None], need: Sequence[bool], x: Tensor) -> list[Tensor]:
    return [x.new_empty((0,)) if d is None or not w else d for d, w in zip(found, need, strict=True)]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Within the block autograd records, also where compiled code, which records itself, runs an operator."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch.inference_mode(False), torch._C._ForceDispatchKeyGuard(include, exclude):
        yield


def steps(call: Call, return_states: bool = False) -> list[Tensor]:
    """What forward returns, a step at a time in PyTorch's own operations, which record themselves."""
    cell, lengths, reset = cell_of(call.cell), call.lengths, call.reset
    if torch._C._functorch.peek_interpreter_stack() is None:  # a transform's tensors have no values to check
        lengths, reset = call.rows()
    with paths.without_autocast(call.x.device):
        y, final, every = differentiable.recurrence(
            cell,
            call.x if call.x.dim() == 3 else call.x[None],
            call.by_name(),
            call.state0 or None,
            scalars=dict(zip(cell.scalars, call.scalars, strict=True)),
            lengths=lengths,
            reset=reset,
            reverse=call.reverse,
            return_states=return_states,
            detach_every=call.detach_every,
            regularization=call.regularization(),
        )
    return [*[y][: call.x.dim() == 3], *final, *(every or [])]


def gradients_of_steps(
    call: Call, upstream: Sequence[Tensor | None], inputs: Sequence[Tensor | None], create_graph: bool
) -> list[Tensor | None]:
    """The gradients of inputs of a call; None where there is none."""
    with torch.enable_grad():
        results = steps(call, len(upstream) > call.results(False))
        used = [(r, d) for r, d in zip(results, upstream, strict=True) if d is not None and r.requires_grad]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found: Any = [None] * len(wanted)
        if used and wanted:
            ys, ds = [r for r, _ in used], [d for _, d in used]
            found = torch.autograd.grad(ys, wanted, ds, create_graph=create_graph, allow_unused=True)
    each = iter(found)
    return [next(each) if t is not None and t.requires_grad else None for t in inputs]


def _forward(*arguments: Any) -> list[Tensor]:
    return run(Call(*arguments[:N]), *arguments[N:])


def _backward(*arguments: Any) -> list[Tensor]:
    return run_backward(Call(*arguments[:N]), *arguments[N:])


for _device in ("CPU", "CUDA"):
    torch.library.impl("fusedrnn::recurrence", _device, _forward)
    torch.library.impl("fusedrnn::recurrence_backward", _device, _backward)


@torch.library.register_vmap("fusedrnn::recurrence_backward")  # type: ignore[untyped-decorator]
def _backward_each(info: Any, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
    """Backward for each of a batch of calls, such as of upstream gradients in ``torch.func.vmap``."""
    found = []
    for k in range(info.batch_size):
        each = tree_map(lambda t, at, k=k: t if at is None else t.select(at, k), arguments, in_dims)
        found.append(torch.ops.fusedrnn.recurrence_backward(*each))
    return [torch.stack(ts) for ts in zip(*found, strict=True)], [0] * len(found[0])


def refuse_onnx(what: str) -> None:
    """Raise while ONNX exports. In compiled code PyTorch's answer is always no; it meets the operators."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(f"ONNX export knows no {what}; it takes torch.nn's layers")


@torch.library.register_fake("fusedrnn::recurrence")  # type: ignore[untyped-decorator]
def _forward_fake(*arguments: Any) -> list[Tensor]:
    refuse_onnx("torch.ops.fusedrnn.recurrence")
    call, (return_states, rows) = Call(*arguments[:N]), arguments[N:]
    out = _allocated(call, return_states)
    # Other backends have no tape, and run forward again.
    if rows is None or call.refused() or not isinstance(call.backend(), CpuBackend):
        return out
    dtype = torch.float32 if call.x.dtype is torch.bfloat16 and call.x.is_cpu else call.x.dtype
    return [*out, call.x.new_empty((rows, call.tape_width()), dtype=dtype)]


@torch.library.register_fake("fusedrnn::recurrence_backward")  # type: ignore[untyped-decorator]
def _backward_fake(*arguments: Any) -> list[Tensor]:
    call, need = Call(*arguments[:N]), arguments[-1]
    return _with_empty(_gradients(call.learned(), need), need, call.x)


def _products(shapes: Sequence[Any]) -> list[int]:
    """Operations of the products of all steps with each weight. A multiply and an add are two, as PyTorch
    counts."""
    x = shapes[0]
    rows = 2 * int(x[0] * x[1] if len(x) == 3 else x[0])
    return [rows * int(s[0] * s[1]) if s is not None and len(s) == 2 else 0 for s in shapes[2]]


@register_flop_formula(torch.ops.fusedrnn.recurrence)
def _forward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return sum(_products(shapes))


@register_flop_formula(torch.ops.fusedrnn.recurrence_backward)
def _backward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Once more for the gradients of operands, and once for those of weights."""
    n0, need, products = len(shapes[1]), shapes[-1], _products(shapes)
    names = list(cell_of(shapes[7]).blocks)
    operands = sum(p * (need[0] if n == "weight_ih" else 1) for n, p in zip(names, products, strict=True))
    return operands + sum(p * w for p, w in zip(products, need[1 + n0 :], strict=False))
