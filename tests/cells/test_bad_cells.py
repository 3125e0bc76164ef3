"""Mistakes in a cell's function: each gets an error that names the line and says what to write instead."""

from __future__ import annotations

import fractions
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import bad_parameters  # noqa: F401  it adds to CASES
from bad_values import CASES
from fusedrnn.cells.builtin import lstm
from fusedrnn.cells.definition import Cell, cell
from fusedrnn.cells.symbols import CellError, absolute, exp, maximum, minimum, relu, tanh, where
from fusedrnn.gradcheck import gradcheck
from fusedrnn.gradcheck_suite import run_suite
from fusedrnn.layers import Recurrent
from fusedrnn.models import Sequential

pytestmark = pytest.mark.quick


def expected_line(function):
    """-> number and text of the marked line, or of that with def"""
    lines, first = inspect.getsourcelines(function)
    marked = [k for k, line in enumerate(lines) if line.rstrip().endswith("# here")]
    assert len(marked) < 2
    k = marked[0] if marked else next(k for k, line in enumerate(lines) if line.lstrip().startswith("def "))
    return first + k, lines[k].strip()


def check(error, function, words):
    line, source = expected_line(function)
    place, message = str(error).split("\n")
    assert place == f"{inspect.getfile(function)}:{line}: {source}"
    for word in words:
        assert word in message
    # It says what would be right, in words: no class of ours, no address of an object.
    assert re.search("expected|write|use|import|give|only|before", message)
    assert not re.search(r"Symbol|Condition|Input|Node|object at|<\w", message)
    assert len(message) < 330


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.function.__name__)
def test_a_mistake_is_named(case):
    with pytest.raises(CellError) as caught:
        cell(case.function).trace  # noqa: B018  or at the decorator, where there are no options
    check(caught.value, case.at, case.words)


def test_the_error_is_a_type_error():
    assert issubclass(CellError, TypeError)


KEPT = []


@pytest.mark.parametrize("where_it_is_used", ["sum", "product", "norm", "condition", "result"])
def test_a_value_of_an_earlier_run_is_named(where_it_is_used):
    def keeps(p, x, h):
        KEPT.append((h, h > 0))
        old, condition = KEPT[0]
        a = tanh(p.dense("a", x, h))
        if where_it_is_used == "sum":
            return a + old
        if where_it_is_used == "product":
            return a + p.dense("b", old)
        if where_it_is_used == "norm":
            return a + p.layer_norm("n", old)
        if where_it_is_used == "condition":
            return where(condition, a, 0)
        return old if len(KEPT) > 1 else a

    KEPT.clear()
    Cell(keeps).trace  # noqa: B018
    with pytest.raises(CellError, match="earlier run") as caught:
        Cell(keeps).trace  # noqa: B018
    assert __file__ in str(caught.value)


def unknown_option():
    return lstm.with_options(peephole=True)  # here


def option_that_is_a_list():
    return lstm.with_options(layer_norm=[1])  # here


def no_function():
    return cell(lstm)  # here


def called():
    return lstm(np.zeros((2, 3)))  # here


def called_within_this_package():
    return Sequential(lstm)(np.zeros((2, 3)))  # here


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (called, ["fusedrnn.layers.Recurrent(lstm, hidden_size)", "lstm.function(p, x, h)"]),
        (called_within_this_package, ["fusedrnn.layers.Recurrent(lstm, hidden_size)"]),
        (unknown_option, ["peephole: expected an option of lstm", "layer_norm"]),
        (option_that_is_a_list, ["hashable", "[1]"]),
        (no_function, ["expected a function", "Cell"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mistakes_beside_the_function(function, words):
    with pytest.raises(CellError) as caught:
        function()
    line, source = expected_line(function)
    assert str(caught.value).startswith(f"{__file__}:{line}: {source}\n")
    for word in words:
        assert word in str(caught.value)


def test_the_line_of_a_cell_in_a_library_is_named():
    """Where no line is the user's, the one that called this package."""
    code = "def made(p, x, h):\n    if h:\n        return h\n"
    names = {"__name__": "numpy.cells"}
    exec(compile(code, "library.py", "exec"), names)
    names["run"] = lambda: Cell(names["made"]).trace
    with pytest.raises(CellError, match=Path(__file__).name):  # this test is the user's
        names["run"]()


def test_what_takes_layers_says_so_of_cells_and_functions():
    words = "a cell, such as fusedrnn.cells.lstm or a function under @fusedrnn.cells.cell, got function"
    with pytest.raises(TypeError, match=f"^cell: expected {words}$"):
        Recurrent(tanh, 5)
    with pytest.raises(TypeError, match=r"^func_or_layer: expected a layer, .*Recurrent\(lstm, 5, 4,"):
        gradcheck(lstm, np.zeros((3, 2, 4)))
    with pytest.raises(TypeError, match=r"^cells: expected a list, \[lstm\("):
        run_suite(cells=lstm)


def test_a_function_is_run_at_the_decorator():
    with pytest.raises(CellError, match=r"if h > 0:\nwhether a condition holds"):

        @cell
        def asks(p, x, h):
            if h > 0:
                return h
            return p.dense("a", x, h)


def test_names_that_are_defined_later_and_options_can_be_used():
    @cell
    def early(p, x, h):
        return later(p.dense("a", x, h))

    @cell
    def chosen(p, x, h, *, steps=None):
        a = p.dense("a", x, h)
        for _ in range(steps):
            a = tanh(a)
        return a

    later = tanh
    assert early.states == ("h",)
    assert chosen.with_options(steps=1).states == ("h",)
    with pytest.raises(TypeError, match="NoneType"):
        chosen.trace  # noqa: B018


def test_the_decorator_may_have_brackets():
    @cell()
    def made(p, x, h):
        return tanh(p.dense("a", x, h))

    assert made.states == ("h",)


# --- what is allowed ----------------------------------------------------------------------------------------

NUMBERS = [2, np.float64(2), np.float32(2), np.int64(2), np.longdouble(2), fractions.Fraction(2)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_every_real_number_is_a_constant(number):
    def scaled(two):
        @cell
        def made(p, x, h):
            a = two * p.dense("a", x, h) + two - h / two
            a = two - maximum(a, two) + two / (minimum(two, a) + 9) - (a * two - two)
            h = where(two > h, a, h) + where(h >= two, a, two) + where(two <= h, h + two, two)
            return where(two < h, h, exp(-absolute(relu(a))))

        return made

    assert str(scaled(number)) == str(scaled(2.0))


def test_options_choose_by_if_and_loops_count():
    @cell
    def made(p, x, h, *, steps=2, relu_of=None):
        for _ in range(steps):
            h = tanh(p.vector("v") * h)
        a = p.dense("a", x, h)
        return a if relu_of is None else relu(a)

    def count(found, op):
        return sum(n.op == op for n in found.forward_nodes)

    assert (count(made, "tanh"), count(made, "relu")) == (2, 0)
    other = made.with_options(steps=3, relu_of=1)
    assert (count(other, "tanh"), count(other, "relu")) == (3, 1)


def test_values_print_what_they_are():
    """A cell may print them."""
    seen = []

    @cell
    def made(p, x, h):
        seen.append(f"{x}, {h}, {h > 0!r}")
        return p.dense("a", x, h)

    assert made.trace
    assert seen == ["the input x, a value of the cell, a condition"]
