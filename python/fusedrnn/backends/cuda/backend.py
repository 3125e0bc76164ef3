"""Forward and backward of the CUDA backend.

The large products before and after the recurrence are the device's, the recurrence itself is launched as
``plans`` chooses.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.backends.arguments import FLOATS, ForwardArguments, check_backward, check_cell, check_forward
from fusedrnn.backends.cuda import cupy_device
from fusedrnn.backends.cuda.cupy_device import CupyDevice
from fusedrnn.backends.cuda.jobs import BackwardJob, CellKernels, ForwardJob, kernels_of
from fusedrnn.backends.cuda.launches import Launches
from fusedrnn.backends.cuda.nvrtc import KERNELS, PRECISIONS
from fusedrnn.backends.cuda.plans import Plan, choose
from fusedrnn.backends.cuda.self_test import self_test
from fusedrnn.backends.cuda.weights import Packed, compute, copy, dtypes_of, kind_of, pack, precision_of
from fusedrnn.backends.protocol import Array, Forward, Gradients, State, Weights
from fusedrnn.cells import Cell

KERNEL, PRECISION = "FUSEDRNN_CUDA_KERNEL", "FUSEDRNN_CUDA_PRECISION"  # of the environment


class KernelOptions(NamedTuple):
    """Kernel and precision that the caller or the environment asks for."""

    kernel: str | None  # out of nvrtc.KERNELS; None: the plan chooses
    precision: str  # out of nvrtc.PRECISIONS


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

    ``last_plan`` is the ``plans.Plan`` of the last pass, forward or backward.

    Args:
        device: Where the arrays are; None: CuPy's current GPU, asked at each call.
        kernel: Out of ``nvrtc.KERNELS``, or None: the environment variable FUSEDRNN_CUDA_KERNEL, and
            where that is not set the plan chooses.
        precision: Of all products of matrices in float32, out of ``nvrtc.PRECISIONS``, or None: the
            environment variable FUSEDRNN_CUDA_PRECISION, and where that is not set "ieee". Sums are float32
            and so is everything else; the other dtypes have none but their own.
    """

    name = "cuda"

    def __init__(
        self,
        device: CupyDevice | None = None,
        kernel: str | None = None,
        precision: str | None = None,
        *,
        _tested: bool = False,
    ) -> None:
        _known("kernel", kernel, KERNELS)
        _known("precision", precision, PRECISIONS)
        self._device = device
        self._kernel, self._precision = kernel, precision
        self._test = not _tested
        self._tested: set[tuple[CupyDevice, str, str, str]] = set()  # where and what passed its self-test
        self.last_plan: Plan | None = None

    def unavailable(self) -> str | None:
        """None, or what is missing or too old."""
        return None if self._device is not None else cupy_device.unavailable()

    @property
    def device(self) -> CupyDevice:
        """The device that calls run on."""
        return cupy_device.current() if self._device is None else self._device

    def plan(self, cell: Cell, T: int, B: int, H: int, dtype: Any, *, backward: bool = False) -> Plan:
        """How a pass of these sizes would run here."""
        kernels = kernels_of(check_cell(cell))
        return self._plan(self.device, kernels, (T, B, H), np.dtype(dtype), self._kernel_options(), backward)

    def pack(self, cell: Cell, weights: Weights) -> Packed:
        """Weights prepared for repeated calls, stale as soon as one of them changes."""
        return pack(self.device, cell, weights)

    def forward(
        self, cell: Cell, x: Array, weights: Weights | Packed, state0: State | None = None, **options: Any
    ) -> Forward:
        """One layer, one direction, the whole sequence; the options are those of ``protocol.Backend``.

        With ``lengths`` of NumPy's, and ``reset`` of booleans or of NumPy's, nothing waits for the GPU to
        know their values. With ``save="boundary_states"`` the tape keeps no more than with None, and
        backward runs all of forward again.
        """
        packed, a = self._checked(cell, x, weights, state0, options)
        kernel_options = self._kernel_options()
        y, stateT, states, c, saved = self._run(a, packed, kernel_options, a.save == "all")
        tape = None if a.save is None else Tape(a, packed, kernel_options, y, c, saved)
        return Forward(y, stateT, states, tape)

    def _checked(
        self, cell: Cell, x: Array, weights: Weights | Packed, state0: State | None, options: dict[str, Any]
    ) -> tuple[Packed, ForwardArguments]:
        """The packed weights, and the arguments of forward as they have to be."""
        packed = weights if isinstance(weights, Packed) else self.pack(cell, weights)
        if packed.cell != check_cell(cell):
            raise ValueError(f"weights: packed for {packed.cell!r}, expected {cell!r}")
        _check_current(self.device, packed, "weights")
        dtypes, kind = dtypes_of(packed.device), kind_of(packed.device)
        a = check_forward(cell, x, packed.weights, state0, **options, dtypes=dtypes, kind=kind)
        if isinstance(a.lengths, np.ndarray):  # whose values were checked without waiting for the GPU
            a = a._replace(lengths=packed.device.asarray(a.lengths))
        if a.state0 is not None and a.save is not None:  # a tape does not borrow it
            a = a._replace(state0=tuple(copy(packed.device, s) for s in a.state0))
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
        **options: Any,
    ) -> Tape:
        """The tape again, of what forward got and returned and of what ``saved`` gave."""
        packed, a = self._checked(cell, x, weights, state0, options | {"save": "all"})
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
        of, kind = (a.cell, a.weights, a.sizes), kind_of(packed.device)
        b = check_backward(*of, dy, dstateT, dstates, need=need, return_states=a.return_states, kind=kind)
        if a.save == "boundary_states":
            again = a._replace(return_states=False)
            y, _, _, c, saved = self._run(again, packed, tape.kernel_options, True)
            tape = Tape(a, packed, tape.kernel_options, y, c, saved)
        run = Launches(packed, a, tape.kernel_options.precision)
        T, B, I, H, _ = a.sizes
        device, kernels, dtype = packed.device, run.kernels, a.x.dtype
        rows = device.empty((T * B, kernels.accumulators * H), dtype)
        da = rows.reshape(T, B, kernels.accumulators * H)
        wanted = "state0" in b.need
        dstate0 = tuple(device.empty((B, H), dtype) for _ in a.cell.states) if wanted else None
        job = run.job(
            BackwardJob,
            {"y": tape.y, "c": tape.c, "saved": tape.saved, "dy": b.dy, "da": da},
            {"{}0": a.state0, "d{}T": b.dstateT, "d{}_states": b.dstates, "d{}0": dstate0},
        )
        plan = self._tested_plan(run, tape.kernel_options, True)
        if plan.kernel == "steps":
            run.steps_backward(job, da, wanted)
        else:
            job.weight = run.pointer(packed.hh_t)
            run.whole(plan, "backward", job)

        dweights = run.weight_gradients(job, rows, b.need)
        dx = None
        if "x" in b.need:
            dx = device.empty((T, B, I), dtype)
            part = kernels.input
            da_x = rows[:, part.first * H : (part.first + part.count) * H]
            run.product(da_x, packed.ih, dx.reshape(T * B, I))
            if run.padding is not None:
                dx[run.padding] = 0  # a weight may be infinite
        return Gradients(dx, {name: dweights.get(name) for name in a.weights}, dstate0, {})

    def _run(
        self, a: ForwardArguments, packed: Packed, kernel_options: KernelOptions, save: bool
    ) -> tuple[Array, State, State | None, Array | None, Array | None]:
        """y, stateT, states, and with ``save`` c and what the cell saves."""
        run = Launches(packed, a, kernel_options.precision)
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
        arrays: dict[str, Array | None] = {"projected": projected, "bias": packed.bias, "weight": packed.hh}
        arrays |= {"y": y, "c": c, "saved": saved}
        job = run.job(ForwardJob, arrays, {"{}0": a.state0, "{}T": stateT, "{}_states": states})
        job.saved_step = B * kernels.saved * H if save else 0
        plan = self._tested_plan(run, kernel_options, False)
        if plan.kernel == "steps":
            run.steps_forward(job)
        else:
            run.whole(plan, "forward", job)
        return y, stateT, states, c, saved if save else None

    def _tested_plan(self, run: Launches, options: KernelOptions, backward: bool) -> Plan:
        """The plan of a pass, ``last_plan`` from here on, once the kernel has passed its self-test."""
        T, B, _, H, _ = run.a.sizes
        device, dtype = run.device, run.a.x.dtype
        plan = self._plan(device, run.kernels, (T, B, H), dtype, options, backward)
        dtype = np.dtype(np.float32) if dtype in FLOATS else dtype  # float64 is float32's code
        new = device, dtype.name, options.precision, plan.kernel
        if self._test and new not in self._tested:
            if device.captured():
                raise RuntimeError(
                    f"the first call in {dtype.name} with kernel {plan.kernel!r} on a GPU cannot be "
                    "captured, since it compiles, tests and waits: make one before, backward too"
                )
            tested = CudaBackend(device, plan.kernel, options.precision, _tested=True)
            self_test(tested, dtype, options.precision)
            self._tested.add(new)
        self.last_plan = plan
        return plan

    def _plan(
        self,
        device: CupyDevice,
        kernels: CellKernels,
        sizes: tuple[int, int, int],
        dtype: np.dtype[Any],
        options: KernelOptions,
        backward: bool,
    ) -> Plan:
        itemsize, precision = compute(dtype).itemsize, precision_of(dtype, options.precision)
        return choose(kernels, *sizes, itemsize, device, precision, backward, options.kernel)

    def _kernel_options(self) -> KernelOptions:
        """What the constructor or the environment wants."""
        kernel = self._kernel or os.environ.get(KERNEL) or None
        precision = self._precision or os.environ.get(PRECISION) or "ieee"
        _known(f"environment variable {KERNEL}", kernel, KERNELS)
        _known(f"environment variable {PRECISION}", precision, PRECISIONS)
        if precision != "ieee" and not self.device.matrix_units:
            raise ValueError(
                f"precision: expected 'ieee' on this GPU, which has no others, got {precision!r}"
            )
        return KernelOptions(kernel, precision)


def _check_current(device: CupyDevice, packed: Packed, name: str) -> None:
    if device is not packed.device:
        raise ValueError(f"{name}: expected that of the current GPU, got another's")


def _known(name: str, value: str | None, names: Collection[str]) -> None:
    if value is not None and value not in names:
        raise ValueError(f"{name}: expected one of {tuple(names)} or None, got {value!r}")
