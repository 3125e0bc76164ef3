"""The structures of csrc/cuda/jobs.h, which the CUDA kernels get, and what the host must know of a cell."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fusedrnn import masks
from fusedrnn.backends.cpu import compiled
from fusedrnn.backends.protocol import Regularization, Unsupported
from fusedrnn.cells import Cell

with contextlib.suppress(ImportError):  # said by ``cupy_device.unavailable``
    from fusedrnn import _core

Pointer = ctypes.c_void_p
Index = ctypes.c_int64


def _of(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Steps(ctypes.Structure):
    """csrc/steps.h"""

    _fields_ = (
        *_of(Index, "T B"),
        *_of(Pointer, "lengths reset"),
        ("reverse", ctypes.c_bool),
        ("detach_every", Index),
    )


class MaskRule(ctypes.Structure):
    """csrc/mask_rule.h"""

    _fields_ = (
        *_of(ctypes.c_bool, "acts drawn"),
        ("threshold", ctypes.c_uint32),
        ("kept", ctypes.c_double),
    )

    @classmethod
    def of(cls, rate: float, kept: float, drawn: bool) -> MaskRule:
        """Gives ``kept`` to a unit with probability 1 - rate; not drawn: to all."""
        if not rate:
            return cls()
        threshold = masks.threshold(rate)
        if drawn and threshold >= 2**32:
            return cls(True, False, 0, 0.0)
        return cls(True, drawn, threshold if drawn else 0, kept)


class Rules(ctypes.Structure):
    """``Regularization`` of csrc/cuda/jobs.h."""

    _fields_ = (("seed", ctypes.c_uint64), ("stream", ctypes.c_uint32), ("rules", MaskRule * 3))

    @classmethod
    def of(cls, r: Regularization | None) -> Rules:
        """What the kernels are told of it; None is nothing."""
        if r is None:
            return cls()
        training, dropped = r.seed is not None, r.recurrent_dropout
        dropout = MaskRule.of(dropped if training else 0, 1 / (1 - dropped) if dropped < 1 else 0, True)
        zoneout = (MaskRule.of(z, 1 if training else 1 - z, training) for z in (r.zoneout_h, r.zoneout_c))
        return cls(r.seed or 0, r.stream, (dropout, *zoneout))


class Cut(ctypes.Structure):
    """How the work of all steps in one launch is cut."""

    _fields_ = (*_of(Index, "units rows splits at_once"), *_of(Pointer, "arrived exchanged"))


class ForwardJob(ctypes.Structure):
    """Of every dtype: the pointers alone know it."""

    _fields_ = (
        ("steps", Steps),
        ("H", Index),
        *_of(Pointer, "projected bias weight h0 c0 y hT cT h_states c_states c saved"),
        ("saved_step", Index),
        ("cut", Cut),
        *_of(Pointer, "operand products state_c gain gain_c bias_c"),
        ("regularization", Rules),
    )


class BackwardJob(ctypes.Structure):
    """Of every dtype: the pointers alone know it."""

    _fields_ = (
        ("steps", Steps),
        ("H", Index),
        *_of(Pointer, "weight y h0 c0 c saved dy dhT dcT dh_states dc_states da dh0 dc0"),
        ("cut", Cut),
        *_of(Pointer, "chain direct dc gain bias gain_c bias_c row norm_sums"),
        ("regularization", Rules),
    )


@dataclass(frozen=True)
class Part:
    """Which accumulators a part of a cell feeds: ``first`` and the ones after it, each from one gate."""

    first: int
    gates: tuple[int, ...]  # of PyTorch's order, one for each accumulator

    @property
    def count(self) -> int:
        """Accumulators that the part feeds."""
        return len(self.gates)

    def runs(self, H: int) -> Iterator[tuple[slice, slice]]:
        """Neighbouring accumulators, and the neighbouring gates that feed them, of H numbers each."""
        for _, group in itertools.groupby(range(self.count), lambda k: self.gates[k] - k):
            k, *others = group
            first, gate, n = self.first + k, self.gates[k], 1 + len(others)
            yield slice(first * H, (first + n) * H), slice(gate * H, (gate + n) * H)


class CellKernels(NamedTuple):
    """A cell as csrc/cells has it."""

    type: str  # of csrc/cells/cells.def, or Regularized<> of one
    accumulators: int
    saved: int
    has_c: bool
    input: Part
    recurrent: Part
    recurrent2: Part  # of cells of two phases
    regularized: bool  # recurrent dropout, zoneout
    layer_norm: bool

    @property
    def whole(self) -> bool:
        """Whether all steps can run in one launch; ``kWhole`` of csrc/cuda/all_steps.h."""
        return not (self.two_phases or self.regularized or self.layer_norm)

    @property
    def norm_sums(self) -> int:
        """``kNormSums`` of csrc/cells/row_norm.h."""
        return 2 * self.accumulators + 2 * self.has_c

    @property
    def biases(self) -> tuple[tuple[str, Part], ...]:
        """The accumulators of each bias."""
        return ("bias_ih", self.input), ("bias_hh", self.recurrent), ("bias_hh", self.recurrent2)

    @property
    def two_phases(self) -> bool:
        """Whether a step needs a second product, of what the first has made."""
        return self.recurrent2.count > 0


@functools.cache
def kernels_of(cell: Cell, regularized: bool = False) -> CellKernels:
    """The cell's name and layout in csrc/cells, as the compiled module has them.

    Raises:
        Unsupported: There are no kernels for it.
    """
    if cell.projects:
        raise Unsupported("weight_hr: is not supported by the cuda backend; use the reference")
    if (core := compiled(cell)) is None:
        raise Unsupported(f"cell: {cell!r} is not supported by the cuda backend; use the reference")
    type_, accumulators, saved, has_c, parts, layer_norm = _core.cell_layout(core, regularized)
    input_, recurrent, recurrent2 = (Part(first, tuple(gates)) for first, gates in parts)
    return CellKernels(
        type_, accumulators, saved, has_c, input_, recurrent, recurrent2, regularized, layer_norm
    )
