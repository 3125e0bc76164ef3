"""One check on a GPU in a process of its own, so that one that fails or hangs takes no other with it.

    python bench/gpu_check.py NAME [ARGUMENT ...]

The last line printed says what was found; where it is wrong, the exit status is 1 and that line the error.
bench/gpu.py runs these.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import backends
from fusedrnn.backends.protocol import Weights
from fusedrnn.cells import CELLS
from fusedrnn.cuda import as_numpy
from fusedrnn.gradcheck import FORWARD, GRADIENT
from fusedrnn.problems import Case, Shape, make

SMALL = Shape(7, 5, 9, 37)  # no multiple of anything
OF_16_BITS, SLOW = Shape(20, 9, 7, 72), Shape(5, 9, 3, 40)
LARGER = Shape(50, 16, 64, 256)
WIDER = Shape(64, 17, 33, 101)  # than SMALL, and by every kernel variant


class Problem(NamedTuple):
    """Arrays of one kind, all that a call takes."""

    cell: Any
    x: Any
    weights: Weights
    state0: tuple[Any, ...]
    dy: Any
    dstateT: tuple[Any, ...]

    def map(self, put: Callable[[Any], Any]) -> Problem:
        """The same with every array mapped."""
        weights = Weights(*(None if w is None else put(w) for w in self.weights))
        state0, dstateT = (tuple(map(put, each)) for each in (self.state0, self.dstateT))
        return Problem(self.cell, put(self.x), weights, state0, put(self.dy), dstateT)


def problem(shape: Shape, cell: str = "lstm", dtype: Any = "float32", seed: int = 0) -> Problem:
    """NumPy's arrays, all of both signs: states that are not zero, a gradient for every output."""
    data = make(Case(CELLS[cell](), shape, "step"), dtype, seed)
    state0, dstateT = (tuple(s[0] for s in states) for states in (data.state0 or (), data.dstateT))
    return Problem(data.case.cell, data.x, data.weights[0], state0, data.dy, dstateT)


def put(a: Any) -> Any:
    """A copy in the GPU's memory."""
    import cupy

    return cupy.asarray(a)


def backend(kernel: str | None = None) -> Any:
    """The CUDA backend, with a kernel variant."""
    from fusedrnn.backends.cuda import CudaBackend

    return CudaBackend(kernel=kernel)


def results(of: Any, p: Problem) -> dict[str, Any]:
    """Every output and gradient of a call."""
    out = of.forward(p.cell, p.x, p.weights, p.state0)
    back = of.backward(out.tape, p.dy, p.dstateT)
    found = {"y": out.y, "dx": back.dx}
    found |= {f"{n}T": s for n, s in zip(p.cell.states, out.stateT, strict=True)}
    found |= {f"d{n}0": s for n, s in zip(p.cell.states, back.dstate0, strict=True)}
    return found | {f"d{n}": w for n, w in back.dweights._asdict().items() if w is not None}


def compare(of: Any, p: Problem, truth: Any, allowed: tuple[float, float] | None = None) -> str:
    """Beside another backend's results in long double, or in float64 where it has no more.

    Args:
        of: Whose results are looked at.
        p: NumPy's arrays.
        truth: The other backend.
        allowed: The largest difference, relative to the largest entry, of outputs and of gradients; None:
            what every backend is held to.
    """
    forward, gradient = allowed or (FORWARD[p.x.dtype.name], GRADIENT[p.x.dtype.name])
    wide = np.longdouble if truth.name == "reference" else np.float64
    got, want = results(of, p.map(put)), results(truth, p.map(lambda a: a.astype(wide)))
    worst = (0.0, "", 0.0)
    for name, expected in want.items():
        limit = gradient if name.startswith("d") else forward
        error = float(np.abs(as_numpy(got[name]).astype(wide) - expected).max() / np.abs(expected).max())
        if not error <= limit:
            raise AssertionError(f"{name} is off by {error:.1e} of its largest entry, allowed is {limit:.1e}")
        worst = max(worst, (error / limit, name, error))
    return f"worst {worst[1]}, off by {worst[2]:.1e}, {worst[0]:.0%} of what is allowed"


# --- right ------------------------------------------------------------------------------------------------


def variant(kernel: str) -> str:
    """A small call by one kernel variant, forward and backward, beside the reference."""
    of = backend(kernel)
    found = compare(of, problem(SMALL), backends.get("reference"))
    return f"{found}; {of.last_plan}"


def halves(kernel: str) -> str:
    """float16 and bfloat16 beside the reference on the same numbers."""
    import ml_dtypes

    found = []
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        limit = 4 * float(ml_dtypes.finfo(dtype).eps)  # h is rounded in every step
        for cell in CELLS:
            p = problem(OF_16_BITS, cell, dtype)
            said = compare(backend(kernel), p, backends.get("reference"), (limit, limit))
            found.append(f"{dtype} {cell} {said}")
    return "; ".join(found)


def cpu(cell: str) -> str:
    """A larger call in float64 beside the CPU backend, as the plan chooses to run it."""
    return compare(backend(), problem(LARGER, cell, "float64"), backends.usable("cpu"))


