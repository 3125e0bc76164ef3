"""The checkers themselves: the oracle's own error, and that the comparisons fail when they must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import mpmath
import numpy as np
import pytest

import oracle
import problems
from fusedrnn.cells import lstm
from problems import name, problem

pytestmark = pytest.mark.quick

# Measured with 50 digits as the truth, over the cells and seeds 0 to 2: at most 7.0e-16 in complex128 and
# 3.1e-19 in complex long double (3 eps of each). The bounds are about 5 eps.
ORACLE_ERROR = {np.complex128: 1e-15, np.clongdouble: 5e-19}


def mp_loss(p: problems.Problem, v: dict[str, Any]) -> Any:
    """The oracle's loss in mpmath, number by number, without options; every formula written again."""
    T, B, _ = p.x.shape
    H = p.state0[-1].shape[1]
    zero = mpmath.mpf(0)

    def sigmoid(a: Any) -> Any:
        return 1 / (1 + mpmath.exp(-a))

    def dot(row: Any, vector: Any) -> Any:
        return sum((a * b for a, b in zip(row, vector, strict=True)), zero)

    total = zero
    for b in range(B):
        h = list(v["dh0"][b])
        c = list(v["dc0"][b]) if "dc0" in v else None
        for t in range(T):
            x = v["dx"][t][b]
            ax = [dot(w, x) for w in v["dweight_ih"]]
            ax = [a + d for a, d in zip(ax, v.get("dbias_ih", [zero] * len(ax)), strict=True)]
            bias_hh = v.get("dbias_hh", [zero] * len(ax))
            ah = [dot(w, h) + d for w, d in zip(v["dweight_hh"], bias_hh, strict=True)]
            if p.cell.name == "rnn":
                h = [mpmath.tanh(ax[u] + ah[u]) for u in range(H)]
                if p.cell.options["relu"]:
                    h = [max(ax[u] + ah[u], zero) for u in range(H)]
            elif p.cell.name == "lstm":
                a = [m + n for m, n in zip(ax, ah, strict=True)]
                c = [sigmoid(a[H + u]) * c[u] + sigmoid(a[u]) * mpmath.tanh(a[2 * H + u]) for u in range(H)]
                h = [sigmoid(a[3 * H + u]) * mpmath.tanh(c[u]) for u in range(H)]
                if "dweight_hr" in v:
                    h = [dot(w, h) for w in v["dweight_hr"]]
            else:
                r = [sigmoid(ax[u] + ah[u]) for u in range(H)]
                z = [sigmoid(ax[H + u] + ah[H + u]) for u in range(H)]
                if p.cell.options["reset_after"]:
                    n = [mpmath.tanh(ax[2 * H + u] + r[u] * ah[2 * H + u]) for u in range(H)]
                else:
                    rh = [r[u] * h[u] for u in range(H)]
                    n = [
                        mpmath.tanh(ax[2 * H + u] + dot(v["dweight_hh"][2 * H + u], rh) + bias_hh[2 * H + u])
                        for u in range(H)
                    ]
                h = [(1 - z[u]) * n[u] + z[u] * h[u] for u in range(H)]
            total += dot(h, map(float, p.dy[t, b]))
        total += dot(h, map(float, p.dstateT[0][b]))
        if c is not None:
            total += dot(c, map(float, p.dstateT[1][b]))
    return total


def mp_gradients(p: problems.Problem) -> dict[str, Any]:
    """Differences with step 1e-50 in 100 digits: right to about 50 digits."""
    with mpmath.workdps(100):
        step = mpmath.mpf("1e-50")
        values = {key: np.vectorize(mpmath.mpf, otypes=[object])(a) for key, a in oracle.variables(p).items()}
        gradients, before = {}, mp_loss(p, values)
        for key, array in values.items():
            gradients[key] = np.empty(array.shape, object)
            for index in np.ndindex(array.shape):
                value = array[index]
                array[index] = value + step
                gradients[key][index] = (mp_loss(p, values) - before) / step
                array[index] = value
        return gradients


