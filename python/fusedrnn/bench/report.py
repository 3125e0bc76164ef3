"""What people read of a run: tables, the lines under them, and the JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusedrnn.bench.runner import FULL, OURS, torch_variants

BUSY = 0.05  # of the cores; threads that wait for each other by spinning then lose far more than that

Table = tuple[str, list[str], list[list[str]]]


def table(report: dict[str, Any]) -> Table:
    """Title, header and rows: ours, the ratio to each peer, and the best of them."""
    peers = report["peers"]
    header = ["case", "ms", "±", "GFLOP/s", "of gemm", *peers]
    best = any(row["best"] for row in report["rows"])
    header += ["best peer", "ratio"] if best else []
    full = any(FULL in row["libraries"] for row in report["rows"])
    header += ["against full"] if full else []
    rows = []
    for row in report["rows"]:
        each = row["libraries"]
        ours = each[OURS]
        cells = [
            row["case"],
            f"{ours['ms']:.3g}",
            f"{ours['spread']:.0%}",
            f"{ours['gflops']:.1f}",
            "–" if ours["of_gemm"] is None else f"{ours['of_gemm']:.0%}",
            *(f"{each[peer]['ratio']:.2f}" if peer in each else "–" for peer in peers),
        ]
        if best:
            cells += [row["best"]["peer"], f"{row['best']['ratio']:.2f}"] if row["best"] else ["–", "–"]
        if full:
            cells.append(against_full(row))
        rows.append(cells)
    title = (
        f"{report['suite'] or 'cases'}, {report['dtype']}, backend {report['backend']}, "
        f"{report['threads']} thread(s): ours, and peer / ours (above 1 ours is faster)"
    )
    return title, header, rows


def against_full(row: dict[str, Any]) -> str:
    """Our time with resets against that without; that of a ragged case against its share of valid steps."""
    if FULL not in row["libraries"]:
        return "–"
    cost = 1 / row["libraries"][FULL]["ratio"]
    return f"{cost / row['valid'] - 1:+.0%}" + (" per valid step" if row["ragged"] else "")


def mebibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.2f}"


def memory_table(report: dict[str, Any]) -> Table:
    """Bytes saved for backward, own and borrowed, and peak memory: ours and the first PyTorch variant."""
    header = ["case", "saved: own", "borrowed", "torch: own", "borrowed", "peak", "torch", "torch is"]
    rows = []
    for row in report["rows"]:
        each = row["libraries"]
        theirs = next(iter(torch_variants(each)), None)
        cells = [row["case"]]
        for name in (OURS, theirs):
            saved = each[name].get("saved") if name else None
            cells += [mebibytes(saved and saved[key]) for key in ("own", "borrowed")]
        cells += [mebibytes(each[name].get("peak") if name else None) for name in (OURS, theirs)]
        rows.append([*cells, theirs or "–"])
    return "memory in MiB, without inputs and weights", header, rows


def summary(report: dict[str, Any]) -> list[str]:
    """The lines under the tables: means, paths, what was left out, the machine."""
    found = report["environment"]
    lines = []
    for peer, mean in report["geometric_mean"].items():
        if mean is not None:
            paths = {row["libraries"][peer]["path"] for row in report["rows"] if peer in row["libraries"]}
            took = ", ".join(sorted(filter(None, paths)))
            lines.append(f"{peer}: geometric mean of the ratios {mean:.2f}" + (f"; {took}" if took else ""))
    for key, name in (("best_of_torch", "best PyTorch variant"), ("best_of_all", "best of all peers")):
        if report[key] is not None:
            lines.append(f"{name}: geometric mean of the ratios {report[key]:.2f}")
    if report["gemm"]["gflops"] is not None:
        who = max(report["gemm"]["each"], key=report["gemm"]["each"].get)
        lines.append(f"matrix product: {report['gemm']['gflops']:.0f} GFLOP/s ({who} cubed)")
    lines += report["left_out"] + [f"left out: {text}" for text in report["skipped"]]
    machine = found["machine"]
    processor = machine.get("model name", machine["architecture"])
    lines.append(f"{processor}, {machine['cores']} cores, {found['date']}")
    busy = max((row["others"] or 0.0 for row in report["rows"]), default=0.0)
    if busy > BUSY:
        lines.append(
            f"other processes took up to {busy:.0%} of the cores during a case: measure again for figures"
        )
    return lines


def save(report: dict[str, Any], path: str) -> None:
    """Write the report as JSON."""
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def load(path: str) -> dict[str, Any]:
    """Read what ``save`` wrote."""
    report: dict[str, Any] = json.loads(Path(path).read_text())
    return report
