"""docs/benchmarks.md from the runs of ``fusedrnn bench`` that bench/results holds.

    python bench/benchmarks_page.py            write the page
    python bench/benchmarks_page.py --check    only see whether it is up to date

A run is kept by ``fusedrnn bench ... --json bench/results/NAME.json``; RUNS says which are shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from measured import ROOT, update

from fusedrnn.bench import report

# The file, and what the run was asked for.
RUNS = {
    "lstm-float32": "--cell lstm --peers torch,torch-cell,jax --memory",
    "lstm-float32-1-thread": "--cell lstm --peers torch --threads 1",
    "lstm-float32-forward": "--cell lstm --forward --peers torch,onnxruntime",
    "gru-float32": "--cell gru --peers torch",
    "rnn-float32": "--cell rnn --peers torch",
    "lstm-float64": "--cell lstm --dtype float64 --peers torch",
    "gru-float64": "--cell gru --dtype float64 --peers torch",
    "programs-float32": "--suite programs --peers torch,jax",
    "rl-float32": "--suite rl --peers torch,torch-cell,torch-packed,torch-masked,onnxruntime --memory",
    "wide-float32": "--suite wide --peers torch",
    "deepbench-float32": "--suite deepbench --peers torch",
    "lstm-float32-numba": "--cell lstm --peers numba",
    "gru-float32-numba": "--cell gru --peers numba",
    "rnn-float32-numba": "--cell rnn --peers numba",
}


def markdown(table: report.Table) -> list[str]:
    """A table, its numbers to the right."""
    _, header, rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def run(name: str, asked: str) -> list[str]:
    """The lines of one run."""
    found = report.load(str(ROOT / "bench" / "results" / f"{name}.json"))
    lines = [f"## `fusedrnn bench {asked}`", "", *markdown(report.table(found)), ""]
    if "--memory" in asked:
        table = report.memory_table(found)
        lines += [f"{table[0].capitalize()}:", "", *markdown(table), ""]
    commit = (found["environment"]["commit"] or "unknown")[:10]
    return [*lines, *(f"- {line}" for line in report.summary(found)), f"- commit {commit}", ""]


def section() -> str:
    """All runs that are there."""
    kept = [name for name in RUNS if (ROOT / "bench" / "results" / f"{name}.json").exists()]
    return "\n".join(line for name in kept for line in run(name, RUNS[name])).rstrip()


def torch_step() -> str:
    """The table of bench/torch_step.py."""
    found = json.loads((ROOT / "bench" / "results" / "torch_step.json").read_text())
    rows: list[Sequence[str]] = []
    for row in found["rows"]:
        rows += [
            [", ".join(map(str, row["shape"])), name, f"{each['ms']:.3g}", f"{each['ratio']:.2f}"]
            for name, each in row["participants"].items()
        ]
    header = ["T, B, I, H", "kernels", "ms a step", "nn.LSTM / this"]
    return "\n".join(markdown(("", header, [list(row) for row in rows])))


def main() -> int:
    check = "--check" in sys.argv[1:]
    page, script = "docs/benchmarks.md", "benchmarks_page.py"
    runs = update(page, script, section(), check, "runs")
    return runs or update(page, script, torch_step(), check, "torch_step")


if __name__ == "__main__":
    sys.exit(main())
