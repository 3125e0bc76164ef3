"""One part of bench/gpu.sh, which installs, sets limits and runs them one after the other.

    python bench/gpu.py PART --seconds 120 --out out/gpu

What a part finds goes to the file results.json as soon as it is there, beside what other parts have found. A
line begins with OK or FAIL where something is right or wrong. Exit status: 0, 1 where something failed, 3
where there is no GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_compile

from fusedrnn.backends import cuda_compile, cuda_cupy
from fusedrnn.backends.cuda_plan import KERNELS
from fusedrnn.cells import CELLS

HERE = Path(__file__).resolve().parent
CHECK = [sys.executable, str(HERE / "gpu_check.py")]
NO_GPU = 3  # exit status
ARCHITECTURE = "sm_90"  # that is compiled for where there is no GPU


class Run:
    """A part: the time that is left, and what it has found, which is written down at once."""

    def __init__(self, part: str, seconds: float, out: Path) -> None:
        self.begin = time.monotonic()
        self.end = self.begin + seconds
        self.path = out / "results.json"
        self.failed = False
        self.all: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            self.all = json.loads(self.path.read_text())
        self.found: dict[str, Any] = {"finished": False}
        self.all[part] = self.found

    def left(self) -> float:
        """Seconds, but for the few that it takes to end."""
        return self.end - time.monotonic() - 4

    def write(self) -> None:
        """At once: a file that is cut off would lose the other parts too."""
        self.found["seconds"] = round(time.monotonic() - self.begin, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.all, indent=1, default=str) + "\n")
        os.replace(new, self.path)

    def note(self, name: str, value: Any) -> None:
        """Something that is neither right nor wrong."""
        print(f"      {name}: {value}", flush=True)
        self.found[name] = value
        self.write()

    def verdict(self, name: str, right: bool, said: str, seconds: float) -> None:
        """A line."""
        print(f"{'OK' if right else 'FAIL':5} {name}: {seconds:.1f} s, {said}", flush=True)
        self.failed |= not right
        line = {"name": name, "right": right, "said": said, "seconds": round(seconds, 2)}
        self.found.setdefault("checks", []).append(line)
        self.write()


# --- checks, each a command of its own --------------------------------------------------------------------


class Check(NamedTuple):
    """A command that exits with 0 on success; the last line of its output is the message."""

    name: str
    command: list[str]
    seconds: float = 30.0
    environment: dict[str, str] = {}  # noqa: RUF012


running: set[subprocess.Popen[bytes]] = set()


def end(process: subprocess.Popen[bytes]) -> None:
    """It and all that it started. One that hangs in the driver may not go; nobody waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)


def do(check: Check, left: float) -> tuple[bool, str, float]:
    """Whether it is right, what it says, and the seconds that it took."""
    begin, limit = time.monotonic(), min(check.seconds, left)
    if limit <= 0:
        return False, "not run: no time left", 0.0
    with tempfile.TemporaryFile() as output:  # a pipe would wait for whoever holds it
        process = subprocess.Popen(
            check.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | check.environment, start_new_session=True,
        )  # fmt: skip
        running.add(process)
        try:
            code = process.wait(limit)
            said = f"exit status {code}"
        except subprocess.TimeoutExpired:
            code, said = -1, f"stopped after {limit:.0f} s"
        finally:
            end(process)
            running.discard(process)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else ""
    if code < 0 or not last:
        last = f"{said}: {last}".rstrip(": ")
    return code == 0, last[:600], time.monotonic() - begin


def do_all(run: Run, checks: Sequence[Check], at_once: int = 1) -> None:
    """A line for each; one that fails stops no other."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        begun = {pool.submit(lambda check=check: do(check, run.left())): check.name for check in checks}
        for done in concurrent.futures.as_completed(begun):
            run.verdict(begun[done], *done.result())


def stopped(*_: Any) -> None:
    """By the limit of the part."""
    for process in list(running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(124)


def checking(*arguments: str, name: str = "", seconds: float = 30.0) -> Check:
    """One of gpu_check.py."""
    return Check(name or " ".join(arguments), [*CHECK, *arguments], seconds)


# --- what it is -------------------------------------------------------------------------------------------


PACKAGES = (
    "torch",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "numpy",
    "ml_dtypes",
)


def versions() -> Iterator[tuple[str, Callable[[], str]]]:
    """Of all that matters; nothing large is imported for it."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,compute_cap,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    yield "GPU, capability, driver, memory", lambda: output(query)
    yield "Python", lambda: f"{sys.version.split()[0]}, {len(os.sched_getaffinity(0))} cores"
    yield "packages", lambda: ", ".join(version_of(package) for package in PACKAGES)
    yield "NVRTC", lambda: "{}.{}".format(*cuda_compile.version())
    folder = Path(cuda_compile.__file__).parents[1]
    yield "fusedrnn", lambda: f"commit {output(['git', 'rev-parse', 'HEAD'])}, {folder}"


