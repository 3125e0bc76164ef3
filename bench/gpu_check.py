"""One check on a GPU: python bench/gpu_check.py NAME [ARGUMENT ...], as bench/gpu.py runs it.

The last line printed says what was found; where it is wrong, the exit status is 1 and that line the error.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by it
import numpy as np

from fusedrnn import backends, gradcheck_suite, problems, system
from fusedrnn.backends.cuda import CudaBackend, cupy_device, nvrtc
from fusedrnn.backends.cuda.jobs import kernels_of
from fusedrnn.backends.cuda.nvrtc import KERNELS
from fusedrnn.backends.cuda.self_test import TOLERANCE
from fusedrnn.backends.protocol import Array, Unsupported
from fusedrnn.bench import cuda, table
from fusedrnn.bench.libraries import check
from fusedrnn.bench.peer_torch import FusedLayer, Place, Torch
from fusedrnn.bench.runner import OURS
from fusedrnn.cells import CELLS, lstm
from fusedrnn.cuda import as_cupy, as_numpy
from fusedrnn.gradcheck.oracle import GRADIENT
from fusedrnn.problems import Case, Data, Shape
from fusedrnn.terminal import plain_table

SMALL, WIDER = Shape(7, 9, 5, 75), Shape(64, 17, 33, 101)  # which every kernel variant can run
# Of 16 bits four eps, since h is rounded in every step; and by the precision of products in float32.
LIMIT = GRADIENT | {"float16": 4e-3, "bfloat16": 3e-2} | TOLERANCE
KINDS = ["float ieee", "double ieee", "Half fp16", "Bfloat16 bf16", "float tf32"]  # dtype and precision


def gpu() -> str:
    """The GPU, its driver, and the versions of what runs on it."""
    reason = cupy_device.unavailable()
    if reason is None:
        return str(system.gpu())  # None: nvidia-smi is missing
    if reason.startswith("there is no NVIDIA") and not Path("/dev/nvidia0").exists():
        return reason
    raise RuntimeError(reason)  # one that is there, but cannot be used


def cubins(which: str, architecture: str = "") -> str:
    """By NVRTC on all cores what checks need: "first" for an LSTM in float32, or "all"."""
    if not architecture:
        architecture = "sm_90" if cupy_device.unavailable() else cupy_device.current().architecture
    cells, kinds, regularized = [lstm], KINDS[:1], [False]
    if which == "all":
        cells, kinds, regularized = list(gradcheck_suite.variants().values()), KINDS, [False, True]
        cells += [cell.with_options(layer_norm=True) for cell in cells if "layer_norm" in cell.options]
    jobs = set()
    for cell, acts, kind in itertools.product(cells, regularized, kinds):
        with contextlib.suppress(Unsupported):
            kernels = kernels_of(cell, acts)
            code = nvrtc.Code(kernels.type, *kind.split())
            jobs |= {(code, architecture, v) for v in (KERNELS if kernels.whole else ("steps",))}
    before, cores = len(list(nvrtc.folder().glob("*.cubin"))), len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(nvrtc.cubin, *zip(*jobs, strict=True)))  # an error is NVRTC's own
    new = len(list(nvrtc.folder().glob("*.cubin"))) - before
    return f"{new} of {len(jobs)} files now, {architecture} by NVRTC {nvrtc.version()}"


def problem(shape: Shape, cell: str = "lstm", dtype: str = "float32", seed: int = 0) -> Data:
    """NumPy's arrays, with states that are not zero and a gradient for every output."""
    return problems.make(Case(CELLS[cell], shape, "step"), np.dtype(dtype), seed)


def results(of: Any, data: Data, put: Any = None, get: Any = as_numpy) -> dict[str, Array]:
    """Every output and gradient of a call; ``put`` and ``get`` bring arrays to where it runs, and back."""
    put, states = put or as_cupy, data.case.cell.states
    weights = {n: put(w) for n, w in data.weights[0].items()}
    out = of.forward(data.case.cell, put(data.x), weights, tuple(put(s[0]) for s in data.state0 or ()))
    back = of.backward(out.tape, put(data.dy), tuple(put(s[0]) for s in data.dstateT))
    found = {"y": out.y, "dx": back.dx} | dict(zip(states, out.stateT, strict=True))
    found |= {f"d{n}": s for n, s in zip(states, back.dstate0, strict=True)}
    found |= {f"d{n}": w for n, w in back.dweights.items()}
    return {name: get(a) for name, a in found.items()}


def same(expected: dict[str, Array], got: dict[str, Array], what: str) -> None:
    """An error where any bit differs."""
    for name, a in expected.items():
        if not np.array_equal(a, got[name]):
            raise AssertionError(f"{what}: {name} has other bits")


def gradients(kernel: str, cell: str, dtype: str, precision: str | None = None) -> str:
    """A small call by one kernel variant beside the reference on the same numbers."""
    of, data = CudaBackend(kernel=kernel, precision=precision), problem(SMALL, cell, dtype)
    exact = results(backends.get("reference"), problems.astype(data, np.longdouble), np.asarray)
    error = check(kernel, results(of, data), exact, LIMIT[precision or dtype])
    return f"off by {error:.1e}; {of.last_plan}"


def cpu(cell: str) -> str:
    """A larger call beside the CPU backend, as the plan chooses to run it."""
    of, data = CudaBackend(), problem(Shape(50, 16, 64, 256), cell, "float64")
    exact = results(backends.usable("cpu"), data, np.asarray)
    return f"off by {check(cell, results(of, data), exact, LIMIT['float64']):.1e}; {of.last_plan}"


