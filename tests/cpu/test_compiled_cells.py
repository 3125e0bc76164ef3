"""Random cells in the vector machine have the bits of the same cells compiled (compiled_cells.py)."""

from __future__ import annotations

import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from compiled_cells import Library, run_compiled
from problems import OPTIONS, SIZES, assert_bitwise_equal, problem, run
from test_machine import COMPILED, CPU, MACHINE, assert_right, regularized
from test_random_cells import made, sources
from test_simd_cpp import FLAGS

_core = pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = (np.float32, np.float64)


def library(cells, folder):
    """Cells compiled, each for the dtype that is its value."""
    if _core.info()["isa"] == "portable":
        pytest.skip("the processor has no FMA")  # sums are others then
    compiler = shutil.which("g++") or shutil.which("c++") or pytest.skip("needs a C++ compiler")
    level = next(level for level in ("avx2", "neon", "portable_fma") if level in FLAGS)
    return Library(cells, folder, compiler, level, FLAGS[level])


def problems(cells):
    """Each cell with the next size, options and masks, and how it is saved."""
    for k, cell in enumerate(cells):
        masks = [None, regularized(cell, 0.3, 0.3, 0.4, seed=k), regularized(cell, 0, 0.3, 0)]
        options = OPTIONS[k % len(OPTIONS)] | {"regularization": masks[k // 2 % 3]}
        yield problem(cell, *SIZES[k % len(SIZES)], seed=k, **options), ("all", "boundary_states")[k // 3 % 2]


def draw(count, seed):
    """The sources of random cells, the larger ones last."""
    found = {}

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(sources())
    def collect(source):
        found[source] = None

    collect()
    return sorted(found, key=len)


def check(drawn, folder):
    """The machine has the bits of the compiled cells, and is right."""
    cells = {made(source): DTYPES[k % 2] for k, source in enumerate(drawn)}
    compiled = library(cells, folder)
    for p, save in problems(cells):
        assert_right(run(MACHINE, p, save=save), p)
        p = p.astype(cells[p.cell])
        assert_bitwise_equal(run(MACHINE, p, save=save), run_compiled(compiled, p))


def test_built_in_cells_have_the_bits_of_their_kernels(tmp_path):
    """So the loop around the compiled functions sums in the order of the kernels."""
    compiled_in = [cell for cell in COMPILED if not cell.projects]  # the loop here has no projection
    cells = {cell: DTYPES[k % 2] for k, cell in enumerate(compiled_in)}
    compiled = library(cells, tmp_path)
    for first in range(3):
        for p, save in problems([*compiled_in[first:], *compiled_in[:first]]):
            p = p.astype(cells[p.cell])
            assert_bitwise_equal(run(CPU, p, save=save), run_compiled(compiled, p))


def test_random_cells_have_the_bits_of_compiled_ones(tmp_path):
    check(draw(20, 0)[-4:], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_random_cells_have_the_bits_of_compiled_ones(seed, tmp_path):
    check(draw(120, seed), tmp_path)
