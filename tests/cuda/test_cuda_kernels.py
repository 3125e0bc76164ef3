"""The CUDA kernels, compiled for a CPU and run by an emulated device, against the reference in long double.

Tolerances are those of accuracy.py: the promise of the project for standard problems. Every problem has
NaN at padding; the device's memory and its blocks' shared memory are NaN before they are written, and no
thread may write beside an array.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import emulated
from emulated import EmulatedDevice
from fusedrnn.backends.cuda import CudaBackend
from fusedrnn.backends.cuda.nvrtc import KERNELS
from fusedrnn.backends.cuda.plans import WARP, Plan, Tile, cut
from fusedrnn.backends.cuda.weights import compute, precision_of
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import Cell, gru, lstm, rnn
from problems import (
    FORWARD,
    GRADIENT,
    NORMED,
    OPTIONS,
    PLAIN,
    SIZES,
    assert_bitwise_equal,
    assert_close,
    assert_standard,
    error,
    errors,
    expected_names,
    name,
    named,
    problem,
    run,
)
from test_regularization import CALLS, KINDS, of

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")

REFERENCE = ReferenceBackend()
ONE_PHASE = tuple(cell for cell in PLAIN if cell != gru.with_options(reset_after=False))
EVERYTHING = {"lengths": True, "reset": True, "return_states": True, "detach_every": 2}


CHOSEN = (*KERNELS, "chosen")


def can_run(kernels: Any) -> list[tuple[Cell, str]]:
    """Cells with the kernels that can run them; "chosen": by the plan, as a user's call."""
    return [(c, k) for c in PLAIN for k in kernels if k in ("steps", "chosen") or c in ONE_PHASE]


def marks_of(cell: Cell) -> Any:
    """Kernels are compiled anew for each cell, for seconds, and relu differs from tanh in the cell alone."""
    return pytest.mark.slow if cell.options.get("relu") else ()


def pairs(kernels: Any, marks: Any = lambda cell: ()) -> Any:
    found = [pytest.param(c, k, marks=marks(c), id=f"{name(c)}-{k}") for c, k in can_run(kernels)]
    return pytest.mark.parametrize(("cell", "kernel"), found)


every_pair = pairs(CHOSEN)


