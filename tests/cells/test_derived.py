"""What is derived from a cell: gradients by complex steps, what is saved, the order of operations.

``python tests/cells/test_derived.py`` writes derived.txt anew.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cells_cpp
import sequences
from fusedrnn.cells import definition, saved
from fusedrnn.cells.graph import UNIT
from fusedrnn.cells.symbols import exp, sqrt, tanh
from published import BUILTIN, CELLS, PUBLISHED, everything, projected_rnn

pytestmark = pytest.mark.quick

DERIVED = Path(__file__).with_name("derived.txt")
ids = {"ids": repr}


def described():
    return "\n\n".join(map(str, CELLS)) + "\n"


# Measured over seeds 0 to 4: at most 9.6e-15 and 6.5e-18, of LSTM with layer norm; of cells without layer
# norm 2.3e-15 and 7.3e-19.
BOUNDS = [(np.float64, 1e-14)] + ([(np.longdouble, 1e-17)] if np.finfo(np.longdouble).eps < 1e-18 else [])


@pytest.mark.parametrize("cell", CELLS, **ids)
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS, ids=lambda value: getattr(value, "__name__", ""))
def test_gradients_are_those_by_a_complex_step(cell, dtype, bound):
    """Of every weight, input, state before and row scalar."""
    assert sequences.worst_error(cell, dtype) < bound


@pytest.mark.parametrize("signs", [*itertools.product((1, -1), repeat=4)], ids=str)
def test_gradients_of_terms_of_any_signs_are_those_by_a_complex_step(signs):
    """h gets two contributions of each of two gradients."""

    @definition.cell
    def made(p, x, h, c):
        a, b, e = p.dense("a b e", x)
        parts = [c, tanh(c)]
        for k, (sign, term) in enumerate(zip(signs, [h * a, h * b, h * e, h / (2 + exp(c))], strict=True)):
            parts[k // 2] = parts[k // 2] + term if sign > 0 else parts[k // 2] - term
        return tanh(parts[0]), parts[1]

    assert sequences.worst_error(made, np.float64) < BOUNDS[0][1]


def test_nothing_recurses_in_the_depth_of_a_cell():
    """900 operations, each of the one before: as many as Python allows calls within one another."""

    @definition.cell
    def deep(p, x, h):
        a = p.dense("a", x, h)
        for _ in range(450):
            a = tanh(a) + 1
        return a

    assert len(deep.forward_nodes) > 900
    assert deep.digest
    assert len(deep.saved) == 1
    lines = str(deep).splitlines()
    assert max(map(len, lines)) < 300
    assert sum(line.count("tanh") for line in lines) > 450
    assert sequences.worst_error(deep, np.float64) < 1e-12


@pytest.mark.parametrize("cell", CELLS, **ids)
def test_backward_may_run_twice(cell):
    arguments, dy, dlast = sequences.draw(cell, np.float64)
    steps = sequences.forward(cell, **arguments)
    upstream = [dy[0], *list(dlast.values())[1:]]
    first = [a.copy() for a in steps[0].backward(upstream)]
    steps[0].backward([2 * d for d in upstream])
    for a, b in zip(first, steps[0].backward(upstream), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_derived_has_changed():
    """Tapes, checkpoints and bits depend on it."""
    assert described() == DERIVED.read_text()


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (BUILTIN[0], []),
        (BUILTIN[1], []),
        (BUILTIN[2], ["sigmoid i", "sigmoid f", "tanh g", "sigmoid o"]),
        (BUILTIN[3], ["sigmoid r", "sigmoid z", "dense n", "tanh"]),
        (BUILTIN[4], ["sigmoid r", "sigmoid z", "tanh n"]),
        (BUILTIN[5], ["dense a"] * 2),
        (BUILTIN[6], [f"dense {gate}" for gate in "ifgo"] * 2),
        (BUILTIN[7], [*["dense r", "dense z"] * 2, *["dense n"] * 2]),
        (BUILTIN[9], ["sigmoid i", "sigmoid f", "tanh g", "sigmoid o"]),
        (projected_rnn, ["tanh a", "add"]),
    ],
    **ids,
)
def test_what_is_saved_is_what_one_saves_by_hand(cell, expected):
    found = []
    for n in cell.saved:
        gates = [a.attribute.gate for a in (n, *n.args) if a.op == "dense"]
        found.append(" ".join([n.op, *(gates[:1] if len(n.args) < 2 or n.op == "dense" else [])]))
    assert sorted(found) == sorted(expected)


# The prices in saved.py, which decide what a tape holds: once more, since they may not change.
SAVE = 14
COST = dict.fromkeys(("tanh", "sigmoid", "exp", "log", "softplus"), 10) | dict.fromkeys(("div", "sqrt"), 4)


def price(cell, kept):
    """What saving these values costs, and making again what else is needed; None if that is impossible."""
    forward = set(cell.forward_nodes)
    there = {n for n in forward if n.op in ("state", "input", "constant")} | set(cell.trace.after.values())
    wanted = saved._read_by_backward(cell.gradient, forward)
    left = [*wanted, *(a for n in forward if n.op in ("dense", "project") for a in n.args)]
    total, seen = SAVE * len(kept), set()
    fused = set(cell.fused.values())
    while left:
        n = left.pop()
        if n in there or n in kept or n in seen:
            continue
        seen.add(n)
        if n.op in ("dense", "project"):
            return None
        if n.shape == UNIT and n.op != "item" and n not in fused:
            total += COST.get(n.op, 1)
        left += n.args
    return total


def near(operation, sums, normed, operand):
    """A cell with a value of which it is nearly as cheap to make it again as to save it."""

    @definition.cell
    def made(p, x, h, c):
        a, b = p.layer_norm("n", h, c) if normed else (h, c)
        value = a + b
        for _ in range(sums):
            value = value + 1
        value = operation(value)
        if operand:
            return p.dense("a", x, value), h - c
        return value * p.dense("a", x), h - c

    made.name = f"{'normed ' * normed}sums, {operation.__name__}, {'operand' if operand else 'factor'}"
    return made


def third(v):
    return v / 3


def plus(v):
    return v + 1


NEAR = [
    near(operation, SAVE - 1 - cost - 2 * normed + more, normed, operand)
    for operation, cost in [(tanh, 10), (sqrt, 4), (third, 4), (plus, 1)]
    for normed in (False, True)
    for operand in (False, True)
    for more in (-1, 1)
]


SMALL = [c for c in (*BUILTIN[:5], *PUBLISHED) if len(c.forward_nodes) < 32] + NEAR


@pytest.mark.parametrize("cell", SMALL, **ids)
def test_no_other_choice_of_what_is_saved_is_cheaper(cell):
    """Of all sets of at most as many values, and one more."""
    fused = set(cell.fused.values())
    after = set(cell.trace.after.values())
    able = [n for n in cell.forward_nodes if n.shape == UNIT and n.op not in ("state", "item")]
    able = [n for n in able if n not in fused and n not in after]
    assert set(cell.saved) <= set(able)
    best = price(cell, set(cell.saved))
    for count in range(min(len(cell.saved), 4) + 2):
        for kept in itertools.combinations(able, count):
            other = price(cell, set(kept))
            assert other is None or other >= best, kept


def test_the_cells_in_cpp_are_those_of_the_functions():
    """Written by a Python without NumPy. If this fails: python tools/generate_cells.py"""
    root = Path(__file__).parents[2]
    program = f"import sys; sys.path.insert(0, {str(root / 'tools')!r}); import generate_cells"
    program += "; print(generate_cells.text(), end='')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == (root / "csrc/cells/derived.h").read_text() == cells_cpp.header()


def test_some_of_the_near_choices_are_saves():
    assert {len(made.saved) for made in NEAR} == {0, 1, 2}


def test_a_sum_of_products_fuses_the_first():
    """And only products that nothing else uses, made in the same round."""
    text = str(everything)
    assert "fma(v, v3, where(" in text
    assert "gain_all[2] * v1[2]" in text  # used twice
    lstm = str(BUILTIN[2])
    assert "new c = fma(v1, c, v2 * v3)" in lstm


if __name__ == "__main__":
    DERIVED.write_text(described())
