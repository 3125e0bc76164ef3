"""Failures that users of other libraries met, each as a test of ours where it can concern a CPU kernel.

The number is that of the list the project keeps; the docstring names the source. Layouts, projections,
dropout, the PyTorch API and checkpoints are tested where they are built. Rows of the list without a test
here, and why:

- R18 (pytorch/audio 3736, rnnt_loss beyond 2^31 elements): there is no such loss; counts of elements are R17.
- The CUDA part of R12 (a result wrong on one GPU), R14 (a handle shared across GPUs) and R15 (a compiler
  run at import): no CUDA kernel is built. What remains of each on a CPU is tested.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import time
from dataclasses import replace

import numpy as np
import pytest

from interpreter import python
from problems import CELLS, NORMED, assert_bitwise_equal, assert_close, name, problem, run

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core, kernels
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import gru, lstm, rnn
from fusedrnn.multilayer import backward_multilayer, forward_multilayer

pytestmark = pytest.mark.kernel

CPU, REFERENCE = CpuBackend(), ReferenceBackend()
every_cell = pytest.mark.parametrize("cell", CELLS, ids=name)


def gradients(results):
    return {key: a for key, a in results.items() if key.startswith("d")}


def truth(p):
    return run(REFERENCE, p.astype(np.longdouble))


def rss():
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@every_cell
def test_regression_R04_only_the_final_state_receives_a_gradient(cell):
    """pytorch 96416: backward failed when y received no gradient."""
    p = problem(cell, 5, 3, 2, 19)
    for k in range(len(cell.states)):
        only = tuple(d if j == k else None for j, d in enumerate(p.dstateT))
        q = replace(p, dy=None, dstateT=only)
        assert_close(gradients(run(CPU, q)), gradients(truth(q)), 2e-14)


@every_cell
def test_regression_R05_no_input_is_written_to_and_middle_layers_are_right(cell):
    """mxnet 17898, PR 18203: dx was written over dy; weight gradients of middle GRU layers were wrong."""
    L, H = 4, 11
    P = problem(cell, 7, 5, 3, H).dy.shape[2]
    ps = [problem(cell, 7, 5, I, H, seed) for seed, I in enumerate([3] + [2 * P] * (L - 1)) for _ in range(2)]
    x, weights = ps[0].x, [p.weights for p in ps]
    dy = np.random.default_rng(0).standard_normal((7, 5, 2 * P))

    def results(backend, dtype):
        cast = [{n: w.astype(dtype) for n, w in ws.items()} for ws in weights]
        inputs = [x.astype(dtype), dy.astype(dtype), *(w for ws in cast for w in ws.values())]
        before = [a.copy() for a in inputs]
        forward = forward_multilayer(cell, inputs[0], cast, bidirectional=True, backend=backend)
        got = backward_multilayer(forward.tape, inputs[1])
        for a, b in zip(inputs, before, strict=True):
            assert_bitwise_equal({"": a}, {"": b})
        named = {"y": forward.y, "dx": got.dx}
        return named | {f"{k} {n}": a for k, d in enumerate(got.dweights) for n, a in d.items()}

    want = results("reference", np.longdouble)
    assert len(want) >= 2 + 2 * L * 3
    assert_close(results("cpu", np.float64), want, 2e-14)


@every_cell
def test_regression_R06_input_size_differs_from_hidden_size(cell):
    """mxnet 17479: layers from the second on were wrong where it did."""
    for T, B, I, H in ((7, 5, 3, 11), (5, 3, 13, 7), (3, 11, 29, 17)):
        p = problem(cell, T, B, I, H)
        assert_close(run(CPU, p), truth(p), 2e-14)


@every_cell
def test_regression_R07_two_gradient_calls_on_one_forward(cell):
    """tensorflow 26331: the second differed, the first had consumed the reserve space."""
    p = problem(cell, 6, 5, 4, 19, dtype=np.float32, return_states=True)
    tape = kernels.forward(cell, p.x, p.weights, p.state0, return_states=True, backend="cpu").tape
    first, second = (kernels.backward(tape, p.dy, p.dstateT, p.dstates) for _ in range(2))
    for a, b in zip(*((g.dx, *g.dweights.values(), *g.dstate0) for g in (first, second)), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("reverse", [False, True])
@every_cell
def test_regression_R09_a_fully_masked_row(cell, reverse):
    """tensorflow 36139, 43103, 33148: an error of cuDNN, sometimes. Here: the initial state, and its
    gradient.
    """
    p = problem(cell, 5, 6, 3, 19, dtype=np.float32, lengths=True, reverse=reverse)
    p.lengths[[1, 4]] = 0
    p.x[:, [1, 4]] = p.dy[:, [1, 4]] = np.nan
    got = run(CPU, p)
    for k, s in enumerate(cell.states):
        assert np.array_equal(got[f"{s}T"][[1, 4]], p.state0[k][[1, 4]])
        assert np.array_equal(got[f"d{s}0"][[1, 4]], p.dstateT[k][[1, 4]])
    assert not got["y"][:, [1, 4]].any()
    assert not got["dx"][:, [1, 4]].any()
    p.lengths[:] = 0
    p.x[:] = p.dy[:] = np.nan
    got = run(CPU, p)
    assert all(np.array_equal(got[f"{s}T"], p.state0[k]) for k, s in enumerate(cell.states))
    assert all(not a.any() for key, a in got.items() if key.startswith(("dw", "db")))


@every_cell
def test_regression_R10_no_steps_no_rows_no_length(cell):
    """pytorch 50192, 4582, 20529: T = 0 and length 0 were errors, an empty batch crashed."""
    for T, B in ((0, 3), (4, 0), (0, 0)):
        p = problem(cell, T, B, 2, 7, return_states=True)
        got = run(CPU, p)
        assert got["y"].shape == p.dy.shape
        assert got["dx"].shape == (T, B, 2)
        assert not got["dweight_ih"].any()
        for k, s in enumerate(cell.states):
            assert np.array_equal(got[f"{s}T"], p.state0[k])
            assert np.array_equal(got[f"d{s}0"], p.dstateT[k])


def errors_here():
    """The worst error of every cell against long double, for one process on one instruction set."""
    for cell in CELLS:
        p = problem(cell, 7, 9, 5, 35, lengths=True, reset=True, return_states=True)
        want = truth(p)
        assert_close(run(CPU, p), want, 2e-14)
        assert_close(run(CPU, p.astype(np.float32)), want, 5e-6)
    return _core.info()["isa"]


def test_regression_R12_every_instruction_set_is_right():
    """haste 17: gradients were wrong on one GPU and right on another."""
    info = _core.info()
    levels = [isa for isa in info["built"] if isa in info["detected"]]
    assert "portable" in levels
    for isa in levels:
        used = python("import test_regressions; print(test_regressions.errors_here())", FUSEDRNN_ISA=isa)
        assert used.strip() == isa


@every_cell
def test_regression_R13_gradients_of_a_batch_of_one(cell):
    """haste 31: they were exactly zero."""
    p = problem(cell, 6, 1, 3, 18)
    got = run(CPU, p)
    for key, a in gradients(got).items():
        if cell != rnn.with_options(relu=True):
            assert a.all(), key
        assert a.any(), key
    assert_close(got, truth(p), 2e-14)


@every_cell
def test_regression_R14_no_uninitialised_memory_is_read(cell, poison):
    """haste CHANGELOG 0.3 and 0.4. Buffers start as NaN, new ones as well as recycled ones."""
    p = problem(cell, 7, 9, 3, 19, lengths=True, reset=True, return_states=True)
    want = truth(p)
    for _ in range(2):
        assert_close(run(CPU, p), want, 2e-14)
        _core.testing.trim_arena()


@pytest.mark.quick
def test_regression_R15_import_needs_no_compiler_and_other_memory_gives_the_same_bits():
    """haste 50, flashrnn 6: NaN losses on one machine only; compiling at import failed."""
    code = """
