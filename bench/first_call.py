"""How long the first call of a new cell takes, forward and backward, every published cell in turn.

    python bench/first_call.py            measure, on a quiet machine; write JSON and docs/cells.md
    python bench/first_call.py mgu ltc    measure these cells, and write nothing
    python bench/first_call.py --page     only write the page anew
    python bench/first_call.py --check    only see whether it is up to date

A process of its own imports the library and reads the arrays; then the clock runs. The call loads the
backend, traces the function, derives the gradient, plans the programs, packs the weights, and computes every
gradient, in float32. The second call is what all later ones take.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from measured import captions, run, side_by_side

from fusedrnn import problems
from fusedrnn.bench.timing import Others
from fusedrnn.cells import Cell
from fusedrnn.cells.zoo import ALL, fs_lstm
from fusedrnn.problems import Case, Shape
from fusedrnn.threads import get_num_threads

PAGE = "docs/cells.md"
LARGE = "fs_lstm(fast=4)"  # 60 operations, more than any published cell has by default
CELLS = {cell.name: cell for cell in ALL} | {LARGE: fs_lstm.with_options(fast=4)}
SHAPE = Shape(50, 32, 1, 32)
CALLS = """
import json, pickle, sys, time
from fusedrnn import kernels
from fusedrnn.cells import zoo
name, options, x, weights, scalars, dy, dstateT = pickle.load(sys.stdin.buffer)
cell = getattr(zoo, name).with_options(**options)
seconds = []
for _ in range(2):
    start = time.perf_counter()
    out = kernels.forward(cell, x, weights, scalars=scalars, save="all", backend="cpu")
    kernels.backward(out.tape, dy, dstateT)
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def measure(name: str, cell: Cell, processes: int) -> dict[str, Any]:
    """Seconds of the first and of the second call, the medians of several processes."""
    data = problems.make(Case(cell, SHAPE), "float32")
    upstream = data.dy, tuple(d[0] for d in data.dstateT)
    given = pickle.dumps((cell.name, cell.options, data.x, data.weights[0], data.scalars, *upstream))
    others = Others()
    found = []
    for _ in range(processes):
        done = subprocess.run([sys.executable, "-c", CALLS], input=given, stdout=subprocess.PIPE, check=True)
        found.append(json.loads(done.stdout))
    first, second = map(statistics.median, zip(*found, strict=True))
    # As `fusedrnn info` counts them.
    operations = sum(o.op not in ("constant", "vector") for o in cell.forward)
    row = {"cell": name, "operations": operations, "first": first, "second": second}
    return row | {"others": others.share()}


def section(reports: dict[str, dict[str, Any]]) -> str:
    """The page's table."""
    header = ["first call of", "ms"]
    each = {family: lines(found) for family, found in reports.items()}
    one = next(iter(reports.values()))
    return (
        f"{side_by_side(header, each)}\n\nForward and backward at (T,B,I,H) = {Shape(*one['shape'])}, each "
        f"in a new process: the median of {one['processes']} for each cell.\n\n{captions(reports)}"
    )


def lines(found: dict[str, Any]) -> list[list[str]]:
    """The rows of the table, of one family of processors."""
    rows = {row["cell"]: row for row in found["rows"]}
    large = rows.pop(LARGE)
    first = [row["first"] for row in rows.values()]
    return [
        ["published cells, median", ms(first)],
        ["published cells, slowest", ms([max(first)])],
        [f"`{LARGE}`, {large['operations']} operations", ms([large["first"]])],
        ["published cells, median of a later call", ms(row["second"] for row in rows.values())],
    ]


def ms(seconds: Iterable[float]) -> str:
    """The median in milliseconds."""
    found = 1e3 * statistics.median(seconds)
    return f"{found:.0f}" if found >= 10 else f"{found:.1f}"


def figures(options: argparse.Namespace) -> dict[str, Any] | None:
    """What the file holds; of some cells alone they are only shown."""
    if unknown := set(options.cells) - set(CELLS):
        raise SystemExit(f"expected cells out of {', '.join(CELLS)}, got {', '.join(sorted(unknown))}")
    rows = []
    for name in options.cells or CELLS:
        rows.append(row := measure(name, CELLS[name], options.processes))
        first, second = ms([row["first"]]), ms([row["second"]])
        print(f"{name}: {row['operations']} operations, first {first} ms, second {second} ms", flush=True)
    if options.cells:
        return None
    return {"shape": SHAPE, "processes": options.processes, "threads": get_num_threads(), "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help="measure these, and write nothing")
    parser.add_argument("--processes", type=int, default=5, help="for each cell; the median counts")
    return run(__file__, parser, figures, section, PAGE, "first_call")


if __name__ == "__main__":
    sys.exit(main())
