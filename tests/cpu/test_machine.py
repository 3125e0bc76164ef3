"""Cells that are programs: against the reference, and against compiled cells bit by bit."""

from __future__ import annotations

import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accuracy
import published
import test_layer_norm
import test_selections
from array_calls import Arrays
from problems import (
    CELLS,
    NORMED,
    OPTIONS,
    PLAIN,
    SIZES,
    assert_bitwise_equal,
    assert_close,
    assert_standard,
    errors,
    name,
    problem,
    run,
)
from test_bitwise import EVERYTHING, THREADED, rows, take_rows
from test_random_cells import made as cell_from
from test_random_cells import sources

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn.backends import cpu, get
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.backends.protocol import Regularization
from fusedrnn.cells import (
    cell,
    log,
    maximum,
    minimum,
    program,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
    zoo,
)

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poison")]

CPU, REFERENCE = CpuBackend(), get("reference")
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


PROGRAMS = published.CELLS
COMPILED = [*CELLS, *NORMED[:4]]
NORMS = [c for c in PROGRAMS if c not in COMPILED and any(n.op == "normalise" for n in c.forward_nodes)]
OWN = [c for c in PROGRAMS if c not in COMPILED]
ZOO = [c for c in zoo.ALL if c not in PROGRAMS]


class Machine:
    """The cpu backend with every cell as a program, built-in ones too."""

    def forward(self, *args, **options):
        with mock.patch.object(cpu, "compiled", return_value=None):
            return CPU.forward(*args, **options)

    def backward(self, *args, **kwargs):
        return CPU.backward(*args, **kwargs)


MACHINE = Machine()


def regularized(cell, dropout, zoneout_h, zoneout_c, seed=None):
    """These rates, 0 of what the cell does not have."""
    rates = (
        rate if there else 0.0
        for rate, there in (
            (dropout, "weight_hh" in cell.blocks),
            (zoneout_h, "h" in cell.states),
            (zoneout_c, "c" in cell.states),
        )
    )
    return Regularization(*rates, seed, stream=3)


# --- right --------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("cell", OWN, ids=name)
def test_published_cells_are_those_of_the_reference(cell, threads):
    """Built-in ones have the bits of their kernels (below), and test_kernels.py has these problems."""
    for size in test_layer_norm.SIZES if cell in NORMS else SIZES:
        for k, options in enumerate(OPTIONS):
            p = problem(cell, *size, **options)
            want = run(REFERENCE, p.astype(np.longdouble))
            threads(1 + k % 2)
            for dtype in (np.float32, np.float64):
                assert_standard(MACHINE, p.astype(dtype), want)


@pytest.mark.quick
@pytest.mark.parametrize("cell", ZOO, ids=name)
def test_the_rest_of_the_zoo_is_that_of_the_reference(cell):
    p = problem(cell, 5, 3, 4, 17, dtype=np.float32, lengths=True, reset=True, biases="both")
    assert_standard(MACHINE, p, run(REFERENCE, p.astype(np.longdouble)))


@DTYPES
@pytest.mark.parametrize("cell", NORMS, ids=name)
def test_badly_conditioned_norms(cell, dtype):
    """As in test_layer_norm.py: of few units, of one input, with gains about 1."""
    for *size, gain in [(4, 5, 2, 1, 0.1), (4, 5, 1, 5, 0.1), (9, 1, 4, 18, 1.0)]:

        def draw(seed, size=size, gain=gain):
            return problem(cell, *size, seed, **EVERYTHING, gain=gain)

        accuracy.assert_hard(draw(0), dtype)
        accuracy.assert_no_worse_than_numpy(draw, dtype)


def assert_right(got, p):
    """Within 1e-12 of the reference; where that is badly conditioned, four times its own error at most."""
    plain = run(REFERENCE, p)
    if any(not e <= 1e-12 for e in errors(got, plain).values()):  # such as 1 - y * y where y is almost 1
        want = run(REFERENCE, p.astype(np.longdouble))
        own, of_numpy = errors(got, want), errors(plain, want)
        assert not {key: e for key, e in own.items() if not e <= min(max(1e-12, 4 * of_numpy[key]), 1e-6)}