import subprocess
def refuse(*_, **__): raise AssertionError("a process was started")
subprocess.Popen.__init__ = refuse
import hashlib, numpy as np
from problems import CELLS, problem, run
from fusedrnn import kernels, _core
from fusedrnn.backends import get
_core.testing.poison({poison})
h = hashlib.sha256()
for cell in CELLS:
    for key, a in sorted(run(get("cpu"), problem(cell, 7, 5, 3, 19, dtype=np.float32)).items()):
        h.update(a.tobytes())
print(h.hexdigest())
"""
    empty, full = (
        "".join(python(code.format(poison=p), PATH="", MALLOC_PERTURB_=m)) for p, m in ((0, "0"), (1, "165"))
    )
    assert empty == full


# 65535 = 3 * 21845, 65537 is a prime: the rows have to lie in the batch.
@pytest.mark.parametrize(
    ("T", "B"), [(3, 21845), (256, 256), (1, 65537), pytest.param(64, 16384, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("cell", [lstm, gru], ids=name)
def test_regression_R16_rows_beyond_65536(cell, T, B):
    """ROCm/rocm-libraries 10551: an LSTM with bias was silently wrong where B*T > 65536."""
    p = problem(cell, T, B, 1, 7, upstream=("dy",))
    want = run(REFERENCE, p)  # float64: a long double would take minutes
    assert_close(run(CPU, p.astype(np.float32)), want, 5e-6)


@pytest.mark.slow
def test_regression_R17_more_than_2_31_elements():
    """ROCm PR 7300, pytorch 191924: 32-bit counts of elements overflowed. y has 2^31 + 2^14 here, 8.6 GB."""
    T, B, H = 256, 2**17 + 1, 64
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 12e9:
        pytest.skip(f"needs 12 GB of free memory, has {available / 1e9:.1f}")
    assert T * B * H > 2**31
    one = problem(rnn, T, 1, 1, H, dtype=np.float32)
    want = CPU.forward(rnn, one.x, one.weights, one.state0)
    state0, dstateT = (tuple(np.repeat(a, B, axis=0) for a in s) for s in (one.state0, one.dstateT))
    got = CPU.forward(rnn, np.broadcast_to(one.x, (T, B, 1)), one.weights, state0)
    for b in (0, 1, B // 2, B - 2, B - 1):
        assert np.array_equal(got.y[:, b], want.y[:, 0])
    dx = CPU.backward(got.tape, None, dstateT, need=("x", "weight_ih")).dx
    want_dx = CPU.backward(want.tape, None, one.dstateT).dx
    assert np.array_equal(dx, np.broadcast_to(want_dx, dx.shape))


def test_regression_R17_sizes_that_overflow_are_an_error():
    """The same with sizes whose product does not fit 63 bits: found before anything is allocated."""
    p = problem(lstm, 2, 3, 1, 64, dtype=np.float32)
    for shape in ((2**32, 2**25, 1), (2**29, 2**28, 1), (2**20, 2**38, 1)):
        x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0, 0, 4))
        with pytest.raises(OverflowError, match="too large"):
            CPU.forward(lstm, x, p.weights)


@pytest.mark.parametrize("H", range(1, 34))
def test_regression_R19_sliced_upstream_gradients_of_any_hidden_size(H):
    """pytorch 54307: cuDNN's GRU failed for a sliced output where H was no multiple of 4."""
    p = problem(gru, 5, 3, 4, H, dtype=np.float32)
    wide = np.full((5, 6, 2 * H + 3), np.nan, np.float32)
    dy = wide[:, 1::2, 2 : H + 2]
    dy[...] = p.dy
    assert not dy.flags.c_contiguous
    assert_bitwise_equal(run(CPU, replace(p, dy=dy)), run(CPU, p))
    # only the last step's output was used: every other gradient is zero
    last = replace(p, dy=np.zeros_like(p.dy))
    last.dy[-1] = p.dy[-1]
    view = np.broadcast_to(last.dy, (2, *last.dy.shape))[1]
    assert_bitwise_equal(run(CPU, replace(p, dy=view)), run(CPU, last))


