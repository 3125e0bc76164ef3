"""What bench/gpu.sh runs: a part, or NVRTC beforehand.

    python bench/gpu.py FOLDER PART SECONDS
    python bench/gpu.py FOLDER compile ARCHITECTURE [PART ...]

What is found goes to FOLDER/results.json as soon as it is there, beside what other parts have found.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fusedrnn import problems, system
from fusedrnn.backends.cuda import KERNEL, cupy_device, nvrtc
from fusedrnn.backends.cuda.jobs import kernels_of
from fusedrnn.backends.cuda.nvrtc import KERNELS
from fusedrnn.bench import cuda
from fusedrnn.bench.runner import OURS
from fusedrnn.cells import CELLS, Cell, gru, lstm, rnn
from fusedrnn.gradcheck_suite import variants
from fusedrnn.terminal import plain_table

CHECK = [sys.executable, str(Path(__file__).with_name("gpu_check.py"))]
CORES = len(os.sched_getaffinity(0))


class Run:
    """A part: when it has to end, and what it has found, which is written down at once."""

    def __init__(self, out: Path, part: str, seconds: float) -> None:
        self.end = time.monotonic() + seconds - 4  # that it takes to end
        self.path = out / "results.json"
        self.all: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.found = self.all[part] = dict[str, Any](finished=False)
        self.failed = False
        self.write()

    def write(self) -> None:
        """At once: a file that is cut off would lose the other parts too."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.all, indent=1, default=str) + "\n")
        os.replace(new, self.path)

    def note(self, name: str, value: Any) -> None:
        """Something that is neither right nor wrong."""
        print(f"      {name}: {value}", flush=True)
        self.found[name] = value
        self.write()

    def verdict(self, name: str, right: bool, said: str, seconds: float = 0.0) -> None:
        """Something that is right or wrong."""
        print(f"{'OK' if right else 'FAIL':5} {name}: {seconds:.1f} s, {said}", flush=True)
        self.failed |= not right
        line = {"name": name, "right": right, "said": said, "seconds": round(seconds, 2)}
        self.found.setdefault("checks", []).append(line)
        self.write()


def checking(*words: Any) -> tuple[str, list[str]]:
    """The name and the command of one of gpu_check.py."""
    return " ".join(map(str, words)), [*CHECK, *map(str, words)]


def do(run: Run, command: list[str], seconds: float) -> tuple[bool, str, float]:
    """Whether it exits with 0, the last line of its output, and the seconds that it took."""
    begin = time.monotonic()
    limit = min(seconds, run.end - begin)
    if limit <= 0:
        return False, "not run: no time left", 0.0
    # Ends all that the command has started, and waits for nothing that hangs in the driver.
    command = ["timeout", "-k", "2", f"{limit:.1f}", *command]
    with tempfile.TemporaryFile() as output:  # a pipe would wait for whoever holds it
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output).returncode
        output.seek(0)
        said = output.read().decode(errors="replace").strip().rpartition("\n")[2].strip()[:600]
    if code not in (0, 1):
        stopped = f"stopped after {limit:.0f} s" if code in (124, 137, -9) else f"exit status {code}"
        said = f"{stopped}: {said}"
    return code == 0, said, time.monotonic() - begin


def do_all(run: Run, checks: Iterable[tuple[str, list[str]]], seconds: float, at_once: int) -> None:
    """A line for each, which has so many seconds; one that fails stops no other."""
    with ThreadPoolExecutor(at_once) as pool:
        begun = {pool.submit(do, run, command, seconds): name for name, command in checks}
        for done in as_completed(begun):
            run.verdict(begun[done], *done.result())


# Cells, dtypes and precisions: one by one, as calls compile them, it would take minutes.
NEEDED: dict[str, tuple[Collection[Cell], list[str]]] = {
    "first": ([lstm], ["float ieee"]),
    "checks": (variants().values(), ["float ieee", "double ieee", "Half fp16", "Bfloat16 bf16"]),
    "timing": ([lstm, gru, rnn], ["float ieee", "float tf32", "Half fp16", "Bfloat16 bf16"]),
}


def jobs_of(part: str, architecture: str) -> list[tuple[nvrtc.Code, str, str]]:
    """Arguments of ``nvrtc.cubin``."""
    cells, kinds = NEEDED.get(part, ((), ()))
    return [
        (nvrtc.Code(kernels.type, dtype, precision), architecture, variant)
        for dtype, precision in map(str.split, kinds)
        for kernels in map(kernels_of, cells)
        for variant in (KERNELS if kernels.whole else ("steps",))
    ]


def compile_for(run: Run, part: str, architecture: str) -> None:
    """On all cores, what is not in the folder of compiled code: of other sources, or by another NVRTC."""
    begin, jobs, folder = time.monotonic(), jobs_of(part, architecture), nvrtc.folder()
    before = len(list(folder.glob("*.cubin")))
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as pool:
        begun = [(job, pool.submit(nvrtc.cubin, *job)) for job in jobs]
    for (code, *rest), done in begun:
        if (error := done.exception()) is not None:  # NVRTC's, or a missing library
            what = " ".join(("compile", *code, *rest))
            run.verdict(what, False, " ".join(str(error).split())[-300:])
    new, by = len(list(folder.glob("*.cubin"))) - before, "NVRTC {}.{}".format(*nvrtc.version())
    said = f"{new} of {len(jobs)} files now, {time.monotonic() - begin:.1f} s, {architecture} by {by}"
    run.note(f"compiled for {part}", said)