def api() -> str:
    """``fusedrnn.torch.LSTM`` on a CUDA tensor beside ``torch.nn.LSTM``."""
    import torch

    from fusedrnn.torch import LSTM

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    theirs, ours = (kind(9, 37, device="cuda") for kind in (torch.nn.LSTM, LSTM))
    ours.load_state_dict(theirs.state_dict())
    x, dy = torch.randn(7, 5, 9, device="cuda"), torch.randn(7, 5, 37, device="cuda")
    worst = 0.0
    grads = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        y, _ = layer(own)
        y.backward(dy)
        grads.append([y.detach(), own.grad, *(p.grad for p in layer.parameters())])
    if ours.last_path != "fused":
        raise AssertionError(f"PyTorch's own layer ran: {ours.last_path}")
    for a, b in zip(*grads, strict=True):
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    if not worst <= 1e-4:
        raise AssertionError(f"off by {worst:.1e} of the largest entry")
    return f"PyTorch {torch.__version__}, off by {worst:.1e}"


# --- promises ---------------------------------------------------------------------------------------------


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether all bits are the same."""
    return all(np.array_equal(as_numpy(a[name]), as_numpy(b[name])) for name in a)


def bits(kernel: str) -> str:
    """Run to run the same."""
    of, p = backend(kernel), problem(WIDER).map(put)
    first = results(of, p)
    wrong = sum(not same(first, results(of, p)) for _ in range(20))
    if wrong:
        raise AssertionError(f"{wrong} of 20 runs gave other bits; {of.last_plan}")
    return f"20 runs; {of.last_plan}"


def graphs() -> str:
    """The same bits from launches one by one, as they are recorded, and from the graph."""
    of, p = backend("steps"), problem(WIDER).map(put)
    packed = of.pack(p.cell, p.weights)
    again = []
    for _ in range(6):  # plain, recorded and repeated, repeated
        out = of.forward(p.cell, p.x, packed, p.state0)
        again.append({"y": out.y.get(), "dx": of.backward(out.tape, p.dy).dx.get()})
        del out  # so that the next call gets the same memory
    count = len(of.device._graphs)
    if not count or not all(same(again[0], one) for one in again):
        raise AssertionError(
            f"{count} graphs, and not the same bits in all of 6 calls" if count else "no graph"
        )
    return f"{count} graphs, 6 calls"


def captured() -> str:
    """A layer's forward pass in a graph that PyTorch captures."""
    import torch

    from fusedrnn.torch import LSTM

    layer, x = LSTM(33, 129, device="cuda"), torch.randn(64, 17, 33, device="cuda")
    with torch.no_grad():
        layer(x)  # compiles and tests
        torch.cuda.synchronize()
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

    of, rng, pool = backend(), np.random.default_rng(0), cupy.get_default_memory_pool()

    def mixed(count: int) -> None:
        for _ in range(count):
            T, B, I, H = (int(n) for n in rng.integers(1, (20, 40, 40, 200)))
            results(of, problem(Shape(T, B, I, H)).map(put))

    mixed(300)
    before, calls, end = pool.total_bytes(), 0, time.monotonic() + 30
    while calls < 5000 and time.monotonic() < end:
        mixed(100)
        calls += 100
    after = pool.total_bytes()
    said = f"{before / 2**20:.1f} MiB before {calls} calls, {after / 2**20:.1f} after"
    if after > 1.5 * before:  # sizes are random: some late one may be the largest
        raise AssertionError(said)
    return said


def threads() -> str:
    """Four threads, each on a stream of its own."""
    import cupy

    of = backends.get("cuda")
    problems = [problem(Shape(40, 8, 16, 64), seed=k).map(put) for k in range(4)]
    expected = [{n: a.get() for n, a in results(of, p).items()} for p in problems]
    wrong: list[str] = []

    def work(k: int) -> None:
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                for number in range(50):
                    got = results(of, problems[k])
                    stream.synchronize()
                    if not same(expected[k], got):
                        wrong.append(f"call {number} of thread {k}: other bits")
        except Exception as error:
            wrong.append(f"thread {k}: {error}")

    running = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    cupy.cuda.Device().synchronize()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if wrong:
        raise AssertionError(f"{len(wrong)} wrong: {wrong[0]}")
    return "200 calls"


def size(T: str, B: str, I: str, H: str) -> str:
    """Finite at the ends of what numbers of 16 and 32 bits count, where there is the memory."""
    import cupy

    shape = Shape(int(T), int(B), int(I), int(H))
    p = problem(shape._replace(T=1), "rnn").map(put)
    draw = cupy.random.default_rng(0).standard_normal
    x, dy = (draw((shape.T, shape.B, n), dtype=cupy.float32) for n in (shape.I, shape.H))
    try:
        out = results(backend(), p._replace(x=x, dy=dy))
    except cupy.cuda.memory.OutOfMemoryError:
        return "not run: out of memory"
    for name, a in out.items():
        if not bool(cupy.isfinite(a).all()):
            raise AssertionError(f"{name} is not finite")
    return "finite"


def small(kernel: str) -> str:
    """Calls for compute-sanitizer, which slows them down a hundred times."""
    import cupy

    for cell in CELLS:
        results(backend(kernel), problem(SLOW, cell).map(put))
    cupy.cuda.Device().synchronize()
    return "three cells"


CHECKS: dict[str, Callable[..., str]] = {
    check.__name__: check
    for check in (variant, halves, cpu, api, bits, graphs, captured, memory, threads, size, small)
}


def main() -> None:
    """Run the one that the command line names."""
    name, *arguments = sys.argv[1:]
    print(CHECKS[name](*arguments))


if __name__ == "__main__":
    main()
