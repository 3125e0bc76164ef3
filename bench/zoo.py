"""The published cells beside the loops that people write for them, in PyTorch, TorchScript and JAX.

    python bench/zoo.py            measure, on a quiet machine; write JSON and docs/zoo.md
    python bench/zoo.py mgu ltc    measure these cells, and write nothing
    python bench/zoo.py mgu ltc --compile    measure torch.compile of these cells' loops, and write both too
    python bench/zoo.py --check    only see whether the page is up to date

Forward and backward in float32, every gradient, all threads. Each result is checked before it is timed, and
the libraries are interleaved, as in ``fusedrnn bench``, whose cases these are for a cell of one's own.
Needs PyTorch and JAX, except to check.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from measured import RESULTS, busy, run, update

from fusedrnn import system
from fusedrnn.bench import registry, runner
from fusedrnn.bench.libraries import version
from fusedrnn.bench.peer_loops import LoopCompiled
from fusedrnn.bench.timing import Others, same_threads
from fusedrnn.cells import Cell
from fusedrnn.cells.zoo import ALL
from fusedrnn.problems import Case, Shape

FILE = RESULTS / "zoo-float32.json"
SHAPES = (Shape(100, 32, 16, 64), Shape(50, 32, 1, 32), Shape(100, 1, 1, 64))
LARGE = Shape(100, 64, 64, 256)
COMPILED, COMPILED_SHAPE = RESULTS / "zoo-compile.json", Shape(50, 32, 1, 32)
TOO_LONG = 3  # exit code of a process whose compiler did not end in time
PAGE = "docs/zoo.md"
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
        "| cell | ours, ms | " + " | ".join(PEERS.values()) + " | lowest of PyTorch and TorchScript |",
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
        f"The first column is our time at (T,B,I,H) = {shapes[0]}. The next three are the times of the "
        f"loops divided by ours, as geometric means over {', '.join(shapes)}. The last one is the lowest "
        f"ratio of the faster of PyTorch and TorchScript at any of these sizes; the lowest of all cells is "
        f"{least:.2f}. "
        f"Backend `cpu`, {environment['isa']}, {found['threads']} thread(s) for all libraries, PyTorch "
        f"{environment['torch']}, JAX {environment['jax']}, "
        f"{machine.get('model name', machine['architecture'])}, {environment['date'][:10]}. Other processes "
        f"used up to {busy(found['rows'])}.",
    ]
    if found["refused"]:
        lines += ["", f"Not timed, because a result differs too much: {'; '.join(found['refused'])}."]
    return "\n".join(lines)


def joined(ratios: list[float]) -> str:
    return " | ".join(f"{ratio:.2f}" for ratio in ratios)


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
        print(compiled_line(row, options.limit), flush=True)
    import torch  # noqa: F401  of which the environment tells the version

    with same_threads(None) as threads:
        return {"limit": options.limit, "threads": threads, "environment": system.environment(), "rows": rows}


def compiled_line(row: dict[str, Any], limit: float) -> str:
    """A row of the table of compiled loops."""
    if "libraries" not in row:
        return f"| `{row['cell']}` | | | | not finished after {limit:.0f} s |"
    libraries = row["libraries"]
    found = libraries["torch-compile"]
    ratios = joined([libraries[n]["ratio"] for n in ("torch-loop", "torchscript", "torch-compile")])
    return f"| `{row['cell']}` | {ratios} | {found['path'].removeprefix('first call ')} |"


def page_section(found: dict[str, Any]) -> str:
    """The page's tables, that of compiled loops if there is one."""
    if not COMPILED.exists():
        return section(found)
    more = json.loads(COMPILED.read_text())
    lines = [
        "",
        "| cell | PyTorch | TorchScript | torch.compile | its first call |",
        "|---|---:|---:|---:|---:|",
        *(compiled_line(row, more["limit"]) for row in more["rows"]),
        "",
        f"The times of the loop divided by ours at (T,B,I,H) = {COMPILED_SHAPE}. `torch.compile` unrolls all "
        f"steps; its first call compiles forward and backward. {more['threads']} thread(s), PyTorch "
        f"{more['environment']['torch']}, {more['environment']['date'][:10]}. Other processes used up to "
        f"{busy(more['rows'])}.",
    ]
    return "\n".join([section(found), *lines])


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
        COMPILED.write_text(json.dumps(measure_compiled(options), indent=1) + "\n")
        update(PAGE, "zoo.py", page_section(json.loads(FILE.read_text())), check=False)
        return None
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
    parser.add_argument("--compile", action="store_true", help=f"torch.compile of cells, at {COMPILED_SHAPE}")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a compiled loop's first call")
    parser.add_argument("--large", action="store_true", help=f"also at {LARGE}")
    return run(__file__, parser, figures, page_section, PAGE, FILE)


if __name__ == "__main__":
    sys.exit(main())
