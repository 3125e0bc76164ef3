"""Everything that needs a GPU, in one run of at most ten minutes: compile, check, time, write down.

    python bench/gpu.py                  all parts, into bench/results/gpu-NAME-DATE.json, and a table
    python bench/gpu.py checks timing    some parts

Needs PyTorch with CUDA and ``fusedrnn[cuda13]`` (or ``cuda12``). A part that fails is written down as failed,
and the next one begins. cuDNN is timed through PyTorch, in the same run, in turn with ours.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RESULTS = Path(__file__).parent / "results"
TOTAL = 570.0  # seconds


class Run:
    """What there is to write down, and how long there still is."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.found: dict[str, Any] = {}

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


def compiled(run: Run) -> dict[str, float]:
    """Seconds that NVRTC takes for each cell and dtype, of one for each precision, with nothing cached."""
    import tempfile

    from fusedrnn.backends import cuda_compile, cuda_cupy
    from fusedrnn.backends.cuda_jobs import kernels_of
    from fusedrnn.cells import GRU, LSTM, RNN

    architecture, kept = cuda_cupy.current().architecture, os.environ.get("FUSEDRNN_CACHE")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUSEDRNN_CACHE"] = folder
        for cell in (RNN(), RNN(relu=True), LSTM(), GRU(), GRU(reset_after=False)):
            for dtype in cuda_compile.DTYPES:
                for precision in cuda_compile.PRECISIONS if (cell, dtype) == (LSTM(), "float") else ("ieee",):
                    begin = time.monotonic()
                    cuda_compile.cubin(kernels_of(cell).type, dtype, architecture, precision)
                    found[f"{cell} {dtype} {precision}"] = round(time.monotonic() - begin, 2)
    os.environ.pop("FUSEDRNN_CACHE")
    if kept is not None:
        os.environ["FUSEDRNN_CACHE"] = kept
    return found


# --- right ------------------------------------------------------------------------------------------------


def checks(run: Run) -> dict[str, Any]:
    """``fusedrnn gradcheck`` of the CUDA backend, once for each way to run."""
    found = {}
    for kernel in ("steps", "grid", "grid_streamed", "cluster"):
        command = [sys.executable, "-m", "fusedrnn", "gradcheck", "--backend", "cuda"]
        environment = {**os.environ, "FUSEDRNN_CUDA_KERNEL": kernel}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=max(1.0, min(45.0, run.left()))
        )
        lines = done.stdout.strip().splitlines()
        end = (lines or [""])[-1]
        found[kernel] = {"exit code": done.returncode, "end": end, "errors": done.stderr[-2000:]}
        print(kernel, found[kernel]["exit code"], found[kernel]["end"], flush=True)
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
    from fusedrnn.functional import backward, forward

    y, stateT, _, tape = forward(p.cell, p.x, p.weights, **options)
    dx, dweights, dstate0 = backward(tape, p.dy)
    return [y, *stateT, dx, *(w for w in dweights if w is not None), *dstate0]


def promises(run: Run) -> dict[str, Any]:
    """Run to run the same bits, the CPU backend's results, flat memory, streams, threads, large sizes."""
    import cupy

    found: dict[str, Any] = {}
    rng = np.random.default_rng(0)

    p = small(64, 17, 33, 129)
    first = [a.get() for a in once(p)]
    found["same bits in 20 runs"] = all(
        all(np.array_equal(a, b.get()) for a, b in zip(first, once(p), strict=True)) for _ in range(20)
    )

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
    """compute-sanitizer over small calls, in every way to run; where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"not run": "compute-sanitizer is not installed"}
    found = {}
    for kind in ("memcheck", "racecheck"):
        for kernel in ("steps", "grid", "cluster"):
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

# (T, B, I, H): public results, what cuDNN's own kernels are made for and what not, odd sizes, one step.
SHAPES = (
    (1024, 16, 768, 768),
    (256, 1, 256, 256),
    (256, 16, 256, 256),
    (256, 64, 256, 256),
    (256, 16, 512, 512),
    (256, 1, 1024, 1024),
    (256, 16, 1024, 1024),
    (256, 64, 1024, 1024),
    (256, 32, 100, 300),
    (30, 128, 7, 100),
    (1, 8, 64, 256),
)
# cuDNN's name, dtype, whether its float32 products may be TF32; which of ours it is beside.
PEERS = (
    ("float32", False, "ieee"),
    ("float32", True, "tf32"),
    ("float16", False, "fp16"),
    ("bfloat16", False, "bf16"),
)


def _median_ms(work: Callable[[], Any], seconds: float) -> tuple[float, float, int]:
    """Median and spread of a call's time by events, in milliseconds."""
    import torch

    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
        begin, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        after.record()
        after.synchronize()
        times.append(begin.elapsed_time(after))
    quarter = statistics.quantiles(times, n=4)
    return statistics.median(times), quarter[2] - quarter[0], len(times)