def mp_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference relative to the largest entry; a long double is given to mpmath in two parts."""
    with mpmath.workdps(50):
        scale = max(abs(w) for w in want.flat)
        parts = [(float(g), float(g - np.longdouble(float(g)))) for g in got.flat]
        worst = max(abs(mpmath.mpf(a) + b - w) for (a, b), w in zip(parts, want.flat, strict=True))
        return float(worst / scale)


@pytest.mark.parametrize("cell", problems.CELLS, ids=name)
def test_oracle_error_against_50_digits(cell: Any) -> None:
    p = problem(cell, 3, 2, 2, 3, seed=2, biases="both")
    truth = mp_gradients(p)
    for dtype, tolerance in ORACLE_ERROR.items():
        got = oracle.gradients(p, dtype)
        assert got.keys() == truth.keys()
        worst = {key: mp_error(got[key], truth[key]) for key in truth}
        assert max(worst.values()) <= tolerance, (dtype, worst)


@pytest.mark.parametrize("cell", problems.CELLS, ids=name)
def test_directional_form_agrees_with_the_full_one(cell: Any) -> None:
    p = problem(cell, 4, 3, 2, 5, seed=2, lengths=True, reset=True, return_states=True)
    full = oracle.gradients(p)
    rng = np.random.default_rng(3)
    directions = {key: rng.choice([-1.0, 1.0], a.shape) for key, a in full.items()}
    for key, value in oracle.directional(p, directions, np.clongdouble).items():
        part = full[key][~np.isnan(full[key])]
        want = (full[key] * directions[key]).sum()
        assert abs(value - want) <= 1e-17 * np.linalg.norm(part.astype(float)), key


def test_oracle_sees_a_wrong_formula() -> None:
    """A gradient of another problem is far away: the oracle is not blind to what it checks."""
    p = problem(lstm, 3, 2, 2, 3)
    other = oracle.gradients(replace(p, weights=p.weights | {"bias_ih": p.weights["bias_ih"] + 1e-9}))
    e = problems.errors(other, oracle.gradients(p))
    assert all(v > 1e-12 for v in e.values()), e


class TestComparison:
    """``problems.assert_close`` and ``assert_bitwise_equal`` fail on everything that is wrong."""

    want: ClassVar = {"y": np.arange(1.0, 7.0).reshape(2, 3), "dx": np.ones(4)}

    def broken(self) -> dict[str, dict[str, np.ndarray]]:
        nan, wrong = (self.want["y"].copy() for _ in range(2))
        nan[0, 1] = np.nan
        wrong[1, 2] += 1e-6
        return {
            "nan": {**self.want, "y": nan},
            "one wrong element": {**self.want, "y": wrong},
            "shape": {**self.want, "y": self.want["y"].T.copy()},
            "broadcastable shape": {**self.want, "dx": np.ones(1)},
            "missing": {"y": self.want["y"]},
            "one too many": {**self.want, "dh0": np.ones(1)},
        }

    def test_close(self) -> None:
        problems.assert_close(self.want, self.want, 0)
        for what, got in self.broken().items():
            with pytest.raises(AssertionError):
                problems.assert_close(got, self.want, 1e-9)
            assert what

    def test_same_bits(self) -> None:
        problems.assert_bitwise_equal(self.want, self.want)
        for got in self.broken().values():
            with pytest.raises(AssertionError):
                problems.assert_bitwise_equal(got, self.want)
        for a, b in (
            ({"y": np.array([0.0])}, {"y": np.array([-0.0])}),
            ({"y": np.ones(1, "f")}, {"y": np.ones(1)}),
        ):
            with pytest.raises(AssertionError):
                problems.assert_bitwise_equal(a, b)

    def test_zero_is_compared_exactly(self) -> None:
        assert problems.error(np.full(2, 1e-30), np.zeros(2)) == float("inf")
        assert problems.error(np.zeros(2), np.zeros(2)) == 0
