"""Everything that needs a GPU, in one run of at most ten minutes: compile, check, time, write down.

    python bench/gpu.py                  all parts, into bench/results/gpu-NAME-DATE.json, and a table
    python bench/gpu.py checks timing    some parts

Needs PyTorch with CUDA and ``fusedrnn[cuda13]`` (or ``cuda12``); DeZero for one goal. A part that fails is
written down as failed, and the next one begins. What is timed is ``fusedrnn.bench.cuda``'s, as in ``fusedrnn
bench --device cuda``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.backends.cuda_plan import KERNELS

RESULTS = Path(__file__).parent / "results"
TOTAL = 570.0  # seconds


class Run:
    """What there is to write down, and how long there still is."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.found: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []  # of the timing
        self.epoch: float | None = None  # DeZero's time divided by ours

    def left(self) -> float:
        return self.end - time.monotonic()

    def part(self, name: str, work: Callable[[Run], Any]) -> None:
        """The part's results, or why there are none."""
        print(f"--- {name} ({self.left():.0f} s left)", flush=True)
        begin = time.monotonic()
        try:
            result = work(self) if self.left() > 0 else {"not run": "no time left"}
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"}
        self.found[name] = {"seconds": round(time.monotonic() - begin, 1), "result": result}


# --- what it is -------------------------------------------------------------------------------------------


def machine(run: Run) -> dict[str, Any]:
    """The GPU and every version that matters."""
    import cuda.bindings
    import cupy
    import torch

    from fusedrnn.backends import cuda_compile

    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory": facts.total_memory,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cupy": cupy.__version__,
        "cuda-bindings": cuda.bindings.__version__,
        "nvrtc": cuda_compile.version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output(["git", "rev-parse", "HEAD"]),
    }


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else f"failed: {done.stderr.strip()[-300:]}"


def to_compile(architecture: str) -> Iterator[tuple[str, str, str, str, str]]:
    """The arguments of ``cuda_compile.cubin`` of all that the parts run, but for layer norm and dropout."""
    from fusedrnn.backends.cuda_compile import DTYPE_PRECISIONS
    from fusedrnn.backends.cuda_jobs import kernels_of
    from fusedrnn.cells import GRU, LSTM, RNN

    for cell in (LSTM(), GRU(), RNN(), RNN(relu=True), GRU(reset_after=False)):
        kernels = kernels_of(cell)
        in_all = cell in (LSTM(), GRU(), RNN())
        for dtype, precision in (
            DTYPE_PRECISIONS if in_all else [pair for pair in DTYPE_PRECISIONS if pair[1] == "ieee"]
        ):
            for variant in KERNELS if kernels.whole else ("steps",):
                yield kernels.type, dtype, architecture, precision, variant


def prepared(run: Run) -> dict[str, float]:
    """That compiled on all cores, into the cache: one by one, as calls do it, it would take minutes."""
    import concurrent.futures
    import multiprocessing

    from fusedrnn.backends import cuda_compile, cuda_cupy

    jobs = list(to_compile(cuda_cupy.current().architecture))
    begin, workers = time.monotonic(), os.cpu_count() or 1
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        count = sum(1 for _ in pool.map(cuda_compile.cubin, *zip(*jobs, strict=True)))
    return {"files": count, "processes": workers, "seconds": round(time.monotonic() - begin, 1)}


def compiled(run: Run) -> dict[str, float]:
    """Seconds that NVRTC takes for each cell and dtype, of one for each precision and each kernel variant by
    itself, as calls compile them; nothing is cached."""
    import tempfile

    from fusedrnn.backends import cuda_compile, cuda_cupy
    from fusedrnn.backends.cuda_jobs import kernels_of
    from fusedrnn.cells import GRU, LSTM, RNN

    architecture, kept = cuda_cupy.current().architecture, os.environ.get("FUSEDRNN_CACHE")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUSEDRNN_CACHE"] = folder
        for cell in (RNN(), RNN(relu=True), LSTM(), GRU(), GRU(reset_after=False)):
            for dtype, precision in cuda_compile.DTYPE_PRECISIONS if cell == LSTM() else (("float", "ieee"),):
                for variant in KERNELS if (cell, precision) == (LSTM(), "ieee") else (None,):
                    begin = time.monotonic()
                    cuda_compile.cubin(kernels_of(cell).type, dtype, architecture, precision, variant)
                    found[f"{cell} {dtype} {precision} {variant or ''}".strip()] = round(
                        time.monotonic() - begin, 2
                    )
    os.environ.pop("FUSEDRNN_CACHE")
    if kept is not None:
        os.environ["FUSEDRNN_CACHE"] = kept
    return found


