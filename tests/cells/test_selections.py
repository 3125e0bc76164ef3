"""Operations that choose between values: at NaN, at ties, at zeros of both signs and at infinities.

A complex step sees none of this. What is expected is written here once more, for one number at a time.
"""

from __future__ import annotations

import itertools
import math
import operator

import numpy as np
import pytest

from fusedrnn.cells.definition import cell
from fusedrnn.cells.evaluation import Evaluation
from fusedrnn.cells.symbols import absolute, maximum, minimum, relu, sigmoid, softplus, sqrt, tanh, where

pytestmark = pytest.mark.quick

NAN, INF = math.nan, math.inf
NUMBERS = [NAN, -INF, -2.0, -0.0, 0.0, 0.5, 2.0, INF]
UPSTREAM = [3.0, -INF, NAN]  # an infinite one too: a mask of 0 would make it NaN
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble])


def cell_of(function):
    """A cell of four states, whose first new state is the function of them."""

    @cell
    def made(p, x, a, b, c, d):
        return function(a, b, c, d), *p.dense("k l m", x)

    return made


def run(made, dtype, columns, upstream):
    """-> the first new state and the gradients of the four states; each column is a unit"""
    states = np.array(columns, dtype).T[:, None, :]
    H = states.shape[-1]
    weights = {"weight_ih": np.ones((3 * H, 1), dtype)}
    step = Evaluation(made, weights, np.ones((1, 1), dtype), list(states))
    d = np.full((1, H), upstream, dtype)
    gradients = step.backward([d, *[np.zeros_like(d)] * 3])
    for found in (step.after[0], *gradients):
        assert found.dtype == dtype
    return step.after[0][0], [g[0] for g in gradients]


def check(function, expected, dtype, columns):
    """``expected(a, b, c, d, upstream)`` gives the value and the gradients of a, b, c and d."""
    made = cell_of(function)
    for upstream in UPSTREAM:
        value, gradients = run(made, dtype, columns, upstream)
        for k, column in enumerate(columns):
            y, *ds = expected(*column, upstream)
            assert same(value[k], y), (column, value[k], y)
            for name, found, right in zip("abcd", gradients, ds, strict=True):
                # The sign of a gradient of 0 is nobody's concern.
                assert same(found[k] + 0, right + 0), (name, column, upstream, found[k], right)


def same(found, right):
    """Equal, a zero's sign included; every NaN is one."""
    if math.isnan(right):
        return math.isnan(found)
    return found == right and math.copysign(1, found) == math.copysign(1, right)


ONE = [(a, 7.0, 8.0, 9.0) for a in NUMBERS]
TWO = [(a, b, 8.0, 9.0) for a, b in itertools.product(NUMBERS, repeat=2)]
FOUR = [
    (a, b, c, d)
    for a, b in itertools.product(NUMBERS, repeat=2)
    for c, d in [(5.0, 6.0), (NAN, 6.0), (5.0, NAN), (INF, 6.0), (5.0, -INF), (-0.0, 0.0)]
]


# --- one argument -------------------------------------------------------------------------------------------


@DTYPES
def test_relu_is_0_but_where_its_argument_is_positive_or_nan(dtype):
    def expected(a, b, c, d, upstream):
        passes = a > 0 or math.isnan(a)
        return a if passes else 0.0, upstream if passes else 0.0, 0.0, 0.0, 0.0

    check(lambda a, b, c, d: relu(a), expected, dtype, ONE)


@DTYPES
@pytest.mark.parametrize("function", [absolute, abs])
def test_absolute_has_no_gradient_at_0(function, dtype):
    def expected(a, b, c, d, upstream):
        sign = 0.0 if a == 0 else math.copysign(1, a)
        # Of NaN as of a positive number.
        gradient = upstream if a > 0 or math.isnan(a) else -upstream if sign else 0.0
        return math.fabs(a), gradient, 0.0, 0.0, 0.0

    check(lambda a, b, c, d: function(a), expected, dtype, ONE)


# --- two arguments ------------------------------------------------------------------------------------------


def of_two(larger):
    """What is expected of maximum or minimum: the first argument unless the second one is larger or NaN."""

    def expected(a, b, c, d, upstream):
        value = a if math.isnan(a) else b if math.isnan(b) or larger(b, a) else a
        second = larger(b, a)
        return value, 0.0 if second else upstream, upstream if second else 0.0, 0.0, 0.0

    return expected


@DTYPES
@pytest.mark.parametrize(("function", "larger"), [(maximum, operator.gt), (minimum, operator.lt)])
def test_the_first_wins_a_tie_and_nan_is_propagated(function, larger, dtype):
    check(lambda a, b, c, d: function(a, b), of_two(larger), dtype, TWO)


