"""The operations of cells in NumPy: plain functions on scalars and arrays of every dtype.

They take real and complex values, for complex-step derivatives. A NaN is propagated, and nothing overflows.
The only constants are float32, the narrowest dtype, so that no result is wider than its argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

ONE = np.float32(1)
ZERO = np.float32(0)


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return np.tanh(x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), with exp of -x or x, the one that cannot overflow."""
    negative = x.real < ZERO
    e = np.exp(np.where(negative, x, -x))
    return np.where(negative, e, ONE) / (ONE + e)


def relu(x: Any) -> Any:
    """x where its real part is positive or NaN, else 0."""
    return np.where(x.real <= ZERO, ZERO, x)


def softplus(x: Any) -> Any:
    """log(1 + exp(x)), with exp of -x or x, the one that cannot overflow."""
    positive = x.real > ZERO
    return np.where(positive, x, ZERO) + np.log1p(np.exp(np.where(positive, -x, x)))


def absolute(x: Any) -> Any:
    """x or -x, the one without a negative real part."""
    return np.where(x.real > ZERO, x, ZERO - x)


def maximum(a: Any, b: Any) -> Any:
    """The one with the larger real part, a if they are equal; NaN if either is NaN."""
    return np.where((a.real >= b.real) | np.isnan(a), a, b)


def minimum(a: Any, b: Any) -> Any:
    """The one with the smaller real part, a if they are equal; NaN if either is NaN."""
    return np.where((a.real <= b.real) | np.isnan(a), a, b)


# By their names in a cell's graph.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "softplus": softplus,
    "relu": relu,
    "absolute": absolute,
    "maximum": maximum,
    "minimum": minimum,
    "where": np.where,
    "greater": lambda a, b: a.real > b.real,
    "greater_equal": lambda a, b: a.real >= b.real,
}
