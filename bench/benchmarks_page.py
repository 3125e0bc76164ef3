"""docs/benchmarks.md from the runs of ``fusedrnn bench`` that bench/results holds.

    python bench/benchmarks_page.py            write the page
    python bench/benchmarks_page.py --check    only see whether it is up to date

A run is kept by ``fusedrnn bench ... --json $(python bench/measured.py)/NAME.json``; RUNS says which are
shown, and what they were asked for besides their peers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import recompute as recompute_bench
from measured import Report, by_family, captions, side_by_side, table, update

from fusedrnn.bench import report

RUNS = {  # in a file of the name: what was asked for, and what it is about
    "lstm-float32": ("--cell lstm --memory", "LSTM, float32"),
    "lstm-float32-1-thread": ("--cell lstm --threads 1", "LSTM, float32, one thread"),
    "lstm-float32-forward": ("--cell lstm --forward", "LSTM, float32, forward only"),
    "gru-float32": ("--cell gru", "GRU, float32"),
    "rnn-float32": ("--cell rnn", "RNN, float32"),
    "lstm-float64": ("--cell lstm --dtype float64", "LSTM, float64"),
    "lstm-bfloat16": ("--cell lstm --dtype bfloat16", "LSTM, bfloat16, PyTorch modules"),
    "gru-float64": ("--cell gru --dtype float64", "GRU, float64"),
    "lstm-float32-numba": ("--cell lstm", "LSTM, float32, compared with Numba"),
    "gru-float32-numba": ("--cell gru", "GRU, float32, compared with Numba"),
    "rnn-float32-numba": ("--cell rnn", "RNN, float32, compared with Numba"),
    "programs-float32": ("--suite programs", "Workloads of other libraries, float32"),
    "pytorch-float32": ("--suite pytorch", "PyTorch modules, float32"),
    "pytorch-float32-1-thread": ("--suite pytorch --threads 1", "PyTorch modules, float32, one thread"),
    "rl-float32": ("--suite rl --memory", "Different lengths, resets and single steps, float32"),
}

LEVELS = ("backend", "kernels", "layer")


def best_peers(reports: dict[str, Report]) -> str:
    """Our time and the best peer of each case, and what the library itself does, on all families."""
    ways = any(report.own_way(row) for found in reports.values() for row in found["rows"])
    rows: dict[str, list[list[str]]] = {}
    for family, found in reports.items():
        rows[family] = []
        for row in found["rows"]:
            each, best, way = row["libraries"], row["best"], report.own_way(row)
            cells = [row["case"], f"{each[report.OURS]['ms']:.3g}"]
            cells.append(f"{best['ratio']:.2f} {best['peer']}" if best else "–")
            if ways:
                cells.append(f"{report.compared(way)} {row['way']}" if way else "–")
            rows[family].append(cells)
    return side_by_side(["case", "ms", "best peer", *(["own way"] if ways else [])], rows)


def run(name: str) -> list[str]:
    """The lines of one run: all families side by side, then each with all its figures."""
    asked, title = RUNS[name]
    reports = by_family(name)
    lines = [f"## {title}", ""]
    if len(reports) > 1:
        lines += [best_peers(reports), ""]
    lines += [captions(reports), ""]
    for family, found in reports.items():
        command = f"fusedrnn bench {asked} --peers {','.join(found['peers'])}"
        _, header, rows = report.table(found)
        lines += [f"### {family}: `{command}`", "", table(header, rows), ""]
        if "--memory" in asked:
            above, header, rows = report.memory_table(found)
            lines += [f"{above[0].upper()}{above[1:]}:", "", table(header, rows), ""]
        lines += [*(f"- {line}" for line in report.summary(found)), ""]
    return lines


def section() -> str:
    """All runs that are there."""
    return "\n".join(line for name in RUNS if by_family(name) for line in run(name)).rstrip()


def part(name: str, header: list[str], rows: Callable[[Report], list[list[str]]], left: int = 1) -> str:
    """The table of what bench/NAME.py measured."""
    reports = by_family(name)
    figures = {family: rows(found) for family, found in reports.items()}
    return f"{side_by_side(header, figures, left)}\n\n{captions(reports)}"


def torch_step(found: Report) -> list[list[str]]:
    return [
        [", ".join(map(str, row["shape"])), name, f"{each['ms']:.3g}", f"{each['ratio']:.2f}"]
        for row in found["rows"]
        for name, each in row["libraries"].items()
    ]


def epoch(name: str, row: Report) -> list[str]:
    """A row of bench/sine_epoch.py or bench/pollution_epoch.py."""
    (_, ours), (peer, theirs), *_ = row["ms"].items()
    return [name, peer, f"{ours:.3g}", f"{theirs:.3g}", f"{row['ratio']:.2f}"]


def epochs() -> str:
    """The tables of bench/sine_epoch.py and bench/pollution_epoch.py."""
    header = ["an epoch of", "peer", "fusedrnn ms", "peer ms", "peer / fusedrnn"]
    sine = part(
        "sine_epoch",
        header,
        lambda found: [epoch(f"sine, {cell.upper()}", row) for cell, row in found["rows"].items()],
        left=2,
    )
    pollution = part("pollution_epoch", header, lambda found: [epoch("pollution, LSTM", found)], left=2)
    return f"{sine}\n\n{pollution}"


def call_overhead(found: Report) -> list[list[str]]:
    rows = []
    for row in found["rows"]:
        times = dict(row["times"])
        arithmetic = times.pop("arithmetic")
        beyond = [f"{times[k] - arithmetic:+.1f}" if k in times else "–" for k in LEVELS]
        sizes = f"{row['B']}, {row['I']}, {row['H']}"
        rows.append([f"{row['cell']} {row['call']}", sizes, f"{arithmetic:.1f}", *beyond])
    return rows


PARTS = {
    "torch_step": lambda: part(
        "torch_step", ["T, B, I, H", "kernels", "ms a step", "nn.LSTM / this"], torch_step, left=2
    ),
    "epochs": epochs,
    "recompute": lambda: part(
        "recompute", recompute_bench.HEADER, lambda found: recompute_bench.table(found["rows"])
    ),
    "call_overhead": lambda: part(
        "call_overhead", ["call", "B, I, H", "arithmetic", *LEVELS], call_overhead, left=2
    ),
    "runs": section,
}


def main() -> int:
    check = "--check" in sys.argv[1:]
    page, script = "docs/benchmarks.md", "benchmarks_page.py"
    return max(update(page, script, written(), check, name) for name, written in PARTS.items())


if __name__ == "__main__":
    sys.exit(main())
