"""One layer in one direction of any cell as operators: ``fusedrnn.cell_recurrence`` and its backward.

As those of ``ops``, but for cells of any parameters and states, which are lists. What no kernel runs they run
a step at a time in PyTorch's operations. Both find the cell by a string.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fusedrnn import backends
from fusedrnn.backends import cpu
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.backends.protocol import Regularization, Unsupported
from fusedrnn.cells import Cell
from fusedrnn.torch import differentiable, ops, paths
from fusedrnn.torch.memory import array, contiguous, contiguous_features, given, tensor

_CALL = (
    "Tensor x, Tensor[] state0, Tensor?[] weights, Tensor[] scalars, Tensor? lengths, Tensor? reset,"
    " Tensor? seed, str cell, bool reverse, bool recompute, int? detach_every, float[] rates, int stream"
)
# Returns y, the final states, those of every step, and the tape: as there are.
torch.library.define(
    "fusedrnn::cell_recurrence",
    f"({_CALL}, bool return_states, bool save) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
# ``upstream`` are the gradients of what forward returned but the tape. Returns those of x, state0, the
# weights and the scalars; empty ones where they are not needed.
torch.library.define(
    "fusedrnn::cell_recurrence_backward",
    f"({_CALL}, Tensor y, Tensor? tape, Tensor?[] upstream, bool[] need) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)

_known: dict[str, Cell] = {}
_keys: dict[Cell, str] = {}


def key_of(cell: Cell) -> str:
    """What stands for a cell in the operators: where it is found in any process, and a digest of what it
    computes, so that compiled code is not that of another version of it; or a number."""
    if cell not in _keys:
        _ = cell.states, cell.blocks, cell.scalars  # known before a compiler asks, which cannot derive them
        key = f"{cell.__module__}:{cell.__qualname__}:{cell.digest}"
        if cell.options:
            key += f":{tuple(cell.options.items())!r}"
        try:
            found = _found(key)
        except (ImportError, AttributeError, ValueError, TypeError, SyntaxError):
            found = None
        key = key if found == cell else f"{cell.name}:{len(_keys)}"
        _keys[cell], _known[key] = key, cell
    return _keys[cell]


def cell_of(key: str) -> Cell:
    """The cell of such a key."""
    if key not in _known:
        try:
            _known[key] = _found(key)
        except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
            raise RuntimeError(
                f"cell: {key!r} is not found in this process ({error}); define the cell at the top of a "
                "module that can be imported"
            ) from error
    return _known[key]


def _found(key: str) -> Cell:
    module, name, digest, *options = key.split(":", 3)
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, Cell):
        raise TypeError(f"it is of type {type(found).__name__}")
    if options:
        found = found.with_options(**dict(ast.literal_eval(options[0])))
    if found.digest != digest:
        raise ValueError("it computes something else than it did")
    return found


class CellCall(NamedTuple):
    """What both operators begin with."""

    x: Tensor  # (T, B, I)
    state0: Sequence[Tensor]  # of each state (B, ·); or empty, for where they start
    weights: Sequence[Tensor | None]  # in the order of cell.blocks; biases may be missing
    scalars: Sequence[Tensor]  # (T, B) each, in the order of cell.scalars
    lengths: Tensor | None  # (B,), on the CPU
    reset: Tensor | None  # (T, B)
    seed: Tensor | None  # of the masks; None: evaluation
    cell: str  # a key
    reverse: bool = False
    recompute: bool = False
    detach_every: int | None = None
    rates: Sequence[float] = ()  # of recurrent dropout and of zoneout of h and c, or none
    stream: int = 0  # of layer and direction: their masks differ

    def by_name(self) -> dict[str, Tensor]:
        """The weights that there are."""
        pairs = zip(cell_of(self.cell).blocks, self.weights, strict=True)
        return {name: w for name, w in pairs if w is not None}

    def scalars_by_name(self) -> dict[str, Any]:
        """As arrays."""
        arrays = [array(contiguous(s)) for s in self.scalars]
        return dict(zip(cell_of(self.cell).scalars, arrays, strict=True))

    def rows(self) -> tuple[Any, Any]:
        """``lengths`` and ``reset`` as arrays, values checked."""
        return ops.Call.rows(cast(Any, self))

    def regularization(self) -> Regularization | None:
        """The rates, the seed and the stream of a call, or None without any."""
        return ops.Call.regularization(cast(Any, self))

    def sizes(self) -> tuple[Any, Any, Any, Any]:
        """T, B, and of each state the width, and H; they may be symbols."""
        cell, weights = cell_of(self.cell), self.by_name()
        H = weights["weight_ih"].size(0) // cell.blocks["weight_ih"]
        P = weights["weight_hr"].size(0) if cell.projects else H
        return self.x.size(0), self.x.size(1), cell.widths(H, P), H

    def refused(self) -> str | None:
        """Why no kernel runs it, or None."""
        x, detached = self.x, self.detach_every is not None
        return refused(self.cell, x.device.type, str(x.dtype), bool(self.rates), detached)

    def tape_width(self) -> Any:
        """Columns of the tape, for each of its T * B rows; None: there is none, and forward runs again."""
        if self.recompute or self.refused() or not isinstance(backends.usable(None), CpuBackend):
            return None
        regularization = None
        if self.rates:  # whatever the seed, which a compiler does not know
            dropout, zoneout_h, zoneout_c = self.rates
            regularization = Regularization(dropout, zoneout_h, zoneout_c, None if self.seed is None else 0)
        return cpu.machine.plan_of(cell_of(self.cell), regularization).tape_width(int(self.sizes()[3]))


N = len(CellCall._fields)


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


def forward(call: CellCall, return_states: bool, save: bool) -> list[Tensor]:
    """The operator; by PyTorch's dispatcher only where that is watched."""
    if ops.watched(call.x):
        found: list[Tensor] = torch.ops.fusedrnn.cell_recurrence(*call, return_states, save)
        return found
    return run(call, return_states, save)