def version_of(package: str) -> str:
    """An installed package's."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def output(command: list[str]) -> str:
    """The last line that it prints, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none ({error})"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""]
    return lines[-1] if done.returncode == 0 else f"none ({lines[-1]})"


def device() -> str:
    """What plans depend on."""
    d = cuda_cupy.current()
    counts = f"{d.multiprocessors} multiprocessors, {d.shared_bytes} B of shared memory"
    return f"{d.architecture}, {counts}, clusters of {d.cluster}"


def without_gpu() -> str | None:
    """None, or why there is no GPU; where there is one that the backend cannot use, something is wrong."""
    reason = cuda_cupy.unavailable()
    none = reason is not None and reason.startswith("there is no NVIDIA")
    return reason if none and not Path("/dev/nvidia0").exists() else None


def compile_for(run: Run, part: str, architecture: str) -> dict[str, str]:
    """All that the part runs; by kernel variant, why something does not compile."""
    begin = time.monotonic()
    before = len(list(gpu_compile.folder().glob("*.cubin")))
    done = gpu_compile.compile_all(gpu_compile.jobs_of(part, architecture))
    new = len(list(gpu_compile.folder().glob("*.cubin"))) - before
    run.note("compiled", f"{new} of {len(done)} files now, {time.monotonic() - begin:.1f} s, {architecture}")
    errors = {d.job.variant: d.error for d in done if d.error is not None}
    for d in done:
        if d.error is not None and part != "first":
            run.verdict(f"compile {d.job}", False, d.error, d.seconds)
    return errors


# --- right ------------------------------------------------------------------------------------------------


def first(run: Run) -> None:
    """Whether anything works at all: each kernel variant by itself, forward and backward, in float32."""
    for name, say in versions():
        try:
            run.note(name, say())
        except Exception as error:  # a missing library, of many kinds
            run.verdict(name, False, f"{type(error).__name__}: {error}", 0.0)
    reason, architecture = cuda_cupy.unavailable(), ARCHITECTURE
    if without_gpu() is None:
        run.verdict("backend cuda", reason is None, reason or "can run", 0.0)
        try:
            run.note("plans for", device())
            architecture = cuda_cupy.current().architecture
        except Exception as error:
            run.verdict("device", False, f"{type(error).__name__}: {error}", 0.0)
    run.note("compiled code", gpu_compile.at_hand(architecture))
    try:
        errors = compile_for(run, "first", architecture)
    except Exception as error:  # calls can compile too, only later
        run.verdict("compile", False, f"{type(error).__name__}: {error}", 0.0)
        if without_gpu() is not None:
            return
        errors = {}
    for variant, error in errors.items():
        run.verdict(variant, False, f"does not compile: {error}", 0.0)
    compiled = [variant for variant in KERNELS if variant not in errors]
    if without_gpu() is not None:
        for variant in compiled:
            run.note(variant, "no GPU: compiled, not run")
        return
    # The first has to wait until libraries are read from disk.
    todo = [
        checking("variant", variant, name=variant, seconds=40.0 if variant == compiled[0] else 20.0)
        for variant in compiled
    ]
    do_all(run, [*todo, checking("api", name="PyTorch")])


def checks(run: Run) -> None:
    """``fusedrnn gradcheck`` by each kernel variant; 16 bits; equality with the CPU backend."""
    compile_for(run, "checks", cuda_cupy.current().architecture)
    gradcheck = [sys.executable, "-m", "fusedrnn", "gradcheck", "--backend", "cuda", "--cell"]
    one_core = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    todo = [checking("halves", kernel) for kernel in KERNELS] + [checking("cpu", cell) for cell in CELLS]
    todo += [
        Check(
            f"gradcheck {cell} {kernel}",
            [*gradcheck, cell],
            150.0,
            one_core | {"FUSEDRNN_CUDA_KERNEL": kernel},
        )
        for kernel in KERNELS
        for cell in CELLS
    ]
    do_all(run, todo, len(os.sched_getaffinity(0)))


LARGE = ((65_535, 1, 1, 1), (1, 65_535, 1, 1), (65_536, 1, 1, 1), (1, 65_537, 2, 3), (2**21, 1024, 1, 1))


