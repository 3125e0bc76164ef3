"""The CUDA backend: the kernels of csrc/cuda on arrays in a GPU's memory, CuPy's.

Experimental: no kernel has run on a GPU yet (docs/cuda.md). Importing this file imports no CuPy. Everything
here goes through a ``cuda_device.Device``; the large products before and after the recurrence are the
device's, the recurrence itself is launched as ``cuda_plan`` chooses.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.backends import cuda_compile, cuda_cupy, cuda_plan
from fusedrnn.backends.arguments import (
    FLOATS,
    ForwardArguments,
    Kind,
    check_backward,
    check_cell,
    check_forward,
    check_weights,
)
from fusedrnn.backends.cuda_device import Device
from fusedrnn.backends.cuda_jobs import (
    BackwardJob,
    CellKernels,
    ForwardJob,
    Index,
    Part,
    Pointer,
    Rules,
    Steps,
    kernels_of,
)
from fusedrnn.backends.cuda_plan import Plan
from fusedrnn.backends.protocol import Array, Forward, Gradients, Regularization, Rows, State, Weights
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import LSTM, Cell

MOST_SUMS = 8  # that a block of csrc/cuda/norm.h makes at once: two for each of four norms
KERNEL, PRECISION = "FUSEDRNN_CUDA_KERNEL", "FUSEDRNN_CUDA_PRECISION"  # of the environment
# Arrays of 16 bits are multiplied as they are, by the matrix units, and summed in float32.
OF_16_BITS = {"float16": "fp16", "bfloat16": "bf16"}
# What the self-test takes for right, relative to the largest entry; factors lose 2^-11, in bf16 2^-9.
TOLERANCE = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}


class KernelOptions(NamedTuple):
    """Kernel and precision that the caller or the environment asks for."""

    kernel: str | None  # out of cuda_plan.KERNELS; None: the plan chooses
    precision: str  # out of cuda_compile.PRECISIONS


@dataclass(frozen=True)
class Packed:
    """Weights in the order of the accumulators, and the arrays they were made of."""

    device: Device
    cell: Cell
    weights: Weights
    bias: Array  # (A*H,), in what is computed in
    ih: Array  # (X*H, I)
    hh: Array  # (R*H, H)
    hh2: Array | None  # (H, H), of cells of two phases
    gain: Array | None = None  # (A*H,), this and what follows of layer norm, in what is computed in
    gain_c: Array | None = None  # (H,)
    bias_c: Array | None = None  # (H,)

    @functools.cached_property
    def hh_t(self) -> Array:
        """hh transposed: what all steps in one launch read going back."""
        hh_t = self.device.empty(self.hh.shape[::-1], self.hh.dtype)
        hh_t[...] = self.hh.T
        return hh_t


@dataclass(frozen=True)
class Tape:
    """What backward needs. x, y and the weights are borrowed."""

    arguments: ForwardArguments
    packed: Packed
    kernel_options: KernelOptions
    y: Array
    c: Array | None  # (T, B, H), in what is computed in
    saved: Array | None  # (T, B, K*H), the same

    @property
    def bytes(self) -> int:
        """Bytes saved for backward beside x, y and the weights."""
        return sum(int(a.nbytes) for a in (self.c, self.saved) if a is not None)


class CudaBackend:
    """Every cell in float32 and float64, float16 and bfloat16, on a GPU; see ``protocol`` for the methods.
    Experimental.

    Of float16 and bfloat16 are the arrays, h included, which is rounded in every step; sums, c, and what is
    saved for backward are float32.

    ``last_plan`` is the ``cuda_plan.Plan`` of the last pass, forward or backward.

    Args:
        device: Where the arrays are; None: CuPy's current GPU, asked at each call.
        kernel: Out of ``cuda_plan.KERNELS``, or None: the environment variable FUSEDRNN_CUDA_KERNEL, and
            where that is not set the plan chooses.
        precision: Of all products of matrices in float32, out of ``cuda_compile.PRECISIONS``, or None: the
            environment variable FUSEDRNN_CUDA_PRECISION, and where that is not set "ieee". Sums are float32
            and so is everything else; the other dtypes have none but their own.
    """

    name = "cuda"

    def __init__(
        self,
        device: Device | None = None,
        kernel: str | None = None,
        precision: str | None = None,
        *,
        _tested: bool = False,
    ) -> None:
        _known("kernel", kernel, cuda_plan.KERNELS)
        _known("precision", precision, cuda_compile.PRECISIONS)
        self._device = device
        self._kernel, self._precision = kernel, precision
        self._test = not _tested
        self._tested: list[tuple[Device, tuple[str, str, str]]] = []  # where and what passed its self-test
        self.last_plan: Plan | None = None

    def unavailable(self) -> str | None:
        """None, or what is missing or too old."""
        return None if self._device is not None else cuda_cupy.unavailable()

    @property
    def device(self) -> Device:
        """The device that calls run on."""
        return cuda_cupy.current() if self._device is None else self._device

    def plan(self, cell: Cell, T: int, B: int, H: int, dtype: Any, *, backward: bool = False) -> Plan:
        """How a pass of these sizes would run here."""
        kernels = kernels_of(check_cell(cell))
        return self._plan(self.device, kernels, (T, B, H), np.dtype(dtype), self._kernel_options(), backward)

    def candidates(
        self, kernel: str, cell: Cell, B: int, H: int, dtype: Any, *, backward: bool = False
    ) -> list[cuda_plan.Candidate]:
        """What ``plan`` chooses from of one kernel of all steps."""
        dtype, kernel_options = np.dtype(dtype), self._kernel_options()
        return list(
            cuda_plan.candidates(
                kernel,
                kernels_of(check_cell(cell)),
                B,
                H,
                compute(dtype).itemsize,
                _facts(self.device),
                precision=_precision(dtype, kernel_options.precision),
                backward=backward,
            )
        )

    def pack(self, cell: Cell, weights: Weights) -> Packed:
        """Weights prepared for repeated calls, stale as soon as one of them changes."""
        device = self.device
        w, _, H = check_weights(cell, weights, dtypes_of(device), kind=_kind(device))
        kernels = kernels_of(cell)
        dtype = w.weight_ih.dtype
        bias = device.zeros((kernels.accumulators, H), compute(dtype))
        for part, given in (
            (kernels.input, w.bias_ih),
            (kernels.recurrent, w.bias_hh),
            (kernels.recurrent2, w.bias_hh),
        ):
            for k, gate, n in part.runs() if given is not None else ():
                first = part.first + k
                bias[first : first + n] += given.reshape(-1, H)[gate : gate + n].astype(bias.dtype)
        ih = _ordered(device, w.weight_ih, kernels.input.gates, H)
        hh = w.weight_hh[: kernels.recurrent.count * H]  # in their own order in every cell
        hh2 = w.weight_hh[kernels.recurrent2.gates[0] * H :] if kernels.two_phases else None
        packed = Packed(device, cell, w, bias.reshape(-1), ih, hh, hh2)
        if not cell.layer_norm:
            return packed
        gain = device.empty((kernels.accumulators * H,), bias.dtype)
        gain[: cell.gates * H], gain[cell.gates * H :] = w.gain_ih, w.gain_hh
        gain_c, bias_c = (None if a is None else a.astype(bias.dtype) for a in (w.gain_c, w.bias_c))
        return replace(packed, gain=gain, gain_c=gain_c, bias_c=bias_c)

    def forward(
        self,
        cell: Cell,
        x: Array,
        weights: Weights | Packed,
        state0: State | None = None,
        *,
        lengths: Rows | None = None,
        reset: Rows | None = None,
        reverse: bool = False,
        return_states: bool = False,
        detach_every: int | None = None,
        regularization: Regularization | None = None,
        save: str | None = "all",
    ) -> Forward:
        """One layer, one direction, the whole sequence.

        With ``lengths`` of NumPy's, and ``reset`` of booleans or of NumPy's, nothing waits for the GPU to
        know their values. With ``save="boundary_states"`` the tape keeps no more than with None, and
        backward runs all of forward again.
        """
        options = {
            "lengths": lengths,
            "reset": reset,
            "reverse": reverse,
            "return_states": return_states,
            "detach_every": detach_every,
            "regularization": regularization,
            "save": save,
        }
        packed, a = self._checked(cell, x, weights, state0, options)
        kernel_options = self._kernel_options()
        y, stateT, states, c, saved = self._run(a, packed, kernel_options, a.save == "all")
        tape = None if a.save is None else Tape(a, packed, kernel_options, y, c, saved)
        return Forward(y, stateT, states, tape)

    def _checked(
        self,
        cell: Cell,
        x: Array,
        weights: Weights | Packed,
        state0: State | None,
        options: dict[str, Any],
    ) -> tuple[Packed, ForwardArguments]:
        """The packed weights, and the arguments of forward as they have to be."""
        packed = weights if isinstance(weights, Packed) else self.pack(cell, weights)
        if packed.cell != check_cell(cell):
            raise ValueError(f"weights: packed for {packed.cell}, expected {cell}")
        _check_current(self.device, packed, "weights")
        dtypes, kind = dtypes_of(packed.device), _kind(packed.device)
        a = check_forward(cell, x, packed.weights, state0, **options, dtypes=dtypes, kind=kind)
        if isinstance(a.lengths, np.ndarray):  # whose values were checked without waiting for the GPU
            a = a._replace(lengths=packed.device.asarray(a.lengths))
        if a.state0 is not None and a.save is not None:  # a tape does not borrow it
            a = a._replace(state0=tuple(_copy(packed.device, s) for s in a.state0))
        return packed, a

    def saved(self, tape: Tape) -> tuple[Array, ...]:
        """The arrays of a tape of everything, beside y, for a library that keeps arrays alone."""
        return tuple(a for a in (tape.saved, tape.c) if a is not None)

    def tape(
        self,
        cell: Cell,
        x: Array,
        weights: Weights,
        state0: State | None = None,
        *,
        y: Array,
        saved: tuple[Array | None, ...],
        return_states: bool = False,
        **options: Any,
    ) -> Tape:
        """The tape again, of what forward got and returned and of what ``saved`` gave."""
        options |= {"return_states": return_states, "save": "all"}
        packed, a = self._checked(cell, x, weights, state0, options)
        T, B, _, H, _ = a.sizes
        kernels = kernels_of(cell, a.regularization is not None)
        arrays = iter(saved)
        kept = next(arrays) if kernels.saved else None
        c = next(arrays) if kernels.has_c else None
        return Tape(a, packed, self._kernel_options(), y.reshape(T, B, H), c, kept)

    def backward(
        self,
        tape: Tape,
        dy: Array | None = None,
        dstateT: tuple[Array | None, ...] | None = None,
        dstates: tuple[Array | None, ...] | None = None,
        *,
        need: Collection[str] | None = None,
    ) -> Gradients:
        """Gradients of everything in ``need``."""
        if not isinstance(tape, Tape):
            raise TypeError(
                f"tape: expected what forward of the cuda backend returned, got {type(tape).__name__}"
            )
        a, packed = tape.arguments, tape.packed
        _check_current(self.device, packed, "tape")
        b = check_backward(
            a.cell,
            a.weights,
            a.sizes,
            dy,
            dstateT,
            dstates,
            need=need,
            return_states=a.return_states,
            kind=_kind(packed.device),
        )
        if a.save == "boundary_states":
            again = a._replace(return_states=False)
            y, _, _, c, saved = self._run(again, packed, tape.kernel_options, True)
            tape = Tape(a, packed, tape.kernel_options, y, c, saved)
        run = _Launches(packed, a, tape.kernel_options.precision)
        T, B, I, H, _ = a.sizes
        device, kernels, dtype = packed.device, run.kernels, a.x.dtype
        rows = device.empty((T * B, kernels.accumulators * H), dtype)
        da = rows.reshape(T, B, kernels.accumulators * H)
        dstate0 = tuple(device.empty((B, H), dtype) for _ in a.cell.states)
        wanted = "state0" in b.need
        final, every, initial = ((*(s or ()), None, None) for s in (b.dstateT, b.dstates, a.state0))
        job = BackwardJob(
            run.steps,
            H,
            y=run.pointer(tape.y),
            h0=run.pointer(initial[0]),
            c0=run.pointer(initial[1]),
            c=run.pointer(tape.c),
            saved=run.pointer(tape.saved),
            dy=run.pointer(b.dy),
            dhT=run.pointer(final[0]),
            dcT=run.pointer(final[1]),
            dh_states=run.pointer(every[0]),
            dc_states=run.pointer(every[1]),
            da=run.pointer(da),
            dh0=run.pointer(dstate0[0] if wanted else None),
            dc0=run.pointer(dstate0[1] if wanted and kernels.has_c else None),
            rules=run.rules,
        )
        plan = self._plan(device, kernels, (T, B, H), dtype, tape.kernel_options, True)
        self._pass(device, dtype, tape.kernel_options.precision, plan.kernel)
        self.last_plan = plan
        if plan.kernel == "steps":
            self._steps_back(run, job, da, wanted)
        else:
            job.weight = run.pointer(packed.hh_t)
            run.whole(plan, "backward", job)

        dweights: dict[str, Array] = {}
        if a.cell.layer_norm:
            dweights |= run.norm_gradients(b.need)
        if "weight_ih" in b.need:
            dweights["weight_ih"] = device.empty((a.cell.gates * H, I), dtype)
            run.weight_gradient(rows, kernels.input, run.valid_x(), dweights["weight_ih"])
        if "weight_hh" in b.need:
            h = device.empty((T, B, H), dtype)
            middle = device.empty((T, B, H), dtype) if kernels.two_phases else None
            run.each("operands", T * B, job, Pointer(run.pointer(h)), Pointer(run.pointer(middle)))
            dweights["weight_hh"] = out = device.empty((a.cell.gates * H, H), dtype)
            run.weight_gradient(rows, kernels.recurrent, h.reshape(T * B, H), out)
            if middle is not None:
                run.weight_gradient(rows, kernels.recurrent2, middle.reshape(T * B, H), out)
        if not a.cell.layer_norm and b.need & {"bias_ih", "bias_hh"}:
            sums = run.sum(rows).reshape(-1, H)
            for name, parts in (
                ("bias_ih", (kernels.input,)),
                ("bias_hh", (kernels.recurrent, kernels.recurrent2)),
            ):
                if name in b.need:
                    dweights[name] = bias = device.empty((a.cell.gates * H,), dtype)
                    for part in parts:
                        for k, gate, n in part.runs():
                            first = part.first + k
                            bias.reshape(-1, H)[gate : gate + n] = sums[first : first + n]
        dx = None
        if "x" in b.need:
            dx = device.empty((T, B, I), dtype)
            part = kernels.input
            run.product(
                rows[:, part.first * H : (part.first + part.count) * H],
                packed.ih,
                dx.reshape(T * B, I),
            )
            if run.padding is not None:
                dx[run.padding] = 0  # a weight may be infinite
        given = Weights(**{name: dweights.get(name) for name in Weights._fields})
        return Gradients(dx, given, dstate0 if wanted else None)

    def _run(
        self, a: ForwardArguments, packed: Packed, kernel_options: KernelOptions, save: bool
    ) -> tuple[Array, State, State | None, Array | None, Array | None]:
        """y, stateT, states, and with ``save`` c and what the cell saves."""
        run = _Launches(packed, a, kernel_options.precision)
        T, B, I, H, _ = a.sizes
        device, kernels, dtype = packed.device, run.kernels, a.x.dtype
        y = device.empty((T, B, H), dtype)
        stateT = tuple(device.empty((B, H), dtype) for _ in a.cell.states)
        states = tuple(device.empty((T, B, H), dtype) for _ in a.cell.states) if a.return_states else None
        c = device.empty((T, B, H), run.compute) if save and kernels.has_c else None
        saved = None
        if kernels.saved and (save or kernels.two_phases or kernels.layer_norm):
            saved = device.empty((T if save else 1, B, kernels.saved * H), run.compute)
        projected = device.empty((T * B, kernels.input.count * H), run.compute)
        run.product(a.x.reshape(T * B, I), packed.ih.T, projected)
        (h0, c0, *_), (hT, cT, *_), (h_states, c_states, *_) = (
            (*(s or ()), None, None) for s in (a.state0, stateT, states)
        )
        job = ForwardJob(
            run.steps,
            H,
            projected=run.pointer(projected),
            bias=run.pointer(packed.bias),
            weight=run.pointer(packed.hh),
            h0=run.pointer(h0),
            c0=run.pointer(c0),
            y=run.pointer(y),
            hT=run.pointer(hT),
            cT=run.pointer(cT),
            h_states=run.pointer(h_states),
            c_states=run.pointer(c_states),
            rules=run.rules,
            c=run.pointer(c),
            saved=run.pointer(saved),
            saved_step=B * kernels.saved * H if save else 0,
        )
        plan = self._plan(device, kernels, (T, B, H), dtype, kernel_options, False)
        self._pass(device, dtype, kernel_options.precision, plan.kernel)
        self.last_plan = plan
        if plan.kernel == "steps":
            self._steps(run, job)
        else:
            run.whole(plan, "forward", job)
        return y, stateT, states, c, saved if save else None

    def _steps(self, run: _Launches, job: ForwardJob) -> None:
        """Forward, one launch a step, its product between the launches."""
        packed, kernels = run.packed, run.kernels
        T, B, _, H, _ = run.a.sizes
        operand = run.scratch((B, H), run.a.x.dtype)
        products = run.scratch((B, kernels.recurrent.count * H))
        job.operand, job.products = run.pointer(operand), run.pointer(products)
        if kernels.has_c:
            job.state_c = run.pointer(run.scratch((B, H)))
        for name in ("gain", "gain_c", "bias_c"):
            setattr(job, name, run.pointer(getattr(packed, name)))
        job2 = job
        if packed.hh2 is not None:
            products2 = run.scratch((B, H))
            job2 = ForwardJob.from_buffer_copy(job)
            job2.products = run.pointer(products2)

        def work() -> None:
            run.each("begin_forward", B, job)
            for s in range(T):
                run.product(operand, packed.hh.T, products)
                run.step("step_forward", job, s)
                if packed.hh2 is not None:
                    run.product(operand, packed.hh2.T, products2)
                    run.each("step_forward2", B, job2, Index(s))

        run.repeat(work, job, job2)

    def _steps_back(self, run: _Launches, job: BackwardJob, da: Array, finish: bool) -> None:
        """Backward, one launch a step, its product between the launches."""
        packed, recurrent, second = run.packed, run.kernels.recurrent, run.kernels.recurrent2
        T, B, _, H, _ = run.a.sizes
        chain, direct = run.scratch((B, H)), run.scratch((B, H))
        job.chain, job.direct = run.pointer(chain), run.pointer(direct)
        if run.kernels.has_c:
            job.dc = run.pointer(run.scratch((B, H)))
        if run.kernels.layer_norm:
            for name in ("gain", "bias", "gain_c", "bias_c"):
                setattr(job, name, run.pointer(getattr(packed, name)))
            job.row = run.pointer(run.scratch((B, run.kernels.accumulators * H)))
            run.norm_sums[...] = 0
            job.norm_sums = run.pointer(run.norm_sums)

        def work() -> None:
            run.each("begin_backward", B, job)
            for s in reversed(range(T)):
                da_t = da[T - 1 - s if run.a.reverse else s]
                run.step("step_backward", job, s)
                if packed.hh2 is not None:
                    run.product(da_t[:, second.first * H :], packed.hh2, chain)
                    run.each("step_backward2", B, job, Index(s))
                if s or finish:
                    columns = slice(recurrent.first * H, (recurrent.first + recurrent.count) * H)
                    run.product(da_t[:, columns], packed.hh, chain)
            if finish:
                run.each("finish_backward", B, job)

        run.repeat(work, job)

    def _plan(
        self,
        device: Device,
        kernels: CellKernels,
        sizes: tuple[int, int, int],
        dtype: np.dtype[Any],
        kernel_options: KernelOptions,
        backward: bool,
    ) -> Plan:
        return cuda_plan.choose(
            kernels,
            *sizes,
            compute(dtype).itemsize,
            _facts(device),
            precision=_precision(dtype, kernel_options.precision),
            backward=backward,
            forced=kernel_options.kernel,
        )

    def _kernel_options(self) -> KernelOptions:
        """What the constructor or the environment wants."""
        kernel = self._kernel or os.environ.get(KERNEL) or None
        precision = self._precision or os.environ.get(PRECISION) or "ieee"
        _known(f"environment variable {KERNEL}", kernel, cuda_plan.KERNELS)
        _known(f"environment variable {PRECISION}", precision, cuda_compile.PRECISIONS)
        if precision != "ieee" and not self.device.matrix_units:
            raise ValueError(
                f"precision: expected 'ieee' on this GPU, which has no others, got {precision!r}"
            )
        return KernelOptions(kernel, precision)

    def _pass(self, device: Device, dtype: np.dtype[Any], precision: str, kernel: str) -> None:
        """The self-test of a kernel variant, the first time; float64 is float32's code."""
        if not self._test:
            return
        dtype = np.dtype(np.float32) if dtype in FLOATS else dtype
        new = dtype.name, precision, kernel
        if not any(d is device and passed == new for d, passed in self._tested):
            if device.captured():
                raise RuntimeError(
                    f"the first call in {dtype.name} with kernel {kernel!r} on a GPU cannot be captured, "
                    "since it compiles, tests and waits: make one before, backward too"
                )
            _self_test(device, dtype, precision, kernel)
            self._tested.append((device, new))


