"""The published cells beside the loops that people write for them, in PyTorch, TorchScript and JAX.

    python bench/zoo.py            measure, on a quiet machine; write JSON and docs/zoo.md
    python bench/zoo.py mgu ltc    measure these cells, and write nothing
    python bench/zoo.py mgu ltc --compile    measure torch.compile of these cells' loops, and write both too
    python bench/zoo.py --page     only write the page anew
    python bench/zoo.py --check    only see whether it is up to date

Forward and backward in float32, every gradient, all threads. Each result is checked before it is timed, and
the libraries are interleaved, as in ``fusedrnn bench``, whose cases these are for a cell of one's own.
Needs PyTorch and JAX, except for the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from measured import Report, by_family, captions, run, save, side_by_side, table, update

from fusedrnn import system
from fusedrnn.bench import registry, runner
from fusedrnn.bench.libraries import version
from fusedrnn.bench.peer_loops import LoopCompiled
from fusedrnn.bench.timing import Others, same_threads
from fusedrnn.cells import Cell
from fusedrnn.cells.zoo import ALL
from fusedrnn.problems import Case, Shape

NAME, COMPILED = "zoo-float32", "zoo-compile"  # of the files in bench/results
SHAPES = (Shape(100, 32, 16, 64), Shape(50, 32, 1, 32), Shape(100, 1, 1, 64))
LARGE = Shape(100, 64, 64, 256)
COMPILED_SHAPE = Shape(50, 32, 1, 32)
TOO_LONG = 3  # exit code of a process whose compiler did not end in time
PAGE = "docs/zoo.md"
CELLS = {cell.name: cell for cell in ALL}
PEERS = {"torch-loop": "PyTorch", "torchscript": "TorchScript", "jax-scan": "JAX"}
BLOCKS = 5


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


def ratios(found: Report) -> dict[str, list[float]]:
    """Of each cell, the means of the ratios to all peers, and the least to PyTorch and TorchScript."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        rows.setdefault(row["cell"], []).append(row["libraries"])
    torch = runner.torch_variants(PEERS)
    return {
        cell: [geometric_mean([libraries[name]["ratio"] for libraries in each]) for name in PEERS]
        + [min(libraries[name]["ratio"] for libraries in each for name in torch)]
        for cell, each in rows.items()
    }


def section(reports: dict[str, Report]) -> str:
    """The page's table."""
    header = ["cell", "ours, ms", *PEERS.values(), "lowest of PyTorch and TorchScript"]
    rows, lowest, refused = {}, [], []
    for family, found in reports.items():
        each = ratios(found)
        first = {row["cell"]: row["libraries"][runner.OURS]["ms"] for row in reversed(found["rows"])}
        rows[family] = [[f"`{cell}`", f"{first[cell]:.3g}", *shown(each[cell])] for cell in each]
        means = map(geometric_mean, zip(*each.values(), strict=True))
        rows[family].append(["geometric mean", "", *shown(means)])
        lowest.append(f"{min(values[-1] for values in each.values()):.2f} on {family}")
        refused += [f"- {family}, {text}" for text in found["refused"]]
    found = next(iter(reports.values()))
    shapes = list(dict.fromkeys(str(Shape(*row["shape"])) for row in found["rows"]))
    lines = [
        side_by_side(header, rows),
        "",
        f"The first column is our time at (T,B,I,H) = {shapes[0]}. The next three are the times of the "
        f"loops divided by ours, as geometric means over {', '.join(shapes)}. The last one is the lowest "
        f"ratio of the faster of PyTorch and TorchScript at any of these sizes; the lowest of all cells is "
        f"{', '.join(lowest)}. Backend `cpu`, the same number of threads for all libraries.",
        "",
        captions(reports),
    ]
    if refused:
        lines += ["", "Not timed, because a result differs too much:", "", *refused]
    return "\n".join(lines)


