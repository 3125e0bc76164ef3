"""The peak memory of a case: a process that runs it, beyond one that only makes its inputs.

Both first run a tiny case, so that the code a library loads or generates at its first call is in both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from fusedrnn import problems
from fusedrnn.bench import registry
from fusedrnn.bench.libraries import Library
from fusedrnn.bench.timing import same_threads
from fusedrnn.problems import Case, Shape

CALLS = 3  # the second and third may still add what an allocator keeps
TINY = Shape(2, 2, 2, 8)


def high_water() -> int:
    """The most bytes of memory that this process has had.

    Not by getrusage alone: on Linux a child's figure begins at the size of the parent that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(text: str) -> None:
    """What the child process does: set up the library, call it, print the high-water mark."""
    task = json.loads(text)

    def make(case: Case) -> Library:
        data = problems.make(case, task["dtype"])
        if task["peer"] is None:
            return registry.ours(data, task["backend"], task["threads"], task["dtype"])
        return registry.peer(task["peer"], data, task["threads"], task["dtype"])

    with same_threads(task["threads"]):
        case = problems.described(task["case"])
        make(replace(case, shape=TINY))()
        library = make(case)
        for _ in range(task["calls"]):
            library()
        print(high_water())


def peak(case: Case, dtype: str, threads: int, backend: str, peer: str | None) -> int:
    """Bytes at the peak of a few calls, beyond imports, inputs, weights and what is prepared with them.

    ``peer`` is None for ours.
    """

    def run(calls: int) -> int:
        task = {
            "case": problems.describe(case),
            "dtype": dtype,
            "threads": threads,
            "backend": backend,
            "peer": peer,
            "calls": calls,
        }
        code = "import sys; from fusedrnn.bench import memory; memory.child(sys.argv[1])"
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(task)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the process that measures memory broke off: {last}")
        return int(done.stdout)

    return run(CALLS) - run(0)