# --- right ------------------------------------------------------------------------------------------------


def checks(run: Run) -> dict[str, Any]:
    """``fusedrnn gradcheck`` of the CUDA backend, once for each kernel variant."""
    found = {}
    for kernel in KERNELS:
        command = [sys.executable, "-m", "fusedrnn", "gradcheck", "--backend", "cuda"]
        environment = {**os.environ, "FUSEDRNN_CUDA_KERNEL": kernel}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=max(1.0, min(45.0, run.left()))
        )
        lines = done.stdout.strip().splitlines()
        end = (lines or [""])[-1]
        found[kernel] = {"exit code": done.returncode, "end": end, "errors": done.stderr[-2000:]}
        print(kernel, found[kernel]["exit code"], found[kernel]["end"], flush=True)
    found["float16 and bfloat16"] = of_16_bits()
    return found


def of_16_bits() -> dict[str, float]:
    """The worst difference from the reference on the same numbers, in units of the dtype's precision, for
    each kernel variant: below 1 where all is right."""
    import cupy
    import ml_dtypes

    from fusedrnn.backends.cuda import CudaBackend
    from fusedrnn.backends.protocol import Weights
    from fusedrnn.backends.reference import ReferenceBackend
    from fusedrnn.cells import CELLS
    from fusedrnn.problems import Case, Shape, make

    def results(backend: Any, cell: Any, put: Callable[[Any], Any], data: Any) -> list[Any]:
        weights = Weights(*(None if w is None else put(w) for w in data.weights[0]))
        forward = backend.forward(cell, put(data.x), weights)
        gradients = backend.backward(forward.tape, put(data.dy))
        return [forward.y, *forward.stateT, gradients.dx, *(w for w in gradients.dweights if w is not None)]

    found = {}
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        for name in ("lstm", "gru", "rnn"):
            cell = CELLS[name]()
            data = make(Case(cell, Shape(20, 9, 7, 72)), "float64")
            truth = results(ReferenceBackend(), cell, lambda a, d=dtype: a.astype(d).astype(float), data)
            for kernel in KERNELS:
                put = lambda a, d=dtype: cupy.asarray(a.astype(d))  # noqa: E731
                got = results(CudaBackend(kernel=kernel), cell, put, data)
                worst = max(
                    float(np.abs(a.get().astype(float) - b).max() / np.abs(b).max())
                    for a, b in zip(got, truth, strict=True)
                )
                found[f"{dtype} {name} {kernel}"] = worst / float(ml_dtypes.finfo(dtype).eps)
    return found


class Small(NamedTuple):
    """A problem in the GPU's memory."""

    cell: Any
    x: Any
    weights: Any
    dy: Any


def small(T: int, B: int, I: int, H: int, name: str = "lstm", dtype: str = "float32", seed: int = 0) -> Small:
    import cupy

    from fusedrnn.backends.protocol import Weights
    from fusedrnn.cells import CELLS
    from fusedrnn.problems import Case, Shape, make

    data = make(Case(CELLS[name](), Shape(T, B, I, H)), dtype, seed)
    weights = Weights(*(None if w is None else cupy.asarray(w) for w in data.weights[0]))
    return Small(data.case.cell, cupy.asarray(data.x), weights, cupy.asarray(data.dy))


def once(p: Small, **options: Any) -> list[Any]:
    """Results and gradients of one call."""
    from fusedrnn.kernels import backward, forward

    y, stateT, _, tape = forward(p.cell, p.x, p.weights, **options)
    dx, dweights, dstate0 = backward(tape, p.dy)
    return [y, *stateT, dx, *(w for w in dweights if w is not None), *dstate0]


