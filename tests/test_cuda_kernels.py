"""The CUDA kernels, compiled for a CPU and run by an emulated device, against the reference in long double.

Tolerances are those of test_kernels.py: the promise of the project for standard problems. Every problem has
NaN at padding; the device's memory and its blocks' shared memory are NaN before they are written, and no
thread may write beside an array.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest

from cuda import emulated
from cuda.emulated import EmulatedDevice
from fusedrnn.backends.cuda import CudaBackend
from fusedrnn.backends.cuda_jobs import kernels_of
from fusedrnn.backends.cuda_plan import Layout, Plan, shared_elements, tile_columns
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import GRU, LSTM
from problems import (
    CELLS,
    OPTIONS,
    SIZES,
    assert_close,
    assert_same_bits,
    error,
    errors,
    expected_names,
    name,
    named,
    problem,
    run,
)

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")

REFERENCE = ReferenceBackend()
FORWARD = {np.float32: 2e-6, np.float64: 1e-14}
GRADIENT = {np.float32: 5e-6, np.float64: 2e-14}
KERNELS = ("steps", "grid", "grid_streamed", "cluster")
ONE_PHASE = tuple(cell for cell in CELLS if cell != GRU(reset_after=False))
EVERYTHING = {"lengths": True, "reset": True, "return_states": True, "detach_every": 2}


def pairs(kernels: Any) -> Any:
    """Cells with the kernels that can run them."""
    return pytest.mark.parametrize(
        ("cell", "kernel"),
        [(c, k) for c in CELLS for k in kernels if k == "steps" or c in ONE_PHASE],
        ids=lambda v: v if isinstance(v, str) else name(v),
    )


class Cut(CudaBackend):
    """The backend with the work cut as a test wants it, instead of by cuda_plan: about so many units and rows
    of a block, no more units than its warps can have, no more blocks than a cluster can."""

    def __init__(
        self, kernel: str, units: int = 3, rows: int = 5, precision: str = "ieee", **options: Any
    ) -> None:
        device = EmulatedDevice(multiprocessors=256, cluster=16, **options)
        super().__init__(device, kernel, precision, _tested=True)
        self.units, self.rows = units, rows

    def _plan(self, device, cell, sizes, dtype, way, backward):
        if way.kernel == "steps" or min(sizes) == 0:
            return Plan("steps")
        _, B, H = sizes
        R = kernels_of(cell).recurrent.count
        K, per_unit = (R * H, 1) if backward else (H, R)
        tile = tile_columns(way.precision)
        if way.kernel == "cluster":
            units, of = max(self.units, -(-H // device.cluster)), Layout.of_cluster
        else:
            units, of = min(self.units, tile * device.warps // per_unit), Layout.of
        layout = of(self.rows, units * per_unit, tile, device.warps)
        shared = dtype.itemsize * shared_elements(way.kernel, layout, K, self.rows, units)
        return Plan(way.kernel, units, self.rows, (-(-H // units), -(-B // self.rows)), shared)


def shapes() -> list[tuple[tuple[int, ...], int, int]]:
    """(T, B, I, H), units and rows: sizes beside multiples of 8 and 32, several tiles of the batch, the last
    block and the last tile not full."""
    rng = np.random.default_rng(1)
    edges_H = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 39, 40)
    edges_B = (1, 2, 3, 7, 8, 9, 15, 16, 17)
    found = []
    for k in range(44):
        T, B, H = 1 + k % 9, edges_B[k * 4 % len(edges_B)], edges_H[k * 7 % len(edges_H)]
        blocks, tiles = 1 + k % 4, 1 + k // 4 % 3
        found.append(((T, B, int(rng.integers(1, 10)), H), -(-H // blocks), -(-B // tiles)))
    return found


SHAPES = shapes()


@functools.cache
def truth(cell, sizes, options):
    """The reference in long double. A problem is drawn in float32, so this is the truth of every dtype."""
    return run(REFERENCE, problem(cell, *sizes, **dict(options)).astype(np.longdouble))


def assert_right(backend, cell, sizes, dtype=np.float64, **options):
    """Within the promised figures. They are for H >= 7; below, 4 times plain NumPy's error will do."""
    p = problem(cell, *sizes, dtype=dtype, **options)
    want = truth(cell, sizes, tuple(options.items()))
    got = run(backend, p)
    assert got.keys() == want.keys() == expected_names(p)
    assert {a.dtype for a in got.values()} == {np.dtype(dtype)}
    for gradient, tolerance in ((False, FORWARD[dtype]), (True, GRADIENT[dtype])):
        named = {key: a for key, a in want.items() if key.startswith("d") == gradient}
        if sizes[3] < 7:
            plain = run(REFERENCE, p)
            tolerance = max(tolerance, 4 * max(error(plain[key], a) for key, a in named.items()))
        assert_close({key: got[key] for key in named}, named, tolerance)
    return got


# --- right -------------------------------------------------------------------------------------------------


