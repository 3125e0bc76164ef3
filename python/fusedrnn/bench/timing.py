"""How time is taken: libraries interleaved, threads alike for everybody; the rate of the matrix product."""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn import system
from fusedrnn.bench.libraries import not_installed
from fusedrnn.threads import get_num_threads, set_num_threads

# Seconds before a library is timed, until the threads of the one before, which go on spinning after their
# last call, have fallen asleep. OpenMP's do after 20 ms, those of NumPy's OpenBLAS after more than 100. After
# ONNX Runtime's, a small call on two threads took 4 times as long for up to 70 ms.
SETTLE = 0.1
SETTLE_AFTER_BLAS = 0.3
BLAS_USERS = ("dezero", "reference")


def time_blocks(
    runs: dict[str, Callable[[], Any]],
    blocks: int,
    seconds: float,
    limit: float,
    clock: Callable[[], float] = time.perf_counter,
    settle: float = SETTLE,
) -> dict[str, list[float]]:
    """Seconds per call of each library in each block, the libraries interleaved.

    A block is about ``seconds`` long for each. One whose blocks would take more than ``limit`` together takes
    part in fewer of them, but at least in three.

    Args:
        clock: What tells the time; that of a GPU waits until its work is done.
        settle: Seconds that a library runs before each block, which do not count.
    """
    count, share = {}, {}
    for name, run in runs.items():
        run()
        start = clock()
        run()
        once = clock() - start
        count[name] = max(1, round(seconds / once))
        share[name] = min(blocks, max(3, int(limit / (once * (count[name] + 1)))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    before = names[-1]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for block in range(blocks):
            turn = block % len(names)
            for name in names[turn:] + names[:turn]:
                if block >= share[name]:
                    continue
                run = runs[name]
                # Not counted: caches fill, others threads fall asleep; each runs as in its own program.
                settled = clock() + (SETTLE_AFTER_BLAS if before in BLAS_USERS else settle)
                before = name
                while clock() < settled:
                    run()
                start = clock()
                for _ in range(count[name]):
                    run()
                samples[name].append((clock() - start) / count[name])
    finally:
        if collecting:
            gc.enable()
    return samples


def speedup(run: Callable[[], Any], other: Callable[[], Any]) -> float:
    """How many times faster the other is, roughly: both in turn, the least of two times each."""
    count = 1
    best = {run: math.inf, other: math.inf}
    for _ in range(2):
        for each in best:
            start = time.perf_counter()
            for _ in range(count):
                each()
            best[each] = min(best[each], (time.perf_counter() - start) / count)
        count = max(1, round(0.02 / min(best.values())))
    return best[run] / best[other]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over the blocks of theirs / ours; a slow library has fewer of them."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=False))


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


@contextmanager
def same_threads(threads: int | None) -> Iterator[int]:
    """Everybody on ``threads`` threads (None: as many as we take by ourselves), and afterwards as before.

    NumPy's BLAS only with threadpoolctl. ONNX Runtime and JAX are told when they are set up.
    """
    ours = get_num_threads()
    used = ours if threads is None else threads
    with ExitStack() as after:
        after.callback(set_num_threads, ours)
        set_num_threads(used)
        if not_installed("PyTorch", "torch") is None:
            import torch

            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(used)
        if not_installed("threadpoolctl", "threadpoolctl") is None:
            pools: Any = importlib.import_module("threadpoolctl")
            after.enter_context(pools.threadpool_limits(limits=used, user_api="blas"))
        yield used


def blas_threads() -> int | None:
    """The number of threads of NumPy's BLAS; that of the cores where nobody can tell."""
    counts = []
    if not_installed("threadpoolctl", "threadpoolctl") is None:
        pools: Any = importlib.import_module("threadpoolctl")
        counts = [pool["num_threads"] for pool in pools.threadpool_info() if pool["user_api"] == "blas"]
    return max(counts, default=os.cpu_count())


class Others:
    """How much of the machine's cores everybody else took since this was made."""

    def __init__(self) -> None:
        self.start = self.read()

    @staticmethod
    def read() -> tuple[float, float] | None:
        """Seconds of all cores together: used by others, and passed; None where it cannot be told."""
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:  # not Linux
            return None
        user, nice, system, idle, waiting, *more = (n / os.sysconf("SC_CLK_TCK") for n in ticks)
        used = user + nice + system + sum(more)  # interrupts, and what the host took
        return used - sum(os.times()[:4]), used + idle + waiting

    def share(self) -> float | None:
        """From 0 to 1; None where it cannot be told."""
        now = self.read()
        if now is None or self.start is None:
            return None
        # Differences of large numbers are rounded, and a share of all would come out as a little more.
        share = (now[0] - self.start[0]) / max(now[1] - self.start[1], 1e-9)
        return min(max(0.0, share), 1.0)


def transfer(threads: int) -> float | None:
    """Seconds for a cache line to get from one thread to another; None where it cannot be told.

    On a virtual machine it changes while a benchmark runs: from 30 to 165 ns, when the host moves one of two
    cores to another cache. Threads that share data are then slower, our backward pass by up to two times.
    """
    try:
        from fusedrnn._core import testing

        return min(testing.time_transfers(2000) for _ in range(5)) if threads > 1 else None
    except (ImportError, RuntimeError):  # not built; there is no second thread
        return None


def numpy_rates(dtype: str, sizes: Sequence[int]) -> None:
    """Print the rates of NumPy's products in GFLOP/s, as JSON: what another process does for ``Gemm``."""
    draw = np.random.default_rng(0)
    rates = {}
    for size in sizes:
        a, b = draw.standard_normal((2, size, size)).astype(dtype)
        out = np.empty_like(a)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            np.matmul(a, b, out)
            seconds.append(time.perf_counter() - start)
        rates[size] = 2.0 * size**3 / min(seconds) / 1e9
    print(json.dumps(rates))


class Gemm:
    """The rate of the square matrix product, the measure of all others: the best that was seen of PyTorch's
    and of NumPy's (where its threads are as many as everybody's) at each size.

    OpenBLAS may not know a processor and then leaves its AVX-512 unused, and MKL does so on some makes; so
    NumPy also takes part in processes in which OpenBLAS is told to use it.
    """

    CORE = "SkylakeX"  # OpenBLAS's name for AVX-512

    def __init__(self, dtype: str, threads: int, sizes: Sequence[int] = (2048, 4096)) -> None:
        self.dtype, self.threads, self.sizes = dtype, threads, sizes
        self.best: dict[str, float] = {}
        self.runs: dict[tuple[str, int], Callable[[], Any]] = {}
        low = dtype == "bfloat16"  # which NumPy has not
        self.told = "avx512" in system.info()["detected"] and not low
        draw = np.random.default_rng(0)
        numpy_alike = blas_threads() == threads and not low
        for size in sizes:
            a, b = draw.standard_normal((2, size, size)).astype("float32" if low else dtype)
            if numpy_alike:
                out = np.empty_like(a)
                self.runs["NumPy", size] = partial(np.matmul, a, b, out)
            if not_installed("PyTorch", "torch") is None:
                import torch

                kind = getattr(torch, dtype)
                left, right, result = (torch.from_numpy(m).to(kind) for m in (a, b, np.empty_like(a)))
                self.runs["PyTorch", size] = partial(torch.mm, left, right, out=result)

    def measure(self) -> None:
        """Measure all once more; a run does this several times, and the fastest counts."""
        for (who, size), run in self.runs.items():
            start = time.perf_counter()
            run()
            self.note(f"{who} {size}", 2.0 * size**3 / (time.perf_counter() - start) / 1e9)
        if self.told:
            code = f"from fusedrnn.bench import timing; timing.numpy_rates({self.dtype!r}, {[*self.sizes]})"
            wanted = {"OPENBLAS_CORETYPE": self.CORE, "OPENBLAS_NUM_THREADS": str(self.threads)}
            done = subprocess.run(
                [sys.executable, "-c", code], env=os.environ | wanted, capture_output=True, text=True
            )
            for size, rate in json.loads(done.stdout or "{}").items():
                self.note(f"NumPy with OPENBLAS_CORETYPE={self.CORE} {size}", rate)

    def note(self, name: str, rate: float) -> None:
        """Keep the best."""
        self.best[name] = max(rate, self.best.get(name, 0.0))

    @property
    def rate(self) -> float | None:
        """GFLOP/s; None where nobody could be measured."""
        return max(self.best.values(), default=None)
