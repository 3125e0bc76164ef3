"""Comparisons of arrays, and the error of a check."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fusedrnn.backends.protocol import Array


class GradcheckError(AssertionError):
    """An output or a gradient is wrong. The message names the tensor, the index and both values."""


def compare(
    name: str | Callable[[tuple[int, ...]], str], got: Any, expected: Array, limit: Any, *, dtype: Any = None
) -> None:
    """GradcheckError unless ``abs(got - expected) <= limit`` everywhere; NaN and infinity are errors."""
    label = name if callable(name) else lambda index: f"{name}{list(index) if index else ''}"
    whole = name if isinstance(name, str) else name(())
    if got is None:
        raise GradcheckError(f"{whole}: expected an array of shape {expected.shape}, got none")
    if not isinstance(got, np.ndarray):
        raise GradcheckError(
            f"{whole}: expected an array of shape {expected.shape}, got {type(got).__name__}"
        )
    if got.shape != expected.shape:
        raise GradcheckError(f"{whole}: expected shape {expected.shape}, got {got.shape}")
    if dtype is not None and got.dtype != dtype:
        raise GradcheckError(f"{whole}: expected dtype {dtype}, got {got.dtype}")
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - expected)
        wrong = ~(difference <= limit) | ~np.isfinite(got)
        if not wrong.any():
            return
        excess = np.where(wrong, np.where(np.isfinite(difference), difference - limit, np.inf), -np.inf)
    index = tuple(int(k) for k in np.unravel_index(np.argmax(excess), excess.shape))
    allowed = np.broadcast_to(limit, got.shape)[index]
    wanted = "a finite number"
    if np.isfinite(allowed):
        wanted = f"{expected[index]}, difference {difference[index]:.2g}, allowed {allowed:.2g}"
    raise GradcheckError(
        f"{label(index)}: got {got[index]}, expected {wanted}; {wrong.sum()} of {wrong.size} are wrong"
    )


def finite(name: str, got: Any, like: Array) -> None:
    """GradcheckError unless an array has the shape and dtype of another one, and no NaN or infinity."""
    compare(name, got, np.zeros_like(like), np.inf, dtype=like.dtype)


def same(name: str, first: Any, second: Any, nondet_tol: float) -> None:
    """GradcheckError unless two evaluations agree."""
    if first is None and second is None:
        return
    if first is None or second is None or first.shape != second.shape:
        raise GradcheckError(
            f"{name}: nondeterministic, missing or of a different shape when evaluated again"
        )
    with np.errstate(invalid="ignore"):
        difference = np.where(first == second, 0, np.abs(first - second))
    both_nan = np.isnan(first) & np.isnan(second)  # equal; reported elsewhere
    wrong = ~(difference <= nondet_tol) & ~both_nan
    if wrong.any():
        index = tuple(int(k) for k in np.argwhere(wrong)[0])
        raise GradcheckError(
            f"{name}{list(index)}: nondeterministic, {first[index]} and then {second[index]} from the same "
            "inputs (the global random generators have the same seed; draw from them, or seed your own)"
        )


def unchanged(name: str, now: Array, before: Array) -> None:
    """GradcheckError if an array was written to."""
    if now.tobytes() != before.tobytes():
        wrong = np.argwhere(~((now == before) | (np.isnan(now) & np.isnan(before))))
        index = [int(k) for k in wrong[0]] if len(wrong) else ""
        raise GradcheckError(f"{name}{index}: modified by the function, which must not write to its inputs")


@contextlib.contextmanager
def fixed_random(seed: int) -> Iterator[None]:
    """Seed the global random generators, and restore them afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch: Any = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_initialized()
    torch_state = None if torch is None else torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else None
    try:
        np.random.seed(seed)
        random.seed(seed)
        if torch is not None:
            torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if torch is not None:
            torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