def good_call():
    p = problem(lstm, 4, 3, 2, 5, dtype=np.float32)
    packed = CPU.pack(lstm, p.weights).core
    return p, packed, [None, p.x, p.state0, (), None, None, False, 0, None, False, 1]


def test_regression_R23_zero_lengths_wrong_ranks_and_foreign_objects():
    """CVE-2020-26270, CVE-2022-29200, CVE-2023-25658, CVE-2025-2998, CVE-2020-15193: aborts, reads out of
    bounds, memory corruption, glue that took any object for a tensor. Here at the lowest entry.
    """
    p, packed, args = good_call()
    tape = _core.forward(packed, *args)[-1]
    h0, c0 = p.state0
    zeros = np.zeros
    wrong = [
        (1, zeros((4, 3), np.float32)), (1, zeros((4, 3, 3), np.float32)), (1, zeros((), np.float32)),
        (2, (zeros((3, 4), np.float32), c0)), (2, (zeros((2, 5), np.float32), c0)),
        (2, (zeros(15, np.float32), c0)), (2, (h0, zeros((3, 5, 1), np.float32))),
        (2, (h0, zeros((3, 6), np.float32))), (2, (h0, "state")), (2, (object(), c0)), (2, (h0, None)),
        (2, (h0,)), (2, (h0, c0, c0)), (2, [h0, c0]), (2, None), (3, (p.x,)), (3, None),
        (4, zeros(2, np.int64)), (4, zeros(3, np.int32)), (4, np.full(3, 5)), (4, np.full(3, -1)), (4, 4),
        (5, zeros((3, 4), bool)), (5, zeros((4, 3), np.uint8)), (5, zeros(12, bool)), (5, True),
    ]  # fmt: skip
    for place, value in wrong:
        with pytest.raises((TypeError, ValueError)):
            _core.forward(packed, *(value if k == place else a for k, a in enumerate(args)))
    need = [True] * 6
    for place, shape in enumerate([(4, 3, 4), (3, 4), (2, 5), (4, 3, 6), (3, 3, 5)]):
        for value in (zeros(shape, np.float32), zeros(shape), object(), [[0.0]]):
            dy, *states = [value if k == place else None for k in range(5)]
            with pytest.raises((TypeError, ValueError)):
                _core.backward(tape, dy, tuple(states[:2]), tuple(states[2:]), need)
    with pytest.raises(ValueError, match="need: expected 6 entries, got 7"):
        _core.backward(tape, None, (), (), [*need, True])
    for foreign in (None, p, packed, 7, "tape"):
        with pytest.raises(TypeError):
            _core.backward(foreign, None, (), (), need)
        if foreign is not packed:
            with pytest.raises(TypeError):
                _core.forward(foreign, *args)
    lengths = np.zeros(3, np.int64)
    y, (hT, _), *_ = _core.forward(packed, *(lengths if k == 4 else a for k, a in enumerate(args)))
    assert not y.any()
    assert np.array_equal(hT, p.state0[0])


