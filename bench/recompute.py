"""What ``save="boundary_states"`` (recompute) costs and saves: time of forward + backward, bytes of the tape.

    python bench/recompute.py [--threads N] [--json FILE]

Both modes interleaved, the best of several calls; the gradients' bits are compared before timing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn import kernels, problems, system, terminal
from fusedrnn.bench.timing import same_threads

CALLS = 7
HEADER = ["case", "ms", "recompute", "ratio", "tape MiB", "recompute"]


def measure(case: problems.Case) -> dict[str, dict[str, float]]:
    """Seconds and bytes of each mode."""
    data = problems.make(case, "float32")
    cell, x, weights, dy = case.cell, data.x, data.weights[0], data.dy
    found: dict[str, dict[str, float]] = {}
    gradients = {}
    for save in ("all", "boundary_states"):
        out = kernels.forward(cell, x, weights, save=save)
        found[save] = {"bytes": out.tape.tape.bytes, "seconds": float("inf")}
        gradients[save] = kernels.backward(out.tape, dy)
    for name, a in gradients["all"].dweights.items():
        assert np.array_equal(a, gradients["boundary_states"].dweights[name])
    for _ in range(CALLS):
        for save, row in found.items():
            start = time.perf_counter()
            kernels.backward(kernels.forward(cell, x, weights, save=save).tape, dy)
            row["seconds"] = min(row["seconds"], time.perf_counter() - start)
    return found


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows under HEADER."""
    cells = []
    for row in rows:
        every, boundary = row["all"], row["boundary_states"]
        ms = [1e3 * each["seconds"] for each in (every, boundary)]
        tapes = [each["bytes"] / 2**20 for each in (every, boundary)]
        cells.append(
            [row["case"], *(f"{t:.3g}" for t in ms), f"{ms[1] / ms[0]:.2f}", *(f"{b:.2f}" for b in tapes)]
        )
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with same_threads(args.threads) as threads:
        for case in problems.SUITES["core"]:
            found = measure(case)
            rows.append({"case": str(case), **found})
    terminal.table(f"{threads} thread(s)", HEADER, table(rows))
    if args.json:
        report = {"threads": threads, "environment": system.environment(), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
