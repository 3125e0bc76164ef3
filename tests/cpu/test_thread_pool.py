"""Kernels on the threads of PyTorch's OpenMP: the same bits, signals, forks and callers as on our own pool.

The region itself is tested without Python by tests/cpu/test_threads_cpp.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap

import pytest

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import cli
from fusedrnn.threads import get_thread_pool, set_thread_pool
from test_robustness import python

pytestmark = pytest.mark.alone
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")

SETUP = """
import warnings
warnings.simplefilter("ignore")  # of PyTorch's import
import torch
from fusedrnn.threads import get_thread_pool, set_num_threads, set_thread_pool
torch.set_num_threads(2)
numbers = torch.ones(1_000_000)
numbers.sum()  # starts PyTorch's threads
set_thread_pool("openmp")

def threads_named(name):
    tasks = [f"/proc/self/task/{task}/comm" for task in os.listdir("/proc/self/task")]
    return sum(open(task).read().strip() == name for task in tasks)
"""


def on_openmp(code, **options):
    """Runs the code as ``python`` does, on two threads of PyTorch's OpenMP."""
    return python(SETUP + textwrap.dedent(code), **options)


@needs_torch
def test_the_same_bits_on_both_thread_pools():
    on_openmp(
        """
        from problems import CELLS
        everything = dict(lengths=True, reset=True, return_states=True)
        for cell in CELLS:  # by rows, by units, one row, several chunks
            for size in ((9, 37, 5, 33), (3, 3, 150, 290), (40, 1, 20, 130), (130, 40, 3, 17)):
                p = problem(cell, *size, dtype=np.float32, **everything)
                set_thread_pool("own")
                set_num_threads(1)
                want = run(CPU, p)
                set_thread_pool("openmp")
                for threads in (2, 7):  # 7: more than the team has
                    set_num_threads(threads)
                    numbers.sum()
                    assert_bitwise_equal(run(CPU, p), want)
        """
    )


@needs_torch
@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_the_openmp_team_starts_no_threads_and_the_own_pool_is_as_before():
    on_openmp(
        """
        before = set(os.listdir("/proc/self/task"))
        for _ in range(5):
            check()
            numbers.sum()
        assert set(os.listdir("/proc/self/task")) == before
        torch.set_num_threads(4)
        numbers.sum()
        four = set(os.listdir("/proc/self/task"))
        set_num_threads(2)  # of a team of four: the other two stay for PyTorch
        for _ in range(5):
            check()
            numbers.sum()
        assert set(os.listdir("/proc/self/task")) == four
        assert threads_named("fusedrnn") == 1  # from before the switch
        set_thread_pool("own")
        set_num_threads(3)
        check()
        assert threads_named("fusedrnn") == 2
        """
    )


@needs_torch
def test_ctrl_c_is_honoured_within_100_ms():
    out = on_openmp(
        """
        for kind in ("forward", "forward by rows", "backward"):
            print(delay_of_ctrl_c(long_work(kind), lambda: (check(), numbers.sum())))
        """
    )
    delays = [float(line) for line in out.splitlines()]
    assert len(delays) == 3
    assert max(delays) < 0.1


@needs_torch
def test_a_signal_handler_may_raise_or_call_kernels_and_pytorch():
    on_openmp(
        """
        class Stop(Exception):
            pass
        def stop(*_):
            raise Stop
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            long_forward()()
            raise SystemExit("not interrupted")
        except Stop:
            check()
        calls = []
        def call(*_):
            check()
            calls.append(float(numbers.sum()))
        signal.signal(signal.SIGALRM, call)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        long_forward(T=1500)()
        assert calls == [1_000_000]
        check()
        """
    )


@needs_torch
def test_a_forked_child_is_on_its_own_threads():
    on_openmp(
        """
        def child():
            assert get_thread_pool() == "own"
            check()
            try:
                set_thread_pool("openmp")
                raise SystemExit("accepted")
            except RuntimeError as error:
                assert "forked" in str(error), error
            set_thread_pool("own")
            in_child(check)
        for _ in range(3):
            check()
            numbers.sum()
            in_child(child)
            assert get_thread_pool() == "openmp"
        check()
        """
    )


@needs_torch
def test_fork_while_another_thread_computes():
    on_openmp("fork_beside(threads=1, times=5)")


@needs_torch
def test_fork_in_a_signal_handler_within_a_kernel():
    on_openmp("fork_in_a_handler()")


@needs_torch
def test_several_python_threads_at_once_and_threads_that_differ_from_one_call_to_the_next():
    """More threads than PyTorch is set to, fewer, and one; PyTorch's number grows and shrinks."""
    on_openmp(
        """
        errors = []
        def work():
            try:
                torch.set_num_threads(2)
                for _ in range(5):
                    check()
                    numbers.sum()
            except BaseException as error:
                errors.append(error)
        for count in (2, 8):
            threads = [threading.Thread(target=work) for _ in range(count)]
            for t in threads: t.start()
            for t in threads: t.join()
            assert not errors, errors
        check()
        for team in (1, 4, 2, 3):
            torch.set_num_threads(team)
            for threads in (1, 2, 3, 9):
                set_num_threads(threads)
                check()
                numbers.sum()
        """
    )


def test_without_openmp_it_says_what_is_missing():
    python(
        """
        from fusedrnn.threads import get_thread_pool, set_thread_pool
        assert get_thread_pool() == "own"
        try:
            set_thread_pool("openmp")
            raise SystemExit("accepted")
        except RuntimeError as error:
            for word in ("OpenMP", "load", "torch"):
                assert word in str(error), error
        assert get_thread_pool() == "own"
        set_thread_pool("own")
        check()
        """
    )


@pytest.mark.parametrize("bad", [None, True, 1, b"own"], ids=repr)
def test_a_thread_pool_of_another_type_is_refused(bad):
    with pytest.raises(TypeError, match=rf"pool: expected 'own' or 'openmp', got {type(bad).__name__}"):
        set_thread_pool(bad)


@pytest.mark.parametrize("bad", ["", "OpenMP", "pool"])
def test_another_thread_pool_is_refused(bad):
    with pytest.raises(ValueError, match=rf"pool: expected 'own' or 'openmp', got '{bad}'"):
        set_thread_pool(bad)
    assert get_thread_pool() == "own"


def test_info_names_the_thread_pool(capsys):
    set_thread_pool("own")
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("threads ") and line.endswith(", own thread pool") for line in lines)
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["thread_pool"] == "own"
