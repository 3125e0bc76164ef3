"""Compare gradients with central differences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from fusedrnn.backends.protocol import Array
from fusedrnn.gradcheck.adapters import VJP, Adapter
from fusedrnn.gradcheck.compare import GradcheckError, compare, finite, fixed_random, same

SAFETY = 300  # multiples of eps**(2/3); a third derivative is often a hundred times the first
DIRECTIONS = 4  # fast_mode: random directions for each tensor


def check_central(
    adapter: Adapter,
    eps: float | None,
    atol: float | None,
    rtol: float | None,
    nondet_tol: float,
    fast_mode: bool,
    seed: int,
) -> None:
    """Compare the gradients with central differences; a failure raises a ``GradcheckError``.

    The arguments are those of ``fusedrnn.gradcheck.gradcheck``.
    """
    rng = np.random.default_rng(seed)

    def forward(values: list[Array]) -> list[Array]:
        with fixed_random(seed):
            arrays = adapter.run(values)[0]
        if [a.shape for a in arrays] != shapes:
            raise GradcheckError(
                f"outputs: expected shapes {shapes}, as before, got {[a.shape for a in arrays]}"
            )
        return arrays

    def apply_vjp(vjp: VJP, upstream: list[Array]) -> list[Any]:
        with breaking_off():
            found = vjp(upstream)
        for name, value, g in zip(adapter.names, adapter.values, found, strict=True):
            if g is not None:
                finite(f"gradient of {name}", g, value)
        return found

    # Evaluate twice: outputs, and gradients for one random upstream gradient.
    with fixed_random(seed):
        outputs, vjp = adapter.run(adapter.values)
        for k, y in enumerate(outputs):
            finite(f"output {k}", y, y)
        shapes = [y.shape for y in outputs]
        upstream = [np.asarray(rng.standard_normal(y.shape), y.dtype) for y in outputs]
        together = apply_vjp(vjp, upstream)
    if not any(y.size for y in outputs):
        raise ValueError("func_or_layer: expected outputs with at least one element, got none")
    with fixed_random(seed):
        again, vjp_again = adapter.run(adapter.values)
        together_again = apply_vjp(vjp_again, upstream)
    if [y.shape for y in again] != shapes:
        raise GradcheckError(
            f"outputs: nondeterministic, shapes {shapes} and then {[y.shape for y in again]}"
        )
    for k, (first, second) in enumerate(zip(outputs, again, strict=True)):
        same(f"output {k}", first, second, nondet_tol)
    for name, first, second in zip(adapter.names, together, together_again, strict=True):
        same(f"gradient of {name}", first, second, nondet_tol)

    machine = max(float(np.finfo(a.dtype).eps) for a in [*adapter.values, *outputs])
    rtol = SAFETY * machine ** (2 / 3) if rtol is None else rtol

    def difference(i: int, step: Array) -> list[Array]:
        """First twice the step as it was rounded, then f(x + step) - f(x - step); in float64."""
        ends = [adapter.values[i] + step, adapter.values[i] - step]
        plus, minus = (forward([*adapter.values[:i], end, *adapter.values[i + 1 :]]) for end in ends)
        return [p.astype(np.float64) - m for p, m in zip((ends[0], *plus), (ends[1], *minus), strict=True)]

    def steps(value: Array) -> Array:
        return np.full(value.shape, eps) if eps else machine ** (1 / 3) * np.maximum(1, np.abs(value))

    if fast_mode:
        norm = float(np.sqrt(sum(np.square(y, dtype=np.float64).sum() for y in outputs)))
        for i, (name, value) in enumerate(zip(adapter.names, adapter.values, strict=True)):
            g = np.zeros(value.shape) if together[i] is None else together[i].astype(np.float64)
            missing = " (no gradient was returned)" if together[i] is None else ""
            for k in range(DIRECTIONS if value.size else 0):
                v = rng.standard_normal(value.shape)
                h = float(steps(value).max())
                moved, *changes = difference(i, (h / np.linalg.norm(v) * v).astype(value.dtype))
                numeric = sum(float((u * c).sum()) for u, c in zip(upstream, changes, strict=True)) / (2 * h)
                analytic = float((g * moved).sum()) / (2 * h)
                allowed = rtol * max(norm, float(np.linalg.norm(g))) if atol is None else atol
                label = f"gradient of {name} along random direction {k}{missing}"
                label += " (fast_mode=False names the element)"
                compare(label, np.asarray(analytic), np.asarray(numeric), allowed + rtol * abs(numeric))
        return

    # The Jacobian of each output by each input: analytically, one row for each element of the output ...
    rows = [[np.zeros((y.size, value.size)) for value in adapter.values] for y in outputs]
    with fixed_random(seed):
        _, vjp = adapter.run(adapter.values)
        for k, y in enumerate(outputs):
            for j in range(y.size):
                one = [np.zeros(other.shape, other.dtype) for other in outputs]
                one[k].flat[j] = 1
                for i, g in enumerate(apply_vjp(vjp, one)):
                    if g is not None:
                        rows[k][i][j] = g.ravel()
    # ... and numerically, one column for each element of the input.
    for i, (name, value) in enumerate(zip(adapter.names, adapter.values, strict=True)):
        missing = " (no gradient was returned)" if together[i] is None else ""
        columns = [np.empty((y.size, value.size)) for y in outputs]
        h_all = steps(value)
        for e, index in enumerate(np.ndindex(value.shape)):
            step = np.zeros_like(value)
            step[index] = h_all[index]
            moved, *changes = difference(i, step)
            for column, change in zip(columns, changes, strict=True):
                column[:, e] = change.ravel() / moved[index]
        for k, y in enumerate(outputs):

            def label_of(index: tuple[int, ...], k: int = k, name: str = name, missing: str = missing) -> str:
                at, of = list(index[: outputs[k].ndim]), list(index[outputs[k].ndim :])
                return f"d output {k}{at or ''} / d {name}{of or ''}{missing}"

            largest = max((float(np.abs(a).max()) for a in (y, columns[k]) if a.size), default=0.0)
            limit = (rtol * largest if atol is None else atol) + rtol * np.abs(columns[k])
            full = y.shape + value.shape
            compare(label_of, rows[k][i].reshape(full), columns[k].reshape(full), limit.reshape(full))
        if together[i] is not None:  # the gradient from all outputs at once is the sum of those from each
            us = [u.astype(np.float64).ravel() for u in upstream]
            summed, bound = np.zeros(value.size), np.zeros(value.size)
            for u, of_output in zip(us, rows, strict=True):
                summed += u @ of_output[i]
                bound += np.abs(u) @ np.abs(of_output[i])
            label = f"gradient of {name} from all outputs at once"
            allowed = rtol * float(bound.max(initial=0))
            compare(label, together[i], summed.reshape(value.shape), allowed)


@contextlib.contextmanager
def breaking_off() -> Iterator[None]:
    """Count an error in a backward pass, for example for a gradient's shape, as a failed check."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise GradcheckError(f"backward raised {type(error).__name__}: {error}") from error
