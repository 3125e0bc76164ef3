"""What bench/gpu.sh runs: parts, which are lists of checks; each check is a process with a time limit."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fusedrnn.backends.cuda import KERNEL
from fusedrnn.backends.cuda.nvrtc import KERNELS, PRECISIONS
from fusedrnn.cells import CELLS

HELP = """bench/gpu.sh PART ...   install this checkout, then run parts, each with its time limit

{}

Without a GPU a part only compiles what it needs, for sm_90. Results are in $OUT, else in out/gpu: a line of
results.jsonl for each check, what they printed in log.txt, and timing.json. Compiled kernels are in
$FUSEDRNN_CACHE, else in out/gpu-cache. Exit status: 0, 1 if something failed, 2 for a wrong command, 3 if
there is no GPU."""
INSTALL = "pip install --upgrade --no-deps --no-build-isolation --no-compile -C build-dir=out/gpu-build"
AT_ONCE = 16  # checks
TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer
HALVES = ("float16", "bfloat16")
SIZES = ("65535 1 1 1", "1 65535 1 1", "65536 1 1 1", "1 65537 2 3", f"{2**20} 1024 1 2")  # T, B, I, H


# Seconds at most, of which a check may take two thirds; what is shown; checks, the first before all others.
PARTS = {
    "first": (
        60, "whether anything works at all: every way to run once, and the PyTorch API",
        ["cubins first", *(f"gradients {kernel} lstm float32" for kernel in KERNELS), "api"],
    ),
    "checks": (
        120, "gradients of every cell, dtype and way to run; equality with the CPU backend",
        ["cubins all", *(f"gradcheck {kernel} {cell}" for kernel in KERNELS for cell in CELLS),
         *(f"gradients {kernel} {cell} {dtype}" for kernel in KERNELS for cell in CELLS for dtype in HALVES),
         *(f"gradients {kernel} lstm float32 {p}" for kernel in KERNELS for p in PRECISIONS[1:]),
         *(f"cpu {cell}" for cell in CELLS)],
    ),
    "promises": (
        90, "same bits run to run, graphs, memory, streams and threads, large sizes",
        ["cubins first", "memory", *(f"size {size}" for size in SIZES), *(f"bits {k}" for k in KERNELS),
         "captured", "threads"],
    ),
    "sanitizers": (
        90, "compute-sanitizer's memcheck and racecheck over small calls",
        ["cubins all", *(f"{tool} small {kernel}" for tool in TOOLS for kernel in KERNELS)],
    ),
    "epochs": (
        60, "an epoch of the air pollution program: PyTorch, and DeZero, of whose time 1/20 is wanted",
        ["cubins all", "epochs"],
    ),
    "timing": (240, "fusedrnn bench --device cuda, as far as the time goes", ["cubins all", "timing"]),
}  # fmt: skip


def command(check: str, out: Path) -> list[str]:
    """The command line of a check; most are functions of gpu_check.py."""
    name, *words = check.split()
    python, own = sys.executable, str(Path(__file__).with_name("gpu_check.py"))
    if name == "install":
        return [python, "-m", *INSTALL.split(), "--target", *words, "."]
    if name == "gradcheck":
        kernel = ["env", f"{KERNEL}={words[0]}"]
        return [*kernel, python, "-m", "fusedrnn", name, "--backend", "cuda", "--cell", words[1]]
    if name == "epochs":
        epoch = str(Path(__file__).with_name("pollution_epoch.py"))
        return [python, epoch, "--device", "cuda", "--json", str(out / "epochs.json")]
    if name in TOOLS:
        return ["compute-sanitizer", f"--tool={name}", "--error-exitcode=9", python, own, *words]
    return [python, own, name, *words]


def run(check: str, out: Path, seconds: float, end: float = math.inf) -> tuple[bool, str]:
    """Whether a check exits with 0, and the last line of its output; a line for it is printed and written."""
    begin, code, text = time.monotonic(), 1, "not run: no time left"
    limit = min(seconds, end - begin)
    if limit > 0:
        limited = ["timeout", "-k", "2", f"{limit:.1f}", *command(check, out)]  # ends all that it has started
        environment = os.environ | {"OUT": str(out), "SECONDS": f"{limit}"}
        with tempfile.TemporaryFile() as output:  # a pipe would wait for whoever holds it
            given: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "env": environment}
            code = subprocess.run(limited, **given).returncode
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
        with (out / "log.txt").open("a") as log:
            log.write(f"--- {check}\n{text[-20_000:]}\n")
    said, took = text.rpartition("\n")[2].strip()[:600], time.monotonic() - begin
    if code not in (0, 1):
        said = f"{'stopped' if code in (124, 137, -9) else f'exit status {code}'}: {said}"
    print(f"{'FAIL' if code else 'OK':5} {check}: {took:.1f} s, {said}", flush=True)
    line = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "check": check, "right": code == 0}
    with (out / "results.jsonl").open("a") as results:
        results.write(json.dumps(line | {"said": said, "seconds": round(took, 2)}) + "\n")
    return code == 0, said


def main(*names: str) -> int:
    """Run parts; -> the exit status."""
    if not names:
        print(
            HELP.format("\n".join(f"  {name:10} {part[0]:4d} s  {part[1]}" for name, part in PARTS.items()))
        )
        return 0
    if wrong := [name for name in names if name not in PARTS]:
        print(f"bench/gpu.sh: expected parts out of {', '.join(PARTS)}, got {wrong[0]!r}", file=sys.stderr)
        return 2
    out, package = Path(os.environ["OUT"]), Path("out/gpu-install").resolve()
    out.mkdir(parents=True, exist_ok=True)
    right, _ = run(f"install {package}", out, 240)  # not where Python is, which may not be written to
    os.environ["PYTHONPATH"] = os.pathsep.join([str(package), os.environ["PYTHONPATH"]])
    right, said = run("gpu", out, 60) if right else (False, "")
    none = said.startswith("there is no NVIDIA")
    for name in names if right else ():
        seconds, _, (first, *others) = PARTS[name]
        print(f"--- {name}, at most {seconds} s", flush=True)
        end = time.monotonic() + (math.inf if none else seconds)
        right &= run(first, out, 3600, end)[0]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            limited = functools.partial(run, out=out, seconds=seconds * 2 / 3, end=end)
            right &= all([each for each, _ in pool.map(limited, [] if none else others)])  # noqa: C419  # of all
    return 1 if not right else 3 if none else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
