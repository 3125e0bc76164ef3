"""The gradient matrix: every kernel passes it, a broken one does not, and its oracle is proved."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from fusedrnn import backends, gradcheck_suite
from fusedrnn.backends.protocol import Unsupported
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import CELLS, definition, gradient, zoo
from fusedrnn.gradcheck.tables import format_notes, format_rows, format_tensors
from fusedrnn.gradcheck_suite import (
    OPTIONS,
    QUICK,
    SIZES,
    available_levels,
    run_suite,
    variants,
)

ROOT = Path(__file__).parents[2]
SMALL = {"cells": ["lstm project=True"], "dtypes": ["float64"], "sizes": QUICK}


def failures(rows):
    return [f"{r.cell} {r.backend} {r.isa} {r.dtype} {r.option}: {r.note}" for r in rows if r.passed is False]


# --- the kernels --------------------------------------------------------------------------------------------


# Only the compiled kernels are repeated under the sanitizers and on each level; Numba compiles for a while.
MARKS = {"cpu": [pytest.mark.kernel], "numba": [pytest.mark.slow]}


@pytest.mark.quick
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=MARKS.get(name, [])) for name in backends.FOR_NUMPY]
)
def test_every_backend_passes(cell, backend):
    if (reason := backends.get(backend).unavailable()) is not None:
        pytest.skip(reason)
    rows = run_suite(cells=[cell], backends=[backend], sizes=QUICK)
    forms = [name for name in variants() if name.split()[0] == cell]
    assert len(rows) == len(forms) * len(OPTIONS) * 2
    assert failures(rows) == []
    not_run = {(r.cell, r.option) for r in rows if r.passed is None}
    masked = {"recurrent-dropout", "zoneout", "dropout-zoneout-all"}
    missing = {form: set() for form in forms}
    if backend == "numba":
        missing = {form: set(OPTIONS) if "project" in form else {"recompute", *masked} for form in forms}
    assert not_run == {(form, option) for form, options in missing.items() for option in options}


@pytest.mark.slow
def test_every_level_passes_beyond_one_tile():
    if not available_levels():
        pytest.skip("the compiled module is not built")
    rows = run_suite(backends=["cpu"], levels=available_levels(), sizes=SIZES[1:2])
    assert len(rows) == len(available_levels()) * len(variants()) * len(OPTIONS) * 2
    assert failures(rows) == []


def test_each_level_is_the_one_that_ran():
    if not available_levels():
        pytest.skip("the compiled module is not built")
    seen = []
    rows = run_suite(
        **SMALL,
        backends=["cpu"],
        options=["plain"],
        levels=available_levels(),
        progress=lambda done, total, row: seen.append((done, total)),
    )
    assert [r.isa for r in rows] == available_levels()
    assert seen == [(k + 1, len(rows)) for k in range(len(rows))]
    assert failures(rows) == []
    with_fma = [r.errors for r in rows if r.isa != "portable"]
    assert all(e == with_fma[0] for e in with_fma)  # the same bits


# --- the oracle is proved -----------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_oracle_agrees_with_complex_steps():
    rows = run_suite(backends=["oracle"], sizes=QUICK)
    assert len(rows) == len(variants()) * len(OPTIONS)
    assert failures(rows) == []
    for row in rows:
        assert set(row.errors) >= {"dx", "dweight_ih", "dweight_hh", "dh0"}
        assert 0 < max(row.errors.values()) < gradcheck_suite.PROOF


def test_a_wrong_formula_in_the_reference_is_found(monkeypatch):
    """Oracle and NumPy would share it; complex steps do not."""
    right = gradient.RULES["tanh"]

    def wrong(g, n, d):
        ((x, term),) = right(g, n, d)
        return [(x, term._replace(node=g.mul(term.node, g.constant(1 + 1e-15))))]

    monkeypatch.setitem(gradient.RULES, "tanh", wrong)
    monkeypatch.setattr(definition, "variant", definition.variant.__wrapped__)
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double is no wider than float64 here: an error of 1e-15 is none")
    rows = run_suite(cells=SMALL["cells"], backends=["oracle"], options=["plain"], sizes=QUICK)
    (text,) = failures(rows)
    assert "dweight_ih" in text


# --- a broken backend fails ---------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """Registers a backend, named broken: the reference, with its results changed."""

    def register(forward=None, backward=None, reason=None, swallow=False):
        class Broken(ReferenceBackend):
            name = "broken"

            def unavailable(self):
                return reason

            def forward(self, cell, x, *args, **options):
                if swallow:  # reads the padding
                    options["lengths"] = None
                out = super().forward(cell, x, *args, **options)
                return out if forward is None else forward(out)

            def backward(self, *args, **options):
                found = super().backward(*args, **options)
                return found if backward is None else backward(found)

        module = types.ModuleType("fusedrnn.backends.broken")
        module.Broken = Broken
        monkeypatch.setitem(sys.modules, "fusedrnn.backends.broken", module)
        monkeypatch.setitem(backends._CLASSES, "broken", "Broken")
        monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "broken"))
        backends._load.cache_clear()

    yield register
    backends._load.cache_clear()


def run_broken(**more):
    return run_suite(**SMALL | {"backends": ["broken"], "options": ["plain"]} | more)


def nudged(array, by=1e-13):
    array = array.copy()
    array[(-1,) * array.ndim] += by * np.abs(array).max()
    return array


def test_an_unbroken_one_passes(broken):
    broken()
    assert failures(run_broken(options=None)) == []


@pytest.mark.quick
@pytest.mark.parametrize("wrong", ["one element", "nan", "shape", "missing", "dtype"])
@pytest.mark.parametrize("tensor", ["dx", "dweight_hh", "dc0", "y", "cT"])
def test_a_broken_one_fails(broken, tensor, wrong):
    def change(array):
        if wrong == "one element":
            return nudged(array)
        if wrong == "nan":
            array[(0,) * array.ndim] = np.nan
            return array
        return {"shape": array[..., 1:], "missing": None, "dtype": array.astype(np.float32)}[wrong]

    def forward(out):
        if tensor == "y":
            return out._replace(y=change(out.y))
        return out._replace(stateT=(out.stateT[0], change(out.stateT[1]))) if tensor == "cT" else out

    def backward(g):
        if tensor == "dx":
            return g._replace(dx=change(g.dx))
        if tensor == "dweight_hh":
            return g._replace(dweights=g.dweights | {"weight_hh": change(g.dweights["weight_hh"])})
        return g._replace(dstate0=(g.dstate0[0], change(g.dstate0[1]))) if tensor == "dc0" else g

    broken(forward, backward)
    (row,) = run_broken()
    assert row.passed is False
    assert row.note.startswith(tensor)
    assert row.errors[tensor] > (5e-14 if wrong == "one element" else 1)
    assert all(e < 1e-14 for name, e in row.errors.items() if name != tensor)


def test_one_that_is_worse_than_numpy_fails(broken):
    """Within the fixed limit, but more than four times what plain NumPy errs."""
    broken(backward=lambda g: g._replace(dx=nudged(g.dx, 1e-14)))
    (row,) = run_broken()
    assert row.errors["dx"] < row.limits["dx"]
    assert row.passed is False
    assert "NumPy" in row.note


def test_one_that_reads_the_padding_fails(broken):
    broken(swallow=True)
    (row,) = run_broken(options=["lengths"])
    assert row.passed is False
    assert row.errors["dx"] == np.inf


def test_one_that_raises_fails_and_the_others_still_run(broken):
    def backward(g):
        raise ZeroDivisionError("oh")

    broken(backward=backward)
    rows = run_broken(backends=["broken", "reference"])
    assert [r.passed for r in rows] == [False, True]
    assert "ZeroDivisionError: oh" in rows[0].note


def test_what_is_not_supported_is_not_run(broken):
    def forward(out):
        raise Unsupported('save: "boundary_states" is not supported by this backend')

    broken(forward)
    (row,) = run_broken()
    assert row.passed is None
    assert "boundary_states" in row.note


def test_a_gradient_that_is_zero_is_proved():
    """Of the initial value of a state that no step reads."""
    rows = run_suite(cells=[zoo.e_lstm], backends=["oracle"], options=["plain"], sizes=QUICK)
    assert [(row.passed, min(row.errors.values())) for row in rows] == [(True, 0.0)]


def test_an_absent_backend_is_reported_with_its_reason(broken, monkeypatch):
    broken(reason="install the thing")
    monkeypatch.setattr(backends, "NAMES", ("reference", "broken"))
    rows = run_suite(**SMALL, options=["plain"])
    (row,) = [r for r in rows if r.backend == "broken"]
    assert row.passed is None
    assert row.note == "install the thing"
    assert ("broken", "not run") in {(r[1], r[-1]) for r in format_rows(rows)[1]}
    assert format_notes(rows) == ["not run: broken: install the thing"]
    with pytest.raises(RuntimeError, match="install the thing"):
        run_broken()


# --- names and tables ---------------------------------------------------------------------------------------


def test_variants_follow_from_the_registry():
    forms = ["rnn", "rnn relu=True", "lstm", "lstm project=True", "gru", "gru reset_after=False"]
    assert list(variants()) == forms
    rows = run_suite(
        cells=["gru"], backends=["reference"], dtypes=["float32"], options=["plain"], sizes=QUICK
    )
    assert [r.cell for r in rows] == ["gru", "gru reset_after=False"]


@pytest.mark.parametrize("argument", ["cells", "backends", "dtypes", "options", "levels"])
def test_unknown_names_are_errors(argument):
    with pytest.raises(ValueError, match=f"{argument}: expected names .*got 'mgu'"):
        run_suite(**{argument: ["mgu"]})
    with pytest.raises(TypeError, match=argument):
        run_suite(**{argument: "plain"})


def test_tables(broken):
    broken(backward=lambda g: g._replace(dx=nudged(g.dx)))
    rows = run_suite(**SMALL, backends=["oracle", "reference", "broken"], options=["plain", "state0"])
    header, text = format_rows(rows)
    assert {len(row) for row in text} == {len(header)}
    assert [row[-1] for row in text if row[1] == "broken"] == ["NO", "NO"]
    (line,) = format_notes(rows)
    assert line.startswith(
        "failed: lstm project=True, broken, float64, plain and 1 more: dx 1e-13 > 2e-14 at "
    )
    assert {row[-1] for row in text if row[1] in ("oracle", "reference")} == {"yes"}
    header, text = format_tensors(rows)
    assert header == ("cell", "dtype", "tensor", "broken", "NumPy", "limit")
    (dx,) = [row for row in text if row[2] == "dx"]
    assert float(dx[3]) == pytest.approx(max(r.errors["dx"] for r in rows if r.backend == "broken"), rel=0.05)
    assert float(dx[4]) < 1e-15
    assert float(dx[5]) == 2e-14


def test_seeds_draw_other_problems():
    first, again, other = (
        run_suite(**SMALL, backends=["reference"], options=["plain"], seed=seed)[0].errors
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_the_accuracy_page_comes_from_the_measured_file():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "gradient_figures.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