def shown(values: Iterable[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def compiled(name: str, seconds: float, limit: float) -> None:
    """One cell's loop by torch.compile, in a process of its own: prints the row, or exits with TOO_LONG."""

    class Limited(LoopCompiled):
        def results(self) -> Any:
            timer = threading.Timer(limit, os._exit, [TOO_LONG])
            timer.start()
            try:
                return super().results()
            finally:
                timer.cancel()

    registry.PEERS["torch-compile"] = Limited
    case, peers = Case(CELLS[name], COMPILED_SHAPE), ["torch-loop", "torchscript", "torch-compile"]
    with same_threads(None) as threads:
        row = runner.run_case(case, "float32", "cpu", peers, threads, (BLOCKS, seconds / BLOCKS, 3 * seconds))
    print(json.dumps({key: row[key] for key in ("cell", "shape", "others", "libraries")}))


def measure_compiled(options: argparse.Namespace) -> dict[str, Any]:
    """torch.compile of the loops of the cells that were named; one whose compiler takes too long says so."""
    rows: list[dict[str, Any]] = []
    for name in options.cells:
        code = f"import zoo; zoo.compiled({name!r}, {options.seconds}, {options.limit})"
        others = Others()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # nothing compiled before
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=Path(__file__).parent,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder},
                stdout=subprocess.PIPE,
                text=True,
            )
        if done.returncode not in (0, TOO_LONG):
            raise RuntimeError(f"{name}: torch.compile failed; its error stands above")
        row = {"cell": name, "others": others.share()}
        if not done.returncode:
            row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print("  ".join(compiled_cells(row, options.limit)), flush=True)
    import torch  # noqa: F401  of which the environment tells the version

    with same_threads(None) as threads:
        return {"limit": options.limit, "threads": threads, "environment": system.environment(), "rows": rows}


def compiled_cells(row: dict[str, Any], limit: float) -> list[str]:
    """A row of the table of compiled loops."""
    if "libraries" not in row:
        return [f"`{row['cell']}`", "", "", "", f"not finished after {limit:.0f} s"]
    libraries = row["libraries"]
    each = [libraries[n]["ratio"] for n in ("torch-loop", "torchscript", "torch-compile")]
    return [f"`{row['cell']}`", *shown(each), libraries["torch-compile"]["path"].removeprefix("first call ")]


def page_section(reports: dict[str, Report]) -> str:
    """The page's tables, that of compiled loops if there is one."""
    if not (more := by_family(COMPILED)):
        return section(reports)
    header = ["cell", "PyTorch", "TorchScript", "torch.compile", "its first call"]
    rows = {
        family: [compiled_cells(row, found["limit"]) for row in found["rows"]]
        for family, found in more.items()
    }
    lines = [
        section(reports),
        "",
        side_by_side(header, rows),
        "",
        f"The times of the loop divided by ours at (T,B,I,H) = {COMPILED_SHAPE}. `torch.compile` unrolls all "
        "steps; its first call compiles forward and backward.",
        "",
        captions(more),
    ]
    return "\n".join(lines)


def known(name: str) -> str:
    """The name of a cell."""
    if name not in CELLS:
        raise argparse.ArgumentTypeError(f"expected cells out of {', '.join(CELLS)}, got {name}")
    return name


def figures(options: argparse.Namespace) -> dict[str, Any] | None:
    """What the file holds; of some cells alone they are only shown, and with --compile have another file."""
    if options.compile:
        if not options.cells:
            raise SystemExit("--compile: expected names of cells")
        save(measure_compiled(options), COMPILED)
        update(PAGE, "zoo.py", page_section(by_family(NAME)), check=False)
        return None
    shapes = [*SHAPES, *([LARGE] if options.large else [])]
    found = measure([CELLS[name] for name in options.cells or CELLS], shapes, options.seconds)
    if not options.cells:
        return found
    print(
        table(["cell", *PEERS.values(), "lowest"], [[cell, *shown(v)] for cell, v in ratios(found).items()])
    )
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "cells", nargs="*", metavar="CELL", type=known, help="measure these, and write nothing"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="of each library, cell and shape")
    parser.add_argument("--compile", action="store_true", help=f"torch.compile of cells, at {COMPILED_SHAPE}")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a compiled loop's first call")
    parser.add_argument("--large", action="store_true", help=f"also at {LARGE}")
    return run(__file__, parser, figures, page_section, PAGE, NAME)


if __name__ == "__main__":
    sys.exit(main())
