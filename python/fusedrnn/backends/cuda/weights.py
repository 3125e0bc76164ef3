"""Arrays and weights as the kernels take them."""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedrnn.backends.arguments import FLOATS, Kind, bfloat16, check_weights
from fusedrnn.backends.cuda.cupy_device import CupyDevice
from fusedrnn.backends.cuda.jobs import Part, kernels_of
from fusedrnn.backends.protocol import Array, Weights
from fusedrnn.cells import Cell

# Arrays of 16 bits are multiplied as they are, by the matrix units, and summed in float32.
OF_16_BITS = {"float16": "fp16", "bfloat16": "bf16"}


def dtypes_of(device: CupyDevice) -> tuple[np.dtype[Any], ...]:
    """What arrays may be of."""
    if not device.matrix_units:
        return FLOATS
    with contextlib.suppress(ImportError):
        importlib.import_module("ml_dtypes")
    return (*FLOATS, np.dtype(np.float16), *bfloat16())


def compute(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What sums, c and what is saved are of."""
    return dtype if dtype in FLOATS else np.dtype(np.float32)


def precision_of(dtype: np.dtype[Any], wanted: str) -> str:
    """How matrices of a dtype are multiplied."""
    return wanted if dtype == np.float32 else OF_16_BITS.get(dtype.name, "ieee")


def kind_of(device: CupyDevice) -> Kind:
    """The device's arrays, as checks of arguments know them."""
    return Kind(
        "an array of the GPU (CuPy)", device.is_array, lambda a: a, lambda a: copy(device, a), device.asarray
    )


def copy(device: CupyDevice, a: Array) -> Array:
    """A C-contiguous copy."""
    made = device.empty(a.shape, a.dtype)
    made[...] = a
    return made


@dataclass(frozen=True)
class Packed:
    """Weights in the order of the accumulators, and the arrays they were made of."""

    device: CupyDevice
    cell: Cell
    weights: dict[str, Array]
    bias: Array  # (A*H,), in what is computed in
    ih: Array  # (X*H, I)
    hh: Array  # (R*H, H)
    hh2: Array | None  # (H, H), of cells of two phases
    norm: dict[str, Array]  # of layer norm: gain (A*H,), gain_c and bias_c (H,)

    @functools.cached_property
    def hh_t(self) -> Array:
        """hh transposed: what all steps in one launch read going back."""
        return copy(self.device, self.hh.T)


def pack(device: CupyDevice, cell: Cell, weights: Weights) -> Packed:
    """Weights prepared for repeated calls, stale as soon as one of them changes."""
    w, _, H, _ = check_weights(cell, weights, dtypes_of(device), kind=kind_of(device))
    kernels = kernels_of(cell)
    bias = device.empty((kernels.accumulators * H,), compute(w["weight_ih"].dtype))
    bias[...] = 0
    for name, part in kernels.biases:
        for accumulators, gates in part.runs(H) if name in w else ():
            bias[accumulators] += w[name][gates].astype(bias.dtype)
    ih = w["weight_ih"]
    if kernels.input.gates != tuple(range(kernels.input.count)):
        ih = device.empty(ih.shape, ih.dtype)
        for accumulators, gates in Part(0, kernels.input.gates).runs(H):
            ih[accumulators] = w["weight_ih"][gates]
    hh = w["weight_hh"][: kernels.recurrent.count * H]  # in their own order in every cell
    hh2 = w["weight_hh"][kernels.recurrent2.gates[0] * H :] if kernels.two_phases else None
    norm: dict[str, Array] = {name: w[name].astype(bias.dtype) for name in ("gain_c", "bias_c") if name in w}
    if kernels.layer_norm:
        gain = norm["gain"] = device.empty(bias.shape, bias.dtype)
        rows = len(w["gain_ih"])
        gain[:rows], gain[rows:] = w["gain_ih"], w["gain_hh"]
    return Packed(device, cell, w, bias, ih, hh, hh2, norm)