def without_gpu() -> str | None:
    """None, or why there is no GPU; where there is one that the backend cannot use, something is wrong."""
    reason = cupy_device.unavailable() or ""
    return reason if reason.startswith("there is no NVIDIA") and not Path("/dev/nvidia0").exists() else None


def first(run: Run) -> None:
    """Versions, then each kernel variant by itself, forward and backward, and the PyTorch API."""
    query = "nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader"
    run.note("GPU", subprocess.run(query, shell=True, capture_output=True, text=True).stdout.strip())
    packages = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    names = ("torch", "cupy", "cuda", "nvidia", "numpy", "ml_dtypes", "dezero")
    run.note("packages", ", ".join(each for each in packages if each.startswith(names)))
    run.note("computer", f"Python {sys.version.split()[0]}, {CORES} cores, commit {system.commit()}")
    if without_gpu() is not None:
        compile_for(run, "first", "sm_90")
        return
    reason = cupy_device.unavailable()
    run.verdict("backend cuda", reason is None, reason or "can run")
    compile_for(run, "first", cupy_device.current().architecture)
    calls = [checking("gradients", kernel, "lstm", "float32") for kernel in KERNELS]
    do_all(run, [*calls, checking("api")], 40.0, 2)


def checks(run: Run) -> None:
    """``fusedrnn gradcheck`` by each kernel variant; 16 bits; equality with the CPU backend."""
    compile_for(run, "checks", cupy_device.current().architecture)
    todo = [checking("cpu", cell) for cell in CELLS]
    for kernel in KERNELS:
        settings = ["env", "OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1", f"{KERNEL}={kernel}"]
        command = [*settings, sys.executable, "-m", "fusedrnn", "gradcheck", "--backend", "cuda", "--cell"]
        todo += [(f"gradcheck {kernel} {cell}", [*command, cell]) for cell in CELLS]
        todo += [checking("gradients", kernel, c, dtype) for c in CELLS for dtype in ("float16", "bfloat16")]
    do_all(run, todo, 150.0, CORES)


def timing(run: Run) -> None:
    """``fusedrnn bench --device cuda``, with few repetitions and as far as the time goes."""
    compile_for(run, "timing", cupy_device.current().architecture)
    rows = run.found["rows"] = []

    def each(row: dict[str, Any]) -> None:
        rows.append(row)
        times = {who: f"{entry['us_per_step']:.2f} us a step" for who, entry in row["libraries"].items()}
        print(row["case"], row["mode"], times | row["failed"], flush=True)
        run.write()

    run.found |= cuda.run(
        problems.SUITES["gpu"], suite="gpu", quick=True, limit=run.end - time.monotonic() - 10, each=each
    )
    broken = [f"{row['case']}, {row['mode']}" for row in rows if OURS in row["failed"]]
    run.verdict("timing", not broken, f"{len(rows)} rows; failed: {'; '.join(broken) or 'none'}")


def epochs(run: Run) -> None:
    """``fusedrnn train pollution`` on the GPU beside PyTorch, and DeZero where it is installed."""
    import pollution_epoch

    for name, value in pollution_epoch.measure("cuda").items():
        run.note(name, value)


def goals(run: Run) -> None:
    """What timing found, as far as it came, and how far it reaches what is wanted."""
    report = run.all.get("timing", {})
    if "environment" in report:  # it came to its end
        print(plain_table(*cuda.table(report), left=2), *cuda.summary(report), sep="\n")
    expected = cuda.expected(problems.SUITES["gpu"], list(cuda.MODES))
    epoch = run.all.get("epochs", {}).get("ratio to dezero")
    run.found["goals"] = cuda.judge(report.get("rows", []), expected, epoch)
    print(plain_table(*cuda.goal_table(run.found["goals"]), left=2))


def promises(run: Run) -> None:
    """Run to run the same bits, graphs, flat memory, streams and threads, sizes."""
    todo = [checking("bits", kernel) for kernel in KERNELS]
    large = ((65_535, 1, 1, 1), (1, 65_535, 1, 1), (65_536, 1, 1, 1), (1, 65_537, 2, 3), (2**21, 1024, 1, 1))
    todo += [checking("captured"), checking("threads"), checking("memory")]
    do_all(run, [*todo, *(checking("size", *shape) for shape in large)], 90.0, 3)


def sanitizers(run: Run) -> None:
    """compute-sanitizer over small calls, in every kernel variant; where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        run.note("not run", "compute-sanitizer is not installed")
        return
    tools = {kind: [tool, f"--tool={kind}", "--error-exitcode=9"] for kind in ("memcheck", "racecheck")}
    calls = [checking("small", kernel) for kernel in KERNELS]
    do_all(run, [(f"{k} {name}", [*tools[k], *command]) for k in tools for name, command in calls], 120.0, 6)


PARTS = {part.__name__: part for part in (first, checks, timing, epochs, goals, promises, sanitizers)}


def main(out: str, part: str, *arguments: str) -> int:
    """Run a part, or compile beforehand; -> the exit status."""
    if part == "compile":
        run = Run(Path(out), part, float("inf"))
        for each in arguments[1:] or ("first", "checks"):
            compile_for(run, each, arguments[0])
        return int(run.failed)
    run, none = Run(Path(out), part, float(arguments[0])), None if part == "goals" else without_gpu()
    try:
        if none is None or part == "first":
            PARTS[part](run)
        if none is not None:
            run.note("no GPU", none)
    except Exception as error:
        traceback.print_exc()
        run.verdict(part, False, f"{type(error).__name__}: {error}")
    run.found["finished"] = True
    run.write()
    return 1 if run.failed else 0 if none is None else 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
