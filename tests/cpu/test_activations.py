"""Functions of the compiled module against 40-digit arithmetic; equal bits on all FMA levels.

bench/ulp_sweep.py does the same over every float32; here a sample, dense where errors were found to be large.
"""

import mpmath
import numpy as np
import pytest

_core = pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")

pytestmark = pytest.mark.quick
info, testing = _core.info, _core.testing

LEVELS = [level for level in info()["built"] if level in info()["detected"]]
FUSED = [level for level in LEVELS if level != "portable"]
FUNCTIONS = ["sigmoid", "tanh", "exp", "log", "softplus"]
DTYPES = [np.float32, np.float64]
LIMIT = 2  # ULP, on every level


def truth(function, x):
    """The value at 40 digits; x is exact."""
    with mpmath.workdps(40):
        x = mpmath.mpf(float(x))
        if function == "sigmoid":
            return 1 / (1 + mpmath.exp(-x))
        if function == "softplus":
            return mpmath.log1p(mpmath.exp(x))
        if function == "log":
            return mpmath.log(x)
        return mpmath.tanh(x) if function == "tanh" else mpmath.exp(x)


def ulps(got, want, dtype):
    """|got - want| in units of the spacing that the dtype has at want."""
    with mpmath.workdps(40):
        exponent = mpmath.frexp(want)[1] - 1
        spacing = mpmath.ldexp(1, max(int(exponent), np.finfo(dtype).minexp) - np.finfo(dtype).nmant)
        return float(abs(mpmath.mpf(float(got)) - want) / spacing)


def samples(function, dtype):
    """Finite inputs: every binade, the steep part, borders of the formulas with their neighbours."""
    rng = np.random.default_rng(20261120)
    fine = np.finfo(dtype)
    if function == "log":
        near = 1 + rng.uniform(-0.5, 0.5, 600) ** 5
        all_binades = np.ldexp(rng.uniform(1, 2, 900), rng.integers(fine.minexp, fine.maxexp, 900))
        borders = (np.sqrt(0.5) * 2.0 ** np.arange(-3, 4)).astype(dtype)  # here n changes
        beside = [np.nextafter(borders, dtype(0)), borders, np.nextafter(borders, dtype(1e9))]
        return np.concatenate([near.astype(dtype), all_binades.astype(dtype), *beside])
    reach = 0.75 * fine.nmant if function == "tanh" else -fine.minexp * 0.69
    binades = np.ldexp(rng.uniform(1, 2, 400), rng.integers(fine.minexp, 4, 400))
    steep = rng.uniform(0, 3, 900)
    wide = rng.uniform(0, reach, 600)
    borders = [0.173, 0.52, 1.1, 9.01, 10, 16.28, 16.29, 17.3, 22, 30, 36.38, 36.39, 37.4, 60, reach]
    halves = (np.arange(60) + 0.5) * np.log(2)  # here n changes: of x, and of 2 x
    borders = np.concatenate([borders, halves, halves / 2])
    borders = borders[borders <= reach].astype(dtype)
    beside = [np.nextafter(borders, dtype(0)), borders, np.nextafter(borders, dtype(1e9))]
    x = np.concatenate([binades.astype(dtype), steep.astype(dtype), wide.astype(dtype), *beside])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_error(function, dtype):
    x = samples(function, dtype)
    wants = [truth(function, value) for value in x]
    for level in LEVELS:
        got = testing.activation(FUNCTIONS.index(function), x, level)
        assert got.dtype == dtype
        errors = [ulps(g, want, dtype) for g, want in zip(got, wants, strict=True)]
        worst = int(np.argmax(errors))
        assert errors[worst] <= LIMIT, f"{level}: {errors[worst]} ULP at {x[worst].hex()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_levels_give_the_same_bits(function, dtype):
    if len(FUSED) < 2:
        pytest.skip("the processor has no second level with FMA")
    rng = np.random.default_rng(7)
    bits = np.uint32 if dtype == np.float32 else np.uint64
    every = rng.integers(0, np.iinfo(bits).max, 100_003, dtype=bits, endpoint=True).view(dtype)  # NaN too
    special = np.array([np.inf, -np.inf, np.nan, 0, -0.0], dtype)
    x = np.concatenate([every, samples(function, dtype), special])
    first, *others = [testing.activation(FUNCTIONS.index(function), x, level) for level in FUSED]
    negative = x <= -np.finfo(dtype).tiny if function == "log" else False  # subnormals are flushed
    nan = np.isnan(x) | negative
    assert np.array_equal(np.isnan(first), nan)
    for level, other in zip(FUSED[1:], others, strict=True):
        assert np.array_equal(np.isnan(other), nan), level
        assert np.array_equal(first[~nan].view(bits), other[~nan].view(bits)), level


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, level):
    x = np.array([0, -0.0, np.inf, -np.inf, 1e30, -1e30, np.nan], dtype)
    expected = {
        "sigmoid": [0.5, 0.5, 1, 0, 1, 0, np.nan],
        "tanh": [0, -0.0, 1, -1, 1, -1, np.nan],
        "exp": [1, 1, np.inf, 0, np.inf, 0, np.nan],
        "log": [-np.inf, -np.inf, np.inf, np.nan, 30 * np.log(10), np.nan, np.nan],
        "softplus": [np.log(2), np.log(2), np.inf, 0, 1e30, 0, np.nan],
    }
    for function in FUNCTIONS:
        got = testing.activation(FUNCTIONS.index(function), x, level)
        exact = function not in ("log", "softplus")
        tolerance = 0 if exact else 2 * np.finfo(dtype).eps
        np.testing.assert_allclose(got, np.array(expected[function], dtype), rtol=tolerance, atol=0)
        if function == "tanh":
            np.testing.assert_array_equal(np.signbit(got[:6]), np.signbit(x[:6]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_is_odd_and_everything_stays_in_range(dtype, level):
    x = samples("tanh", dtype)
    tanh, sigmoid = (testing.activation(FUNCTIONS.index(f), x, level) for f in ("tanh", "sigmoid"))
    assert np.array_equal(testing.activation(1, -x, level), -tanh)
    assert np.all(np.abs(tanh) <= 1)
    assert np.all((sigmoid >= 0) & (sigmoid <= 1))