def promises(run: Run) -> dict[str, Any]:
    """Run to run the same bits, graphs, the CPU backend's results, flat memory, streams, threads, sizes."""
    import cupy

    from fusedrnn.backends.cuda import CudaBackend

    found: dict[str, Any] = {}
    rng = np.random.default_rng(0)

    p = small(64, 17, 33, 129)
    first = [a.get() for a in once(p)]
    found["same bits in 20 runs"] = all(
        all(np.array_equal(a, b.get()) for a, b in zip(first, once(p), strict=True)) for _ in range(20)
    )

    backend = CudaBackend(kernel="steps")
    packed = backend.pack(p.cell, p.weights)
    again = []
    for _ in range(6):  # plain, recorded and repeated, repeated
        forward = backend.forward(p.cell, p.x, packed)
        again.append([forward.y.get(), backend.backward(forward.tape, p.dy).dx.get()])
    same = all(np.array_equal(a, b) for one in again for a, b in zip(one, again[0], strict=True))
    found["graphs: recorded, and the same bits as one by one"] = [len(backend.device._graphs), same]

    worst = 0.0
    for name in ("lstm", "gru", "rnn"):
        p = small(50, 16, 64, 256, name, "float64")
        weights = type(p.weights)(*(w if w is None else w.get() for w in p.weights))
        on_cpu = Small(p.cell, p.x.get(), weights, p.dy.get())
        for a, b in zip(once(p), once(on_cpu), strict=True):
            worst = max(worst, float(np.abs(a.get() - b).max() / np.abs(b).max()))
    found["largest difference from the CPU backend, float64"] = worst

    def mixed(count: int) -> None:
        for _ in range(count):
            T, B, I, H = (int(n) for n in rng.integers(1, (20, 40, 40, 200)))
            once(small(T, B, I, H))

    mixed(200)
    used = cupy.get_default_memory_pool().total_bytes()
    calls, end = 0, time.monotonic() + min(60.0, run.left() / 4)
    while calls < 10_000 and time.monotonic() < end:
        mixed(100)
        calls += 100
    found["calls of mixed shapes"] = calls
    found["memory pool before and after, bytes"] = [used, cupy.get_default_memory_pool().total_bytes()]

    problems = [small(40, 8, 16, 64, seed=k) for k in range(4)]
    expected = [[a.get() for a in once(p)] for p in problems]
    wrong: list[int] = []

    def work(k: int) -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(50):
                got = once(problems[k])
                stream.synchronize()
                if not all(np.array_equal(a, b.get()) for a, b in zip(expected[k], got, strict=True)):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found["wrong calls of 200 on four threads and streams"] = len(wrong)

    large = ((65_535, 1, 1, 1), (1, 65_535, 1, 1), (65_536, 1, 1, 1), (1, 65_537, 2, 3), (2**21, 1024, 1, 1))
    for T, B, I, H in large:
        try:
            out = once(small(T, B, I, H))
            found[f"finite at {(T, B, I, H)}"] = bool(all(cupy.isfinite(a).all() for a in out))
        except cupy.cuda.memory.OutOfMemoryError:
            found[f"finite at {(T, B, I, H)}"] = "out of memory"
    return found


SMALL_RUN = """
import sys
sys.path.insert(0, {folder!r})
from gpu import once, small
for name in ("lstm", "gru", "rnn"):
    once(small(5, 9, 3, 40, name))
import cupy
cupy.cuda.Device().synchronize()
"""