def api() -> str:
    """``fusedrnn.torch.LSTM`` on CUDA tensors beside ``torch.nn.LSTM`` in float64."""
    data = problems.make(Case(lstm, SMALL), "float32")
    ours, theirs = FusedLayer(data, 1, Place("cuda")), Torch(data, 1, Place("cuda", "float64"))
    error = check("fusedrnn", ours.results(), theirs.results(), 1e-4)
    if ours.path != "fused":
        raise AssertionError(f"PyTorch's own layer ran: {ours.path}")
    return f"off by {error:.1e}"


def bits(kernel: str) -> str:
    """The same from run to run; steps one by one, as they are recorded, and from the graph."""
    of: Any = CudaBackend(kernel=kernel)
    data = problem(WIDER)
    expected = results(of, data)
    for number in range(60):  # with the memory of those before, and so from graphs
        same(expected, results(of, data), f"run {number}, {of.last_plan}")
    graphs = len(of.device._graphs)
    if kernel == "steps" and not graphs:
        raise AssertionError("no graph")
    return f"60 runs, {graphs} graphs; {of.last_plan}"


def captured() -> str:
    """A layer forward and back in a graph that PyTorch captures."""
    import torch

    from fusedrnn import torch as fused

    layer = fused.LSTM(33, 129, device="cuda")
    x = torch.randn(64, 17, 33, device="cuda", requires_grad=True)

    def call() -> tuple[Any, ...]:
        y, _ = layer(x)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], y.detach())

    call()  # compiles and tests
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for number, (a, b) in enumerate(zip(found, call(), strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"result {number}: the graph gives other bits than a call")
    return "the same bits"


def memory() -> str:
    """Flat over 10,000 calls of 50 sizes, from the first 1,000 on: CuPy's, and that of the process."""
    import cupy

    draw, ways = np.random.default_rng(0), (CudaBackend(), CudaBackend(kernel="steps"))
    sizes = draw.integers(1, (20, 40, 40, 200), (25, 4)).tolist()
    calls = [(of, problem(Shape(*each))) for each in sizes for of in ways]

    def used() -> Array:
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return np.array([cupy.get_default_memory_pool().total_bytes(), process]) / 2**20

    for number in range(10_000):
        results(*calls[number % len(calls)])
        if number == 1000:
            begin = used()
    said = f"CuPy and process: {begin} MiB after 1,000 calls, {used()} after 10,000"
    if max(used() - begin) > 64:
        raise AssertionError(said)
    return said


def threads() -> str:
    """Four threads, each on a stream of its own."""
    import cupy

    of, given = CudaBackend(), [problem(Shape(40, 8, 16, 64), seed=k) for k in range(4)]
    expected = [results(of, data) for data in given]

    def work(k: int) -> None:
        with cupy.cuda.Stream(non_blocking=True):
            for number in range(50):
                same(expected[k], results(of, given[k]), f"call {number} of thread {k}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    return "200 calls"


def size(*numbers: str) -> str:
    """At the ends of what 16 and 32 bits count: a batch of one row, B times, beside that row on the CPU."""
    import cupy

    T, B, I, H = map(int, numbers)
    one = problem(Shape(T, 1, I, H), "rnn")
    exact = results(backends.usable("cpu"), one, np.asarray)

    def rows(a: Array) -> Any:
        return cupy.repeat(as_cupy(a), B, axis=1)

    states = {name: tuple(map(rows, getattr(one, name) or ())) for name in ("state0", "dstateT")}
    wide, worst = replace(one, x=rows(one.x), dy=rows(one.dy), **states), 0.0
    for name, a in results(CudaBackend(), wide, get=lambda a: a).items():
        want = as_cupy(exact[name])
        sums, times = (T * B, B) if name[1:] in one.weights[0] else (0, 1)  # of a weight's gradient
        error = float(abs(a - want * times).max() / abs(want).max()) / times
        limit = 1e-4 + sums * 2**-24  # equal terms, whose roundings are equal too
        if limit > 0.5:  # so long a sum in float32 may be anything
            continue
        if not error <= limit:
            raise AssertionError(f"{name} is off by {error:.1e} of its largest entry, not {limit:.0e}")
        worst = max(worst, error)
    return f"off by {worst:.1e}"


def small(kernel: str) -> str:
    """Calls for compute-sanitizer, which slows them down a hundred times."""
    import cupy

    cupy.cuda.set_allocator(None)  # every array by itself, so that memcheck knows its ends
    of = CudaBackend(kernel=kernel)
    for cell, dtype in itertools.product(CELLS, ("float32", "float16")):
        results(of, problem(SMALL, cell, dtype))
    return f"{len(CELLS)} cells"


def timing() -> str:
    """``fusedrnn bench --device cuda``, with few repetitions and as far as the time goes."""
    end, file = time.monotonic() + float(os.environ["SECONDS"]) - 20, Path(os.environ["OUT"], "timing.json")

    def go_on(report: dict[str, Any]) -> bool:
        new = file.with_suffix(".new")
        new.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(new, file)  # at once: this process may be stopped
        return time.monotonic() < end

    report = cuda.run(problems.SUITES["gpu"], suite="gpu", quick=True, go_on=go_on)
    rows = report["rows"]
    print(plain_table(*table(report)), *cuda.summary(report), sep="\n")
    print(plain_table(*cuda.goal_table(cuda.judge(rows)), left=2))
    broken = [row["case"] for row in rows if OURS in row["failed"]]
    if broken:
        raise AssertionError(f"{len(broken)} rows failed: {'; '.join(broken)}")
    return f"{sum(OURS in row['libraries'] for row in rows)} of {len(rows)} rows"


if __name__ == "__main__":
    print(globals()[sys.argv[1]](*sys.argv[2:]))
