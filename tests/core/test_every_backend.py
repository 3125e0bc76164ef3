"""What every backend keeps to (backends/protocol.py) beside right values: the Numba backend, and the CUDA
backend on the emulated device. The CPU backend's own tests (test_kernels.py) go further.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import emulated
from fusedrnn.backends import get
from fusedrnn.backends.cuda import CudaBackend
from fusedrnn.cells import lstm, rnn
from problems import PLAIN, assert_bitwise_equal, assert_standard, name, named, problem, run

REFERENCE = get("reference")
EVERYTHING = {"lengths": True, "reset": True, "return_states": True}


def param(cell, dtype=np.float64, *more, **options):
    """Numba compiles a cell in a dtype for seconds: in float64 all but relu, the same layer as tanh, which
    test_own_cells.py has too; in float32 the smallest.
    """
    runs = cell == rnn or (dtype is np.float64 and not cell.options.get("relu"))
    return pytest.param(cell, *more, **options, marks=() if runs else pytest.mark.slow)


cells = pytest.mark.parametrize("cell", [param(cell) for cell in PLAIN], ids=name)
cells_and_dtypes = pytest.mark.parametrize(
    ("cell", "dtype"),
    [
        param(cell, dtype, dtype, id=f"{name(cell)}-{dtype.__name__}")
        for cell in PLAIN
        for dtype in (np.float32, np.float64)
    ],
)


@pytest.fixture(scope="module", params=["numba", "cuda"])
def backend(request):
    if request.param == "numba":
        found = get("numba")
        if found.unavailable() is not None:
            pytest.skip(found.unavailable())
        return found
    if emulated.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    return CudaBackend(emulated.EmulatedDevice(16), _tested=True)


def forward(backend, p, **options):
    return backend.forward(p.cell, p.x, p.weights, p.state0, **p.options, **options)


def arrays_of(p):
    given = (p.x, p.lengths, p.reset, p.dy, *p.weights.values(), *p.state0, *p.dstateT, *p.dstates)
    return [a for a in given if a is not None]


# --- what may be left out ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "B"), [(0, 3), (4, 0), (0, 0)])
@cells
def test_nothing_to_do(backend, cell, T, B):
    for options in ({}, {"reverse": True}):
        p = problem(cell, T, B, 3, 7, **options)
        assert_bitwise_equal(run(backend, p), run(REFERENCE, p))
        p = problem(cell, T, B, 3, 7, **options, lengths=True, return_states=True)
        p = replace(p, reset=np.zeros((T, B), bool))
        assert_bitwise_equal(run(backend, p), run(REFERENCE, p))


@cells
def test_no_row_has_a_step(backend, cell):
    p = replace(problem(cell, 4, 3, 2, 7, **EVERYTHING), lengths=np.zeros(3, np.int32))
    assert_bitwise_equal(run(backend, p), run(REFERENCE, p))


@cells
def test_each_gradient_alone(backend, cell):
    p = problem(cell, 5, 3, 4, 9, **EVERYTHING, biases="both")
    every, tape = run(backend, p), forward(backend, p).tape
    single = [(n,) for n in ("x", *cell.blocks, "state0")]
    for need in [(), *single, ("x", "bias_hh"), ("x", "weight_hh"), ("weight_hh", "state0")]:
        got = named(cell, None, backend.backward(tape, p.dy, p.dstateT, p.dstates, need=need))
        states = [f"d{s}0" for s in cell.states]
        wanted = {key for n in need for key in (states if n == "state0" else [f"d{n}"])}
        assert_bitwise_equal(got, {key: every[key] for key in wanted})


@pytest.mark.parametrize(
    "upstream", [(), ("dy",), ("dstateT",), ("dstates",), ("dstateT", "dstates")], ids=str
)
@cells
def test_upstream_gradients_may_be_missing(backend, cell, upstream):
    assert_standard(backend, problem(cell, 5, 3, 4, 9, return_states=True, upstream=upstream))


@pytest.mark.parametrize("options", [{"return_states": True}, EVERYTHING], ids=len)
@pytest.mark.parametrize("there", [(True, False), (False, True)], ids=["h", "c"])
def test_one_state_has_an_upstream_gradient(backend, there, options):
    p = problem(lstm, 5, 3, 4, 9, **options)
    only = {
        n: tuple(d if has else None for d, has in zip(getattr(p, n), there, strict=True))
        for n in ("dstateT", "dstates")
    }
    assert_standard(backend, replace(p, **only))


@cells
def test_nothing_saved(backend, cell):
    for options in ({}, {"reverse": True}, {**EVERYTHING, "reverse": True}):
        for B in (1, 3, 37):  # below 32 rows, Numba makes the input products of several steps at once
            p = problem(cell, 7, B, 3, 9, **options)
            saved, bare = forward(backend, p), forward(backend, p, save=None)
            assert bare.tape is None
            assert saved.tape.bytes > 0 or (backend.name == "cuda" and cell.name == "rnn")  # y is all
            assert_bitwise_equal(named(cell, bare, None), named(cell, saved, None))


# --- arguments ---------------------------------------------------------------------------------------------


@cells_and_dtypes
def test_any_strides(backend, cell, dtype):
    p = problem(cell, 6, 5, 3, 9, dtype=dtype, **EVERYTHING)
    want = run(backend, p)
    wide = np.full((5, 13, 4), np.nan, dtype)
    wide[:, ::-2][:, :6, :3] = p.x.transpose(1, 0, 2)
    views = [
        np.ascontiguousarray(p.x.transpose(1, 0, 2)).transpose(1, 0, 2),
        wide[:, ::-2][:, :6, :3].transpose(1, 0, 2),
        np.asfortranarray(p.x),
        p.x[::-1].copy()[::-1],
    ]
    for x in views:
        assert not x.flags.c_contiguous
        assert_bitwise_equal(run(backend, replace(p, x=x, dy=np.asfortranarray(p.dy))), want)
    same = np.broadcast_to(np.nan_to_num(p.x[:1, :1]), (6, 5, 3))
    repeated = replace(p, x=same, lengths=None, dy=np.nan_to_num(p.dy), dstates=None)
    assert_bitwise_equal(run(backend, repeated), run(backend, replace(repeated, x=same.copy())))


@cells
def test_inputs_are_not_written_to(backend, cell):
    p = problem(cell, 5, 3, 4, 9, **EVERYTHING)
    before = [a.copy() for a in arrays_of(p)]
    want = run(backend, p)
    for a in arrays_of(p):
        a.flags.writeable = False
    assert_bitwise_equal(run(backend, p), want)
    for a, b in zip(arrays_of(p), before, strict=True):
        np.testing.assert_array_equal(a, b)


@cells
def test_packed_weights(backend, cell):
    p = problem(cell, 5, 3, 4, 9, **EVERYTHING, biases="both")
    packed = backend.pack(cell, p.weights)
    assert_bitwise_equal(run(backend, replace(p, weights=packed)), run(backend, p))
    with pytest.raises(ValueError, match=r"^weights: packed for"):
        backend.forward(rnn if cell != rnn else rnn.with_options(relu=True), p.x, packed)


def test_wrong_arguments_are_named(backend):
    p = problem(lstm, 4, 3, 2, 7)
    tape = forward(backend, p).tape
    with pytest.raises(TypeError, match="x: expected dtype float64"):
        backend.forward(p.cell, p.x.astype(np.float32), p.weights)
    with pytest.raises(ValueError, match=r"^x: expected shape \(T, B, 2\)"):
        backend.forward(p.cell, p.x[:, :, 1:], p.weights)
    for dtype in ("g", "i8", ">f4", ">f2"):
        with pytest.raises(TypeError, match=r"^weight_ih: expected"):
            run(backend, p.astype(dtype))
    with pytest.raises(ValueError, match=r"dy: expected shape \(4, 3, 7\)"):
        backend.backward(tape, p.dy[1:])
    with pytest.raises(ValueError, match=r"^dstates: expected None"):
        backend.backward(tape, None, None, (p.dy, None))
    for wrong in (None, forward(REFERENCE, p).tape):
        with pytest.raises(TypeError, match=f"tape: expected what forward of the {backend.name} backend"):
            backend.backward(wrong, p.dy)


# --- promises ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@cells_and_dtypes
def test_nan_stays_in_its_row(backend, cell, dtype, bad):
    p = problem(cell, 5, 7, 4, 19, dtype=dtype)
    clean = run(backend, p)
    x = p.x.copy()
    x[1, 2] = bad
    with np.errstate(all="ignore"):
        got = run(backend, replace(p, x=x))
    others = [b for b in range(7) if b != 2]
    for key in ("y", "dx", *(f"{s}T" for s in cell.states), *(f"d{s}0" for s in cell.states)):
        axis = clean[key].ndim - 2
        assert_bitwise_equal({key: got[key].take(others, axis)}, {key: clean[key].take(others, axis)})
    if np.isnan(bad):
        assert np.isnan(got["y"][1:, 2]).all()
        assert np.isnan(got["hT"][2]).all()
        assert np.isnan(got["dweight_ih"]).any()