@pairs(KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: name(LSTM(), o)[5:] or "plain")
def test_options(cell, kernel, options):
    sizes = SIZES[OPTIONS.index(options) % len(SIZES)]
    assert_right(Cut(kernel), cell, sizes, **options)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_every_option_at_every_shape(cell, part):
    """The kernels take turns."""
    kernels = KERNELS if cell in ONE_PHASE else KERNELS[:1]
    for k in range(part, len(SHAPES), 4):
        sizes, units, rows = SHAPES[k]
        for j, options in enumerate(OPTIONS):
            kernel = kernels[(k // 4 + j) % len(kernels)]
            assert_right(Cut(kernel, units, rows, seed=k), cell, sizes, **options)


@pairs(KERNELS)
def test_float32(cell, kernel):
    for k in (7, 12, 22, 34):
        sizes, units, rows = SHAPES[k]
        for options in ({}, EVERYTHING, {**EVERYTHING, "reverse": True}):
            assert_right(Cut(kernel, units, rows, seed=k), cell, sizes, np.float32, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", [LSTM(), GRU()], ids=name)
def test_eight_warps(cell, kernel):
    """As on a GPU: warps share the rows, the columns and k."""
    for units, rows in ((5, 9), (40, 17), (16, 4)):
        for reverse in (False, True):
            assert_right(
                Cut(kernel, units, rows, warps=8, seed=units),
                cell,
                (4, 17, 3, 40),
                reverse=reverse,
                **EVERYTHING,
            )


@pairs(KERNELS)
@pytest.mark.parametrize(
    "upstream",
    [u for n in range(4) for u in itertools.combinations(("dy", "dstateT", "dstates"), n)],
    ids=str,
)
def test_any_upstream_gradient_may_be_missing(cell, kernel, upstream):
    assert_right(Cut(kernel), cell, (4, 5, 3, 9), upstream=upstream, **EVERYTHING)


@pairs(KERNELS)
def test_no_initial_state(cell, kernel):
    for reverse in (False, True):
        assert_right(Cut(kernel), cell, (5, 7, 2, 9), state0=False, reverse=reverse, **EVERYTHING)


@pairs(KERNELS[:3])  # a cluster does not cut k
def test_k_of_several_chunks(cell, kernel):
    """More elements than are staged at once, and no multiple of a warp."""
    assert_right(Cut(kernel, units=15, rows=3, warps=8), cell, (2, 3, 2, 261), lengths=True)


# --- the same bits -----------------------------------------------------------------------------------------


@pairs(KERNELS)
def test_the_same_bits_in_any_order_of_the_threads(cell, kernel):
    p = problem(cell, 5, 11, 3, 19, **EVERYTHING)
    first = run(Cut(kernel, 7, 6, seed=0), p)
    for seed in (0, *range(1, 8)):
        assert_same_bits(run(Cut(kernel, 7, 6, seed=seed), p), first)


@pairs(KERNELS)
def test_backward_twice(cell, kernel):
    p = problem(cell, 5, 7, 3, 9, **EVERYTHING)
    backend = Cut(kernel)
    f = backend.forward(p.cell, p.x, p.weights, p.state0, **p.options)
    first, second = (
        named(cell, None, backend.backward(f.tape, p.dy, p.dstateT, p.dstates)) for _ in range(2)
    )
    assert_same_bits(first, second)


@pytest.mark.parametrize("cell", ONE_PHASE, ids=name)
def test_resident_and_streamed_weights_give_the_same_bits(cell):
    p = problem(cell, 5, 11, 3, 19, **EVERYTHING)
    assert_same_bits(run(Cut("grid", 7, 6), p), run(Cut("grid_streamed", 7, 6), p))


# --- products by the matrix units --------------------------------------------------------------------------

# How much a factor may be off, relatively; tf32x3 keeps all but the product of two such errors.
UNITS = {"tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11, "tf32x3": 2.0**-20}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", UNITS)
def test_precisions(precision, kernel):
    cell = LSTM()
    for sizes, units, rows in (((5, 11, 3, 19), 7, 6), ((3, 17, 4, 40), 16, 17)):
        p = problem(cell, *sizes, dtype=np.float32, **EVERYTHING)
        backend = Cut(kernel, units, rows, precision=precision)
        got = run(backend, p)
        assert set(backend.device.products) == {precision}
        worst = max(errors(got, truth(cell, sizes, tuple(EVERYTHING.items()))).values())
        assert worst <= 4 * UNITS[precision]
        assert precision == "tf32x3" or worst >= UNITS[precision] / 16  # the factors are rounded


@pytest.mark.parametrize("kernel", KERNELS)
def test_float64_has_no_precisions(kernel):
    p = problem(LSTM(), 3, 2, 3, 7, dtype=np.float64)
    backend = Cut(kernel, precision="bf16")
    assert_same_bits(run(backend, p), run(Cut(kernel), p))
    assert set(backend.device.products) == {"ieee"}
