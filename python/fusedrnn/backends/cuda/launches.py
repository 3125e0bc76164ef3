"""The launches of one call: step by step, or all steps in one; and the large products around them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import numpy as np

from fusedrnn.backends.arguments import ForwardArguments
from fusedrnn.backends.cuda import jobs, nvrtc
from fusedrnn.backends.cuda.jobs import BackwardJob, ForwardJob, Index, Part, Pointer, kernels_of
from fusedrnn.backends.cuda.plans import Plan
from fusedrnn.backends.cuda.weights import Packed, compute, precision_of
from fusedrnn.backends.protocol import Array

Job = TypeVar("Job", ForwardJob, BackwardJob)
States = tuple[Array | None, ...] | None
MOST_SUMS = 8  # that a block of csrc/cuda/norm.h makes at once: two for each of four norms


class Launches:
    """The launches of one call: what they share, and the arrays they use, which live as long."""

    def __init__(self, packed: Packed, a: ForwardArguments, precision: str) -> None:
        self.packed, self.a = packed, a
        self.device = packed.device
        self.kernels = kernels_of(a.cell, a.regularization is not None)
        self.rules = jobs.Rules.of(a.regularization)
        self.compute, self.precision = compute(a.x.dtype), precision_of(a.x.dtype, precision)
        self.code = nvrtc.Code(self.kernels.type, nvrtc.DTYPES[a.x.dtype.name], self.precision)
        self.kept: list[Array] = []
        rows = self.pointer(a.lengths), self.pointer(a.reset)
        self.steps = jobs.Steps(a.sizes.T, a.sizes.B, *rows, a.reverse, a.detach_every or 0)

    def job(self, kind: type[Job], arrays: dict[str, Array | None], states: dict[str, States]) -> Job:
        """A job with the addresses of these arrays, and of those of each state: "{}0" names h0 and c0."""
        for name, of_states in states.items():
            for state, array in zip(self.a.cell.states, of_states or (), strict=False):
                arrays[name.format(state)] = array
        job = kind(self.steps, self.a.sizes.H, regularization=self.rules)
        self.point(job, arrays)
        return job

    def point(self, to: Any, arrays: dict[str, Array | None]) -> None:
        """The fields of a structure to the addresses of these arrays."""
        for name, array in arrays.items():
            setattr(to, name, self.pointer(array))

    def pointer(self, array: Array | None) -> int | None:
        """The address of an array, or of nothing."""
        return None if array is None else self.device.pointer(array)

    def scratch(self, shape: tuple[int, ...], dtype: Any = None, fill: int | None = None) -> Array:
        """An array that lives as long as this does; of the dtype that is computed in unless told."""
        array = self.device.empty(shape, dtype or self.compute)
        if fill is not None:
            array[...] = fill
        self.kept.append(array)
        return array

    def each(self, kernel: str, rows: int, *args: Any) -> None:
        """A kernel that has a thread for each unit of so many rows."""
        threads = 32 * self.device.warps
        blocks = min(-(-rows * self.a.sizes.H // threads), 32 * self.device.multiprocessors)
        if blocks:
            self.device.launch(self.code, kernel, (blocks, 1), args)

    def step(self, kernel: str, job: ForwardJob | BackwardJob, s: int) -> None:
        """Step s: each unit by itself, or with layer norm a block for each row."""
        if self.kernels.layer_norm:
            blocks = min(self.a.sizes.B, 32 * self.device.multiprocessors)
            shared = self.device.warps * MOST_SUMS * 8
            self.device.launch(self.code, kernel, (blocks, 1), (job, Index(s)), shared)
        else:
            self.each(kernel, self.a.sizes.B, job, Index(s))

    def repeat(self, work: Callable[[], None], job: ForwardJob | BackwardJob) -> None:
        """Launches and products of all steps. The job knows all sizes and addresses but the weights'."""
        if self.a.sizes.B:
            weights = self.pointer(self.packed.hh), self.pointer(self.packed.hh2)
            self.device.repeat((self.code, *weights, bytes(job)), work)

    def steps_forward(self, job: ForwardJob) -> None:
        """Forward, one launch a step, its product between the launches."""
        packed = self.packed
        T, B, _, H, _ = self.a.sizes
        operand = self.scratch((B, H), self.a.x.dtype)
        products = self.scratch((B, self.kernels.recurrent.count * H))
        products2 = products.reshape(-1)[: B * H].reshape(B, H)  # after the first phase
        state_c = self.scratch((B, H)) if self.kernels.has_c else None
        self.point(job, {"operand": operand, "products": products, "state_c": state_c, **packed.norm})

        def work() -> None:
            self.each("begin_forward", B, job)
            for s in range(T):
                self.product(operand, packed.hh.T, products)
                self.step("step_forward", job, s)
                if packed.hh2 is not None:
                    self.product(operand, packed.hh2.T, products2)
                    self.each("step_forward2", B, job, Index(s))

        self.repeat(work, job)

    def steps_backward(self, job: BackwardJob, da: Array, finish: bool) -> None:
        """Backward, one launch a step, its product between the launches."""
        packed, recurrent, second = self.packed, self.kernels.recurrent, self.kernels.recurrent2
        T, B, _, H, _ = self.a.sizes
        chain = self.scratch((B, H))
        arrays: dict[str, Array | None] = {"chain": chain, "direct": self.scratch((B, H))}
        if self.kernels.has_c:
            arrays["dc"] = self.scratch((B, H))
        if self.kernels.layer_norm:
            row = self.scratch((B, self.kernels.accumulators * H))
            arrays |= {"bias": packed.bias, "row": row, "norm_sums": self.norm_sums}
        self.point(job, {**arrays, **packed.norm})

        def work() -> None:
            self.each("begin_backward", B, job)
            for s in reversed(range(T)):
                da_t = da[T - 1 - s if self.a.reverse else s]
                self.step("step_backward", job, s)
                if packed.hh2 is not None:
                    self.product(da_t[:, second.first * H :], packed.hh2, chain)
                    self.each("step_backward2", B, job, Index(s))
                if s or finish:
                    columns = slice(recurrent.first * H, (recurrent.first + recurrent.count) * H)
                    self.product(da_t[:, columns], packed.hh, chain)
            if finish:
                self.each("finish_backward", B, job)

        self.repeat(work, job)

    def whole(self, plan: Plan, direction: str, job: ForwardJob | BackwardJob) -> None:
        """All steps in one launch."""
        job.cut = jobs.Cut(plan.units, plan.rows, plan.splits, plan.at_once)
        if plan.kernel == "grid":
            arrived = self.scratch((plan.blocks[1],), np.uint32, 0)
            exchanged = self.scratch((plan.exchanged,), np.uint8, 0)
            self.point(job.cut, {"arrived": arrived, "exchanged": exchanged})
        self.device.launch(self.code, f"{plan.kernel}_{direction}", plan.blocks, (job,), plan.shared)

    def product(self, a: Array, b: Array, out: Array) -> None:
        """out = a b in the precision of the call, for all sizes."""
        if out.size and a.shape[1]:
            self.device.matmul(a, b, out, self.precision)
        else:
            out[...] = 0

    def sum(self, rows: Array) -> Array:
        """Over the rows, in what is computed in: of 16 bits by a product, whose sums are of no more."""
        if self.compute == rows.dtype:
            return rows.sum(axis=0)
        ones = self.scratch((1, rows.shape[0]), rows.dtype, 1)
        sums = self.scratch((1, rows.shape[1]))
        self.product(ones, rows, sums)
        return sums.reshape(-1)

    @functools.cached_property
    def norm_sums(self) -> Array:
        """(B, N, H): of layer norm, what ``norm_gradients`` is made of, for each row of the batch."""
        return self.scratch((self.a.sizes.B, self.kernels.norm_sums, self.a.sizes.H), fill=0)

    def norm_gradients(self, need: Collection[str]) -> dict[str, Array]:
        """Of the gains and biases."""
        A, gates, dtype = self.kernels.accumulators, self.kernels.input.count, self.a.x.dtype
        sums = self.norm_sums.sum(axis=0)  # gains, then biases: of the input part, of the recurrent one; of c
        firsts = {"gain_ih": 0, "gain_hh": gates, "bias_ih": A, "bias_hh": A + gates}
        found = {name: sums[first : first + gates].reshape(-1) for name, first in firsts.items()}
        if self.kernels.has_c:
            found |= {"gain_c": sums[2 * A], "bias_c": sums[2 * A + 1]}
        return {name: d.astype(dtype) for name, d in found.items() if name in need}

    def weight_gradients(self, job: BackwardJob, rows: Array, need: frozenset[str]) -> dict[str, Array]:
        """In PyTorch's order, of da as rows (T*B, A*H)."""
        T, B, _, H, _ = self.a.sizes
        device, dtype, kernels = self.device, self.a.x.dtype, self.kernels
        biases = need & {name for name, _ in kernels.biases if not kernels.layer_norm}
        names = need & {"weight_ih", "weight_hh"} | biases
        found = {name: device.empty(self.a.weights[name].shape, dtype) for name in names}

        def multiply(name: str, part: Part, operand: Array) -> None:
            for accumulators, gates in part.runs(H):
                self.product(rows[:, accumulators].T, operand, found[name][gates])

        if "weight_ih" in need:
            multiply("weight_ih", kernels.input, self.valid_x())
        if "weight_hh" in need:
            h = device.empty((T * B, H), dtype)
            middle = device.empty((T * B, H), dtype) if kernels.two_phases else None
            self.each("operands", T * B, job, Pointer(self.pointer(h)), Pointer(self.pointer(middle)))
            multiply("weight_hh", kernels.recurrent, h)
            if middle is not None:
                multiply("weight_hh", kernels.recurrent2, middle)
        sums = self.sum(rows) if biases else rows
        for name, part in kernels.biases:
            for accumulators, gates in part.runs(H) if name in biases else ():
                found[name][gates] = sums[accumulators]
        return found | (self.norm_gradients(need) if kernels.layer_norm else {})

    @functools.cached_property
    def padding(self) -> Array | None:
        """(T, B) true at padding; None where there is none."""
        if self.a.lengths is None:
            return None
        times = self.device.asarray(np.arange(self.a.sizes.T)[:, np.newaxis])
        return times >= self.a.lengths

    def valid_x(self) -> Array:
        """x as (T*B, I), with zeros at padding."""
        T, B, I, _, _ = self.a.sizes
        if self.padding is None:
            return self.a.x.reshape(T * B, I)
        x = self.a.x.copy()
        x[self.padding] = 0
        return x.reshape(T * B, I)