class Tiled(CudaBackend):
    """The backend with the work cut as a test wants it: so many units and rows of a block, or as many fewer
    as fit; of a grid no more rows at once in shared memory."""

    def __init__(
        self,
        kernel: str,
        units: int = 3,
        rows: int = 5,
        precision: str = "ieee",
        at_once: int = 8,
        **options: Any,
    ) -> None:
        device = EmulatedDevice(**{"multiprocessors": 256, "cluster": 16} | options)
        super().__init__(device, None if kernel == "chosen" else kernel, precision, _tested=True)
        self.units, self.rows, self.at_once = units, rows, at_once

    def _plan(self, device, kernels, sizes, dtype, options, backward):
        _, B, H = sizes
        kernel = options.kernel
        if kernel is None:
            return super()._plan(device, kernels, sizes, dtype, options, backward)
        if kernel == "steps" or min(sizes) == 0:
            return Plan("steps")
        rest = (compute(dtype).itemsize, device, precision_of(dtype, options.precision), backward)
        most = max(self.units, -(-H // device.cluster)) if kernel == "cluster" else self.units
        for units in range(most, 0, -1):
            rows = min(self.rows, 2 * WARP * device.warps // units)  # a thread has two units
            plan = cut(kernel, kernels, B, H, *rest, units, rows)
            if plan is not None:
                return plan._replace(at_once=min(plan.at_once, self.at_once))
        raise AssertionError("it does not fit")


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
    if sizes[3] >= 7:
        return assert_standard(backend, p, want)
    got, plain = run(backend, p), run(REFERENCE, p)
    assert got.keys() == want.keys() == expected_names(p)
    assert {a.dtype for a in got.values()} == {np.dtype(dtype)}
    for gradient, tolerance in ((False, FORWARD[dtype]), (True, GRADIENT[dtype])):
        named = {key: a for key, a in want.items() if key.startswith("d") == gradient}
        tolerance = max(tolerance, 4 * max(error(plain[key], a) for key, a in named.items()))
        assert_close({key: got[key] for key in named}, named, tolerance)
    return got


# --- right -------------------------------------------------------------------------------------------------

WITHOUT = (
    *({"state0": False, "reverse": reverse} for reverse in (False, True)),
    *({"upstream": u} for n in range(4) for u in itertools.combinations(("dy", "dstateT", "dstates"), n)),
)
EVERY_OPTION = (*OPTIONS, *({**EVERYTHING, **options} for options in WITHOUT))


@every_pair
@pytest.mark.parametrize("options", EVERY_OPTION, ids=lambda o: name(lstm, o)[5:] or "plain")
def test_options(cell, kernel, options):
    sizes = SIZES[EVERY_OPTION.index(options) % len(SIZES)]
    assert_right(Tiled(kernel), cell, sizes, **options)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("cell", PLAIN, ids=name)
def test_every_option_at_every_shape(cell, part):
    """The kernels take turns."""
    kernels = KERNELS if cell in ONE_PHASE else KERNELS[:1]
    for k in range(part, len(SHAPES), 4):
        sizes, units, rows = SHAPES[k]
        for j, options in enumerate(OPTIONS):
            kernel = kernels[(k // 4 + j) % len(kernels)]
            assert_right(Tiled(kernel, units, rows, seed=k), cell, sizes, **options)


@pairs(CHOSEN, marks_of)
def test_float32(cell, kernel):
    for k in (7, 22) if PLAIN.index(cell) % 2 else (12, 34):  # of each kernel all four
        sizes, units, rows = SHAPES[k]
        for options in ({}, EVERYTHING, {**EVERYTHING, "reverse": True}):
            assert_right(Tiled(kernel, units, rows, seed=k), cell, sizes, np.float32, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", [lstm, gru], ids=name)
def test_eight_warps(cell, kernel):
    """As on a GPU: warps share the rows, the columns and k."""
    for (units, rows), reverse in itertools.product(((5, 9), (40, 17), (16, 4)), (False, True)):
        backend = Tiled(kernel, units, rows, warps=8, seed=units)
        assert_right(backend, cell, (4, 17, 3, 40), reverse=reverse, **EVERYTHING)


@pytest.mark.parametrize("at_once", [8, 16, 24])
def test_rows_of_several_groups(at_once):
    """Three tiles of rows, brought one by one, by two or all."""
    backend = Tiled("grid", units=5, rows=24, warps=8, at_once=at_once)
    assert_right(backend, lstm, (3, 24, 2, 40), **EVERYTHING)


@pytest.mark.parametrize("less", [0, 1, 33])
@pytest.mark.parametrize(
    ("kernel", "cell", "H", "units"),
    [
        ("grid", rnn, 256, 8),
        ("grid", lstm, 64, 4),
        ("cluster", lstm, 64, 4),
    ],
    ids=lambda v: name(v) if isinstance(v, Cell) else str(v),
)
def test_as_much_as_registers_hold(kernel, cell, H, units, less):
    """In float64 a lane keeps 4 times 32 k: here all of them are taken, the last not whole, the last not."""
    backend = Tiled(kernel, units, rows=8)
    warps = 2  # which share k, since there is one tile of columns
    assert Tile.of(8, "ieee", False).kept * WARP * warps == cell.blocks["weight_ih"] * H
    assert_right(backend, cell, (3, 9, 2, H - less), **EVERYTHING)


@every_pair
def test_the_same_bits_in_any_order_of_the_threads(cell, kernel):
    """And again from the same tape."""
    p = problem(cell, 5, 11, 3, 19, **EVERYTHING)
    first = run(Tiled(kernel, 7, 6, seed=0), p)
    for seed in range(4):
        backend = Tiled(kernel, 7, 6, seed=seed)
        f = backend.forward(p.cell, p.x, p.weights, p.state0, **p.options)
        for _ in range(2):
            again = named(cell, f, backend.backward(f.tape, p.dy, p.dstateT, p.dstates))
            assert_bitwise_equal(again, first)


# --- products by the matrix units --------------------------------------------------------------------------

# How much a factor may be off, relatively.
UNITS = {"tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", UNITS)
def test_precisions(precision, kernel):
    cell = lstm
    for sizes, units, rows in (((5, 11, 3, 19), 7, 6), ((3, 17, 4, 40), 16, 17)):
        p = problem(cell, *sizes, dtype=np.float32, **EVERYTHING)
        backend = Tiled(kernel, units, rows, precision=precision)
        got = run(backend, p)
        assert set(backend.device.products) == {precision}
        worst = max(errors(got, truth(cell, sizes, tuple(EVERYTHING.items()))).values())
        assert worst <= 4 * UNITS[precision]
        assert worst >= UNITS[precision] / 16  # the factors are rounded


@pytest.mark.parametrize("less", [0, 1])
def test_as_much_as_registers_hold_for_the_matrix_units(less):
    """Going back by a grid, in tiles of 8 columns."""
    H, sizes = 128, (2, 3, 2, 128 - less)
    assert Tile.of(4, "tf32", True).kept * WARP == 4 * H
    got = run(Tiled("grid", 4, 8, "tf32", warps=1), problem(lstm, *sizes, dtype=np.float32))
    assert max(errors(got, truth(lstm, sizes, ())).values()) <= 4 * UNITS["tf32"]


@pytest.mark.parametrize(("dtype", "own"), [("float64", "ieee"), ("float16", "fp16"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_dtypes_have_no_precisions_but_their_own(kernel, dtype, own):
    p = problem(lstm, 3, 2, 3, 7).astype(dtype)
    for precision in {"tf32", "bf16"} - {own}:
        backend = Tiled(kernel, precision=precision)
        assert_bitwise_equal(run(backend, p), run(Tiled(kernel), p))
        assert set(backend.device.products) == {own}


# --- arrays of 16 bits -------------------------------------------------------------------------------------

HALVES = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half the distance between neighbours, relatively


# Loads and stores convert, by the same code for every cell: each has one of the two, the LSTM both.
@pytest.mark.parametrize(
    ("cell", "kernel", "half"),
    [
        pytest.param(c, k, half, marks=marks_of(c) if c == lstm or (c == gru) == j else pytest.mark.slow)
        for c, k in can_run(CHOSEN)
        for j, half in enumerate(HALVES)
    ],
    ids=lambda v: v if isinstance(v, str) else name(v),
)
def test_halves(cell, kernel, half):
    """Beside the reference on the same numbers: off by the roundings of what is stored, and no more."""
    for sizes, units, rows in (((5, 11, 3, 19), 7, 6), ((3, 17, 4, 40), 16, 17), ((4, 3, 9, 72), 24, 3)):
        if cell == rnn.with_options(relu=True) and sizes[3] == 72:
            continue  # rounding puts a sum on the other side of 0, where the gradient is another
        for options in ({}, EVERYTHING, {**EVERYTHING, "reverse": True}):
            p = problem(cell, *sizes, **options).astype(half)
            got, want = run(Tiled(kernel, units, rows), p), run(REFERENCE, p.astype(np.longdouble))
            assert {a.dtype.name for a in got.values()} == {half}
            assert_close(got, want, 3 * HALVES[half])


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_halves_leave_c_and_its_gradient_in_float32(kernel, half):
    """1 and many parts, each so small that in 16 bits it would be lost."""
    T, B, H, part = 400, 2, 3, 2.0**-13
    bias = np.repeat([30, 30, part, 30], H)  # i = f = o = 1; every step adds about g = 2^-13 to c
    p = problem(lstm, T, B, 1, H, return_states=True)
    zeros = {n: np.zeros_like(w) for n, w in p.weights.items()}
    p = replace(
        p,
        weights=zeros | {"bias_ih": bias},
        state0=(np.zeros((B, H)), np.ones((B, H))),
        dy=None,
        dstateT=(None, np.ones((B, H))),
        dstates=(None, np.full((T, B, H), part)),
    )
    got = run(Tiled(kernel), p.astype(half))
    for found in ("cT", "dc0"):
        np.testing.assert_allclose(got[found].astype(float), 1 + T * part, rtol=2 * HALVES[half])


# --- recurrent dropout, zoneout, layer norm ----------------------------------------------------------------

STEPPED = (*PLAIN, *NORMED[:4])  # not GRU with reset before and layer norm


@pytest.mark.parametrize("call", CALLS, ids=["plain", "all", "reverse"])
@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        pytest.param(c, k, marks=marks_of(c))
        for c in STEPPED
        for k in (None, *KINDS)
        if (of(k, c) if k else c.vectors)
    ],
    ids=lambda v: v if isinstance(v, str) else name(v) if v else "none",
)
def test_regularization_and_layer_norm(cell, kind, call):
    r = None if kind is None else of(kind, cell)
    for sizes in ((5, 11, 3, 19), (3, 4, 2, 70)):
        assert_right(Tiled("steps"), cell, sizes, regularization=r, **call)


@pytest.mark.parametrize("warps", [1, 8])
def test_layer_norm_in_blocks_of_other_sizes(warps):
    assert_right(
        Tiled("steps", warps=warps), lstm.with_options(layer_norm=True), (3, 4, 2, 300), **EVERYTHING
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "cell", [lstm, gru, rnn.with_options(layer_norm=True), lstm.with_options(layer_norm=True)], ids=name
)
def test_regularization_and_layer_norm_in_other_dtypes(cell, dtype):
    p = problem(cell, 5, 11, 3, 19, regularization=of("all", cell), **EVERYTHING).astype(dtype)
    tolerance = (4 if dtype == np.float32 else 1.5) * float(ml_dtypes.finfo(dtype).eps)
    got, want = run(Tiled("steps"), p), run(REFERENCE, p.astype(np.longdouble))
    assert {a.dtype for a in got.values()} == {np.dtype(dtype)}
    assert_close(got, want, tolerance)


@pytest.mark.parametrize("cell", [pytest.param(c, marks=marks_of(c)) for c in STEPPED], ids=name)
def test_regularization_and_layer_norm_give_the_same_bits_in_any_order(cell):
    p = problem(cell, 5, 11, 3, 19, regularization=of("all", cell), **EVERYTHING)
    first = run(Tiled("steps", seed=0), p)
    for seed in range(1, 5):
        assert_bitwise_equal(run(Tiled("steps", seed=seed), p), first)
    assert_bitwise_equal(run(Tiled("steps"), p, save="boundary_states"), first)
