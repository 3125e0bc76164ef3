"""A projected first state of cells that are programs, beside what test_machine.py shows of every cell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from problems import OPTIONS, PLAIN, PROJECTED, assert_bitwise_equal, assert_close, name, problem, run

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core
from fusedrnn.backends import machine
from fusedrnn.backends.cpu import names
from fusedrnn.cells import cell, program, sigmoid, tanh, where
from test_machine import MACHINE, REFERENCE, regularized
from test_machine_plans import made

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poison")]


@cell
def projected_gru(p, x, h, s):
    """What is projected is another state as well, of which zoneout keeps nothing."""
    r, z = sigmoid(p.dense("r z", x, h))
    s = s + z * (tanh(p.dense("n", x) + r * p.dense("q", h)) - s)
    return p.project(s), s


@cell
def projected_c(p, x, c, h=1, *, dt):
    """The mask of the projection is that of c, what is projected a state before the step."""
    return p.project(h), tanh(p.dense("a", x, c)) - dt * h


@cell
def projected_once(p, x, h, c):
    """No product reads h."""
    c = tanh(p.dense("a", x)) + c * p.vector("u")
    return p.project(c), c


@cell
def projected_choice(p, x, h, c):
    """What is projected has no gradient."""
    a = p.dense("a", x, h)
    return p.project(where(a > 0, 1, 0)), tanh(a) + c


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("cell", [projected_gru, projected_c, projected_once, projected_choice], ids=name)
def test_projections(cell, threads):
    """Of one unit to all, with and without masks, of several chunks too."""
    sizes = [((7, 7, 3, 17), 1), ((5, 3, 4, 35), 33), ((4, 1, 4, 35), 16), ((90, 5, 2, 40), 17)]
    for k, options in enumerate(OPTIONS):
        size, P = sizes[k % len(sizes)]
        for seed in (None, k):
            masks = regularized(cell, 0.3 * (k % 3 > 0), 0.3 * (k % 5 < 3), 0.3, seed) if k else None
            p = problem(cell, *size, P=P, regularization=masks, **options)
            threads(1)
            want = run(MACHINE, p)
            assert_close(want, run(REFERENCE, p), 1e-12)
            threads(3)
            assert_bitwise_equal(run(MACHINE, p, save="boundary_states"), want)


STATES = program.STATES
WRONG_PROJECTIONS = {
    "projection": ({"projects": 2}, "projection: expected 0 to 1, got 2"),
    "mask": ({"projected_mask": 3}, "mask of the projection: expected 0 to 2, got 3"),
    "mask of none": ({"projects": False}, "mask of the projection: expected 0 to 0, got 1"),
    "direct": ({"direct": [False, True]}, "direct: expected 1 to 1, got 0"),
    "direct of none": ({"projected_mask": 0}, "direct: expected 0 to 0, got 1"),
    "operand": ({"operands": [1]}, "state of an operand: expected 0 to 0, got 1"),
    "computed operand": ({"operands": [-1]}, "state of an operand: expected 0 to 0, got -1"),
}


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("wrong", WRONG_PROJECTIONS.values(), ids=WRONG_PROJECTIONS)
def test_wrong_projections_are_refused(wrong):
    changed, message = wrong
    with pytest.raises(ValueError, match=f"program: {message}"):
        made(replace(program.plan(PROJECTED, False, ["h"]), **changed))


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_programs_reach_no_projected_state(direction):
    """Before the step, after it, its gradient, and its mask: these have other units."""
    for op, places in (
        ("load", (STATES, STATES + 2, STATES + 4, program.KEEP_H)),
        ("store", (STATES, STATES + 4, program.KEEP_H)),
    ):
        for place in places:
            plan = program.plan(PROJECTED, False, ["h"])
            code = getattr(plan, direction)[0].code
            code.append(program.Instruction(op, 0, place))
            with pytest.raises(ValueError, match="program: value of a place: expected less than 0, got 0"):
                made(plan)


@pytest.mark.mutation
def test_wrong_arrays_of_a_projection():
    p = problem(PROJECTED, 2, 1, 3, 4, P=3)
    plan = machine.plan(PROJECTED)
    *first, weight_hr = [p.weights.get(n) for n in names(PROJECTED)]
    for wrong, message in (
        (np.ones((0, 4)), r"weight_hr: expected \(P, H\), P from 1 to H = 4"),
        (np.ones((5, 4)), r"weight_hr: expected \(P, H\), P from 1 to H = 4"),
        (np.ones(4), r"weight_hr: expected \(P, H\), P from 1 to H = 4"),
        (np.ones((3, 5)), r"weight_hr: expected float64 \(3, 4\)"),
        (np.ones((2, 4)), r"weight_hh: expected float64 \(16, 2\)"),
        (weight_hr.astype(np.float32), "weight_hr: expected float64"),
        (None, "weight_hr: expected an array, got .*NoneType"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            _core.pack(plan, (*first, wrong))
    with pytest.raises(ValueError, match="weights: expected 5 entries, got 4"):
        _core.pack(plan, tuple(first))
    packed = _core.pack(plan, (*first, weight_hr))
    rest = (), None, None, False, 0, None, False, 1
    h, c = p.state0
    with pytest.raises(ValueError, match="cell: expected that of the packed weights"):
        _core.forward(packed, machine.plan(PLAIN[2]), p.x, (), *rest)
    for wrong in ((c, c), (h, h)):
        with pytest.raises(ValueError, match="state0: expected float64"):
            _core.forward(packed, plan, p.x, wrong, *rest)
    with pytest.raises(ValueError, match="cell: expected one without this mask"):
        _core.forward(packed, machine.plan(PROJECTED, False, ("h",)), p.x, (), *rest)
    tape = _core.forward(packed, plan, p.x, (), *rest)[3]
    with pytest.raises(ValueError, match="dy: expected float64"):
        _core.backward(tape, np.ones((2, 1, 4)), (), (), [True] * 7)
