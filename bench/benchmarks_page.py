"""docs/benchmarks.md from the runs of ``fusedrnn bench`` that bench/results holds.

    python bench/benchmarks_page.py            write the page
    python bench/benchmarks_page.py --check    only see whether it is up to date

A run is kept by ``fusedrnn bench ... --json bench/results/NAME.json``; RUNS says which are shown, and
what they were asked for besides their peers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import recompute as recompute_bench
from measured import ROOT, update

from fusedrnn.bench import report

RUNS = {
    "lstm-float32": "--cell lstm --memory",
    "lstm-float32-1-thread": "--cell lstm --threads 1",
    "lstm-float32-forward": "--cell lstm --forward",
    "gru-float32": "--cell gru",
    "rnn-float32": "--cell rnn",
    "lstm-float64": "--cell lstm --dtype float64",
    "gru-float64": "--cell gru --dtype float64",
    "lstm-float32-numba": "--cell lstm",
    "gru-float32-numba": "--cell gru",
    "rnn-float32-numba": "--cell rnn",
    "programs-float32": "--suite programs",
    "pytorch-float32": "--suite pytorch",
    "pytorch-float32-1-thread": "--suite pytorch --threads 1",
    "rl-float32": "--suite rl --memory",
}


LEVELS = ("backend", "kernels", "layer")


def markdown(table: report.Table) -> list[str]:
    """A table, its numbers to the right."""
    _, header, rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def run(name: str, asked: str) -> list[str]:
    """The lines of one run."""
    found = report.load(str(ROOT / "bench" / "results" / f"{name}.json"))
    asked += f" --peers {','.join(found['peers'])}"
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


def result(name: str) -> Any:
    """What bench/NAME.py --json bench/results/NAME.json wrote."""
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def torch_step() -> str:
    """The table of bench/torch_step.py."""
    rows = [
        [", ".join(map(str, row["shape"])), name, f"{each['ms']:.3g}", f"{each['ratio']:.2f}"]
        for row in result("torch_step")["rows"]
        for name, each in row["libraries"].items()
    ]
    return "\n".join(markdown(("", ["T, B, I, H", "kernels", "ms a step", "nn.LSTM / this"], rows)))


def epochs() -> str:
    """The tables of bench/sine_epoch.py and bench/pollution_epoch.py."""
    found = {f"sine, {cell.upper()}": row for cell, row in result("sine_epoch")["rows"].items()}
    found["pollution, LSTM"] = result("pollution_epoch")
    rows = []
    for name, row in found.items():
        (_, ours), (peer, theirs) = row["ms"].items()
        rows.append([name, f"{ours:.3g}", peer, f"{theirs:.3g}", f"{row['ratio']:.2f}"])
    return "\n".join(markdown(("", ["an epoch of", "fusedrnn ms", "peer", "ms", "peer / fusedrnn"], rows)))


def recompute() -> str:
    """The table of bench/recompute.py."""
    rows = recompute_bench.table(result("recompute")["rows"])
    return "\n".join(markdown(("", recompute_bench.HEADER, rows)))


def call_overhead() -> str:
    """The table of bench/call_overhead.py."""
    rows = []
    for row in result("call_overhead")["rows"]:
        times = dict(row["times"])
        arithmetic = times.pop("arithmetic")
        beyond = [f"{times[k] - arithmetic:+.1f}" if k in times else "–" for k in LEVELS]
        sizes = f"{row['B']}, {row['I']}, {row['H']}"
        rows.append([f"{row['cell']} {row['call']}", sizes, f"{arithmetic:.1f}", *beyond])
    return "\n".join(markdown(("", ["call", "B, I, H", "arithmetic", *LEVELS], rows)))


PARTS = {
    "torch_step": torch_step,
    "epochs": epochs,
    "recompute": recompute,
    "call_overhead": call_overhead,
    "runs": section,
}


def main() -> int:
    check = "--check" in sys.argv[1:]
    page, script = "docs/benchmarks.md", "benchmarks_page.py"
    return max(update(page, script, part(), check, name) for name, part in PARTS.items())


if __name__ == "__main__":
    sys.exit(main())
