"""The published cells beside the loops that people write for them, in PyTorch, TorchScript and JAX.

    python bench/zoo.py            measure, on a quiet machine; write JSON and docs/zoo.md
    python bench/zoo.py mgu ltc    measure these cells, and write nothing
    python bench/zoo.py --check    only see whether the page is up to date

Forward and backward in float32, every gradient, all threads. Each result is checked before it is timed, and
the libraries are interleaved, as in ``fusedrnn bench``, whose cases these are for a cell of one's own.
Needs PyTorch and JAX, except to check.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from typing import Any

from measured import RESULTS, busy, run

from fusedrnn import system
from fusedrnn.bench import registry, runner
from fusedrnn.bench.libraries import version
from fusedrnn.bench.timing import same_threads
from fusedrnn.cells import Cell
from fusedrnn.cells.zoo import ALL
from fusedrnn.problems import Case, Shape

FILE = RESULTS / "zoo-float32.json"
SHAPES = (Shape(100, 32, 16, 64), Shape(50, 32, 1, 32), Shape(100, 1, 1, 64))
LARGE = Shape(100, 64, 64, 256)
CELLS = {cell.name: cell for cell in ALL if not cell.projects}
PEERS = {"torch-loop": "PyTorch", "torchscript": "TorchScript", "jax-scan": "JAX"}
BLOCKS = 5


def mean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def measure(cells: list[Cell], shapes: list[Shape], seconds: float) -> dict[str, Any]:
    """Every cell at every shape; ``seconds`` of each library there."""
    cases = [Case(cell, shape) for cell in cells for shape in shapes]
    registry.choose([*PEERS], cases, "float32", "cpu")  # or an error that says what to install
    timing = BLOCKS, seconds / BLOCKS, 3 * seconds
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    with same_threads(None) as threads:
        for number, case in enumerate(cases, start=1):
            try:
                row = runner.run_case(case, "float32", "cpu", [*PEERS], threads, timing)
            except RuntimeError as error:  # of the check; the others' figures are not lost for it
                refused.append(f"{case}: {error}")
                print(refused[-1], flush=True)
                continue
            each = {
                name: {key: found[key] for key in ("ms", "spread", "ratio", "error") if key in found}
                for name, found in row["libraries"].items()
            }
            rows.append({key: row[key] for key in ("cell", "shape", "others")} | {"libraries": each})
            ratios = "  ".join(f"{PEERS[name]} {each[name]['ratio']:.2f}" for name in PEERS)
            print(
                f"{number}/{len(cases)} {case}: {each[runner.OURS]['ms']:.3g} ms, times ours {ratios}",
                flush=True,
            )
    return {
        "seconds": seconds,
        "threads": threads,
        "environment": system.environment() | {"jax": version("jax")},
        "refused": refused,
        "rows": rows,
    }


def section(found: dict[str, Any]) -> str:
    """The page's table."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        rows.setdefault(row["cell"], []).append(row["libraries"])
    lines = [
        "| cell | ours, ms | " + " | ".join(PEERS.values()) + " | least of PyTorch and TorchScript |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    figures = []
    for cell, each in rows.items():
        ratios = [mean([libraries[name]["ratio"] for libraries in each]) for name in PEERS]
        torch = runner.torch_variants(PEERS)
        ratios.append(min(libraries[name]["ratio"] for libraries in each for name in torch))
        figures.append(ratios)
        lines.append(f"| `{cell}` | {each[0][runner.OURS]['ms']:.3g} | {joined(ratios)} |")
    columns = [mean([*column]) for column in zip(*figures, strict=True)]
    lines.append(f"| geometric mean | | {joined(columns)} |")
    shapes = list(dict.fromkeys(str(Shape(*row["shape"])) for row in found["rows"]))
    environment = found["environment"]
    machine = environment["machine"]
    least = min(ratios[-1] for ratios in figures)
    lines += [
        "",
        f"Our time at (T,B,I,H) = {shapes[0]}; then how many times ours the others take, geometric means of "
        f"{', '.join(shapes)}, and the least ratio at any of them to the faster of the loop in PyTorch and "
        f"TorchScript, of all cells {least:.2f}. Backend `cpu`, {environment['isa']}, {found['threads']} "
        f"thread(s) for everybody, PyTorch {environment['torch']}, JAX {environment['jax']}, "
        f"{machine.get('model name', machine['architecture'])}, {environment['date'][:10]}; other processes "
        f"took up to {busy(found['rows'])}.",
    ]
    if found["refused"]:
        lines += ["", f"Not timed, since a result differs too much: {'; '.join(found['refused'])}."]
    return "\n".join(lines)


def joined(ratios: list[float]) -> str:
    return " | ".join(f"{ratio:.2f}" for ratio in ratios)


def known(name: str) -> str:
    """The name of a cell."""
    if name not in CELLS:
        raise argparse.ArgumentTypeError(f"expected cells out of {', '.join(CELLS)}, got {name}")
    return name


def figures(options: argparse.Namespace) -> dict[str, Any] | None:
    """What the file holds; of some cells alone they are only shown."""
    shapes = [*SHAPES, *([LARGE] if options.large else [])]
    found = measure([CELLS[name] for name in options.cells or CELLS], shapes, options.seconds)
    if not options.cells:
        return found
    print(section(found))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "cells", nargs="*", metavar="CELL", type=known, help="measure these, and write nothing"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="of each library, cell and shape")
    parser.add_argument("--large", action="store_true", help=f"also at {LARGE}")
    return run(__file__, parser, figures, section, "docs/zoo.md", FILE)


if __name__ == "__main__":
    sys.exit(main())