class _Launches:
    """The launches of one call: what they share, and the arrays they use, which live as long."""

    def __init__(self, packed: Packed, a: ForwardArguments, precision: str) -> None:
        self.packed, self.a = packed, a
        self.device = packed.device
        self.kernels = kernels_of(a.cell, a.regularization is not None)
        self.rules = Rules.of(a.regularization)
        self.dtype, self.compute = cuda_compile.DTYPES[a.x.dtype.name], compute(a.x.dtype)
        self.precision = _precision(a.x.dtype, precision)
        self.kept: list[Array] = []
        self.steps = Steps(
            a.sizes.T,
            a.sizes.B,
            self.pointer(a.lengths),
            self.pointer(a.reset),
            a.reverse,
            a.detach_every or 0,
        )

    def pointer(self, array: Array | None) -> int | None:
        """The address of an array, or of nothing."""
        return None if array is None else self.device.pointer(array)

    def scratch(self, shape: tuple[int, ...], dtype: Any = None) -> Array:
        """An array that lives as long as this does; of the dtype that is computed in unless told."""
        self.kept.append(self.device.empty(shape, dtype or self.compute))
        return self.kept[-1]

    def each(self, kernel: str, rows: int, *args: Any) -> None:
        """A kernel that has a thread for each unit of so many rows."""
        threads = 32 * self.device.warps
        blocks = min(-(-rows * self.a.sizes.H // threads), 32 * self.device.multiprocessors)
        if blocks:
            self._launch(kernel, (blocks, 1), args)

    def step(self, kernel: str, job: ForwardJob | BackwardJob, s: int) -> None:
        """Step s: each unit by itself, or with layer norm a block for each row."""
        blocks = min(self.a.sizes.B, 32 * self.device.multiprocessors)
        if not self.kernels.layer_norm:
            self.each(kernel, self.a.sizes.B, job, Index(s))
        elif blocks:
            shared = self.device.warps * MOST_SUMS * 8
            self._launch(kernel, (blocks, 1), (job, Index(s)), shared)

    def _launch(self, kernel: str, blocks: tuple[int, int], args: Any, shared: int = 0) -> None:
        self.device.launch(
            self.kernels.type, self.dtype, kernel, blocks, args, shared, precision=self.precision
        )

    def repeat(self, work: Callable[[], None], *jobs: ForwardJob | BackwardJob) -> None:
        """Launches and products of all steps. The jobs know all sizes and addresses but the weights'."""
        if self.a.sizes.B == 0:
            return
        weights = self.pointer(self.packed.hh), self.pointer(self.packed.hh2)
        key = (self.kernels.type, self.dtype, self.precision, *weights, *map(bytes, jobs))
        self.device.repeat(key, work)

    def whole(self, plan: Plan, direction: str, job: ForwardJob | BackwardJob) -> None:
        """All steps in one launch."""
        job.units, job.rows, job.at_once, job.chunk = plan.units, plan.rows, plan.at_once, plan.chunk
        name, _, weights = plan.kernel.partition("_")
        if name == "grid":
            self.kept.append(self.device.zeros((plan.blocks[1],), np.uint32))
            job.arrived = self.pointer(self.kept[-1])
        self.device.launch(
            self.kernels.type,
            self.dtype,
            f"{name}_{direction}{weights and '_' + weights}",
            plan.blocks,
            (job,),
            plan.shared,
            cooperative=name == "grid",
            precision=self.precision,
        )

    def product(self, a: Array, b: Array, out: Array) -> None:
        """out = a b in the precision of the call, for all sizes."""
        if out.size and a.shape[1]:
            self.device.matmul(a, b, out, self.precision)
        else:
            out[...] = 0

    def sum(self, rows: Array) -> Array:
        """Over the rows, in what is computed in: of 16 bits by a product, whose sums are of no more."""
        if self.compute == rows.dtype:
            sums: Array = rows.sum(axis=0)
            return sums
        ones = self.scratch((1, rows.shape[0]), rows.dtype)
        ones[...] = 1
        sums = self.scratch((1, rows.shape[1]))
        self.product(ones, rows, sums)
        return sums

    @functools.cached_property
    def norm_sums(self) -> Array:
        """(B, N, H): of layer norm, what ``norm_gradients`` is made of, for each row of the batch."""
        return self.scratch((self.a.sizes.B, self.kernels.norm_sums, self.a.sizes.H))

    def norm_gradients(self, need: Collection[str]) -> dict[str, Array]:
        """Of the gains and biases."""
        A, gates, dtype = self.kernels.accumulators, self.a.cell.gates, self.a.x.dtype
        sums = self.norm_sums.sum(axis=0)  # gains, then biases: of the input part, of the recurrent one; of c
        firsts = {"gain_ih": 0, "gain_hh": gates, "bias_ih": A, "bias_hh": A + gates}
        found = {name: sums[first : first + gates].reshape(-1) for name, first in firsts.items()}
        if self.kernels.has_c:
            found |= {"gain_c": sums[2 * A], "bias_c": sums[2 * A + 1]}
        return {name: d.astype(dtype) for name, d in found.items() if name in need}

    def weight_gradient(self, da: Array, part: Part, operand: Array, out: Array) -> None:
        """The gates of a weight's gradient that a part of the accumulators (T*B, A*H) gives, in PyTorch's
        order."""
        H = self.a.sizes.H
        for k, gate, n in part.runs():
            first = part.first + k
            self.product(da[:, first * H : (first + n) * H].T, operand, out[gate * H : (gate + n) * H])

    @functools.cached_property
    def padding(self) -> Array | None:
        """(T, B) true at padding; None where there is none."""
        if self.a.lengths is None:
            return None
        times = self.device.asarray(np.arange(self.a.sizes.T)[:, np.newaxis])
        padding: Array = times >= self.a.lengths
        return padding

    def valid_x(self) -> Array:
        """x as (T*B, I), with zeros at padding."""
        T, B, I, _, _ = self.a.sizes
        if self.padding is None:
            return self.a.x.reshape(T * B, I)
        x = self.a.x.copy()
        x[self.padding] = 0
        return x.reshape(T * B, I)


def dtypes_of(device: Device) -> tuple[np.dtype[Any], ...]:
    """What arrays may be of."""
    if not device.matrix_units:
        return FLOATS
    halves = [np.dtype(np.float16)]
    with contextlib.suppress(ImportError):
        halves.append(np.dtype(importlib.import_module("ml_dtypes").bfloat16))
    return (*FLOATS, *halves)


def compute(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What sums, c and what is saved are of."""
    return dtype if dtype in FLOATS else np.dtype(np.float32)


def _facts(device: Device) -> cuda_plan.Device:
    return cuda_plan.Device(device.multiprocessors, device.shared_bytes, device.warps, device.cluster)


def _precision(dtype: np.dtype[Any], wanted: str) -> str:
    """How matrices of a dtype are multiplied."""
    return wanted if dtype == np.float32 else OF_16_BITS.get(dtype.name, "ieee")


def _kind(device: Device) -> Kind:
    return Kind(
        "an array of the GPU (CuPy)", device.is_array, lambda a: a, lambda a: _copy(device, a), device.asarray
    )


def _copy(device: Device, a: Array) -> Array:
    made = device.empty(a.shape, a.dtype)
    made[...] = a
    return made


def _ordered(device: Device, weight: Array, gates: tuple[int, ...], H: int) -> Array:
    """The rows of a weight in the order of the accumulators; the array itself where that is its own."""
    if gates == tuple(range(len(gates))):
        return weight
    ordered = device.empty(weight.shape, weight.dtype)
    for k, gate in enumerate(gates):
        ordered[k * H : (k + 1) * H] = weight[gate * H : (gate + 1) * H]
    return ordered


def _on_host(a: Any) -> Array:
    """A device array's copy; the emulated device's are NumPy's."""
    host: Array = a.get() if hasattr(a, "get") else a
    return host


def _check_current(device: Device, packed: Packed, name: str) -> None:
    if device is not packed.device:
        raise ValueError(f"{name}: expected that of the current GPU, got another's")


def _known(name: str, value: str | None, names: Collection[str]) -> None:
    if value is not None and value not in names:
        raise ValueError(f"{name}: expected one of {tuple(names)} or None, got {value!r}")


def _self_test(device: Device, dtype: np.dtype[Any], precision: str, kernel: str) -> None:
    """A small LSTM against the reference.

    Raises:
        RuntimeError: The results are wrong.
    """
    draw = np.random.default_rng(0).standard_normal
    T, B, I, H = 4, 3, 5, 13
    x, ih, hh, bias, h0, c0, dy = (
        draw(shape).astype(dtype)
        for shape in [(T, B, I), (4 * H, I), (4 * H, H), (4 * H,), (B, H), (B, H), (T, B, H)]
    )
    lengths, reset = np.array([T, 2, 3]), np.zeros((T, B), bool)
    reset[2, 0] = True
    hh /= dtype.type(4)

    def results(backend: Any, put: Any, get: Any) -> dict[str, Array]:
        weights = Weights(put(ih), put(hh), put(bias))
        out = backend.forward(
            LSTM(), put(x), weights, (put(h0), put(c0)), lengths=put(lengths), reset=put(reset)
        )
        back = backend.backward(out.tape, put(dy))
        found = {"y": out.y, "h": out.stateT[0], "c": out.stateT[1], "dx": back.dx}
        found |= {f"d{name}": d for name, d in back.dweights._asdict().items() if d is not None}
        found |= {"dh0": back.dstate0[0], "dc0": back.dstate0[1]}
        return {name: get(a) for name, a in found.items()}

    def wide(a: Array) -> Array:
        return a.astype(np.float32) if a.dtype == dtype else a

    want = results(ReferenceBackend(), wide, np.asarray)
    tolerance = TOLERANCE[_precision(dtype, precision)]
    tested = CudaBackend(device, kernel, precision, _tested=True)
    for name, got in results(tested, device.asarray, _on_host).items():
        error = float(np.abs(got.astype(np.float32) - want[name]).max() / np.abs(want[name]).max())
        if not error <= tolerance:
            raise RuntimeError(
                f"the cuda backend's self-test failed on this GPU, in {dtype} with {tested.last_plan}: "
                f"{name} is off by {error:.1e} of its largest entry; do not use it here, and please report "
                "this"
            )
