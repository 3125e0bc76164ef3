"""What may happen around a kernel: signals, forks, other threads, odd control words, sizes beyond memory,
no memory.

What can hang or die runs in a process of its own with a time limit. Each starts with ``PRELUDE``.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import interpreter
from problems import CELLS, assert_bitwise_equal, name, problem, run

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core, kernels
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.cells import gru, lstm, rnn

pytestmark = [pytest.mark.kernel, pytest.mark.alone]

CPU = CpuBackend()
EVERYTHING = {"lengths": True, "reset": True, "return_states": True}

PRELUDE = """
import ctypes, os, signal, sys, threading, time
import numpy as np
from problems import CELLS, assert_bitwise_equal, problem, run
from fusedrnn import _core
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.cells import gru, lstm, rnn
CPU = CpuBackend()
_core.set_num_threads(int(os.environ.get("TEST_THREADS", "2")))
_core.testing.thresholds(False)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a process started in the background

small = problem(lstm, 9, 40, 5, 33, dtype=np.float32)
want = run(CPU, small)

def check():
    assert_bitwise_equal(run(CPU, small), want)

def long_forward(T=40_000, H=512, B=1):  # some seconds; no copy of x is made
    p = problem(lstm, 2, B, 3, H, dtype=np.float32)
    x = np.broadcast_to(p.x[:1], (8 * T, B, 3))  # long enough for a timer on a quiet machine
    return lambda: CPU.forward(p.cell, x, p.weights, p.state0, save=None)

def long_work(kind):  # some seconds each
    if kind == "forward":
        return long_forward()
    if kind == "forward by rows":
        return long_forward(T=60_000, H=64, B=33)
    if kind == "pack":
        square = np.ones((6000, 6000), np.float32)  # some tenths of a second each
        return lambda: [CPU.pack(rnn, {"weight_ih": square, "weight_hh": square}) for _ in range(99)]
    p = problem(lstm, 2, 1, 3, 512, dtype=np.float32)
    x = np.broadcast_to(p.x[:1], {"backward": (8_000, 1, 3), "weights of a large batch": (40, 800, 3)}[kind])
    tape = CPU.forward(p.cell, x, p.weights).tape
    dhT = np.ones((x.shape[1], 512), np.float32)
    return lambda: [CPU.backward(tape, None, (dhT, None)) for _ in range(9)]

def delay_of_ctrl_c(work, then):
    "The middle one of five: from the signal to the handler's KeyboardInterrupt. Afterwards then() runs."
    delays = []
    for _ in range(5):
        sent = []
        def send():
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
        timer = threading.Timer(0.1, send)
        timer.start()
        try:
            work()
            raise SystemExit("finished before the signal: too short to tell")
        except KeyboardInterrupt:
            delays.append(time.monotonic() - sent[0])
        timer.join()
        then()
    return sorted(delays)[2]

def fork_beside(threads, times):
    "Forks while so many threads compute."
    stop = threading.Event()
    def loop():
        while not stop.is_set():
            check()
    threads = [threading.Thread(target=loop) for _ in range(threads)]
    for t in threads: t.start()
    for _ in range(times):
        in_child(check)
    stop.set()
    for t in threads: t.join()
    check()

def fork_in_a_handler():
    "The child lacks the other threads: its call fails, the next one works. The parent's call goes on."
    children = []
    call = long_forward(T=1500)
    signal.signal(signal.SIGALRM, lambda *_: children.append(os.fork()))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        call()
        failed = False
    except RuntimeError as error:
        assert "fork" in str(error)
        failed = True
    check()
    if children == [0]:
        os._exit(0 if failed else 1)
    assert not failed
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0

def in_child(what):
    "Runs what() in a forked child; its exit code, or a failure after ten seconds."
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            what()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(code)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, status
            return
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")

libm = ctypes.CDLL(None) if sys.platform == "darwin" else ctypes.CDLL("libm.so.6")

