"""How much faster than the NumPy reference a program's training is, on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from fusedrnn import backends
from fusedrnn.terminal import Report

TIMED = 15  # repetitions, of what takes long fewer


def compare(start: Callable[[str], Callable[[], object]], what: str, report: Report) -> None:
    """A line: the milliseconds of ``what`` with the backend in use and with the NumPy reference.

    ``start(backend)`` gives what is timed. Of several times, interleaved, the fastest counts.
    """
    backend = backends.get().name
    if backend == "reference":
        report.line("Speed: no compiled backend can run here, so this was the NumPy reference itself.")
        return
    works = {name: start(name) for name in (backend, "reference")}
    least = dict.fromkeys(works, math.inf)
    begin = time.perf_counter()
    for k in range(TIMED):
        for name, work in works.items():
            before = time.perf_counter()
            work()
            least[name] = min(least[name], 1e3 * (time.perf_counter() - before))
        if k and time.perf_counter() - begin > 1:
            break
    ours, theirs = least.values()
    report.line(
        f"Speed: {what} took {ours:.2f} ms with the {backend} backend, {theirs:.2f} ms with "
        f"the NumPy reference: {theirs / ours:.1f} times as fast."
    )
