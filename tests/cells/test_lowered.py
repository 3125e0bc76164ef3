"""The lowered operations: they compute the same bits, in rounds, and fuse what the rule says."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import sequences
from fusedrnn.cells.definition import cell
from fusedrnn.cells.evaluation import Evaluation
from fusedrnn.cells.rounds import rounds
from fusedrnn.cells.symbols import tanh
from published import BUILTIN, CELLS, cfc, dreamer_gru, everything, ind_rnn, ltc, mgu

pytestmark = pytest.mark.quick


@cell
def product_returned(p, x, h, c):
    """A product that a sum uses, and that is a result itself, forward and backward."""
    c = h * c
    return c + p.dense("a", x, h), c


@cell
def late_sums(p, x, h, c):
    """Sums a round later than their products."""
    a = p.dense("a", x, h)
    b = p.dense("b", a)
    return a * h + b, c - a * c + tanh(b)


@cell
def early_factor_last(p, x, h, c):
    """In backward the gradient of h is a sum of products whose factors are of different rounds of forward."""
    early = p.dense("a", x)
    late = p.dense("b", early)
    second = h * late
    return h * early, second + c


@cell
def late_factor_last(p, x, h, c):
    early = p.dense("a", x)
    late = p.dense("b", early)
    first = h * early
    return first, h * late + c


FEW = [product_returned, late_sums, early_factor_last, late_factor_last]
each_cell = pytest.mark.parametrize("cell", [*CELLS, *FEW], ids=repr)

# What reads all units of a row: a product with a matrix, a norm, and their gradients.
READS_ROWS = ("dense", "transposed", "normalise", "normalise_gradient", "project", "project_transposed")


def evaluated(cell):
    """A step, forward and backward; the values that go into it, and those that backward needs beside them."""
    arguments, _, dlast = sequences.draw(cell, np.float64)
    scalars = {name: value[0] for name, value in arguments["scalars"].items()}
    step = Evaluation(
        cell, arguments["weights"], arguments["x"]["x"][0], list(arguments["states"].values()), scalars
    )
    step.backward(list(dlast.values()))
    t = cell.trace
    given = {*t.states.values(), *t.scalars.values()}
    return step, given, {*t.after.values(), *cell.saved, *cell.gradient.upstream.values()}


def compute(step, operation):
    n = operation.node
    if operation.op not in ("fma", "fnma"):
        return step.value(n)
    a, b, c = (step.values[v] for v in operation.args)
    return a * b + c if operation.op == "fma" else c - a * b


def check_equal(step, expected, nodes):
    for n in nodes:
        np.testing.assert_array_equal(step.values[n], expected[n])


@each_cell
def test_forward_computes_the_same_bits(cell):
    """One operation after the other, from the states before; NumPy rounds an FMA twice."""
    step, given, _ = evaluated(cell)
    expected, step.values = step.values, {n: step.values[n] for n in given}
    for operation in cell.forward:
        step.values[operation.node] = compute(step, operation)
    check_equal(step, expected, [*cell.trace.after.values(), *cell.saved])


@each_cell
def test_backward_needs_only_states_and_what_is_saved(cell):
    step, given, kept = evaluated(cell)
    expected, step.values = step.values, {n: step.values[n] for n in given | kept}
    for operation in cell.backward:
        assert operation.op not in ("dense", "project")  # no product of forward is made again
        step.values[operation.node] = compute(step, operation)
    check_equal(step, expected, cell.gradient.outputs)
    for product in (n for n in cell.forward_nodes if n.op in ("dense", "project")):
        for operand in product.args:
            if operand.op != "input":  # for the gradient of the weights
                assert operand in given | kept or can_be_made(operand, given | kept)


def can_be_made(n, there):
    """Whether a value can be made of these, without a product."""
    return n in there or (
        n.op not in ("dense", "project", "state") and all(can_be_made(a, there) for a in n.args)
    )


# --- rounds -------------------------------------------------------------------------------------------------


@each_cell
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_round_by_round_every_value_is_there_in_time(cell, which):
    """What reads all units of a row sees only what earlier rounds have made."""
    step, given, kept = evaluated(cell)
    forward = cell.forward_nodes
    if which == "forward":
        operations, there, of = cell.forward, given, rounds(forward)
    else:
        operations, there = cell.backward, given | kept
        of = rounds(cell.backward_nodes, known=forward)
    expected, step.values = step.values, {n: step.values[n] for n in there}
    for k in range(max(of[o.node] for o in operations) + 1):
        made = {o.node: compute(step, o) for o in operations if of[o.node] == k and o.op in READS_ROWS}
        step.values |= made
        for o in operations:
            if of[o.node] == k and o.op not in READS_ROWS:
                step.values[o.node] = compute(step, o)
    check_equal(step, expected, cell.trace.after.values() if which == "forward" else cell.gradient.outputs)


@pytest.mark.parametrize(
    ("cell", "forward", "backward"),
    [
        (BUILTIN[0], 1, 1),
        (BUILTIN[2], 1, 1),
        (BUILTIN[3], 1, 1),
        (BUILTIN[4], 2, 2),  # r before its product
        (BUILTIN[5], 2, 2),  # a norm after the product
        (BUILTIN[6], 3, 3),  # and another one of c
        (ind_rnn, 1, 0),  # no product with a state: backward has none
        (mgu, 2, 2),
        (cfc, 2, 2),
        (ltc, 1, 1),
        (dreamer_gru, 2, 2),
        (everything, 3, 3),
        (BUILTIN[9], 2, 2),  # the projection, and its gradient before that of the products
    ],
    ids=repr,
)
def test_there_are_no_more_rounds_than_needed(cell, forward, backward):
    nodes = cell.forward_nodes
    assert max(rounds(nodes).values()) == forward
    assert max(rounds(cell.backward_nodes, known=nodes).values()) == backward


# --- fusion -------------------------------------------------------------------------------------------------


def fused_by_the_rule(nodes, outputs, known, first):
    """Of each sum its product, by the rule as it is written in fusion.py; ``first`` is the first round."""

    @functools.cache
    def round_of(n):
        if n in known:
            return 0
        return max((round_of(a) for a in n.args), default=0) + (1 if n.op in READS_ROWS else 0)

    def may_fuse(product, total):
        uses = [a for n in nodes for a in n.args if a is product]
        same = max(round_of(product), first) == max(round_of(total), first)
        return product.op == "mul" and len(uses) == 1 and product not in outputs and same

    found = {}
    for n in nodes:
        able = n.args if n.op == "add" else n.args[1:] if n.op == "sub" else ()
        for product in reversed(able):
            if may_fuse(product, n):
                found[n] = product  # the first one last
    return found


@each_cell
def test_a_product_is_fused_as_the_rule_says(cell):
    forward, backward = cell.forward_nodes, cell.backward_nodes
    expected = fused_by_the_rule(forward, set(cell.trace.after.values()), set(), 1)
    expected |= fused_by_the_rule(backward, set(cell.gradient.outputs), set(forward), 0)
    assert cell.fused == expected


def test_the_text_names_a_vector_by_its_name_alone():
    """The rows of gains and of biases after a norm are numbered."""

    @cell
    def made(p, x, h):
        return p.vector("time_constant") * p.layer_norm("n", p.dense("a", x, h))

    text = str(made)
    assert "time_constant[" not in text
    assert "gradient of time_constant: " in text
    assert "gain_n[0]" in text
    assert "bias_n[0]" in text