def set_control_word(word):  # the last field of x86-64's fenv_t
    environment = (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    environment[7] = word
    libm.fesetenv(environment)
"""


def python(code, limit=240, **environment):
    """Runs PRELUDE and the code in a fresh interpreter; its output. What takes longer hangs: under the
    sanitizers a long call takes a minute on a slow machine."""
    return interpreter.python(PRELUDE + textwrap.dedent(code), limit=limit, **environment)


x86 = pytest.mark.skipif("_core.testing.control_word() == 0", reason="reads MXCSR, which only x86-64 has")


# --- the interpreter lock and signals ----------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gil_is_released_in_kernels(direction):
    p = problem(lstm, 2, 1, 3, 512, dtype=np.float32)
    x = np.broadcast_to(p.x[:1], (1500, 1, 3))
    tape = CPU.forward(p.cell, x, p.weights, p.state0).tape
    work = {
        "forward": lambda: CPU.forward(p.cell, x, p.weights, p.state0, save=None),
        "backward": lambda: CPU.backward(tape, None, p.dstateT),
    }[direction]
    thread = threading.Thread(target=work)
    gaps, last = [], time.monotonic()
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    assert len(gaps) > 20, "too short to tell"
    assert max(gaps) < sum(gaps) / 2


@pytest.mark.parametrize(
    "kind", ["forward", "forward by rows", "backward", "weights of a large batch", "pack"]
)
def test_ctrl_c_is_honoured_within_100_ms(kind):
    out = python(
        f"""
        work = long_work({kind!r})
        for threads in (1, 2):
            _core.set_num_threads(threads)
            print(delay_of_ctrl_c(work, check))
        """
    )
    one, two = map(float, out.split())
    assert max(one, two) < 0.1


@pytest.mark.quick
def test_an_exception_of_a_signal_handler_comes_through_and_the_pool_works_on():
    python(
        """
        class Stop(Exception):
            pass
        def handler(*_):
            raise Stop("by the handler")
        signal.signal(signal.SIGALRM, handler)
        work = long_forward()
        live = _core.testing.arena()[0]
        for threads in (1, 2, 3):
            _core.set_num_threads(threads)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            try:
                work()
            except Stop as error:
                assert error.args == ("by the handler",)
            else:
                raise AssertionError("not interrupted")
            assert _core.testing.arena()[0] == live
            check()
        """
    )


def test_a_signal_handler_that_returns_changes_nothing():
    python(
        """
        calls = []
        signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
        work = long_forward(T=1500)
        plain = work()
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        interrupted = work()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert calls
        assert_bitwise_equal({"y": interrupted.y}, {"y": plain.y})
        """
    )


def test_a_signal_handler_may_call_a_kernel():
    python(
        """
        calls = []
        def handler(*_):
            check()
            calls.append(1)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        long_forward(T=1500)()
        assert calls
        check()
        """
    )


@x86
def test_a_signal_handler_finds_the_callers_control_word():
    python(
        """
        seen = []
        signal.signal(signal.SIGALRM, lambda *_: seen.append((_core.testing.control_word(), 1e-310 * 0.5)))
        for word in (0x1F80, 0x5F80):
            set_control_word(word)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            long_forward(T=1500)()
            got, product = seen.pop()
            assert got & 0xFFC0 == word, hex(got)
            assert product > 0
        """
    )


# --- fork, processes, threads ------------------------------------------------------------------------------


@pytest.mark.quick
def test_fork_after_the_pool_is_warm():
    python("for _ in range(5): check(); in_child(check); check()")


def test_nested_fork():
    python(
        "check(); in_child(lambda: (in_child(check), check(), in_child(lambda: in_child(check)))); check()"
    )


def test_fork_without_a_call_before_it():
    python("in_child(check)", TEST_THREADS="1")


def test_fork_while_another_thread_computes():
    python("fork_beside(threads=3, times=20)")


def test_fork_in_a_signal_handler_within_a_kernel():
    python("fork_in_a_handler()")


@pytest.mark.quick
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_multiprocessing(method, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(
        PRELUDE
        + textwrap.dedent(
            f"""
            import multiprocessing
            def work(seed):
                results = run(CPU, problem(gru, 6, 40, 5, 33, seed, np.float32))
                return {{key: a.tobytes() for key, a in results.items()}}
            if __name__ == "__main__":
                here = [work(seed) for seed in range(6)]
                with multiprocessing.get_context({method!r}).Pool(2) as pool:
                    assert pool.map_async(work, range(6)).get(40) == here
            """
        )
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", script]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr


@pytest.mark.quick
def test_64_calling_threads_get_the_same_bits(threads):
    threads(3)
    ps = [
        problem(CELLS[k % len(CELLS)], 6, 20 + k % 7, 5, 17 + k % 3, k, np.float32, **EVERYTHING)
        for k in range(64)
    ]
    want = [run(CPU, p) for p in ps]
    start, errors = threading.Barrier(64), []

    def work(k):
        try:
            start.wait()
            for n in range(5):
                assert_bitwise_equal(run(CPU, ps[(k + n) % 64]), want[(k + n) % 64])
        except BaseException as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=work, args=(k,)) for k in range(64)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert not any(w.is_alive() for w in workers)
    assert not errors


@pytest.mark.quick
def test_threads_share_packed_weights_and_a_tape(threads):
    threads(2)
    p = problem(lstm, 6, 33, 5, 33, dtype=np.float32)
    packed = CPU.pack(p.cell, p.weights)
    want = run(CPU, p)
    tape = CPU.forward(p.cell, p.x, packed, p.state0).tape
    errors = []

    def work():
        try:
            for _ in range(10):
                y = CPU.forward(p.cell, p.x, packed, p.state0).y
                dx = CPU.backward(tape, p.dy, p.dstateT).dx
                assert_bitwise_equal({"y": y, "dx": dx}, {"y": want["y"], "dx": want["dx"]})
        except BaseException as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=work) for _ in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert not errors


def test_a_busy_pool_makes_nobody_wait():
    python(
        """
        work = long_forward(T=5000)
        done = []
        thread = threading.Thread(target=lambda: (work(), done.append(1)))
        thread.start()
        time.sleep(0.2)
        check()
        assert not done, "the long call ended first: too short to tell"
        thread.join()
        """
    )


# --- the floating-point control word -----------------------------------------------------------------------


@x86
def test_control_word_is_restored_whole_and_does_not_change_the_bits():
    """Rounding up, down, to zero, flushing, sticky flags: none of it comes in, none of it is lost."""
    python(
        """
        from itertools import product
        from problems import named
        words = (0x1F80, 0x1FBF, 0x9FC0, 0x5F80, 0x3F80, 0x7F80, 0xFFFF)
        cases = [problem(cell, 6, 40, 5, 33, dtype=dtype, biases="both", return_states=True)
                 for cell in CELLS
                 for dtype in (np.float32, np.float64)]
        for word, p in product(words, cases):
            plain = run(CPU, p)
            set_control_word(word)
            packed = CPU.pack(p.cell, p.weights)
            after_pack = _core.testing.control_word()
            forward = CPU.forward(p.cell, p.x, packed, p.state0, **p.options)
            after_forward = _core.testing.control_word()
            gradients = CPU.backward(forward.tape, p.dy, p.dstateT, p.dstates)
            after_backward = _core.testing.control_word()
            set_control_word(0x1F80)
            for after in (after_pack, after_forward, after_backward):
                assert after == word, (hex(word), hex(after))
            assert_bitwise_equal(named(p.cell, forward, gradients), plain)
        """
    )


@x86
def test_unmasked_exceptions_do_not_trap_in_kernels():
    python(
        """
        p = problem(lstm, 6, 40, 5, 33, dtype=np.float32)
        p.x[2] = np.inf
        plain = run(CPU, p)
        assert np.isnan(plain["dx"]).any()
        set_control_word(0x1F80 & ~0x0680)  # invalid, division by zero, overflow
        forward = CPU.forward(p.cell, p.x, p.weights, p.state0)
        gradients = CPU.backward(forward.tape, p.dy, p.dstateT)
        word = _core.testing.control_word()
        set_control_word(0x1F80)
        assert word == 0x1F80 & ~0x0680, hex(word)
        assert_bitwise_equal({"y": forward.y, "dx": gradients.dx}, {"y": plain["y"], "dx": plain["dx"]})
        """
    )


def test_import_and_calls_leave_numpys_subnormals_alone():
    """finfo warns, and warnings are errors, where subnormals are flushed."""
    python(
        """
        import warnings
        warnings.simplefilter("error")
        check()
        import fusedrnn
        for dtype in (np.float32, np.float64):
            smallest = np.finfo(dtype).smallest_subnormal
            assert smallest > 0 and smallest * dtype(0.5) == 0
            assert np.finfo(dtype).smallest_normal * dtype(0.5) > 0
        """
    )


@pytest.mark.quick
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_subnormal_input_is_not_slow(cell, threads):
    """At most 3 times the time of ordinary numbers; the hardware takes 20 and more where they are not
    flushed.
    """
    threads(1)
    p = problem(cell, 20, 16, 16, 64, dtype=np.float32)
    tiny = np.float32(1e-40)
    weights = {n: w * tiny for n, w in p.weights.items()}

    def seconds(x, w, dy):
        best = np.inf
        for _ in range(7):
            start = time.perf_counter()
            CPU.backward(CPU.forward(cell, x, w).tape, dy)
            best = min(best, time.perf_counter() - start)
        return best

    ordinary = seconds(p.x, p.weights, p.dy)
    assert seconds(p.x * tiny, p.weights, p.dy * tiny) < 3 * ordinary
    assert seconds(p.x, weights, p.dy * tiny) < 3 * ordinary


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_flushing_subnormals_can_be_switched_off(dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    one = np.ones((1, 1), dtype)
    w = {"weight_ih": one, "weight_hh": np.zeros((1, 1), dtype)}
    x = np.full((3, 2, 1), 5 * tiny)

    def results():
        forward = CPU.forward(rnn.with_options(relu=True), x, w)
        return forward.y, CPU.backward(forward.tape, np.full((3, 2, 1), tiny)).dweights["weight_hh"]

    try:
        assert not results()[0].any()
        _core.set_flush_subnormals(False)
        assert (results()[0] == x).all()
    finally:
        _core.set_flush_subnormals(True)
    assert not results()[0].any()


# --- sizes and memory --------------------------------------------------------------------------------------


def huge(shape, dtype=np.float32):
    """An array of any size: one element seen over and over."""
    strides = (0,) * (len(shape) - 1) + (np.dtype(dtype).itemsize,)
    return np.lib.stride_tricks.as_strided(np.zeros(max(shape[-1], 1), dtype), shape, strides)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("T", "B"), [(2**45, 1), (1, 2**45), (2**30, 2**28), (2**57, 2), (2, 2**57), (2**58, 1)]
)
@pytest.mark.parametrize("cell", [lstm, rnn], ids=name)
def test_sizes_beyond_memory_are_an_error(cell, T, B):
    p = problem(cell, 2, 3, 1, 7, dtype=np.float32)
    want = run(CPU, p)
    for options in ({}, {"return_states": True}, {"save": None}):
        with pytest.raises((MemoryError, OverflowError, ValueError)) as error:
            kernels.forward(cell, huge((T, B, 1)), p.weights, backend="cpu", **options)
        assert str(error.value)
    assert_bitwise_equal(run(CPU, p), want)


def test_weights_beyond_memory_are_an_error():
    H = 2**24
    w = {"weight_ih": huge((H, 8)), "weight_hh": huge((H, H))}
    for call in (lambda: CPU.pack(rnn, w), lambda: CPU.forward(rnn, huge((2, 2, 8)), w)):
        with pytest.raises((MemoryError, OverflowError)) as error:
            call()
        assert str(error.value)


def test_many_steps_without_rows_take_no_time():
    """B = 0 is legal, so T may be anything: nothing is walked through."""
    p = problem(gru, 2, 1, 3, 7, dtype=np.float32)
    start = time.monotonic()
    forward = CPU.forward(gru, np.empty((2**40, 0, 3), np.float32), p.weights)
    gradients = CPU.backward(forward.tape, np.empty((2**40, 0, 7), np.float32))
    assert time.monotonic() - start < 2
    assert forward.y.shape == (2**40, 0, 7)
    assert gradients.dx.shape == (2**40, 0, 3)
    assert not gradients.dweights["weight_hh"].any()


@pytest.mark.parametrize("save", ["all", "boundary_states", None])
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_every_failing_allocation_is_a_memory_error_and_leaks_nothing(cell, save):
    p = problem(cell, 6, 20, 5, 33, dtype=np.float32, **EVERYTHING)
    want = run(CPU, p)

    def work():
        forward = CPU.forward(cell, p.x, p.weights, p.state0, **p.options, save=save)
        if save is not None:
            CPU.backward(forward.tape, p.dy, p.dstateT, p.dstates)

    gc.collect()
    live = _core.testing.arena()[0]
    failed = 0
    try:
        while True:
            _core.testing.fail_allocation_after(failed)
            try:
                work()
                break
            except MemoryError as error:
                assert "bytes" in str(error)  # noqa: PT017
                failed += 1
            _core.testing.fail_allocation_after(-1)
            assert _core.testing.arena()[0] == live
            assert_bitwise_equal(run(CPU, p), want)
    finally:
        _core.testing.fail_allocation_after(-1)
    assert failed >= (2 if save is None else 4)  # weights, scratch; tape and scratch of backward
    assert _core.testing.arena()[0] == live


def test_the_cache_of_memory_is_bounded_and_can_be_given_back():
    run(CPU, problem(lstm, 50, 64, 5, 64, dtype=np.float32))
    gc.collect()
    _, cached, limit = _core.testing.arena()
    assert 0 < cached <= limit
    _core.testing.trim_arena()
    assert _core.testing.arena()[1] == 0
