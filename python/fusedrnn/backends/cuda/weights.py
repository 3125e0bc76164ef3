"""Arrays and weights as the kernels take them."""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusedrnn.backends.arguments import FLOATS, Kind, check_weights
from fusedrnn.backends.cuda.device import Device
from fusedrnn.backends.cuda.jobs import kernels_of
from fusedrnn.backends.protocol import Array, Weights
from fusedrnn.cells import Cell

# Arrays of 16 bits are multiplied as they are, by the matrix units, and summed in float32.
OF_16_BITS = {"float16": "fp16", "bfloat16": "bf16"}


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


def precision_of(dtype: np.dtype[Any], wanted: str) -> str:
    """How matrices of a dtype are multiplied."""
    return wanted if dtype == np.float32 else OF_16_BITS.get(dtype.name, "ieee")


def kind_of(device: Device) -> Kind:
    """The device's arrays, as checks of arguments know them."""
    return Kind(
        "an array of the GPU (CuPy)", device.is_array, lambda a: a, lambda a: copy(device, a), device.asarray
    )


def copy(device: Device, a: Array) -> Array:
    """A C-contiguous copy."""
    made = device.empty(a.shape, a.dtype)
    made[...] = a
    return made


@dataclass(frozen=True)
class Packed:
    """Weights in the order of the accumulators, and the arrays they were made of."""

    device: Device
    cell: Cell
    weights: dict[str, Array]
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
        return copy(self.device, self.hh.T)


def pack(device: Device, cell: Cell, weights: Weights) -> Packed:
    """Weights prepared for repeated calls, stale as soon as one of them changes."""
    w, _, H, _ = check_weights(cell, weights, dtypes_of(device), kind=kind_of(device))
    kernels = kernels_of(cell)
    bias = device.empty((kernels.accumulators, H), compute(w["weight_ih"].dtype))
    bias[...] = 0
    for part, name in (
        (kernels.input, "bias_ih"),
        (kernels.recurrent, "bias_hh"),
        (kernels.recurrent2, "bias_hh"),
    ):
        for k, gate, n in part.runs() if name in w else ():
            first = part.first + k
            bias[first : first + n] += w[name].reshape(-1, H)[gate : gate + n].astype(bias.dtype)
    ih = _ordered(device, w["weight_ih"], kernels.input.gates, H)
    hh = w["weight_hh"][: kernels.recurrent.count * H]  # in their own order in every cell
    hh2 = w["weight_hh"][kernels.recurrent2.gates[0] * H :] if kernels.two_phases else None
    packed = Packed(device, cell, w, bias.reshape(-1), ih, hh, hh2)
    if not kernels.layer_norm:
        return packed
    gain = device.empty((kernels.accumulators * H,), bias.dtype)
    rows = len(w["gain_ih"])
    gain[:rows], gain[rows:] = w["gain_ih"], w["gain_hh"]
    of_c: dict[str, Any] = {n: w[n].astype(bias.dtype) for n in ("gain_c", "bias_c") if n in w}
    return replace(packed, gain=gain, **of_c)


def _ordered(device: Device, weight: Array, gates: tuple[int, ...], H: int) -> Array:
    """The rows of a weight in the order of the accumulators; the array itself where that is its own."""
    if gates == tuple(range(len(gates))):
        return weight
    ordered = device.empty(weight.shape, weight.dtype)
    for k, gate in enumerate(gates):
        ordered[k * H : (k + 1) * H] = weight[gate * H : (gate + 1) * H]
    return ordered