def backward(call: CellCall, y: Tensor, tape: Any, upstream: Any, need: Any) -> list[Tensor]:
    """The operator, likewise."""
    if ops.watched(call.x):
        found: list[Tensor] = torch.ops.fusedrnn.cell_recurrence_backward(*call, y, tape, upstream, need)
        return found
    return run_backward(call, y, tape, upstream, need)


def _allocated(call: CellCall, return_states: bool) -> list[Tensor]:
    """Memory for y, the final states and those of every step."""
    T, B, widths, _ = call.sizes()
    final = [call.x.new_empty((B, width)) for width in widths]
    every = [call.x.new_empty((T, B, width)) for width in widths] if return_states else []
    return [call.x.new_empty((T, B, widths[0])), *final, *every]


def _machine_arguments(call: CellCall) -> tuple[Any, ...]:
    lengths, reset = call.rows()
    state0 = given([s.contiguous() for s in call.state0])
    scalars = given([s.contiguous() for s in call.scalars])
    x = given([contiguous_features(call.x)])[0]
    return x, state0, scalars, lengths, reset, call.reverse, call.detach_every or 0, call.regularization()


def _machine_weights(call: CellCall) -> Sequence[Any]:
    weights = call.by_name()
    return given([contiguous(weights.get(name)) for name in cpu.machine.names(cell_of(call.cell))])


