"""Ways that are chosen by machine have equal bits: copies for the weight gradients, prefetched weights."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from problems import CELLS, NORMED, assert_bitwise_equal, name, problem, run

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core
from fusedrnn.backends.cpu import CpuBackend
from test_machine import MACHINE, OWN

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poison")]

CPU = CpuBackend()
COPIES = ("never", "large", "always")


@pytest.fixture
def small():
    """Small problems take the ways of large ones."""
    default = _core.info()
    _core.testing.thresholds(False)
    yield
    _core.testing.thresholds(True)
    _core.testing.ordered_copies(default["ordered_copies"])
    _core.testing.prefetch(default["prefetch"])


def check(backend, cell, threads):
    # Several chunks; several panels and tiles of columns, the last of them narrower; fewer rows than threads.
    for size in [(130, 40, 3, 17), (3, 5, 40, 100), (2, 1, 3, 4)]:
        for dtype in (np.float32, np.float64):
            p = problem(cell, *size, dtype=dtype, lengths=True, reset=True)
            for count in (1, 3):
                threads(count)
                results = []
                for copies in COPIES:
                    _core.testing.ordered_copies(copies)
                    results.append(run(backend, p))
                for other in results[1:]:
                    assert_bitwise_equal(results[0], other)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("cell", [*CELLS, *NORMED[:4]], ids=name)
def test_compiled_cells(cell, small, threads):
    check(CPU, cell, threads)


@pytest.mark.quick
@pytest.mark.parametrize("cell", OWN, ids=name)
def test_cells_as_programs(cell, small, threads):
    check(MACHINE, cell, threads)


@pytest.mark.quick
@pytest.mark.parametrize("cell", [*CELLS, *NORMED[:4], *OWN], ids=name)
def test_prefetched_weights(cell, small, threads):
    backend = MACHINE if cell in OWN else CPU
    for dtype in (np.float32, np.float64):  # many tiles of rows, several panels, all of whole runs
        p = problem(cell, 3, 40, 16, 48, dtype=dtype, lengths=True, reset=True)
        for count in (1, 3):
            threads(count)
            results = []
            for on in (False, True):
                _core.testing.prefetch(on)
                results.append(run(backend, p))
            assert_bitwise_equal(*results)


@pytest.mark.parametrize(
    ("variable", "key", "values", "expected"),
    [
        ("FUSEDRNN_ORDERED_COPIES", "ordered_copies", COPIES, "never, large or always"),
        ("FUSEDRNN_PREFETCH", "prefetch", ("never", "always"), "never or always"),
    ],
)
def test_the_variables(variable, key, values, expected):
    for value in (*values, "yes"):
        code = f"from fusedrnn import _core; print(_core.info()['{key}'])"
        out = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, variable: value},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if value == "yes":
            assert f"{variable}: expected {expected}, got 'yes'" in out.stderr
        else:
            printed = value if key == "ordered_copies" else str(value == "always")
            assert out.stdout.split() == [printed], out.stderr
