"""The one list of problems: the shapes that benchmarks time, and seeded data of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusedrnn.backends.protocol import Array, Weights
from fusedrnn.cells import GRU, Cell


class Shape(NamedTuple):
    """``T`` time steps, ``B`` batch, ``I`` input size, ``H`` hidden size."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return f"({self.T},{self.B},{self.I},{self.H})"


# Forecasting, hydrology, audio, control and, at the end, sizes where the matrix product is everything.
SPEED = (
    Shape(30, 30, 1, 100),
    Shape(50, 32, 1, 32),
    Shape(30, 128, 7, 100),
    Shape(100, 1, 1, 64),
    Shape(64, 16, 128, 128),
    Shape(100, 64, 64, 256),
    Shape(50, 64, 512, 512),
    Shape(25, 128, 1024, 1024),
    Shape(25, 16, 1024, 1024),
    Shape(256, 256, 3, 64),
    Shape(365, 256, 32, 128),
)
QUICK = (Shape(30, 30, 1, 100), Shape(100, 1, 1, 64), Shape(64, 16, 128, 128))


@dataclass(frozen=True)
class Data:
    """One problem: what goes into forward and backward. The initial state is zero."""

    cell: Cell
    shape: Shape
    x: Array  # (T, B, I)
    weights: Weights
    dy: Array  # (T, B, H), the gradient that comes in on every step
    dstateT: tuple[Array, ...]  # (B, H) for each state


def make(cell: Cell, shape: Shape, dtype: npt.DTypeLike, seed: int = 0) -> Data:
    """Draw a standard problem: weights uniform in ±1/sqrt(H), everything else normal of order one.

    Drawn in float64 and then rounded, so that one seed is the same problem in every dtype.
    """
    T, B, I, H = shape
    draw = np.random.default_rng(seed)

    def normal(*size: int) -> Array:
        return draw.standard_normal(size).astype(dtype)

    def uniform(*size: int) -> Array:
        return draw.uniform(-(H**-0.5), H**-0.5, size).astype(dtype)

    rows = cell.gates * H
    two_biases = isinstance(cell, GRU) and cell.reset_after
    weights = Weights(
        weight_ih=uniform(rows, I),
        weight_hh=uniform(rows, H),
        bias_ih=uniform(rows),
        bias_hh=uniform(rows) if two_biases else None,
    )
    return Data(
        cell=cell,
        shape=shape,
        x=normal(T, B, I),
        weights=weights,
        dy=normal(T, B, H),
        dstateT=tuple(normal(B, H) for _ in cell.states),
    )


def astype(data: Data, dtype: npt.DTypeLike) -> Data:
    """The same numbers in another dtype."""

    def cast(array: Any) -> Any:
        return None if array is None else array.astype(dtype)

    return Data(
        data.cell,
        data.shape,
        cast(data.x),
        Weights(*map(cast, data.weights)),
        cast(data.dy),
        tuple(map(cast, data.dstateT)),
    )


def flops(cell: Cell, shape: Shape) -> float:
    """Operations of one forward and one backward: ``2*T*B*G*H*(I+H)``, and twice that for the backward."""
    T, B, I, H = shape
    return 3 * 2.0 * T * B * cell.gates * H * (I + H)
