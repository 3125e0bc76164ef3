"""The C++ kernels where no fixed figure can hold: the yardsticks of accuracy.py, and that they find."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

import accuracy
from accuracy import (
    CPU,
    DTYPES,
    EVERYTHING,
    assert_hard,
    assert_no_worse_than_numpy,
    cell_name,
    truth,
)
from fusedrnn.cells import lstm
from problems import CELLS, GRADIENT, assert_bitwise_equal, assert_close, problem

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poison")]


# --- hard problems -----------------------------------------------------------------------------------------


def gained(p, gain):
    return replace(p, weights={n: w * w.dtype.type(gain) for n, w in p.weights.items()})


def last_state(p):
    return replace(p, dy=None, dstates=None)


def unscaled(p):
    return replace(p, x=p.x * 700 + 1000)


def faint(p):
    return replace(p, dy=p.dy * 1e-30)


HARD = {
    "large gains": lambda cell, s: gained(problem(cell, 20, 7, 5, 33, s, lengths=True), 6),
    "chaos": lambda cell, s: gained(problem(cell, 60, 3, 2, 41, s), 3),
    "last state only": lambda cell, s: last_state(problem(cell, 120, 5, 3, 23, s)),
    "last state, reverse, ragged": lambda cell, s: last_state(
        problem(cell, 60, 5, 3, 23, s, lengths=True, reverse=True)
    ),
    "unscaled data": lambda cell, s: unscaled(problem(cell, 15, 6, 4, 20, s)),
    "tiny upstream": lambda cell, s: faint(problem(cell, 30, 4, 3, 25, s, upstream=("dy",))),
    "tiny weights": lambda cell, s: gained(problem(cell, 20, 4, 3, 25, s), 1e-4),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_hard_problems_stay_within_the_yardstick(cell, kind):
    assert_hard(HARD[kind](cell, 0), np.float32)
    assert_no_worse_than_numpy(functools.partial(HARD[kind], cell), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_more_hard_problems_stay_within_the_yardstick(cell, kind):
    for seed, dtype in ((1, np.float32), (2, np.float32), *((k, np.float64) for k in range(3))):
        assert_hard(HARD[kind](cell, seed), dtype)
    assert_no_worse_than_numpy(functools.partial(HARD[kind], cell), np.float64)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_standard_problems_are_as_exact_as_plain_numpy(cell, dtype):
    for size in ((30, 5, 3, 40), (9, 20, 30, 33)):
        assert_no_worse_than_numpy(
            lambda seed, size=size: problem(cell, *size, seed, return_states=True), dtype
        )


# --- the checks themselves ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return truth(problem(lstm, 4, 5, 3, 18, **EVERYTHING))


def spoiled(results, key, change):
    copy = {k: a.copy() for k, a in results.items()}
    copy[key] = change(copy[key])
    return copy


def one_wrong(a):
    a.flat[a.size // 3] += np.abs(a).max() * 1e-5
    return a


def one_nan(a):
    a.flat[-1] = np.nan
    return a


@pytest.mark.parametrize(
    "change",
    [one_wrong, one_nan, lambda a: a[..., :-1], lambda a: a[None], np.zeros_like, lambda a: a * (1 + 6e-6)],
    ids=["one wrong element", "one NaN", "another shape", "another rank", "zeros", "scaled"],
)
def test_the_comparison_finds(change, results):
    assert_close(results, results, 0)
    for key in results:
        with pytest.raises(AssertionError, match=key):
            assert_close(spoiled(results, key, change), results, GRADIENT[np.float32])
        with pytest.raises(AssertionError, match=key):
            assert_bitwise_equal(spoiled(results, key, change), results)


def test_the_comparison_finds_a_missing_and_an_extra_result(results):
    for key in results:
        rest = {k: a for k, a in results.items() if k != key}
        for got, want in ((rest, results), (results, rest)):
            with pytest.raises(AssertionError, match=key):
                assert_close(got, want, 1.0)
            with pytest.raises(AssertionError):
                assert_bitwise_equal(got, want)


def test_the_comparison_of_bits_sees_signs_of_zero_and_dtypes(results):
    zero = {"dx": np.zeros((2, 3), np.float32)}
    for other in (-zero["dx"], np.zeros((2, 3)), np.full((2, 3), 1e-45, np.float32)):
        with pytest.raises(AssertionError, match="dx"):
            assert_bitwise_equal({"dx": other}, zero)


@pytest.mark.parametrize(
    "change", [lambda a: a * 1.001, one_nan, np.zeros_like], ids=["scaled", "one NaN", "zeros"]
)
@pytest.mark.parametrize("key", ["y", "dweight_hh"])
def test_the_yardstick_finds(key, change, monkeypatch):
    """A kernel with one wrong result or gradient does not pass the rules for hard problems."""
    p = problem(lstm, 6, 3, 2, 9)
    real = accuracy.run

    def wrong(backend, q, **keywords):
        results = real(backend, q, **keywords)
        return spoiled(results, key, change) if backend is CPU else results

    assert_hard(p, np.float32)
    monkeypatch.setattr(accuracy, "run", wrong)
    with pytest.raises(AssertionError, match=key):
        assert_hard(p, np.float32)
    with pytest.raises(AssertionError, match=key):
        assert_no_worse_than_numpy(lambda seed: p, np.float32)