def sanitizers(run: Run) -> dict[str, Any]:
    """compute-sanitizer over small calls, in every kernel variant; where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"not run": "compute-sanitizer is not installed"}
    found = {}
    for kind in ("memcheck", "racecheck"):
        for kernel in KERNELS:
            code = SMALL_RUN.format(folder=str(Path(__file__).parent))
            done = subprocess.run(
                [tool, f"--tool={kind}", "--error-exitcode=9", sys.executable, "-c", code],
                capture_output=True, text=True, env={**os.environ, "FUSEDRNN_CUDA_KERNEL": kernel},
                timeout=max(1.0, min(60.0, run.left())),
            )  # fmt: skip
            found[f"{kind}, {kernel}"] = {
                "exit code": done.returncode,
                "end": (done.stdout + done.stderr)[-500:],
            }
    return found


# --- fast -------------------------------------------------------------------------------------------------


def timing(run: Run) -> dict[str, Any]:
    """``fusedrnn bench --device cuda``, with few repetitions and as far as the time goes."""
    from fusedrnn import problems
    from fusedrnn.bench import cuda

    def note(row: dict[str, Any]) -> None:
        run.rows.append(row)
        print(cuda.line(row), flush=True)

    limit = max(0.0, min(run.left() - 150, 270))  # what comes after wants some too
    return cuda.run(problems.SUITES["gpu"], suite="gpu", quick=True, limit=limit, each=note)


def candidates(run: Run) -> dict[str, Any]:
    """Candidate plans, timed: what ``backends.cuda_plan`` chooses from, beside what it counts."""
    import cupy

    from fusedrnn.bench.cuda import plans, timing

    found: dict[str, Any] = {}
    end = time.monotonic() + min(60.0, run.left() / 3)
    for size in plans.SIZES:
        if time.monotonic() > end:
            found.setdefault("no time left for", []).append(str(size))
            continue
        one = plans.measure(
            size, lambda kind, precision: kind(precision=precision), cupy.asarray, timing.by_events
        )
        found[one.pop("size")] = one
    return found


def epochs(run: Run) -> dict[str, Any]:
    """An epoch of ``fusedrnn train pollution`` on the GPU beside the same in PyTorch, and in DeZero if it is
    installed."""
    import pollution_epoch

    found: dict[str, Any] = pollution_epoch.measure("cuda")
    run.epoch = found.get("ratio to dezero")  # of the goal; PyTorch's is beside it
    return found


def goals(run: Run) -> list[dict[str, Any]]:
    """How far what was timed reaches what is wanted."""
    from fusedrnn import problems
    from fusedrnn.bench import cuda

    return cuda.judge(run.rows, cuda.expected(problems.SUITES["gpu"], list(cuda.MODES)), run.epoch)


ALWAYS = ("machine", "prepared")  # also where only others are asked for
PARTS: dict[str, Callable[[Run], Any]] = {  # what is wanted most first
    "machine": machine,
    "prepared": prepared,
    "checks": checks,
    "timing": timing,
    "epochs": epochs,
    "goals": goals,
    "candidates": candidates,
    "promises": promises,
    "sanitizers": sanitizers,
    "compiled": compiled,
}


def table(found: dict[str, Any]) -> Iterator[str]:
    """What to read first."""
    from fusedrnn.bench import cuda
    from fusedrnn.terminal import plain_table

    for name, part in found.items():
        result = part["result"]
        if name == "timing" and "rows" in result:
            yield plain_table(*cuda.table(result), left=2)
            yield from cuda.summary(result)
        elif isinstance(result, list):
            yield plain_table(*cuda.goal_table(result), left=2)
        else:
            for key, value in result.items():
                yield f"{name}: {key}: {value}"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"out of {', '.join(PARTS)}; all of them")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    given = parser.parse_args()
    unknown = [name for name in given.parts if name not in PARTS]
    if unknown:
        parser.error(f"expected parts out of {', '.join(PARTS)}, got {', '.join(unknown)}")
    run = Run(given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "gpu-none.json"
    for name, work in PARTS.items():
        if name not in ALWAYS and given.parts and name not in given.parts:
            continue
        run.part(name, work)
        if name == "machine":
            gpu = re.sub(r"[^a-z0-9]+", "-", str(run.found[name]["result"].get("gpu", "none")).lower())
            path = given.out / f"gpu-{gpu.strip('-')}-{datetime.date.today():%Y-%m-%d}.json"
        path.write_text(json.dumps(run.found, indent=1, default=str) + "\n")  # so far; a part may hang
    print("\n".join(table(run.found)))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