def promises(run: Run) -> None:
    """Run to run the same bits, graphs, flat memory, streams and threads, sizes."""
    compile_for(run, "promises", cuda_cupy.current().architecture)
    do_all(run, [checking("bits", kernel) for kernel in KERNELS], 3)
    todo = [checking("graphs"), checking("captured"), checking("threads", seconds=45.0)]
    todo += [checking("memory", seconds=90.0), *(checking("size", *map(str, shape)) for shape in LARGE)]
    do_all(run, todo, 3)


def sanitizers(run: Run) -> None:
    """compute-sanitizer over small calls, in every kernel variant; where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        run.note("not run", "compute-sanitizer is not installed")
        return
    compile_for(run, "sanitizers", cuda_cupy.current().architecture)
    todo = [
        Check(
            f"{kind} {kernel}", [tool, f"--tool={kind}", "--error-exitcode=9", *CHECK, "small", kernel], 120.0
        )
        for kind in ("memcheck", "racecheck")
        for kernel in KERNELS
    ]
    do_all(run, todo, 6)


# --- fast -------------------------------------------------------------------------------------------------


def timing(run: Run) -> None:
    """``fusedrnn bench --device cuda``, with few repetitions and as far as the time goes."""
    from fusedrnn import problems
    from fusedrnn.bench import cuda
    from fusedrnn.bench.runner import OURS

    compile_for(run, "timing", cuda_cupy.current().architecture)
    rows = run.found["rows"] = []

    def each(row: dict[str, Any]) -> None:
        rows.append(row)
        print(cuda.line(row), flush=True)
        run.write()

    report = cuda.run(problems.SUITES["gpu"], suite="gpu", quick=True, limit=run.left() - 10, each=each)
    run.found |= report
    broken = [f"{row['case']}, {row['mode']}" for row in rows if OURS in row["failed"]]
    run.verdict("timing", not broken, f"{len(rows)} rows; failed: {'; '.join(broken) or 'none'}", 0.0)


def epochs(run: Run) -> None:
    """An epoch of ``fusedrnn train pollution`` on the GPU beside the same in PyTorch, and in DeZero if it is
    installed."""
    import pollution_epoch

    compile_for(run, "epochs", cuda_cupy.current().architecture)
    for name, value in pollution_epoch.measure("cuda").items():
        run.note(name, value)


def goals(run: Run) -> None:
    """What timing found, as far as it came, and how far it reaches what is wanted."""
    from fusedrnn import problems
    from fusedrnn.bench import cuda
    from fusedrnn.terminal import plain_table

    report = run.all.get("timing", {})
    if "environment" in report:  # it came to its end
        print(plain_table(*cuda.table(report), left=2))
        print("\n".join(cuda.summary(report)))
    epoch = run.all.get("epochs", {}).get("ratio to dezero")
    expected = cuda.expected(problems.SUITES["gpu"], list(cuda.MODES))
    run.found["goals"] = cuda.judge(report.get("rows", []), expected, epoch)
    print(plain_table(*cuda.goal_table(run.found["goals"]), left=2))


def cuts(run: Run) -> None:
    """Candidate plans, timed: what ``backends.cuda_plan`` chooses from, beside what it counts."""
    import cupy

    from fusedrnn.bench.cuda import plans, timing

    compile_for(run, "cuts", cuda_cupy.current().architecture)
    for size in plans.SIZES:
        if run.left() < 5:
            run.note(f"{size}", "no time left")
            continue
        one = plans.measure(
            size, lambda kind, precision: kind(precision=precision), cupy.asarray, timing.by_events
        )
        run.found[one.pop("size")] = one
        run.write()


PARTS: dict[str, Callable[[Run], None]] = {
    part.__name__: part for part in (first, checks, timing, epochs, goals, cuts, promises, sanitizers)
}


def main() -> int:
    """Run a part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=600.0, help="at most (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "gpu", help="folder (%(default)s)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, stopped)
    run = Run(given.part, given.seconds, given.out)
    run.write()
    none = None if given.part == "goals" else without_gpu()
    if none is not None:
        run.note("no GPU", none)
    if none is None or given.part == "first":
        try:
            PARTS[given.part](run)
        except Exception as error:
            traceback.print_exc()
            run.verdict(given.part, False, f"{type(error).__name__}: {error}", time.monotonic() - run.begin)
    run.found["finished"] = True
    run.write()
    return 1 if run.failed else 0 if none is None else NO_GPU


if __name__ == "__main__":
    sys.exit(main())
