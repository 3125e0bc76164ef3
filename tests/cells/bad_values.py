"""Cells with a mistake in what they do to values and to x, for test_bad_cells.py.

The line that the error has to name ends with "# here"; without one it is the one with ``def``.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import numpy as np

from fusedrnn.cells.builtin import lstm
from fusedrnn.cells.symbols import maximum, sigmoid, tanh, where

try:
    import torch
except ImportError:
    torch = None


class Case(NamedTuple):
    function: object
    words: tuple[str, ...]  # that the message has to hold
    at: object  # the function whose line it names


CASES = []


def bad(*words, at=None):
    """The function makes a mistake."""

    def register(function):
        CASES.append(Case(function, words, at or function))
        return function

    return register


def helper(h):
    return (
        np.tanh(h)  # here
    )


def helper_of_helper(h):
    return helper(h * 2)


# --- Python's statements and functions ----------------------------------------------------------------------


@bad("`if`", "where(a > b, x, y)", "maximum", "option")
def if_of_a_value(p, x, h):
    a = p.dense("a", x, h)
    if a:  # here
        return tanh(a)
    return a


@bad("`if`", "condition", "where(a > b, x, y)")
def if_of_a_condition(p, x, h):
    a = p.dense("a", x, h)
    if a > 0:  # here
        return tanh(a)
    return a


@bad("`while`", "where(a > b, x, y)")
def while_of_a_condition(p, x, h):
    a = p.dense("a", x, h)
    while a > 1:  # here
        a = a / 2
    return a


@bad("`and`", "where(a > b, x, y)")
def and_of_conditions(p, x, h):
    a = p.dense("a", x, h)
    return where(a > 0 and h > 0, a, h)  # here


@bad("`not`", "where(a > b, x, y)")
def not_of_a_condition(p, x, h):
    return where(not h > 0, p.dense("a", x, h), h)  # here


@bad("&", "where(a > 0, where(b > 0, x, y), y)")
def bitwise_and_of_conditions(p, x, h):
    a = p.dense("a", x, h)
    return where((a > 0) & (h > 0), a, h)  # here


@bad("~", "where(a > 0, y, x)")
def inverted_condition(p, x, h):
    return where(~(h > 0), p.dense("a", x, h), h)  # here


@bad("chained comparison", "where(a > b, x, y)")
def chained_comparison(p, x, h):
    return where(0 < h < 1, p.dense("a", x, h), h)  # here


@bad("max", "maximum(a, b)")
def max_of_values(p, x, h):
    return max(p.dense("a", x, h), h)  # here


@bad("==", "where(a > b, x, y)")
def equality(p, x, h):
    a = p.dense("a", x, h)
    return where(a == h, a, h)  # here


@bad("!=", "where(a > b, x, y)")
def inequality(p, x, h):
    a = p.dense("a", x, h)
    return where(a != 0, a, h)  # here


@bad("number", "a value of the cell", "from fusedrnn.cells, not from math")
def function_of_math(p, x, h):
    return math.tanh(p.dense("a", x, h))  # here


@bad("number", "a value of the cell")
def value_as_float(p, x, h):
    return p.dense("a", x, h) * float(h)  # here


@bad("rounding")
def rounded(p, x, h):
    return p.dense("a", x, h) + round(h)  # here


@bad("an integer", "option of the cell", "default")
def range_of_a_row_scalar(p, x, h, *, steps):
    for _ in range(steps):  # here
        h = tanh(p.dense("a", x, h))
    return h


@bad("**", "x * x")
def power(p, x, h):
    return tanh(p.dense("a", x, h)) ** 2  # here


@bad("**", "exp(b * log(a))")
def power_of_a_number(p, x, h):
    return 2 ** p.dense("a", x, h)  # here


@bad("@", "p.dense")
def matrix_product(p, x, h):
    return p.dense("a", x) + h @ h  # here


@bad("//")
def floor_division(p, x, h):
    return p.dense("a", x, h) // 2  # here


@bad("cannot be indexed", 'i, f = p.dense("i f", x, h)')
def index(p, x, h):
    return p.dense("a", x, h) + h[0]  # here


@bad("cannot be indexed")
def assignment_to_an_index(p, x, h):
    h[0] = 0  # here
    return p.dense("a", x, h)


@bad("not a sequence", "names gates")
def iteration(p, x, h):
    return sum(unit for unit in h) + p.dense("a", x)  # here


@bad("not a sequence", 'i, f = p.dense("i f", x, h)')
def two_values_of_one_gate(p, x, h):
    i, f = p.dense("i", x, h)  # here
    return i * f


@bad("not a sequence")
def length(p, x, h):
    return p.dense("a", x, h) / len(h)  # here


@bad("no attribute tanh", "tanh(h)")
def method(p, x, h):
    return p.dense("a", x, h).tanh()  # here


@bad("no attribute shape")
def shape(p, x, h):
    return p.dense("a", x, h) / h.shape[1]  # here


@bad("cannot be called", "lstm.function(p, x, h)")
def another_cell(p, x, h, c):
    return lstm(p, x, h, c)  # here


@bad("a value of the cell")
def function_of_a_library(p, x, h):
    return p.dense("a", x) + statistics.fmean([h, h])  # here


# --- NumPy and PyTorch --------------------------------------------------------------------------------------


@bad("NumPy's tanh", "from fusedrnn.cells, tanh")
def ufunc(p, x, h):
    return np.tanh(p.dense("a", x, h))  # here


@bad("NumPy's tanh", at=helper)
def mistake_in_a_helper(p, x, h):
    return helper_of_helper(p.dense("a", x, h))


@bad("NumPy's add")
def method_of_a_ufunc(p, x, h):
    return p.dense("a", x) + np.add.reduce(h)  # here


@bad("NumPy's concatenate", "p.dense")
def concatenate(p, x, h):
    return p.dense("a", np.concatenate([x, h]))  # here


@bad("NumPy's mean", "cannot take a value of the cell")
def function_of_numpy(p, x, h):
    return p.dense("a", x) + np.mean(h)  # here


@bad("not an array", "not with NumPy")
def made_an_array(p, x, h):
    return p.dense("a", x) + np.asarray(h)  # here


@bad("not an array")
def made_an_array_of_several(p, x, h):
    return p.dense("a", x) + np.array([h, h])  # here


@bad("numpy.ndarray", 'p.vector("name")')
def array_times_value(p, x, h):
    return np.ones(3) * p.dense("a", x, h)  # here


@bad("numpy.ndarray", 'p.vector("name")')
def value_times_array(p, x, h):
    return p.dense("a", x, h) * np.ones(3)  # here


@bad("@", "p.dense")
def array_by_value(p, x, h):
    return p.dense("a", x) + np.eye(3) @ h  # here


@bad("==")
def array_equal_to_value(p, x, h):
    return where(np.ones(3) == h, p.dense("a", x), h)  # here


@bad("numpy.ndarray", 'p.vector("name")')
def array_in_where(p, x, h):
    return where(h > 0, p.dense("a", x), np.zeros(3))  # here


if torch is not None:

    @bad("PyTorch's tanh", "from fusedrnn.cells, tanh")
    def function_of_torch(p, x, h):
        return torch.tanh(p.dense("a", x, h))  # here

    @bad("PyTorch's softplus")
    def function_of_torch_of_a_condition(p, x, h):
        return torch.nn.functional.softplus(p.dense("a", x, h))  # here

    @bad("PyTorch's layer_norm")
    def function_of_torch_in_python(p, x, h):
        return torch.nn.functional.layer_norm(p.dense("a", x, h), (3,))  # here

    @bad("torch.Tensor", 'p.vector("name")')
    def tensor_times_value(p, x, h):
        return torch.ones(3) * p.dense("a", x, h)  # here

    @bad("torch.Tensor", 'p.vector("name")')
    def tensor_over_value(p, x, h):
        return torch.ones(3) / p.dense("a", x, h)  # here

    @bad("torch.Tensor", 'p.vector("name")')
    def value_times_tensor(p, x, h):
        return p.dense("a", x, h) * torch.ones(3)  # here

    @bad("a value of the cell")
    def made_a_tensor(p, x, h):
        return p.dense("a", x, h) + torch.tensor(h)  # here


# --- numbers and conditions ---------------------------------------------------------------------------------


@bad("finite", "inf")
def infinite_constant(p, x, h):
    return p.dense("a", x, h) * math.inf  # here


@bad("finite", "nan")
def constant_nan(p, x, h):
    return where(h > 0, p.dense("a", x, h), float("nan"))  # here


@bad("double")
def integer_beyond_a_double(p, x, h):
    return p.dense("a", x, h) * 10**400  # here


@bad("divided by the number 0")
def division_by_0(p, x, h):
    return p.dense("a", x, h) / 0.0  # here


@bad("True", "1.0 if True else 0.0")
def bool_as_a_number(p, x, h, *, residual=True):
    return p.dense("a", x, h) + residual * h  # here


@bad("number", "None")
def none_as_a_number(p, x, h, *, scale=None):
    return p.dense("a", x, h) * scale  # here


@bad("number", "str")
def text_as_a_number(p, x, h):
    return p.dense("a", x, h) + "h"  # here


@bad("number", "complex")
def complex_number(p, x, h):
    return p.dense("a", x, h) + 1j  # here


@bad("one value, got several")
def list_as_a_value(p, x, h):
    return p.dense("i f", x, h) * h  # here


@bad("functions of math")
def function_of_a_number(p, x, h):
    return p.dense("a", x, h) * tanh(0.5)  # here


@bad("functions of math")
def maximum_of_numbers(p, x, h):
    return p.dense("a", x, h) * maximum(0.5, 1)  # here


@bad("condition", "where(a > b, 1, 0)")
def condition_as_a_value(p, x, h):
    return p.dense("a", x, h) * (h > 0)  # here


@bad("condition", "where(a > b, 1, 0)")
def condition_times_a_number(p, x, h):
    return p.dense("a", x, h) + (h > 0) * 2  # here


@bad("condition", "where(a > b, 1, 0)")
def function_of_a_condition(p, x, h):
    return p.dense("a", x, h) * sigmoid(h > 0)  # here


@bad("where", "a > 0", "a value of the cell")
def where_of_a_value(p, x, h):
    return where(h, p.dense("a", x, h), 0)  # here


@bad("where", "a > 0", "bool")
def where_of_a_bool(p, x, h, *, residual=True):
    return where(residual, p.dense("a", x, h), h)  # here


# --- x ------------------------------------------------------------------------------------------------------


@bad("second argument", "x", 'p.dense("a", x, h)')
def x_in_a_product(p, x, h):
    return p.dense("a", h) * x  # here


@bad("second argument", 'p.dense("a", x, h)')
def x_minus(p, x, h):
    return p.dense("a", h) + (1 - x)  # here


@bad("second argument", 'p.dense("a", x, h)')
def function_of_x(p, x, h):
    return p.dense("a", tanh(x), h)  # here


@bad("second argument", 'p.dense("a", x, h)')
def comparison_of_x(p, x, h):
    return where(x > 0, p.dense("a", h), h)  # here


@bad("second argument", 'p.dense("a", x, h)')
def x_in_where(p, x, h):
    return where(h > 0, x, p.dense("a", h))  # here


@bad("the input x", "cannot be indexed")
def index_of_x(p, x, h):
    return p.dense("a", x[0], h)  # here


@bad("p.layer_norm", "got x", "before the layer")
def norm_of_x(p, x, h):
    return p.dense("a", p.layer_norm("x", x), h)  # here


@bad("second argument")
def x_forgotten(p, h, c):
    return p.dense("a", h) * h, c  # here


@bad("no new state depends on the input x", 'p.dense("a", x, h)')
def x_not_used(p, x, h):
    return tanh(p.dense("a", h))
