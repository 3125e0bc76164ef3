"""One check on a GPU: python bench/gpu_check.py NAME [ARGUMENT ...], as bench/gpu.py runs it.

The last line printed says what was found; where it is wrong, the exit status is 1 and that line the error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by it
import numpy as np

from fusedrnn import backends, problems
from fusedrnn.backends.cuda import CudaBackend
from fusedrnn.backends.protocol import Array
from fusedrnn.bench.libraries import check
from fusedrnn.bench.peer_torch import FusedLayer, Place, Torch
from fusedrnn.cells import CELLS, lstm, rnn
from fusedrnn.cuda import as_cupy, as_numpy
from fusedrnn.gradcheck.oracle import GRADIENT
from fusedrnn.problems import Case, Data, Shape

SMALL, WIDER = Shape(7, 9, 5, 75), Shape(64, 17, 33, 101)  # which every kernel variant can run
LIMIT = GRADIENT | {"float16": 4e-3, "bfloat16": 3e-2}  # of 16 bits four eps: h is rounded in every step


def problem(shape: Shape, cell: str = "lstm", dtype: str = "float32", seed: int = 0) -> Data:
    """NumPy's arrays, with states that are not zero and a gradient for every output."""
    return problems.make(Case(CELLS[cell], shape, "step"), np.dtype(dtype), seed)


def results(of: Any, data: Data, put: Callable[[Array], Any] | None = None) -> dict[str, Array]:
    """Every output and gradient of a call, of copies of the arrays on the GPU or as ``put`` makes them."""
    put, states = put or as_cupy, data.case.cell.states
    weights = {n: put(w) for n, w in data.weights[0].items()}
    out = of.forward(data.case.cell, put(data.x), weights, tuple(put(s[0]) for s in data.state0 or ()))
    back = of.backward(out.tape, put(data.dy), tuple(put(s[0]) for s in data.dstateT))
    found = {"y": out.y, "dx": back.dx} | dict(zip(states, out.stateT, strict=True))
    found |= {f"d{n}": s for n, s in zip(states, back.dstate0, strict=True)}
    found |= {f"d{n}": w for n, w in back.dweights.items()}
    return {name: as_numpy(a) for name, a in found.items()}


def same(expected: dict[str, Array], got: dict[str, Array], what: str) -> None:
    """An error where any bit differs."""
    for name, a in expected.items():
        if not np.array_equal(a, got[name]):
            raise AssertionError(f"{what}: {name} has other bits")


def gradients(kernel: str, cell: str, dtype: str) -> str:
    """A small call by one kernel variant beside the reference on the same numbers."""
    of, data = CudaBackend(kernel=kernel), problem(SMALL, cell, dtype)
    exact = results(backends.get("reference"), problems.astype(data, np.longdouble), np.asarray)
    return f"off by {check(kernel, results(of, data), exact, LIMIT[dtype]):.1e}; {of.last_plan}"


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
    """A layer's forward pass in a graph that PyTorch captures."""
    import torch

    from fusedrnn import torch as fused

    layer, x = fused.LSTM(33, 129, device="cuda"), torch.randn(64, 17, 33, device="cuda")
    with torch.no_grad():
        layer(x)  # compiles and tests
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        if not torch.equal(y, layer(x)[0]):
            raise AssertionError("the graph gives other bits than a call")
    return "the same bits"


def memory() -> str:
    """Flat over calls of mixed sizes."""
    import cupy

    of, rng, end = CudaBackend(), np.random.default_rng(0), time.monotonic() + 30
    used: list[float] = []
    while len(used) < 5000 and (len(used) < 301 or time.monotonic() < end):
        results(of, problem(Shape(*map(int, rng.integers(1, (20, 40, 40, 200))))))
        used.append(cupy.get_default_memory_pool().total_bytes() / 2**20)
    said = f"{used[300]:.1f} MiB after 300 calls, {used[-1]:.1f} after {len(used)}"
    if used[-1] > 1.5 * used[300]:  # sizes are random: some late one may be the largest
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
    """Finite at the ends of what numbers of 16 and 32 bits count, where there is the memory."""
    import cupy

    T, B, I, H = map(int, numbers)
    weights = {n: as_cupy(w) for n, w in problem(Shape(1, 1, I, H), "rnn").weights[0].items()}
    draw = cupy.random.default_rng(0).standard_normal
    try:
        out = CudaBackend().forward(rnn, draw((T, B, I), dtype=cupy.float32), weights)
        back = CudaBackend().backward(out.tape, draw((T, B, H), dtype=cupy.float32))
    except cupy.cuda.memory.OutOfMemoryError:
        return "not run: out of memory"
    for a in (out.y, back.dx, *back.dweights.values()):
        if not bool(cupy.isfinite(a).all()):
            raise AssertionError("not finite")
    return "finite"


def small(kernel: str) -> str:
    """Calls for compute-sanitizer, which slows them down a hundred times."""
    for cell in CELLS:
        results(CudaBackend(kernel=kernel), problem(SMALL, cell))
    return "three cells"


if __name__ == "__main__":
    print(globals()[sys.argv[1]](*sys.argv[2:]))
