"""The C++ kernels against the reference in long double, within the figures of tests/support/accuracy.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from accuracy import (
    CPU,
    DTYPES,
    EVERYTHING,
    REFERENCE,
    assert_hard,
    assert_no_worse_than_numpy,
    assert_standard,
    cell_name,
    split,
    truth,
)
from array_calls import Arrays
from fusedrnn.backends.protocol import Regularization
from fusedrnn.cells import gru, lstm, rnn
from problems import (
    CELLS,
    GRADIENT,
    OPTIONS,
    SIZES,
    assert_bitwise_equal,
    assert_close,
    named,
    problem,
    run,
)

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poison")]


# --- standard problems -------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)) or "plain")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_options(cell, size, options):
    p = problem(cell, *size, **options)
    want = truth(p)
    for dtype in DTYPES:
        assert_standard(p, want, dtype)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("size", [(7, 11, 5, 19), (5, 5, 37, 35)], ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_everything_at_once(cell, size, reverse):
    for biases in ("both", "native"):
        p = problem(cell, *size, **EVERYTHING, reverse=reverse, biases=biases)
        want = truth(p)
        for dtype in DTYPES:
            assert_standard(p, want, dtype)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_truncated_gradients(cell, reverse):
    for every in (1, 4, 9, 10):
        p = problem(cell, 9, 5, 3, 19, **EVERYTHING, detach_every=every, reverse=reverse)
        want = truth(p)
        for dtype in DTYPES:
            assert_standard(p, want, dtype)


@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_truncated_gradients_are_those_of_chunks(cell):
    """The state carried from chunk to chunk, the gradient not."""
    p = problem(cell, 11, 5, 3, 19)
    got = run(CPU, replace(p, detach_every=4))
    state, parts = p.state0, []
    for t in range(0, 11, 4):
        last = p.dstateT if t == 8 else None
        part = replace(p, x=p.x[t : t + 4], dy=p.dy[t : t + 4], state0=state, dstateT=last)
        parts.append(run(CPU, part))
        state = tuple(parts[-1][f"{s}T"] for s in cell.states)
    assert_bitwise_equal({"y": got["y"]}, {"y": np.concatenate([part["y"] for part in parts])})
    assert_bitwise_equal({"dx": got["dx"]}, {"dx": np.concatenate([part["dx"] for part in parts])})
    for s in cell.states:
        assert_bitwise_equal({"": got[f"d{s}0"]}, {"": parts[0][f"d{s}0"]})
    for key in ("dweight_ih", "dweight_hh", "dbias_ih"):
        np.testing.assert_allclose(got[key], sum(part[key] for part in parts), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("H", range(7, 34))
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_every_hidden_size(cell, H):
    p = problem(cell, 4, 5, H % 8 + 1, H, **EVERYTHING, reverse=H % 2 == 0)
    want = truth(p)
    for dtype in DTYPES:
        assert_standard(p, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("H", range(1, 7))
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_hidden_sizes_below_the_standard(cell, H, dtype):
    def draw(seed):
        return problem(cell, 4, 5, H % 3 + 1, H, seed, **EVERYTHING, reverse=H % 2 == 0)

    assert_hard(draw(0), dtype)
    assert_no_worse_than_numpy(draw, dtype)


@pytest.mark.parametrize("I", [1, 2, 3, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 97, 127, 128, 129, 130])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_input_sizes(cell, I):
    p = problem(cell, 3, 7, I, 11, lengths=True)
    want = truth(p)
    for dtype in DTYPES:
        assert_standard(p, want, dtype)


@pytest.mark.parametrize("B", [2, 6, 7, 8, 12, 13, 14, 15, 25, 28, 29, 43, 64])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_batch_sizes(cell, B):
    p = problem(cell, 3, B, 2, 9, **EVERYTHING, reverse=B % 2 == 0)
    want = truth(p)
    for dtype in DTYPES:
        assert_standard(p, want, dtype)


# T*B rows of da do not fit one chunk; the last one has less than half a megabyte for one step.
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((256, 27, 3, 17), {}),
        ((256, 27, 3, 17), EVERYTHING),
        ((101, 130, 2, 7), EVERYTHING | {"reverse": True}),
        ((6, 1900, 3, 9), {}),
        ((6, 1900, 3, 9), EVERYTHING | {"reverse": True}),
    ],
    ids=["plain", "all", "reverse", "rows-plain", "rows-reverse"],
)
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_several_chunks(cell, size, options):
    p = problem(cell, *size, **options)
    want = truth(p)
    for dtype in DTYPES:
        assert_standard(p, want, dtype)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_two_chunks(cell):
    """The smallest problem of more than one chunk in either dtype."""
    p = problem(cell, 52, 64, 2, 7, **EVERYTHING)
    want = truth(p)
    for dtype in DTYPES:
        assert_standard(p, want, dtype)


# More panels than one, weights beyond one megabyte (the other loop order, threads split by units), wide
# inputs.
@pytest.mark.parametrize(
    "size", [(3, 9, 67, 97), (5, 5, 30, 193), (3, 17, 130, 305), (2, 41, 515, 129)], ids=str
)
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_large_layers(cell, size, threads):
    p = problem(cell, *size, **EVERYTHING)
    want = truth(p)
    for count in (1, 2, 3):
        threads(count)
        for dtype in DTYPES:
            assert_standard(p, want, dtype)


@pytest.mark.quick
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
@pytest.mark.parametrize("size", [(0, 3, 2, 7), (4, 0, 2, 7), (0, 0, 1, 17), (1, 1, 1, 7)], ids=str)
def test_empty_and_single(cell, size):
    for options in ({"return_states": True}, EVERYTHING) if size[0] else ({"return_states": True},):
        p = problem(cell, *size, **options)
        want = truth(p)
        for dtype in DTYPES:
            assert_standard(p, want, dtype)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
@pytest.mark.parametrize("biases", ["none", "bias_ih", "bias_hh", "both"])
def test_biases(cell, biases):
    p = problem(cell, 5, 3, 4, 21, biases=biases)
    want = truth(p)
    for dtype in DTYPES:
        assert_standard(p, want, dtype)


# --- what comes in, what is asked for ----------------------------------------------------------------------


def upstream_subsets(cell):
    places = ["dy", *(f"dstateT {s}" for s in cell.states), *(f"dstates {s}" for s in cell.states)]
    return [set(s) for n in range(1, len(places)) for s in itertools.combinations(places, n)]


def only(p, subset):
    """The problem with these upstream gradients alone."""

    def kept(kind, given):
        return tuple(
            d if f"{kind} {s}" in subset else None for s, d in zip(p.cell.states, given, strict=True)
        )

    return replace(
        p,
        dy=p.dy if "dy" in subset else None,
        dstateT=kept("dstateT", p.dstateT),
        dstates=kept("dstates", p.dstates),
    )


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(EVERYTHING, np.float32), ({"reverse": True, "return_states": True}, np.float64)],
    ids=["ragged", "reverse"],
)
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_every_subset_of_upstream_gradients(cell, options, dtype):
    p = problem(cell, 4, 5, 3, 18, **options)
    for subset in upstream_subsets(cell):
        assert_hard(only(p, subset), dtype)


@pytest.mark.mutation
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_single_upstream_gradients(cell):
    p = problem(cell, 4, 5, 3, 18, **EVERYTHING)
    for subset in upstream_subsets(cell):
        if len(subset) == 1:
            assert_hard(only(p, subset), np.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_only_what_is_needed_comes_back(cell, dtype):
    p = problem(cell, 6, 5, 4, 18, dtype=dtype, **EVERYTHING, biases="both")
    whole = run(CPU, p)
    gradient_of = {key: [f"d{key}"] for key in ("x", *p.weights)}
    gradient_of["state0"] = [f"d{s}0" for s in cell.states]
    for n in range(len(gradient_of) + 1):
        for need in itertools.combinations(gradient_of, n):
            got = split(run(CPU, p, need=need))[1]
            assert_bitwise_equal(got, {key: whole[key] for name in need for key in gradient_of[name]})


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_strided_inputs_and_upstream_gradients(cell, dtype):
    p = problem(cell, 6, 5, 4, 18, dtype=dtype, **EVERYTHING)
    want = run(CPU, p)

    def batch_first(a):
        return np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1)

    def sliced(a):
        wide = np.full((2 * len(a) + 1, a.shape[1] + 2, a.shape[2] + 3), np.nan, a.dtype)
        view = wide[1::2, 1:-1, 2:-1]
        view[...] = a
        return view

    def backwards(a):
        return a[::-1, ::-1].copy()[::-1, ::-1]

    def columns(a):  # the last axis is strided too: a copy has to be made
        return np.repeat(a, 2, axis=2)[:, :, ::2]

    for change in (batch_first, sliced, backwards, columns):
        q = replace(p, x=change(p.x), dy=change(p.dy), dstates=tuple(map(change, p.dstates)))
        assert not q.x.flags.c_contiguous
        assert_bitwise_equal(run(CPU, q), want)


@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_broadcast_input(cell):
    p = problem(cell, 6, 5, 4, 18)
    for index in (np.s_[:1, :1], np.s_[:1], np.s_[:, :1]):
        q = replace(p, x=np.broadcast_to(p.x[index], p.x.shape))
        assert 0 in q.x.strides
        assert_bitwise_equal(run(CPU, q), run(CPU, replace(q, x=q.x.copy())))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_without_a_tape_the_results_are_the_same(cell, dtype):
    p = problem(cell, 6, 5, 4, 18, dtype=dtype, **EVERYTHING)
    with_tape = CPU.forward(cell, p.x, p.weights, p.state0, **p.options)
    without = CPU.forward(cell, p.x, p.weights, p.state0, **p.options, save=None)
    assert without.tape is None
    for a, b in zip((with_tape.y, *with_tape.stateT, *with_tape.states),
                    (without.y, *without.stateT, *without.states), strict=True):  # fmt: skip
        assert_bitwise_equal({"": a}, {"": b})


# --- NaN and infinity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["all", "recompute"])
@pytest.mark.parametrize("options", [{}, EVERYTHING, EVERYTHING | {"reverse": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_calls_into_arrays_give_the_same_bits(cell, dtype, options, recompute):
    """Of weights as they are and packed; and from a tape that lies anywhere, with more rows than it needs."""
    p = problem(cell, 9, 5, 3, 19, dtype=dtype, **options)
    call = Arrays(p, recompute)
    want = run(CPU, p)
    out = call.forward()
    packed = call.forward(CPU.pack(cell, p.weights).core)
    assert np.array_equal(packed["tape"], out["tape"], equal_nan=True)
    forward = call.named(out)
    assert_bitwise_equal(call.named(packed), forward)
    tape = out["tape"]
    moved = np.empty(tape.size + 1, dtype)[1:].reshape(tape.shape)
    moved[:] = tape
    larger = np.concatenate([tape, np.full_like(tape, np.nan)])
    for kept in (tape, moved, larger):
        got = call.backward(out["y"], kept)
        for key, value in got.items():
            assert np.array_equal(value, want[key]), key
    assert_bitwise_equal(forward, {key: want[key] for key in forward})


@pytest.mark.parametrize("reverse", [False, True])
def test_boundary_states_are_the_same_for_the_same_inputs(reverse):
    """Also of rows that have not begun, or are over, where a chunk begins."""
    p = replace(problem(lstm, 1000, 4, 3, 16, reverse=reverse), lengths=np.array([1000, 0, 5, 900]))
    tape = Arrays(p, True).forward()["tape"]
    assert tape.size
    assert not np.isnan(tape).any()


def test_results_are_not_written_to_read_only_arrays():
    call = Arrays(problem(lstm, 4, 3, 2, 5), False)
    for key, which in (("y", None), ("tape", None), ("stateT", 1)):
        out = call.empty()
        (out[key] if which is None else out[key][which]).setflags(write=False)
        with pytest.raises(ValueError, match=f"{key}: expected an array that can be written to"):
            call.forward(out=out)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("units", [5, 19, 40])
@pytest.mark.parametrize("batch", [1, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_one_step_of_weights_as_they_lie_gives_the_same_bits(cell, dtype, batch, units):
    """As of packed ones: (B, I) is one step, whose y is the final h."""
    dropped = Regularization(0.5, 0.3, 0.3 * ("c" in cell.states), seed=7)
    for regularization in (None, dropped):
        p = problem(cell, 1, batch, 23, units, dtype=dtype, regularization=regularization)
        want = run(CPU, p)
        step = Arrays(replace(p, x=p.x[0], dy=None, dstates=None), False)
        for weights in (None, CPU.pack(cell, p.weights).core):
            out = step.forward(weights)
            assert out["y"] is None
            assert np.array_equal(out["stateT"][0], want["hT"])
        first = CPU.forward(cell, p.x, p.weights, p.state0, regularization=regularization)
        expected = named(cell, first, CPU.backward(first.tape, None, p.dstateT))
        for key, value in step.backward(out["stateT"][0], out["tape"]).items():
            assert np.array_equal(value, expected[key].reshape(value.shape)), key


@pytest.mark.quick
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_one_step_keeps_the_state_of_rows_that_are_empty(cell):
    """hT lies where y would, and y is 0 there."""
    p = replace(problem(cell, 1, 4, 3, 7, dtype=np.float32), lengths=np.array([1, 0, 1, 0]))
    out = Arrays(replace(p, x=p.x[0], dy=None, dstates=None), False).forward()
    assert np.array_equal(out["stateT"][0], run(CPU, p)["hT"])


@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_arrays_that_do_not_fit_are_refused(cell):
    p = problem(cell, 4, 3, 2, 5)
    call = Arrays(p, False)
    out = call.forward()
    tape, y, w = out["tape"], out["y"], p.weights
    refused = (TypeError, ValueError)
    other = np.float64 if p.x.dtype == np.float32 else np.float32
    for bad in (tape[1:], tape[:, :-1] if tape.size else tape[:, None], tape[None], tape.astype(other), None):
        with pytest.raises(refused, match="tape"):
            call.backward(y, bad)
    for bad_y, x, weights in (
        (y[1:], p.x, w),
        (y, p.x[:, :, 1:], w),
        (y, p.x, w | {"weight_hh": w["weight_hh"][1:]}),
        (y, p.x, w | {"weight_ih": w["weight_ih"][:, 1:]}),
        (y, p.x, w | {"weight_ih": w["weight_ih"][:0]}),
    ):
        with pytest.raises(refused):
            Arrays(replace(p, x=x, weights=weights), False).backward(bad_y, tape)
    with pytest.raises(refused, match="lengths"):
        Arrays(replace(p, lengths=np.array([5, 1, 1])), False).backward(y, tape)
    small = np.empty((2, 2), p.x.dtype)
    for key, value in out.items():
        if value is not None and len(value):
            bad = [small] * len(value) if isinstance(value, list) else small
            with pytest.raises(refused, match=key):
                call.forward(out=out | {key: bad})
    for key in ("y", "stateT"):
        with pytest.raises(TypeError, match="None"):
            call.forward(out=out | {key: [None] * len(out[key]) if key == "stateT" else None})
    with pytest.raises(TypeError, match="weights"):
        call.forward(list(call.weights))
    with pytest.raises(TypeError, match="weights"):
        call.backward(y, tape, CPU.pack(cell, w).core)
    for inputs in ((p.x, p.state0[:1] * 3, ()), (p.x, (None,) * len(p.state0), ()), (p.x, p.state0, (p.x,))):
        call.inputs = inputs
        with pytest.raises(refused, match=r"state0|scalars"):
            call.forward()


@pytest.mark.parametrize("cell", [lstm, gru, gru.with_options(reset_after=False)], ids=cell_name)
def test_a_tape_holds_no_padding(cell):
    p = problem(cell, 40, 10, 3, 32, lengths=True)
    full = CPU.forward(cell, p.x, p.weights, p.state0).tape.bytes
    ragged = CPU.forward(cell, p.x, p.weights, p.state0, lengths=p.lengths).tape.bytes
    valid = p.lengths.sum() / (40 * 10)
    assert 0 < valid < 0.7
    assert ragged == pytest.approx(valid * full, abs=512)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_nan_is_never_swallowed_and_stays_in_its_row(cell, dtype):
    T, B, bad = 7, 9, 4
    p = problem(cell, T, B, 5, 18, dtype=dtype, return_states=True)
    x = p.x.copy()
    x[3, bad, 2] = np.nan
    q = replace(p, x=x)
    clean, got, plain = run(CPU, p), run(CPU, q), run(REFERENCE, q)
    rows = np.arange(B) != bad
    for key in got:
        assert np.array_equal(np.isnan(got[key]), np.isnan(plain[key])), key
        if not key.startswith(("dweight", "dbias")):
            axis = got[key].ndim - 2
            assert_bitwise_equal({key: got[key].compress(rows, axis)}, {key: clean[key].compress(rows, axis)})
    assert np.isnan(got["y"][3:, bad]).all()
    assert not np.isnan(got["y"][:3, bad]).any()
    assert np.isnan(got["dweight_hh"]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_the_gradient_through_relu_at_nan_is_that_of_numpy(dtype):
    p = problem(rnn.with_options(relu=True), 4, 3, 5, 18, dtype=dtype)
    p.x[2, 1, 0] = np.nan
    got, want = (run(backend, p)["dx"] for backend in (CPU, REFERENCE))
    assert_close({"dx": got}, {"dx": want}, GRADIENT[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_nan_upstream_reaches_every_gradient(cell, dtype):
    p = problem(cell, 5, 3, 5, 18, dtype=dtype)
    p.dy[2, 1] = np.nan
    got = split(run(CPU, p))[1]
    for key, a in got.items():
        assert np.isnan(a).any(), key
    assert np.isfinite(got["dx"][:, [0, 2]]).all()
    assert np.isfinite(got["dx"][3:]).all()


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", [rnn, lstm, gru, gru.with_options(reset_after=False)], ids=cell_name)
def test_saturation_stays_finite(cell, dtype):
    p = problem(cell, 5, 3, 5, 18, dtype=dtype)
    for scale in (1e4, 1e30):
        got = run(CPU, replace(p, x=p.x * dtype(scale)))
        assert all(np.isfinite(a).all() for key, a in got.items() if key != "dweight_ih")
        assert np.abs(got["y"]).max() <= 1 + (np.abs(p.state0[0]).max() if cell.name == "gru" else 0)
