"""The same bits: zero differing bits, whatever the threads, batch, split or instruction set.

Results per row (y, states, dx, dstate0) do not depend on the batch or on where the sequence is cut;
gradients of weights are sums over rows and steps, so they do. Nothing here has a tolerance.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from interpreter import python
from problems import CELLS as PLAIN
from problems import NORMED, assert_bitwise_equal, name, problem, run

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core
from fusedrnn.backends.cpu import CpuBackend

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poison")]

CELLS = (*PLAIN, *NORMED[:4])  # the kernels have no layer norm for GRU with reset before
CPU = CpuBackend()
DTYPES = [np.float32, np.float64]
EVERYTHING = {"lengths": True, "reset": True, "return_states": True}
OPTIONS = [{}, EVERYTHING, EVERYTHING | {"reverse": True}]

# Split by rows; by units, with several panels; one row; several chunks; the same with weights beyond a
# megabyte.
THREADED = [(9, 37, 5, 33), (3, 3, 150, 290), (40, 1, 20, 130), (130, 40, 3, 17), (3, 33, 60, 300)]


def per_row(results):
    """Without the gradients of weights."""
    return {key: a for key, a in results.items() if not key.startswith(("dweight", "dbias", "dgain"))}


def rows(p, index):
    """Some rows of the batch."""

    def of(a, axis):
        return None if a is None else np.ascontiguousarray(np.take(a, index, axis))

    def of_all(arrays, axis):
        return None if arrays is None else tuple(of(a, axis) for a in arrays)

    return replace(
        p, x=of(p.x, 1), state0=of_all(p.state0, 0), lengths=of(p.lengths, 0), reset=of(p.reset, 1),
        dy=of(p.dy, 1), dstateT=of_all(p.dstateT, 0), dstates=of_all(p.dstates, 1),
        scalars={key: of(a, 1) for key, a in p.scalars.items()},
    )  # fmt: skip


def take_rows(results, index):
    return {key: a.take(index, a.ndim - 2) for key, a in per_row(results).items()}


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("size", THREADED, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_threads(cell, size, dtype, threads):
    for options in OPTIONS[:2]:
        p = problem(cell, *size, dtype=dtype, **options)
        threads(1)
        want = run(CPU, p)
        for count in (2, 3, 7):
            threads(count)
            assert_bitwise_equal(run(CPU, p), want)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all", "reverse"])
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_batch_sizes(cell, options):
    for dtype in DTYPES:
        p = problem(cell, 5, 33, 3, 19, dtype=dtype, **options)
        want = run(CPU, p)
        for B in range(1, 33):
            assert_bitwise_equal(per_row(run(CPU, rows(p, range(B)))), take_rows(want, range(B)))


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all", "reverse"])
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_row_positions(cell, options):
    for dtype in DTYPES:
        p = problem(cell, 5, 33, 3, 19, dtype=dtype, **options)
        want = run(CPU, p)
        for order in (
            range(32, -1, -1),
            [*range(7, 33), *range(7)],
            np.random.default_rng(0).permutation(33),
        ):
            assert_bitwise_equal(per_row(run(CPU, rows(p, order))), take_rows(want, order))


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_batch_sizes_of_a_large_layer(cell, threads):
    p = problem(cell, 3, 40, 40, 300, dtype=np.float32, **EVERYTHING)
    threads(2)
    want = run(CPU, p)
    for index in ([0], [17], range(3, 20), range(31)):
        assert_bitwise_equal(per_row(run(CPU, rows(p, index))), take_rows(want, index))


# --- splits of the sequence --------------------------------------------------------------------------------


def part(p, begin, end, state0, dstateT):
    """Steps [begin, end) with the state that comes in and the gradient of the state that goes out."""
    return replace(
        p,
        x=p.x[begin:end],
        state0=state0,
        lengths=None if p.lengths is None else np.clip(p.lengths - begin, 0, end - begin),
        reset=None if p.reset is None else p.reset[begin:end],
        dy=p.dy[begin:end],
        dstateT=dstateT,
        dstates=None if p.dstates is None else tuple(d[begin:end] for d in p.dstates),
    )


def cut_at(p, t, state):
    """What is handed over between t and t-1 in reverse: step t does not know that a step follows, so its
    caller cuts.
    """
    if not p.reverse or p.reset is None or t in (0, len(p.x)):
        return state
    cut = (p.reset[t] & (t < (len(p.x) if p.lengths is None else p.lengths)))[:, None]
    return tuple(np.where(cut, np.zeros_like(s), s) for s in state)


def run_in_parts(p, cuts):
    """Forward over the parts, then backward over them, states and their gradients handed on."""
    edges = list(zip([0, *cuts], [*cuts, len(p.x)], strict=True))
    order = range(len(edges))[::-1] if p.reverse else range(len(edges))
    state, parts, dx = p.state0, {}, {}
    for k in order:
        q = part(p, *edges[k], cut_at(p, edges[k][1], state), None)
        parts[k] = CPU.forward(p.cell, q.x, q.weights, q.state0, **q.options)
        state = parts[k].stateT
    dstate = p.dstateT
    for k in order[::-1]:
        q = part(p, *edges[k], None, dstate)
        gradients = CPU.backward(parts[k].tape, q.dy, q.dstateT, q.dstates)
        dx[k], dstate = gradients.dx, cut_at(p, edges[k][1], gradients.dstate0)
    joined = {"y": [parts[k].y for k in sorted(parts)], "dx": [dx[k] for k in sorted(parts)]}
    for n, s in enumerate(p.cell.states if p.return_states else ()):
        joined[s] = [parts[k].states[n] for k in sorted(parts)]
    results = {key: np.concatenate(a) for key, a in joined.items()}
    for s, final, first in zip(p.cell.states, state, dstate, strict=True):
        results |= {f"{s}T": final, f"d{s}0": first}
    return results


def held(p, results):
    """Without the all-step states of padding in reverse: each part holds the state that came into it."""
    if p.reverse and p.lengths is not None:
        return {key: a for key, a in results.items() if key not in p.cell.states}
    return results


@pytest.mark.quick
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all", "reverse"])
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_every_split(cell, options):
    for dtype in DTYPES:
        p = problem(cell, 17, 5, 3, 19, dtype=dtype, **options)
        want = held(p, per_row(run(CPU, p)))
        for cut in range(18):
            assert_bitwise_equal(held(p, run_in_parts(p, [cut])), want)
        assert_bitwise_equal(held(p, run_in_parts(p, [3, 4, 4, 9, 16])), want)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all", "reverse"])
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_single_steps_are_the_sequence(cell, options):
    for dtype in DTYPES:
        for I in (3, 18):  # W x of a wide input is made for several steps at once
            p = problem(cell, 17, 5, I, 19, dtype=dtype, **options)
            assert_bitwise_equal(held(p, run_in_parts(p, range(1, 17))), held(p, per_row(run(CPU, p))))


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_split_across_chunks(cell, threads):
    """Steps fall into other chunks of the backward pass than in one piece."""
    threads(2)
    p = problem(cell, 90, 60, 3, 19, dtype=np.float32, **EVERYTHING)
    assert_bitwise_equal(run_in_parts(p, [31, 59]), per_row(run(CPU, p)))


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_single_steps_of_a_large_layer(cell, threads):
    threads(2)
    p = problem(cell, 4, 3, 70, 290, dtype=np.float32, return_states=True)
    assert_bitwise_equal(run_in_parts(p, [1, 2, 3]), per_row(run(CPU, p)))


# --- recomputation -----------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("size", [(17, 5, 3, 19), (130, 40, 3, 17), (5, 33, 60, 300)], ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_recomputed_steps_give_the_same_bits(cell, size, threads):
    """save="boundary_states" keeps less and runs forward again: every gradient, those of weights too, has
    the same bits.
    """
    for options in OPTIONS:
        for dtype in DTYPES:
            p = problem(cell, *size, dtype=dtype, **options)
            threads(1)
            want = run(CPU, p)
            for count in (1, 2, 3):
                threads(count)
                assert_bitwise_equal(run(CPU, p, save="boundary_states"), want)
            packed = replace(p, weights=CPU.pack(cell, p.weights))
            assert_bitwise_equal(run(CPU, packed, save="boundary_states"), want)


# --- instruction sets --------------------------------------------------------------------------------------


def digests():
    """A line per problem: everything that comes out, hashed."""
    lines = []
    for cell in CELLS:
        for dtype in DTYPES:
            for size in [(7, 13, 5, 33), (4, 3, 90, 210), (60, 40, 3, 17)]:
                for options in OPTIONS:
                    results = run(CPU, problem(cell, *size, dtype=dtype, **options))
                    joined = b"".join(key.encode() + results[key].tobytes() for key in sorted(results))
                    digest = hashlib.sha256(joined).hexdigest()
                    lines.append(f"{name(cell, options)} {np.dtype(dtype)} {size} {digest}")
    return lines


def digests_on(isa, count="2"):
    """``digests`` in a process of its own, on one instruction set and number of threads."""
    code = "import test_bitwise; print(test_bitwise._core.info()['isa'], *test_bitwise.digests(), sep='\\n')"
    used, *lines = python(code, FUSEDRNN_ISA=isa, FUSEDRNN_NUM_THREADS=count).splitlines()
    assert used == isa
    assert len(lines) == len(CELLS) * 2 * 3 * len(OPTIONS)
    return lines


def levels():
    info = _core.info()
    return [isa for isa in info["built"] if isa in info["detected"]]


@pytest.mark.quick
def test_every_level_with_fma_gives_the_same_bits():
    with_fma = [isa for isa in levels() if isa != "portable"]
    if not with_fma:
        pytest.skip("needs a CPU with FMA")
    want = digests_on(with_fma[0])
    for isa in with_fma[1:]:
        assert digests_on(isa, "1") == want, isa


@pytest.mark.slow
def test_plain_portable_gives_the_same_bits_run_to_run():
    """CI runs test_golden.py on it too, where the bits are those that were written down."""
    assert digests_on("portable") == digests_on("portable")


# --- run to run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_backward_twice(cell):
    for dtype in DTYPES:
        p = problem(cell, 6, 9, 4, 35, dtype=dtype, **EVERYTHING)
        tape = CPU.forward(cell, p.x, p.weights, p.state0, **p.options).tape
        once, other, again = (
            CPU.backward(tape, dy, p.dstateT, p.dstates)
            for dy in (p.dy, np.where(np.isnan(p.dy), p.dy, 1), p.dy)
        )
        for a, b, c in zip(*(flat(g) for g in (once, again, other)), strict=True):
            assert_bitwise_equal({"": a}, {"": b})
            assert not np.array_equal(a, c)


def flat(gradients):
    return [gradients.dx, *gradients.dweights.values(), *gradients.dstate0]


@pytest.mark.quick
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_a_hundred_runs(cell, threads):
    threads(3)
    p = problem(cell, 9, 21, 4, 47, dtype=np.float32, **EVERYTHING)
    want = run(CPU, p)
    for _ in range(100):
        assert_bitwise_equal(run(CPU, p), want)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_packed_weights_are_the_weights(cell):
    for dtype in DTYPES:
        for biases in ("none", "bias_ih", "bias_hh", "both"):
            p = problem(cell, 5, 3, 20, 35, dtype=dtype, biases=biases)
            packed = CPU.pack(cell, p.weights)
            want = run(CPU, p)
            for _ in range(2):
                assert_bitwise_equal(run(CPU, replace(p, weights=packed)), want)


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_order_of_the_two_biases(cell):
    """A missing bias is a bias of zeros."""
    p = problem(cell, 5, 3, 4, 19, dtype=np.float32, biases="bias_ih")
    zeros = np.zeros_like(p.weights["bias_ih"])
    two = replace(p, weights=p.weights | {"bias_hh": zeros})
    got = run(CPU, two)
    got.pop("dbias_hh")
    assert_bitwise_equal(got, run(CPU, p))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_no_upstream_gradient_gives_exact_zeros(cell, dtype):
    for options in OPTIONS:
        p = problem(cell, 6, 7, 4, 21, dtype=dtype, **options)
        zero = replace(
            p, dy=np.zeros_like(p.dy), dstateT=tuple(map(np.zeros_like, p.dstateT)),
            dstates=p.dstates and tuple(map(np.zeros_like, p.dstates)),
        )  # fmt: skip
        nothing = replace(p, dy=None, dstateT=None, dstates=None)
        for q in (zero, nothing):
            gradients = {key: a for key, a in run(CPU, q).items() if key.startswith("d")}
            assert gradients.keys() >= {"dx", "dweight_ih", "dweight_hh", "dh0"}
            assert all(not a.any() for a in gradients.values())


@pytest.mark.mutation
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_padding_and_cuts_give_positive_zeros(cell):
    p = problem(cell, 6, 7, 4, 21, dtype=np.float32, **EVERYTHING)
    got = run(CPU, p)
    padding = np.arange(6)[:, None] >= p.lengths
    for key in ("y", "dx"):
        assert not got[key][padding].any()
        assert not np.signbit(got[key][padding]).any()
    cut = p.reset[0] & (p.lengths > 0)
    assert cut.any()
    for s in cell.states:
        assert not got[f"d{s}0"][cut].any()
        assert got[f"d{s}0"][~cut].all()


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_gradients_are_linear_in_powers_of_two(cell):
    """Doubling every upstream gradient doubles every gradient, to the bit."""
    p = problem(cell, 6, 7, 4, 21, dtype=np.float32, **EVERYTHING)

    def double(arrays):
        return tuple(2 * a for a in arrays)

    twice = run(CPU, replace(p, dy=2 * p.dy, dstateT=double(p.dstateT), dstates=double(p.dstates)))
    once = run(CPU, p)
    assert_bitwise_equal(twice, {key: 2 * a if key.startswith("d") else a for key, a in once.items()})


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_weights_may_be_slices_of_a_larger_array(cell):
    """Copied where they are not contiguous; the bits are those of a contiguous copy."""
    p = problem(cell, 5, 3, 4, 19, dtype=np.float32, biases="both")
    wide = {n: np.repeat(w, 2, axis=-1)[..., ::2] for n, w in p.weights.items()}
    assert_bitwise_equal(run(CPU, replace(p, weights=wide)), run(CPU, p))