@DTYPES
@pytest.mark.parametrize(("function", "larger"), [(maximum, operator.gt), (minimum, operator.lt)])
def test_of_a_number_and_a_value_too(function, larger, dtype):
    def number_second(a, b, c, d, upstream):
        value, da, *_ = of_two(larger)(a, 0.5, c, d, upstream)
        return value, da, 0.0, 0.0, 0.0

    def number_first(a, b, c, d, upstream):
        value, _, da, *_ = of_two(larger)(0.5, a, c, d, upstream)
        return value, da, 0.0, 0.0, 0.0

    check(lambda a, b, c, d: function(a, 0.5), number_second, dtype, ONE)
    check(lambda a, b, c, d: function(0.5, a), number_first, dtype, ONE)


@DTYPES
def test_of_one_value_twice_the_gradient_comes_once(dtype):
    for function in (maximum, minimum):
        check(
            lambda a, b, c, d: function(a, a),  # noqa: B023
            lambda a, b, c, d, upstream: (a, upstream, 0.0, 0.0, 0.0),
            dtype,
            ONE,
        )


# --- where --------------------------------------------------------------------------------------------------

COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@DTYPES
@pytest.mark.parametrize("compare", COMPARISONS.values(), ids=COMPARISONS)
def test_where_takes_nothing_from_what_it_does_not_choose(compare, dtype):
    """No comparison holds of NaN. An infinity or NaN in the other one reaches neither value nor gradient."""

    def expected(a, b, c, d, upstream):
        if compare(a, b):
            return c, 0.0, 0.0, upstream, 0.0
        return d, 0.0, 0.0, 0.0, upstream

    check(lambda a, b, c, d: where(compare(a, b), c, d), expected, dtype, FOUR)


@DTYPES
@pytest.mark.parametrize("compare", COMPARISONS.values(), ids=COMPARISONS)
def test_where_compares_with_numbers_on_either_side(compare, dtype):
    for number in (-0.0, 0.0, 0.5):

        def expected(a, b, c, d, upstream):
            left, right = compare(a, number), compare(number, b)  # noqa: B023
            value = (c if left else 1.0) if right else d
            return value, 0.0, 0.0, upstream if left and right else 0.0, 0.0 if right else upstream

        def function(a, b, c, d):
            return where(compare(number, b), where(compare(a, number), c, 1.0), d)  # noqa: B023

        check(function, expected, dtype, FOUR)


@DTYPES
def test_what_is_compared_and_chosen_has_the_gradient_of_what_is_chosen(dtype):
    check(
        lambda a, b, c, d: where(a > b, a, b),
        lambda a, b, c, d, upstream: (a, upstream, 0.0, 0.0, 0.0) if a > b else (b, 0.0, upstream, 0.0, 0.0),
        dtype,
        TWO,
    )


@DTYPES
def test_a_vector_that_is_not_chosen_has_no_gradient(dtype):
    @cell
    def made(p, x, h):
        return where(h > 0, h, p.vector("v")) + where(h > 0, p.vector("w"), h) + 0.0 * p.dense("a", x)

    v, h = np.array([NAN, INF, 1], dtype), np.array([[2, 2, -2]], dtype)
    w = np.array([1, 1, NAN], dtype)
    weights = {"v": v, "w": w, "weight_ih": np.ones((3, 1), dtype)}
    step = Evaluation(made, weights, np.ones((1, 1), dtype), [h])
    np.testing.assert_array_equal(step.after[0], [[3, 3, -1]])
    (dh,) = step.backward([np.full_like(h, 5)])
    np.testing.assert_array_equal(dh, [[5, 5, 5]])
    found = {n.attribute[0]: step.of(d) for n, d in made.gradient.vectors.items()}
    np.testing.assert_array_equal(found["v"], [[0, 0, 5]])
    np.testing.assert_array_equal(found["w"], [[5, 5, 0]])


@DTYPES
def test_where_and_maximum_keep_a_root_from_0(dtype):
    """As the documentation of ``where`` says."""
    made = cell_of(lambda a, b, c, d: where(a > 0, sqrt(maximum(a, 1e-6)), 0))
    value, gradients = run(made, dtype, [(0.0, 1.0, 1.0, 1.0), (4.0, 1.0, 1.0, 1.0)], 3.0)
    np.testing.assert_array_equal(value, [0, 2])
    np.testing.assert_array_equal(gradients[0], [0, 0.75])


# --- functions that choose inside ---------------------------------------------------------------------------

FUNCTIONS = {
    "sigmoid": (sigmoid, 0.0, 1.0),
    "softplus": (softplus, 0.0, INF),
    "tanh": (tanh, -1.0, 1.0),
}


@DTYPES
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_overflows(name, dtype):
    """Far out there is the limit, and no warning; of NaN there is NaN."""
    function, low, high = FUNCTIONS[name]
    far = float(np.finfo(np.float32).max)
    columns = [(a, 7.0, 8.0, 9.0) for a in (-INF, -far, far, INF, NAN)]
    value, gradients = run(cell_of(lambda a, b, c, d: function(a)), dtype, columns, 3.0)
    slopes = [0.0, 0.0, 3.0, 3.0] if name == "softplus" else [0.0] * 4
    np.testing.assert_array_equal(value, np.array([low, low, min(far, high), high, NAN], dtype))
    np.testing.assert_array_equal(gradients[0], np.array([*slopes, NAN], dtype))
