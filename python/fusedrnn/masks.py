"""The masks of recurrent dropout and zoneout, drawn by Philox4x32-10: a function of a counter and a key.

Masks are not stored. Forward, backward and recompute draw the same mask again, in every backend, dtype and
thread. The key is the seed of a call. The counter of a unit's word is (unit // 4, row, time, kind + 4 *
stream), and the word is number unit % 4 of the four. In C++: ``csrc/mask_rule.h``.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

KINDS = ("recurrent_dropout", "zoneout_h", "zoneout_c")  # in the order of their numbers


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """Philox4x32-10: (..., 4) uint32 random words for counters (..., 4) uint32 and a key of two words."""
    a, b, c, d = np.moveaxis(counter.astype(np.uint64), -1, 0)
    k0, k1 = key
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b = (q >> half) ^ b ^ np.uint64(k0), q & low
        c, d = (p >> half) ^ d ^ np.uint64(k1), p & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([a, b, c, d], axis=-1).astype(np.uint32)


def threshold(rate: float) -> int:
    """The bound below which a fraction ``rate`` of all words is; up to 2**32."""
    return round(rate * 2**32)


def keep(rate: float, kind: str, seed: int, stream: int, time: int, rows: Array, units: int) -> Array:
    """Which units are kept: (len(rows), units) bool, each False with probability ``rate``.

    The probability is that of a 32-bit word below ``threshold(rate)``.

    Args:
        rate: From 0 to 1.
        kind: One of ``KINDS``.
        seed: 0 <= seed < 2**64.
        stream: Gives different masks for the same seed: layer * directions + direction.
        time: The index of the step in the sequence, also in reverse; 0 for recurrent dropout.
        rows: Indices of rows of the batch.
        units: H, or P for a first state that is projected.
    """
    counter = np.empty((len(rows), -(-units // 4), 4), np.uint32)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1] = np.asarray(rows)[:, np.newaxis]
    counter[..., 2] = time
    counter[..., 3] = KINDS.index(kind) + 4 * stream
    words = philox(counter, (seed % 2**32, seed >> 32)).reshape(len(rows), 4 * counter.shape[1])[:, :units]
    return words >= np.uint64(threshold(rate))


def dropout(rate: float, seed: int, stream: int, rows: Array, units: int) -> Array:
    """The mask of recurrent dropout, (len(rows), units): 0 with probability ``rate``, else 1 / (1 - rate)."""
    kept = keep(rate, "recurrent_dropout", seed, stream, 0, rows, units)
    return np.where(kept, 1 / (1 - rate) if rate < 1 else 0.0, 0.0)


def zoneout(
    rate: float, state: str, seed: int | None, stream: int, time: int, rows: Array, units: int
) -> Array | None:
    """The fraction of the new state ("h" or "c") that is used, (len(rows), units).

    It is drawn, or its mean without a seed. None: all of it.
    """
    if not rate:
        return None
    if seed is None:
        return np.full((len(rows), units), 1 - rate)
    return keep(rate, f"zoneout_{state}", seed, stream, time, rows, units)