def _other_arguments(call: CellCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lengths, reset = call.rows()
    weights = {name: array(contiguous(w)) for name, w in call.by_name().items()}
    state0 = tuple([array(contiguous(s)) for s in call.state0])
    options = {
        "lengths": lengths,
        "reset": reset,
        "reverse": call.reverse,
        "detach_every": call.detach_every,
        "regularization": call.regularization(),
        "scalars": call.scalars_by_name() or None,
    }
    return (cell_of(call.cell), array(contiguous_features(call.x)), weights, state0 or None), options


def run(
    call: CellCall, return_states: bool, save: bool, packed: tuple[Any, Any] | None = None
) -> list[Tensor]:
    """Forward, of the call's weights or of a backend and what it packed of them."""
    if (reason := call.refused()) is not None:
        paths.tell(cell_of(call.cell).name, reason, paths.STEPS)
        with torch.no_grad():
            y, *states = steps(call, return_states)
        return [y, *[s.clone(memory_format=torch.contiguous_format) for s in states]]
    backend, weights = (backends.usable(None), None) if packed is None else packed
    cell = cell_of(call.cell)
    if isinstance(backend, CpuBackend):
        machine, n, out = cpu.machine, len(cell.states), _allocated(call, return_states)
        tape = None
        if save and not call.recompute:
            tape = ops._own_tape(call.x, call.x.size(0) * call.x.size(1), call.tape_width())
            if call.lengths is not None:
                tape.zero_()  # padding leaves it as it is
        core = machine.pack_given(cell, _machine_weights(call)) if weights is None else weights.core
        y, *states = given(out)
        kept = None if tape is None else given([tape])[0]
        machine.run_forward(cell, core, *_machine_arguments(call), y, states[:n], states[n:], kept)
        return out if tape is None else [*out, tape]
    (_, x, own, state0), options = _other_arguments(call)
    first = cell, x, own if weights is None else weights, state0
    found = backend.forward(*first, **options, return_states=return_states, save=None)
    return [tensor(a) for a in (found.y, *found.stateT, *(found.states or ()))]


def run_backward(
    call: CellCall, y: Tensor, tape: Tensor | None, upstream: Sequence[Tensor | None], need: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x, state0, the weights and the scalars."""
    cell, learned = cell_of(call.cell), [call.x, *call.state0, *call.weights, *call.scalars]
    n, n0, scalars = len(cell.states), len(call.state0), 1 + len(call.state0) + len(call.weights)
    dy, final, every = upstream[0], list(upstream[1 : 1 + n]), list(upstream[1 + n :])
    found: list[Tensor | None]
    if call.refused() is not None:
        with _recording():
            inputs = [
                None if t is None else t.detach().requires_grad_(wanted)
                for t, wanted in zip(learned, need, strict=True)
            ]
            found = gradients_of_steps(with_tensors(call, inputs), upstream, inputs, False)
    elif isinstance(backends.usable(None), CpuBackend):
        if tape is None:
            call = call._replace(recompute=False)
            tape = run(call, False, True)[-1]
        found = [
            t.new_empty(t.shape) if wanted and t is not None else None
            for t, wanted in zip(learned, need, strict=True)
        ]
        if any(need[1 : 1 + n0]):  # all or none
            found[1 : 1 + n0] = [s.new_empty(s.shape) for s in call.state0]
        machine, names = cpu.machine, cpu.machine.names(cell)
        by_name = dict(zip(cell.blocks, found[1 + n0 : scalars], strict=True))
        dx, *dweights = given([found[0], *[by_name.get(name) for name in names]])
        dstate0 = [d for d in found[1 : 1 + n0] if d is not None]
        machine.run_backward(
            cell,
            _machine_weights(call),
            *_machine_arguments(call),
            *given([contiguous(y), contiguous(tape), contiguous(dy)]),
            given([contiguous(d) for d in final]),
            given([contiguous(d) for d in every]),
            dx,
            dweights,
            given(dstate0),
            given(found[scalars:]),
        )
    else:
        first, options = _other_arguments(call)
        backend = backends.usable(None)
        needed = [m for m, w in zip([*cell.blocks, *cell.scalars], need[1 + n0 :], strict=True) if w]
        wanted = [*(["x"] if need[0] else []), *needed, *(["state0"] if any(need[1 : 1 + n0]) else [])]
        back = backend.backward(
            backend.forward(*first, **options, return_states=bool(every)).tape,
            array(contiguous(dy)),
            tuple([array(contiguous(d)) for d in final]),
            tuple([array(contiguous(d)) for d in every]) or None,
            need=wanted,
        )
        arrays = [back.dx, *(back.dstate0 or [None] * n0)[:n0]]
        arrays += [*map(back.dweights.get, cell.blocks), *map(back.dscalars.get, cell.scalars)]
        found = [None if a is None else tensor(a) for a in arrays]
    return [
        call.x.new_empty((0,)) if d is None or not wanted else d
        for d, wanted in zip(found, need, strict=True)
    ]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Within the block autograd records, also where compiled code, which records itself, runs an operator."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch.inference_mode(False), torch._C._ForceDispatchKeyGuard(include, exclude):
        yield


def steps(call: CellCall, return_states: bool) -> list[Tensor]:
    """What forward returns, a step at a time in PyTorch's own operations, which record themselves."""
    cell, lengths, reset = cell_of(call.cell), call.lengths, call.reset
    if torch._C._functorch.peek_interpreter_stack() is None:  # a transform's tensors have no values to check
        lengths, reset = call.rows()
    with paths.without_autocast(call.x.device):
        y, final, every = differentiable.recurrence(
            cell,
            call.x,
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
    return [y, *final, *(every or [])]


def with_tensors(call: CellCall, learned: Sequence[Any]) -> CellCall:
    """The call with others in place of x, state0, the weights and the scalars."""
    x, *rest = learned
    a = len(call.state0)
    b = a + len(call.weights)
    return call._replace(x=x, state0=rest[:a], weights=rest[a:b], scalars=rest[b:])


def gradients_of_steps(
    call: CellCall, upstream: Sequence[Tensor | None], inputs: Sequence[Tensor | None], create_graph: bool
) -> list[Tensor | None]:
    """The gradients of inputs of a call; None where there is none."""
    with torch.enable_grad():
        results = steps(call, len(upstream) > 1 + len(cell_of(call.cell).states))
        used = [(r, d) for r, d in zip(results, upstream, strict=True) if d is not None and r.requires_grad]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found: Any = [None] * len(wanted)
        if used and wanted:
            ys, ds = [r for r, _ in used], [d for _, d in used]
            found = torch.autograd.grad(ys, wanted, ds, create_graph=create_graph, allow_unused=True)
    each = iter(found)
    return [next(each) if t is not None and t.requires_grad else None for t in inputs]


def _forward(*arguments: Any) -> list[Tensor]:
    return run(CellCall(*arguments[:N]), *arguments[N:])


def _backward(*arguments: Any) -> list[Tensor]:
    call, (y, tape, upstream, need) = CellCall(*arguments[:N]), arguments[N:]
    found = run_backward(call, y, tape, upstream, need)
    learned = [call.x, *call.state0, *call.weights, *call.scalars]
    return [  # zeros where no step used what was asked for
        torch.zeros_like(t) if w and t is not None and not d.numel() else d
        for t, d, w in zip(learned, found, need, strict=True)
    ]


for _device in ("CPU", "CUDA"):
    torch.library.impl("fusedrnn::cell_recurrence", _device, _forward)
    torch.library.impl("fusedrnn::cell_recurrence_backward", _device, _backward)


@torch.library.register_fake("fusedrnn::cell_recurrence")  # type: ignore[untyped-decorator]
def _forward_fake(*arguments: Any) -> list[Tensor]:
    ops.refuse_onnx("torch.ops.fusedrnn.cell_recurrence")
    call, (return_states, save) = CellCall(*arguments[:N]), arguments[N:]
    out, width = _allocated(call, return_states), call.tape_width() if save else None
    return out if width is None else [*out, call.x.new_empty((call.x.size(0) * call.x.size(1), width))]


@torch.library.register_fake("fusedrnn::cell_recurrence_backward")  # type: ignore[untyped-decorator]
def _backward_fake(*arguments: Any) -> list[Tensor]:
    call, need = CellCall(*arguments[:N]), arguments[-1]
    learned = [call.x, *call.state0, *call.weights, *call.scalars]
    return [
        t.new_empty(t.shape) if w and t is not None else call.x.new_empty((0,))
        for t, w in zip(learned, need, strict=True)
    ]


def _products(shapes: Sequence[Any]) -> list[int]:
    """Operations of the products of all steps with each weight; a multiply and an add are two."""
    rows = 2 * int(shapes[0][0] * shapes[0][1])
    return [rows * int(s[0] * s[1]) if s is not None and len(s) == 2 else 0 for s in shapes[2]]


@register_flop_formula(torch.ops.fusedrnn.cell_recurrence)
def _forward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return sum(_products(shapes))


@register_flop_formula(torch.ops.fusedrnn.cell_recurrence_backward)
def _backward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Once more for the gradients of operands, and once for those of weights."""
    n0, need, products = len(shapes[1]), shapes[-1], _products(shapes)
    names = list(cell_of(shapes[7]).blocks)
    operands = sum(p * (need[0] if n == "weight_ih" else 1) for n, p in zip(names, products, strict=True))
    return operands + sum(p * w for p, w in zip(products, need[1 + n0 :], strict=False))