@pytest.mark.quick
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("calls", [1500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_regression_R24_memory_stays_flat_over_varying_shapes(calls):
    """pytorch 41486, 32596, 32037, 27971: it grew with every shape, and per request, with 8 threads."""
    code = f"""
import gc, threading
import numpy as np
from problems import CELLS, problem, run
from test_regressions import CPU, rss
from fusedrnn import _core
_core.set_num_threads(2)
rng = np.random.default_rng(0)
def work(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        T, B, I, H = (int(v) for v in rng.integers(1, (12, 9, 9, 40)))
        run(CPU, problem(CELLS[T % len(CELLS)], T, B, I, H, lengths=True, dtype=np.float32))
def in_threads(count):
    threads = [threading.Thread(target=work, args=(count // 8, k)) for k in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
work({calls} // 3, 99); in_threads({calls} // 3); gc.collect()
live, before = _core.testing.arena()[0], rss()
work({calls} // 3, 100); in_threads({calls} // 3); gc.collect()
assert _core.testing.arena()[0] == live == 0
print(rss() - before)
"""
    assert int(python(code)) < 4 << 20  # the interpreter's own memory moves by this much


@every_cell
def test_regression_R25_memory_is_what_the_sizes_say(cell):
    """oneDNN 848: the LSTM's scratchpad was four times too large, and running out of memory crashed."""
    gc.collect()
    T, B, I = 300, 20, 3
    for dtype, H in itertools.product((np.float32, np.float64), (1, 32, 33)):
        p = problem(cell, T, B, I, H, dtype=dtype)
        live = _core.testing.arena()[0]
        tape = CPU.forward(cell, p.x, p.weights, p.state0).tape
        saved = {"rnn": 0, "lstm": 5, "gru": 4 if cell == gru else 3}[cell.name]  # gates, and c of the LSTM
        want = T * B * H * saved * np.dtype(dtype).itemsize
        assert want <= tape.bytes <= want + 4096
        y = T * B * H * np.dtype(dtype).itemsize  # borrowed by the tape
        held = _core.testing.arena()[0] - live
        assert want <= held <= 1.15 * (want + y) + 4096  # sizes are rounded up to classes, an eighth apart
        _core.testing.trim_arena()
        CPU.backward(tape, p.dy)
        scratch = _core.testing.arena()[1]
        assert scratch < 8 << 20  # two chunks of a megabyte or so, whatever T is
        _core.testing.fail_allocation_after(0)
        try:
            with pytest.raises(MemoryError, match="bytes"):
                CPU.backward(tape, p.dy)
        finally:
            _core.testing.fail_allocation_after(-1)
        del tape
        gc.collect(1)  # the traceback's cycle
        assert _core.testing.arena()[0] == live


@every_cell
def test_regression_R27_states_that_decay_into_subnormals_are_not_slow(cell, threads):
    """oneDNN 561, mxnet RFC 19361: such sequences took 20 times as long."""
    threads(1)
    p = problem(cell, 400, 4, 3, 32, dtype=np.float32)
    weak = {n: w * np.float32(0.05) for n, w in p.weights.items()}
    still = replace(p, x=np.zeros_like(p.x), dy=None, weights=weak)

    def seconds(p):
        best = np.inf
        for _ in range(5):
            start = time.perf_counter()
            run(CPU, p)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(still) < 3 * seconds(p)


def test_regression_R28_backward_takes_nothing_but_the_tape_of_its_forward():
    """oneDNN 4306: the backward primitive accepted a forward hint of the wrong kind and returned nonsense."""
    p = problem(lstm, 4, 3, 2, 5)
    inference = CPU.forward(p.cell, p.x, p.weights, save=None).tape
    assert inference is None
    with pytest.raises(TypeError, match="tape"):
        CPU.backward(inference, p.dy)
    with pytest.raises(ValueError, match="dstates"):
        CPU.backward(CPU.forward(p.cell, p.x, p.weights).tape, p.dy, None, (p.dy, p.dy))
    with pytest.raises(ValueError, match="save"):
        CPU.forward(p.cell, p.x, p.weights, save="inference")
    with pytest.raises((TypeError, ValueError)):
        CPU.backward(CPU.forward(gru, p.x, problem(gru, 4, 3, 2, 5).weights).tape, None, p.dstateT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_regression_R36_a_forked_child_does_not_hang():
    """faiss 5206, LightGBM 4751, OpenBLAS 294. Fork, a fork in the child, and a pool of forked workers; ten
    seconds.
    """
    start = time.monotonic()
    python("""
import multiprocessing, os
import numpy as np
from problems import assert_bitwise_equal, problem, run
from test_regressions import CPU
from fusedrnn import _core
from fusedrnn.cells import lstm
_core.set_num_threads(4)
p = problem(lstm, 9, 40, 5, 33, dtype=np.float32)
want = run(CPU, p)
def child(depth):
    assert_bitwise_equal(run(CPU, p), want)
    if depth:
        pid = os.fork()
        if pid == 0:
            child(depth - 1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    return True
child(3)
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert all(pool.map(child, [0, 1] * 6))
child(0)
""")
    assert time.monotonic() - start < 10


# R26 (oneDNN 838, 713: results differed from version to version): the bits of this release. Whoever changes
# them on
# purpose says so in the changelog and writes the new ones here.
GOLDEN = {
    "rnn float32": "6edf6a57cff9d77f",
    "rnn float64": "4a8e3b605324b6cc",
    "rnn-relu float32": "84486ba978b349bc",
    "rnn-relu float64": "8bde279ba80c1e65",
    "lstm float32": "1806864af1dd4b83",
    "lstm float64": "ab860d343f6b2b3e",
    "gru float32": "192d3fcf7814f5cd",
    "gru float64": "8dd095b52c479548",
    "gru-before float32": "4d511191d9572f15",
    "gru-before float64": "2d7a79bb93c25d5e",
    "rnn-norm float32": "d1ca16d0522f0558",
    "rnn-norm float64": "a9550f7c150d1fe3",
    "rnn-relu-norm float32": "427123125978fe6f",
    "rnn-relu-norm float64": "91ddb64d1b8ecb63",
    "lstm-norm float32": "8ade3f5cd7b8a374",
    "lstm-norm float64": "4adf99e2cdcc2520",
    "gru-norm float32": "8f50aa588c0596fe",
    "gru-norm float64": "9307789e150cf280",
    "lstm-projected float32": "206ce3d6354b3e1b",
    "lstm-projected float64": "b6f84e3885fa06fc",
}


def golden_digests():
    found = {}
    for cell in (*CELLS, *NORMED[:4]):
        for dtype in (np.float32, np.float64):
            p = problem(cell, 7, 9, 5, 35, dtype=dtype, lengths=True, reset=True, return_states=True)
            results = run(CPU, p)
            joined = b"".join(key.encode() + results[key].tobytes() for key in sorted(results))
            found[f"{name(cell)} {np.dtype(dtype)}"] = hashlib.sha256(joined).hexdigest()[:16]
    return found


@pytest.mark.quick
def test_regression_R26_the_bits_of_this_release():
    """oneDNN 838, 713. Every level with FMA has these."""
    if _core.info()["isa"] == "portable":
        pytest.skip("plain portable code without FMA has bits of its own")
    assert golden_digests() == GOLDEN
