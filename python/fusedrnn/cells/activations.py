"""The activations that the cells call: plain functions on NumPy scalars and arrays of every dtype.

Real and complex alike, so that a derivative can be taken by a complex step; NaN goes through, nothing
overflows.
The only constants are of float32, the narrowest dtype, so that no result is wider than its argument.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ONE = np.float32(1)
ZERO = np.float32(0)


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return np.tanh(x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), with exp of -x or x, whichever cannot overflow."""
    negative = x.real < ZERO
    e = np.exp(np.where(negative, x, -x))
    return np.where(negative, e, ONE) / (ONE + e)


def relu(x: Any) -> Any:
    """x where its real part is positive or NaN, else 0."""
    return np.where(x.real <= ZERO, ZERO, x)


def relu_backward(dy: Any, y: Any) -> Any:
    """Gradient through ``y = relu(x)``: dy where y is positive or NaN, else 0."""
    return np.where(y.real <= ZERO, ZERO, dy)