def _layer(kind: str, shape: tuple[int, ...], dtype: str, ours: bool, training: bool) -> Callable[[], Any]:
    """One call of a layer."""
    import torch

    from fusedrnn import torch as face

    T, B, I, H = shape
    module = getattr(face if ours else torch.nn, kind)(I, H, device="cuda", dtype=getattr(torch, dtype))
    x = torch.randn(T, B, I, device="cuda", dtype=getattr(torch, dtype), requires_grad=training)
    dy = torch.randn(T, B, H, device="cuda", dtype=getattr(torch, dtype))

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def both() -> None:
        y = module(x)[0]
        torch.autograd.backward(y, dy)
        module.zero_grad(set_to_none=True)
        x.grad = None

    work = both if training else forward
    work()
    if ours and module.last_path != "fused":
        raise RuntimeError(module.last_path)
    return work


def timing(run: Run) -> list[dict[str, Any]]:
    """cuDNN through PyTorch beside ours, forward and with backward."""
    import torch

    from fusedrnn.torch import gpu

    backend: Any = gpu.backend()
    rows: list[dict[str, Any]] = []
    end = min(run.end - 120, time.monotonic() + 250)  # what comes after wants some too
    for kind in ("LSTM", "GRU", "RNN"):
        for shape in SHAPES:
            for training in (False, True):
                for dtype, tf32, precision in PEERS:
                    if time.monotonic() > end:
                        return rows
                    torch.backends.cudnn.allow_tf32 = tf32
                    row: dict[str, Any] = {"cell": kind, "shape": shape, "backward": training}
                    row |= {"dtype": dtype, "tf32": tf32, "precision": precision}
                    try:
                        row["cudnn"] = _median_ms(_layer(kind, shape, dtype, False, training), 0.3)
                    except RuntimeError as error:
                        row["cudnn failed"] = str(error)[:200]
                    os.environ["FUSEDRNN_CUDA_PRECISION"] = precision
                    try:  # in float32 memory whatever the products' precision
                        row["ours"] = _median_ms(_layer(kind, shape, "float32", True, training), 0.3)
                        row["plan"] = str(backend.last_plan)
                    except (RuntimeError, ValueError) as error:
                        row["ours failed"] = str(error)[:200]
                    finally:
                        del os.environ["FUSEDRNN_CUDA_PRECISION"]
                    rows.append(row)
                    print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    T = row["shape"][0]
    both = "forward + backward" if row["backward"] else "forward"
    peer = f"{row['dtype']}{' tf32' if row['tf32'] else ''}"
    parts = [f"{row['cell']:4} {row['shape']!s:22} {both:18} {peer:13}"]
    for who in ("cudnn", "ours"):
        if who in row:
            parts.append(f"{who} {row[who][0]:8.3f} ms {1000 * row[who][0] / T:8.2f} us a step")
        else:
            parts.append(f"{who} failed")
    if "cudnn" in row and "ours" in row:
        parts.append(f"ratio {row['cudnn'][0] / row['ours'][0]:5.2f}  {row['plan']}")
    return "  ".join(parts)


def bounds(run: Run) -> dict[str, Any]:
    """Rates of cuBLAS, and of one step of almost no arithmetic, all blocks waiting for each other."""
    import torch

    found: dict[str, Any] = {}
    for dtype, tf32 in (("float32", False), ("float32", True), ("bfloat16", False), ("float16", False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.randn(8192, 8192, device="cuda", dtype=getattr(torch, dtype))
        ms = _median_ms(lambda a=a: a @ a, 0.5)[0]
        found[f"cuBLAS {dtype}{' tf32' if tf32 else ''}, TFLOP/s"] = 2 * 8192**3 / ms / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    for H in (8, 132, 1056):
        p = small(4000, 1, 1, H, "rnn")
        from fusedrnn.functional import forward

        ms = _median_ms(lambda p=p: forward(p.cell, p.x, p.weights, save=None), 0.5)[0]
        found[f"RNN, B = 1, H = {H}, us a step"] = ms / 4
    return found


PARTS: dict[str, Callable[[Run], Any]] = {  # what is wanted most first
    "machine": machine,
    "checks": checks,
    "bounds": bounds,
    "timing": timing,
    "promises": promises,
    "sanitizers": sanitizers,
    "compiled": compiled,
}


def table(found: dict[str, Any]) -> Iterator[str]:
    """What to read first."""
    for name, part in found.items():
        result = part["result"]
        if name == "timing" and isinstance(result, list):
            yield from map(_line, result)
        elif isinstance(result, dict):
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
    for name, work in PARTS.items():
        if name == "machine" or not given.parts or name in given.parts:
            run.part(name, work)
    facts = run.found["machine"]["result"]
    name = re.sub(r"[^a-z0-9]+", "-", str(facts.get("gpu", "none")).lower()).strip("-")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"gpu-{name}-{datetime.date.today():%Y-%m-%d}.json"
    path.write_text(json.dumps(run.found, indent=1, default=str) + "\n")
    print("\n".join(table(run.found)))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
