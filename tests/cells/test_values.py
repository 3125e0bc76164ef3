"""What a cell computes is what its function says, run on arrays (direct.py)."""

from __future__ import annotations

import numpy as np
import pytest

import direct
import sequences
from fusedrnn.cells.definition import cell
from fusedrnn.cells.evaluation import Evaluation
from fusedrnn.cells.graph import Graph, number
from fusedrnn.cells.symbols import exp, tanh
from published import CELLS

pytestmark = pytest.mark.quick


def worst_difference(made, seed=0):
    """The largest difference of a new state from that of the function itself, relative to 1 + its size."""
    arguments, *_ = sequences.draw(made, np.float64, seed)
    weights, x = arguments["weights"], arguments["x"]["x"][0]
    before = list(arguments["states"].values())
    scalars = {name: value[0] for name, value in arguments["scalars"].items()}
    found = Evaluation(made, weights, x, before, scalars).after
    expected = direct.new_states(made, weights, x, before, scalars)
    return max(np.max(abs(a - b) / (1 + abs(b))) for a, b in zip(found, expected, strict=True))


# Both round each operation once, in another order: some tens of eps, times what a norm makes of it.
BOUND = 1e-12


@pytest.mark.parametrize("made", CELLS, ids=repr)
def test_a_step_computes_what_the_function_says(made):
    assert worst_difference(made) < BOUND


@cell
def differences(p, x, h, c):
    """Of the same values both ways, and other operations that are equal but for one thing."""
    a = p.dense("a", x)
    b = p.dense("b", h, x)
    return (a - b) * exp(b - a) + a / (2 + b * b) - b / (2 + a * a), (2.0 - h) * (h - 3.0) + c * 2.0


@cell
def identities(p, x, h, c):
    a = p.dense("a", x, h)
    minus_a, minus_c = -a, -c
    b = -minus_c
    return -minus_a * 1 + 1.0 * c, 1 * -b + a / 1 + (a + 0)


@cell
def norms(p, x, h, c):
    """Two values in one, one alone, both kinds, with and without bias, each with its own eps."""
    a, b = p.layer_norm("n", *p.dense("a b", x, h), eps=0.25)
    d, e = p.rms_norm("m", h, c, bias=True, eps=2)
    return tanh(a) + p.rms_norm("r", d), b * p.layer_norm("l", e, bias=False)


@cell
def parameters(p, x, h, c):
    """Rows of each matrix are counted by themselves, in the order in which they are named."""
    a, b = p.dense("a b", h)
    d = p.dense("d", c, x, h, bias=False)
    a2, e = p.dense("a e", x, c, layer_norm=True)
    f = p.dense("b", x) * p.vector("v") + p.vector("w") * p.vector("v")
    return a * b + d * a2, e + f


@pytest.mark.parametrize("made", [differences, identities, norms, parameters], ids=repr)
def test_what_few_cells_do_is_computed_too(made):
    assert worst_difference(made) < BOUND
    assert sequences.worst_error(made, np.float64) < BOUND


# --- the same operation once, and no other one for it -------------------------------------------------------


def graph():
    g = Graph()
    return g, g.node("state", attribute="a"), g.node("state", attribute="b")


def test_an_operation_is_made_once():
    g, a, b = graph()
    assert g.add(a, b) is g.add(b, a)
    assert g.mul(a, b) is g.mul(b, a)
    assert g.sub(a, b) is g.sub(a, b)
    assert g.sub(a, b) is not g.sub(b, a)
    assert g.div(a, b) is not g.div(b, a)
    assert g.node("maximum", a, b) is not g.node("maximum", b, a)  # they differ at a tie
    assert g.constant(0.0) is not g.constant(-0.0)


def test_nothing_is_folded_that_changes_a_bit():
    """Of NaN, of an infinity or of a zero's sign."""
    g, a, _ = graph()
    one, zero = g.constant(1), g.constant(0)
    assert g.mul(a, one) is g.mul(one, a) is a
    assert g.neg(g.neg(a)) is a
    for found in (g.add(a, zero), g.sub(a, zero), g.mul(a, zero), g.sub(a, a), g.div(a, a), g.div(a, one)):
        assert found.op in ("add", "sub", "mul", "div")


@pytest.mark.parametrize(
    ("op", "a", "b", "expected"),
    [
        ("add", 0.5, 0.25, 0.75),
        ("sub", 0.5, 2.0, -1.5),
        ("mul", 3.0, -0.5, -1.5),
        ("add", 0.1, 0.2, None),  # rounded: another dtype rounds otherwise
        ("sub", 1.0, 1e-20, None),
        ("mul", 0.1, 0.1, None),
        ("sub", 1.0, 1.0, None),  # a zero has a sign
        ("mul", 1e300, 1e300, None),
    ],
)
def test_constants_are_folded_where_that_is_exact(op, a, b, expected):
    g, *_ = graph()
    found = getattr(g, op)(g.constant(a), g.constant(b))
    assert (number(found) if found.op == "constant" else None) == expected
