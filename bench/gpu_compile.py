"""What the parts of bench/gpu.sh run, compiled on all cores into the folder of compiled code.

    bench/gpu.sh compile sm_90                 what the parts first and checks run
    bench/gpu.sh compile sm_90 first timing    what these run

One by one, as calls do it, it would take minutes. No GPU is needed. A computer with the same sources and the
same version of NVRTC finds the code again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fusedrnn.backends import cuda_compile
from fusedrnn.backends.cuda_compile import KERNELS
from fusedrnn.backends.cuda_jobs import kernels_of
from fusedrnn.cells import GRU, LSTM, RNN, Cell
from fusedrnn.gradcheck_suite import variants

NOTE = "made.json"  # in the folder: of which sources and by which NVRTC it was compiled beforehand
IEEE, TF32, BF16, FP16 = (("float", precision) for precision in ("ieee", "tf32", "bf16", "fp16"))
DOUBLE, HALVES = ("double", "ieee"), (("Half", "fp16"), ("Bfloat16", "bf16"))
NEEDED: dict[str, tuple[tuple[Cell, ...], tuple[tuple[str, str], ...]]] = {
    "first": ((LSTM(),), (IEEE,)),
    "checks": ((LSTM(), GRU(), RNN()), (IEEE, DOUBLE, *HALVES)),
    "timing": ((LSTM(), GRU(), RNN()), (IEEE, TF32, BF16, FP16, *HALVES)),
    "epochs": ((LSTM(),), (TF32,)),
    "goals": ((), ()),
    "cuts": ((LSTM(), GRU()), (IEEE, TF32, FP16)),
    "promises": ((LSTM(), RNN()), (IEEE,)),
    "sanitizers": ((LSTM(), GRU(), RNN()), (IEEE,)),
}


class Job(NamedTuple):
    """The arguments of ``cuda_compile.cubin``."""

    cell: str
    dtype: str
    architecture: str
    precision: str
    variant: str

    def __str__(self) -> str:
        return f"{self.cell} {self.dtype} {self.precision} {self.variant}"


def jobs_of(part: str, architecture: str) -> Iterator[Job]:
    """What a part runs, but what only a benchmark of layer norm or dropout would."""
    cells, ways = NEEDED[part]
    for dtype, precision in ways:
        for cell in cells:
            for variant in KERNELS:
                yield Job(kernels_of(cell).type, dtype, architecture, precision, variant)
    if part != "checks":
        return
    for cell in variants().values():  # with every option of gradcheck
        kernels = kernels_of(cell)
        for dtype, precision in (IEEE, DOUBLE):
            if cell not in cells:
                for variant in KERNELS if kernels.whole else ("steps",):
                    yield Job(kernels.type, dtype, architecture, precision, variant)
            for kind in step_by_step(cell):
                yield Job(kind, dtype, architecture, precision, "steps")


def step_by_step(cell: Cell) -> Iterator[str]:
    """The types of a cell with recurrent dropout or zoneout, and with layer norm."""
    yield kernels_of(cell, regularized=True).type
    if cell != GRU(reset_after=False):
        yield kernels_of(dataclasses.replace(cell, layer_norm=True)).type


class Compiled(NamedTuple):
    """What became of a job."""

    job: Job
    seconds: float
    error: str | None


def compiled(job: Job) -> Compiled:
    """Of this run or of an earlier one."""
    begin, error = time.monotonic(), None
    try:
        cuda_compile.cubin(*job)
    except Exception as e:  # NVRTC's, or a missing library
        error = (str(e).strip().splitlines() or [type(e).__name__])[-1]
    return Compiled(job, time.monotonic() - begin, error)


def compile_all(jobs: Iterable[Job], each: Callable[[Compiled], None] = lambda done: None) -> list[Compiled]:
    """All of them, each once, by as many processes as there are cores; those that are slow come first."""
    todo = sorted(dict.fromkeys(jobs), key=lambda job: "registers" not in job.variant)
    found = []
    workers = max(1, min(len(os.sched_getaffinity(0)), len(todo)))
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done in concurrent.futures.as_completed([pool.submit(compiled, job) for job in todo]):
            found.append(done.result())
            each(found[-1])
    return found


folder: Callable[[], Path] = cuda_compile._cache  # of compiled code; bench/gpu.sh says which


def _by(architecture: str) -> str:
    return "{} by NVRTC {}.{}".format(architecture, *cuda_compile.version())


def _sources() -> str:
    return cuda_compile.fatbin_key("Lstm", "float", "ieee")  # a hash of them all


def _noted() -> dict[str, str]:
    """The sources, for each architecture and NVRTC that they were compiled for beforehand."""
    try:
        noted: dict[str, str] = json.loads((folder() / NOTE).read_text())
    except (OSError, ValueError):
        noted = {}
    return noted


def at_hand(architecture: str) -> str:
    """Whether what was compiled beforehand is used here, in one line."""
    noted, wanted = _noted(), _by(architecture)
    if not noted:
        return f"nothing was compiled beforehand in {folder()}"
    if wanted not in noted:
        return f"compiled beforehand for {', '.join(noted)}: NOT USED, here it is {wanted}"
    if noted[wanted] != _sources():
        return "compiled beforehand of other sources: NOT USED"
    return f"compiled beforehand for {wanted}: used"


def main(architecture: str, *parts: str) -> int:
    """Compile what the parts run, the first part first."""
    folder().mkdir(parents=True, exist_ok=True)
    noted = _noted()
    noted[_by(architecture)] = _sources()
    (folder() / NOTE).write_text(json.dumps(noted, indent=1) + "\n")
    print(f"for {_by(architecture)}; a computer with another NVRTC will not use it", flush=True)
    failed = 0
    for part in parts or ("first", "checks"):

        def show(done: Compiled) -> None:
            print(f"{'FAIL' if done.error else 'OK':5} {done.job}: {done.error or f'{done.seconds:.1f} s'}")

        begin = time.monotonic()
        found = compile_all(jobs_of(part, architecture), show)
        failed += sum(done.error is not None for done in found)
        print(f"{part}: {len(found)} files, {time.monotonic() - begin:.0f} s", flush=True)
    size = sum(file.stat().st_size for file in folder().iterdir()) / 2**20
    print(f"{folder()}: {size:.1f} MiB")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
