"""What a kernel has to get right on a GPU before its results are used."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedrnn.backends.cuda.weights import precision_of
from fusedrnn.backends.protocol import Array
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import lstm

# What is taken for right, relative to the largest entry; factors lose 2^-11, in bf16 2^-9.
TOLERANCE = {"ieee": 1e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}


def self_test(backend: Any, dtype: np.dtype[Any], precision: str) -> None:
    """A small LSTM by this backend, against the reference.

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

    def results(by: Any, put: Any) -> dict[str, Array]:
        weights = {"weight_ih": put(ih), "weight_hh": put(hh), "bias_ih": put(bias)}
        out = by.forward(lstm, put(x), weights, (put(h0), put(c0)), lengths=put(lengths), reset=put(reset))
        back = by.backward(out.tape, put(dy))
        found = {"y": out.y, "h": out.stateT[0], "c": out.stateT[1], "dx": back.dx}
        found |= {f"d{name}": d for name, d in back.dweights.items()}
        return found | {"dh0": back.dstate0[0], "dc0": back.dstate0[1]}

    want = results(ReferenceBackend(), lambda a: a.astype(np.float32) if a.dtype == dtype else a)
    for name, a in results(backend, backend.device.asarray).items():
        got = a.get() if hasattr(a, "get") else a  # the emulated device's are NumPy's
        error = float(np.abs(got.astype(np.float32) - want[name]).max() / np.abs(want[name]).max())
        if not error <= TOLERANCE[precision_of(dtype, precision)]:
            raise RuntimeError(
                f"the cuda backend's self-test failed on this GPU, in {dtype} with {backend.last_plan}: "
                f"{name} is off by {error:.1e} of its largest entry; do not use it here, and please report "
                "this"
            )
