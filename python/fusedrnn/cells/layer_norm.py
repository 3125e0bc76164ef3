"""Layer norm in the cell: what it normalises, forward and backward side by side.

    x = (v - mean(v)) / sqrt(var(v) + EPSILON),  LN(v; gain) = gain * x

mean and variance over the last axis, for each row and step. A cell with ``layer_norm=True`` normalises the
input part and the recurrent part of its gates apart, each over the gates of one group of ``cell.norms``,
before the biases are added; the LSTM also normalises c, on its way to h only.

Source: Ba, Kiros and Hinton, "Layer normalization", 2016, supplementary material; its RNN has one norm, of
the sum of both parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

WEIGHTS = ("gain_ih", "gain_hh", "gain_c", "bias_c")  # the fields of ``Weights`` that only layer norm has
EPSILON = 1e-5  # as in PyTorch; a Python number, which makes no result wider


class Normed(NamedTuple):
    """What ``forward`` found, which ``backward`` reads."""

    x: Any  # (B, N), normalised
    inverse: Any  # (B, 1), 1 / sqrt(var + EPSILON)


def forward(v: Any) -> Normed:
    """Normalise v (B, N) over its last axis."""
    d = v - v.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt((d * d).mean(axis=-1, keepdims=True) + EPSILON)
    return Normed(d * inverse, inverse)


def backward(dx: Any, normed: Normed) -> Any:
    """dv from the gradient of x: less its mean, and less its part along x, which the variance keeps fixed."""
    x, inverse = normed
    return inverse * (dx - dx.mean(axis=-1, keepdims=True) - x * (dx * x).mean(axis=-1, keepdims=True))


def weights(cell: Any) -> tuple[str, ...]:
    """Those of ``WEIGHTS`` that a cell has."""
    if not cell.layer_norm:
        return ()
    return WEIGHTS if "c" in cell.states else WEIGHTS[:2]