def check_random(source, number):
    drawn = cell_from(source)
    options = OPTIONS[number % len(OPTIONS)]
    masks = [None, regularized(drawn, 0.3, 0.3, 0.4, seed=number), regularized(drawn, 0, 0.3, 0)]
    regularization = masks[number % len(masks)]
    p = problem(drawn, *SIZES[number % len(SIZES)], regularization=regularization, **options)
    assert_right(run(MACHINE, p, save=("all", "boundary_states")[number // 3 % 2]), p)


@pytest.mark.quick
@settings(max_examples=40)
@given(sources(), st.integers(0, 1000))
def test_random_cells(source, number):
    check_random(source, number)


@pytest.mark.slow
@settings(max_examples=1000)
@given(sources(), st.integers(0, 1000))
def test_many_random_cells(source, number):
    check_random(source, number)


FUNCTIONS = {
    "relu": lambda a, b, c, d: relu(a),
    "absolute": lambda a, b, c, d: abs(a),
    "maximum": lambda a, b, c, d: maximum(a, b),
    "minimum": lambda a, b, c, d: minimum(a, b),
    "of a number": lambda a, b, c, d: maximum(0.5, a) + minimum(b, 0.5),
    "greater": lambda a, b, c, d: where(a > b, c, d),
    "greater_equal": lambda a, b, c, d: where(a >= b, c, d),
    "sqrt": lambda a, b, c, d: sqrt(a),
    "log": lambda a, b, c, d: log(a),
    "softplus": lambda a, b, c, d: softplus(a),
    "div": lambda a, b, c, d: a / b,
}


@pytest.mark.quick
@pytest.mark.mutation
@DTYPES
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_nan_ties_and_infinities(function, dtype):
    """Values and gradients are the reference's, NaN and the sign of a value's 0 included."""
    made = test_selections.cell_of(function)
    columns = np.array(test_selections.FOUR, dtype).T[:, None, :]
    H = columns.shape[-1]
    x, weights = np.ones((1, 1, 1), dtype), {"weight_ih": np.ones((3 * H, 1), dtype)}
    for upstream in test_selections.UPSTREAM:
        d = tuple(np.full((1, H), u, dtype) for u in (upstream, 0, 0, 0))
        found = []
        for backend in (MACHINE, REFERENCE):
            f = backend.forward(made, x, weights, tuple(columns))
            found.append((f.y, *(backend.backward(f.tape, None, d).dstate0)))
        for got, want in zip(*found, strict=True):
            np.testing.assert_allclose(got, want, rtol=4 * np.finfo(dtype).eps, atol=0)
        y, wanted = found[0][0], found[1][0]
        assert (np.signbit(y) == np.signbit(wanted))[~np.isnan(wanted)].all()


@cell
def everywhere(p, x, h, c, n=2):
    """An operand of round 0, ten accumulators in a round, values that wait for two rounds, one value as two
    states.
    """
    a, b, e, f, g = p.dense("a b e f g", x, h, p.vector("u") * c)
    k, l, m, o, q = p.dense("k l m o q", x)
    s = tanh(a + b) * tanh(e - f) + tanh(g + k)
    t = tanh(p.dense("t", s, c) + l * m)
    w = tanh(p.dense("w", t * n, h, c, n, x, bias=False) + o * q - a)
    return w, tanh(s + t), tanh(s + t)


def check_sizes(cell, sizes, threads):
    """Both dtypes, every option, one and several threads."""
    for size in sizes:
        for options in OPTIONS:
            p = problem(cell, *size, **options)
            want = run(REFERENCE, p.astype(np.longdouble))
            for count in (1, 3):
                threads(count)
                for dtype in (np.float32, np.float64):
                    assert_standard(MACHINE, p.astype(dtype), want)


def test_a_cell_of_many_rounds_and_accumulators(threads):
    made = program.plan(everywhere)
    assert [r.first[0] for r in made.forward] == [0, 10, 1, 1]
    assert made.carried[0] > 0 < made.carried[1]
    check_sizes(everywhere, [*SIZES, (4, 5, 6, 100)], threads)


@cell
def unsaved(p, x, h, c):
    """Backward needs states alone; h is an operand of more than x is."""
    a, b = p.dense("a", x, h), p.dense("b", h, c)
    return a - b, c / 2 + h


@cell
def norms(p, x, h, c):
    """Norms in every round but the first: of a state, of values that backward makes again, of normalised
    ones, of a new state; of f nothing has a gradient.
    """
    a = p.layer_norm("a", h, eps=0.5)
    m, n = p.rms_norm("m", tanh(c), h * c, eps=0.5)
    i, f, g = p.layer_norm("i", *p.dense("i f g", x, h, a), eps=0.5)
    c = where(f > 0, sigmoid(i) * m + tanh(g), c * n)
    b, s = p.rms_norm("b", c, p.dense("o", tanh(c)), bias=True, eps=0.5)
    y, w = p.layer_norm("y", b, m, eps=0.5)
    return tanh(y + w * s), c


def test_a_cell_of_many_norms(threads):
    made = program.plan(norms)
    assert [len(r.norms) for r in made.forward] == [0, 2, 0, 1, 0, 1, 1]
    check_sizes(norms, [(7, 7, 3, 17), (4, 5, 6, 100)], threads)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", [everywhere, norms, unsaved, published.gru_d, published.slstm], ids=name)
def test_everything_at_once(cell, reverse, threads):
    """Cells that together have whatever the machine has, in tiles of several rows and of several blocks."""
    for count, size, biases in ((2, (4, 9, 4, 19), "both"), (1, (3, 1, 2, 37), "native")):
        threads(count)
        for rates in (None, (0.3, 0.4, 0.2, 7), (0.3, 0.4, 0.2)):
            regularization = regularized(cell, *rates) if rates else None
            options = EVERYTHING | {"reverse": reverse, "regularization": regularization, "biases": biases}
            p = problem(cell, *size, **options)
            want = run(REFERENCE, p)
            for save in ("all", "boundary_states"):
                assert_close(run(MACHINE, p, save=save), want, 1e-12)


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.quick
@DTYPES
@pytest.mark.parametrize("cell", COMPILED, ids=name)
def test_built_in_cells_have_the_bits_of_their_kernels(cell, dtype, threads):
    """Gradients of weights too."""
    some = [OPTIONS[0], EVERYTHING | {"reverse": True}]
    sizes = [
        (size, options, [1 + k % 2]) for size in (*SIZES, (4, 3, 2, 1)) for k, options in enumerate(OPTIONS)
    ]
    sizes += [(size, options, [1, 2]) for size in THREADED for options in some]
    for size, options, counts in sizes:
        p = problem(cell, *size, dtype=dtype, **options)
        want = run(CPU, p)  # by any number of threads: test_bitwise.py
        for count in counts:
            threads(count)
            assert_bitwise_equal(run(MACHINE, p), want)


# Training, evaluation, and each mask alone. The longest problem has several chunks.
RATES = [(0.3, 0.4, 0.4, 7), (0.3, 0.4, 0.4), (0.3, 0, 0, 8), (0, 0.4, 0, 9), (0, 0, 0.4)]
MASKED = [(2, 3, 5, 7), (200, 13, 3, 33)]


@DTYPES
@pytest.mark.parametrize("cell", COMPILED, ids=name)
def test_masks_and_recompute_have_the_bits_of_the_kernels(cell, dtype, threads):
    for k, rates in enumerate(RATES):
        for size in MASKED:
            options = EVERYTHING | {"regularization": regularized(cell, *rates), "reverse": k % 2 == 1}
            p = problem(cell, *size, dtype=dtype, **options)
            threads(1)
            want = run(CPU, p)
            for count, save in ((1, "all"), (1, "boundary_states"), (2, "all"), (2, "boundary_states")):
                threads(count)
                assert_bitwise_equal(run(MACHINE, p, save=save), want)


@DTYPES
@pytest.mark.parametrize("cell", [*OWN, everywhere, norms], ids=name)
def test_masks_and_recompute_of_other_cells(cell, dtype, threads):
    """In training and in evaluation; whatever is kept and however it is split, the bits are the same."""
    for seed in (None, 7):
        options = EVERYTHING | {"regularization": regularized(cell, 0.25, 0.3, 0.3, seed)}
        for size, reverse in zip(MASKED, (True, False), strict=True):
            p = problem(cell, *size, dtype=dtype, reverse=reverse, **options)
            threads(1)
            want = assert_standard(MACHINE, p) if size is MASKED[0] else run(MACHINE, p)
            for count in (1, 3):
                threads(count)
                assert_bitwise_equal(run(MACHINE, p, save="boundary_states"), want)


@DTYPES
@pytest.mark.parametrize("cell", [*OWN, everywhere, norms], ids=name)
def test_threads(cell, dtype, threads):
    for size in THREADED[:2] if dtype is np.float32 else THREADED[2:]:
        p = problem(cell, *size, dtype=dtype, **EVERYTHING)
        threads(1)
        want = run(MACHINE, p)
        for count in (2, 3, 7):
            threads(count)
            assert_bitwise_equal(run(MACHINE, p), want)


@pytest.mark.parametrize("cell", [*OWN, everywhere, norms], ids=name)
def test_batch_sizes(cell):
    p = problem(cell, 6, 19, 5, 23, dtype=np.float32, **EVERYTHING)

    def of_rows(p):
        found = {key: a for key, a in run(MACHINE, p).items() if key.removeprefix("d") not in p.weights}
        return {key: a[..., None] if key[1:] in p.scalars else a for key, a in found.items()}

    whole = of_rows(p)
    for index in ([0], [1], [18], [3, 4], list(range(7)), list(range(2, 19))):
        assert_bitwise_equal(of_rows(rows(p, index)), take_rows(whole, index))


# --- row scalars --------------------------------------------------------------------------------------------


@cell
def scaled(p, x, h, *, dt):
    """Its gradient of dt is 0 / 0 in the lanes behind the last unit."""
    return p.dense("a", x, bias=False) + h / p.vector("u", init=1) * dt


@pytest.mark.quick
@pytest.mark.mutation
@DTYPES
def test_gradients_of_row_scalars_are_summed_in_one_order(dtype, threads):
    """Each block's 16 units by halves, then the blocks in order."""
    for H in (1, 15, 16, 37):
        p = problem(scaled, 1, 3, 4, H, dtype=dtype, lengths=True)
        p = replace(p, weights=p.weights | {"u": np.ones(H, dtype)}, dstateT=None)
        for count in (1, 2):
            threads(count)
            got = run(MACHINE, p)
            blocks = np.zeros((1, 3, -(-H // 16) * 16), dtype)
            blocks[..., :H] = np.nan_to_num(p.dy) * p.state0[0]  # at padding 0
            blocks = blocks.reshape(1, 3, -1, 16)
            while blocks.shape[-1] > 1:
                half = blocks.shape[-1] // 2
                blocks = blocks[..., :half] + blocks[..., half:]
            want = np.zeros((1, 3), dtype)
            for block in range(blocks.shape[2]):
                want += blocks[..., block, 0]
            assert_bitwise_equal({"": got["ddt"]}, {"": want})


def test_calls_with_row_scalars():
    p = problem(published.gru_d, 5, 3, 4, 17, **EVERYTHING)
    want = run(CPU, p)
    assert_bitwise_equal(run(CPU, replace(p, scalars={"dt": np.asfortranarray(p.scalars["dt"])})), want)
    f = CPU.forward(p.cell, p.x, p.weights, p.state0, **p.options)
    for need in ((), ("dt",), ("w", "x")):
        some = CPU.backward(f.tape, p.dy, p.dstateT, p.dstates, need=need)
        assert (some.dscalars["dt"] is not None) == ("dt" in need)
        if need == ("dt",):
            np.testing.assert_array_equal(some.dscalars["dt"], want["ddt"])
    for size in ((0, 3), (4, 0)):
        empty = problem(published.gru_d, *size, 4, 17)
        assert run(CPU, empty)["ddt"].shape == size
    for wrong, error in (
        (p.scalars["dt"][1:], r"dt: expected shape \(5, 3\), got \(4, 3\)"),
        (p.scalars["dt"].astype(np.float32), "dt: expected dtype float64"),
        ([[1.0]], "dt: expected a NumPy array, got list"),
        (None, r"scalars: expected dt of shape \(T, B\) for gru_d"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            CPU.forward(p.cell, p.x, p.weights, scalars={"dt": wrong})
    q = problem(PLAIN[0], 2, 1, 3, 4)
    with pytest.raises(ValueError, match=r"scalars: expected none for rnn\(.*, got dt"):
        CPU.forward(q.cell, q.x, q.weights, scalars={"dt": q.x})


# --- calls --------------------------------------------------------------------------------------------------

PEEPHOLE = published.peephole_lstm


def test_the_cpu_backend_runs_it():
    p = problem(PEEPHOLE, 5, 3, 4, 17, **EVERYTHING)
    assert_bitwise_equal(run(CPU, p), run(MACHINE, p))
    packed = CPU.pack(p.cell, p.weights)
    twice = [CPU.forward(p.cell, p.x, packed, p.state0, **p.options, save=None) for _ in range(2)]
    assert twice[0].tape is None
    np.testing.assert_array_equal(twice[0].y, twice[1].y)
    np.testing.assert_array_equal(twice[0].y, run(CPU, p)["y"])
    with pytest.raises(ValueError, match="weights: packed for peephole_lstm"):
        CPU.forward(published.mgu, p.x, packed)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("cell", [everywhere, norms], ids=name)
def test_chunks_are_made_again(cell):
    """The sequence has three chunks."""
    for reverse in (False, True):
        p = problem(cell, 90, 9, 2, 19, lengths=True, reverse=reverse)
        assert_bitwise_equal(run(MACHINE, p, save="boundary_states"), run(MACHINE, p))


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("recompute", [False, True], ids=["all", "recompute"])
@pytest.mark.parametrize("cell", [norms, published.gru_d, published.slstm], ids=name)
def test_arrays_of_the_caller(cell, recompute):
    """Of weights as they lie and packed. A tape is what is said of its size: nothing behind it is written.

    With recompute the sequence has several chunks.
    """
    p = problem(cell, *((90, 9, 2, 19) if recompute else (4, 3, 2, 17)), **EVERYTHING, biases="both")
    call, want = Arrays(p, recompute), run(MACHINE, p)
    for weights in (None, CPU.pack(cell, p.weights).core):
        out = call.empty()
        shape, size = out["tape"].shape, out["tape"].size
        memory = np.full(size + 100, np.nan)
        out["tape"] = memory[:-100].reshape(shape)
        call.forward(weights, out)
        assert np.isnan(memory[-100:]).all()
        assert not np.isnan(memory[:-100]).any()  # padding is 0
        assert_bitwise_equal(call.named(out) | call.backward(out["y"], out["tape"]), want)


def test_some_of_the_states_of_every_step():
    """Without a tape, and without those of the first state."""
    p = problem(published.slstm, 9, 3, 2, 17, lengths=True, return_states=True)
    call = Arrays(p, False)
    want, out = call.forward(), call.empty()
    out["states"][0] = out["tape"] = None
    call.forward(out=out)
    for got, expected in zip(out["states"][1:], want["states"][1:], strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("cell", [norms, PEEPHOLE], ids=name)
def test_one_step_in_arrays_of_the_caller(cell):
    """(B, I) is one step, whose y is the first of the final states."""
    p = replace(problem(cell, 1, 4, 3, 17, lengths=True, biases="both"), dy=None)
    step = Arrays(replace(p, x=p.x[0]), False)
    out, want = step.forward(), run(MACHINE, p)
    for s, stateT in zip(cell.states, out["stateT"], strict=True):
        assert np.array_equal(stateT, want[f"{s}T"])
    for key, value in step.backward(out["stateT"][0], out["tape"]).items():
        assert np.array_equal(value, want[key].reshape(value.shape)), key


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("cell", [*OWN, everywhere, norms], ids=name)
def test_without_a_tape_the_results_are_the_same(cell):
    """States are then kept of two steps alone."""
    for options in ({}, {"lengths": True, "reset": True, "reverse": True}, {"return_states": True}):
        p = problem(cell, 7, 4, 3, 18, **options)
        saved, plain = (
            MACHINE.forward(cell, p.x, p.weights, p.state0, save=save, **p.options) for save in ("all", None)
        )
        for a, b in zip((saved.y, *saved.stateT), (plain.y, *plain.stateT), strict=True):
            np.testing.assert_array_equal(a, b)


def test_backward_twice_and_only_what_is_needed():
    p = problem(PEEPHOLE, 5, 3, 4, 17, **EVERYTHING)
    f = CPU.forward(p.cell, p.x, p.weights, p.state0, **p.options)
    full = CPU.backward(f.tape, p.dy, p.dstateT, p.dstates)
    for need in ((), ("x",), ("pi",), ("weight_hh", "pf"), ("bias_ih", "state0")):
        some = CPU.backward(f.tape, p.dy, p.dstateT, p.dstates, need=need)
        for key, d in {"x": some.dx, **some.dweights, "state0": some.dstate0}.items():
            assert (d is not None) == (key in need)
            if d is not None:
                want = {"x": full.dx, "state0": full.dstate0, **full.dweights}[key]
                np.testing.assert_array_equal(d, want)


@pytest.mark.parametrize("size", [(0, 3), (4, 0), (0, 0)])
def test_no_steps_and_no_rows(size):
    for more in ({}, {"regularization": Regularization(0.3, 0.3, 0.3, 1)}):
        p = problem(PEEPHOLE, *size, 4, 17, **more)
        for save in ("all", "boundary_states"):
            assert_close(run(MACHINE, p, save=save), run(REFERENCE, p), 0)


def test_a_tape_of_boundary_states_is_small():
    for one in (PEEPHOLE, published.mgu):
        p = problem(one, 1000, 2, 3, 64, dtype=np.float32)
        full, few = (CPU.forward(one, p.x, p.weights, save=s).tape for s in ("all", "boundary_states"))
        count = len(one.saved) + len(one.states) - 1
        assert full.bytes >= 1000 * 2 * 64 * 4 * count
        assert few.bytes < full.bytes / 50


def test_arrays_of_other_strides_and_dtypes():
    p = problem(PEEPHOLE, 5, 3, 4, 17)
    x = np.ascontiguousarray(p.x.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert_bitwise_equal(run(CPU, replace(p, x=x, dy=np.asfortranarray(p.dy))), run(CPU, p))
    with pytest.raises(TypeError, match="x: expected dtype float64"):
        CPU.forward(p.cell, p.x.astype(np.float32), p.weights)
    with pytest.raises(ValueError, match=r"dy: expected shape \(5, 3, 17\)"):
        CPU.backward(CPU.forward(p.cell, p.x, p.weights).tape, p.dy[1:])


def test_what_is_not_supported():
    p = problem(PEEPHOLE, 2, 1, 3, 4)
    with pytest.raises(ValueError, match=r"state0: expected a tuple .* got one of length 0"):
        CPU.forward(p.cell, p.x, p.weights, ())
    with pytest.raises(ValueError, match=r"dstateT: expected a tuple .* got one of length 0"):
        CPU.backward(CPU.forward(p.cell, p.x, p.weights).tape, p.dy, ())


def test_the_work_of_a_plan_does_not_grow_with_the_square_of_a_cell():
    def chain(count):
        @cell
        def made(p, x, h):
            a = p.dense("a", x, h)
            for _ in range(count):
                a = tanh(a * h) + h
            return a

        lines = 0

        def count_lines(frame, event, arg):
            nonlocal lines
            lines += event == "line"
            return count_lines

        before = sys.gettrace()
        sys.settrace(count_lines)
        try:
            program.plan(made)
        finally:
            sys.settrace(before)
        return lines

    assert chain(40) < 8 * chain(10)
