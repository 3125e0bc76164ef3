"""What people read of a run: tables, the lines under them, and the JSON file."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from fusedrnn.bench.runner import FULL, OURS, WRONG, torch_variants

BUSY = 0.05  # of the cores; threads that wait for each other by spinning then lose far more than that
APART = 2.0  # times as long as at best: then a cache line travels between cores that share no cache

# Of a suite: what of it, and how many times faster than whom its geometric mean shall be, none below 1.
GOALS = {"pytorch": ("training steps beside torch", 1.7), "programs": ("the library's own way", 2.5)}

Table = tuple[str, list[str], list[list[str]]]


def table(report: dict[str, Any]) -> Table:
    """Title, header and rows: ours, the ratio to each peer, and the best of them."""
    peers = report["peers"]
    header = ["case", "ms", "±", "GFLOP/s", "of gemm", *peers]
    measured = [row for row in report["rows"] if OURS in row["libraries"]]
    best = any(row["best"] for row in measured)
    header += ["best peer", "ratio"] if best else []
    ways = any(own_way(row) for row in measured)
    header += ["own way", "ratio"] if ways else []
    full = any(FULL in row["libraries"] for row in measured)
    header += ["against full"] if full else []
    bounds = any("bound" in row for row in measured)  # of a GPU
    header += ["of bound", "bound by", "ours ran"] if bounds else []
    rows = []
    for row in measured:
        each = row["libraries"]
        ours = each[OURS]
        cells = [
            row["case"],
            f"{ours['ms']:.3g}",
            f"{ours['spread']:.0%}",
            f"{ours['gflops']:.1f}",
            "–" if ours["of_gemm"] is None else f"{ours['of_gemm']:.0%}",
            *(compared(each.get(peer)) for peer in peers),
        ]
        if best:
            cells += [row["best"]["peer"], f"{row['best']['ratio']:.2f}"] if row["best"] else ["–", "–"]
        if ways:
            cells += [row["way"], compared(own_way(row))] if own_way(row) else ["–", "–"]
        if full:
            cells.append(against_full(row))
        if bounds:
            cells += [f"{ours['of_bound']:.0%}", row["bound"]["by"], row["plan"].partition(",")[0]]
        rows.append(cells)
    title = (
        f"{report['suite'] or 'cases'}, {report['dtype']}, backend {report['backend']}, "
        f"{report['threads']} thread(s): ours, and peer / ours (above 1 ours is faster)"
    )
    return title, header, rows


def compared(entry: dict[str, Any] | None) -> str:
    """A peer's ratio, starred where it was faster with products in bfloat16."""
    if entry is None:
        return "–"
    return f"{entry['ratio']:.2f}" + ("*" if "precision" in entry else "")


def own_way(row: dict[str, Any]) -> dict[str, Any] | None:
    """What the row's library does by itself, where that took part."""
    return row["libraries"].get(row.get("way"))


def ratios(report: dict[str, Any], what: str) -> list[tuple[float, str]]:
    """The ratios that a goal is about, each with its case."""
    found = []
    for row in report["rows"]:
        torch = row["libraries"].get("torch") if row["kind"] == "update" else None
        entry = own_way(row) if what == GOALS["programs"][0] else torch
        if entry is not None:
            found.append((entry["ratio"], row["case"]))
    return found


def mean_and_least(found: list[tuple[float, str]]) -> str:
    """Their geometric mean, and the smallest with its case."""
    mean = statistics.geometric_mean([ratio for ratio, _ in found])
    return f"{mean:.2f}, the lowest {min(found)[0]:.2f} ({min(found)[1]})"


def at_product_rate(report: dict[str, Any]) -> float | None:
    """The geometric mean beside the best peers if our calls took only as long as their products.

    None for whole training steps, which are more than our calls, and if no matrix product was timed.
    """
    rows = [row for row in report["rows"] if row["best"]]
    found = [(row["best"]["ratio"], row["libraries"][OURS]["of_gemm"]) for row in rows]
    if not all(rate for _, rate in found) or any(row["kind"] == "update" for row in rows):
        return None
    return statistics.geometric_mean([ratio / rate for ratio, rate in found])


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
            took = " or ".join(sorted(filter(None, paths)))
            lines.append(f"{peer}: geometric mean of the ratios {mean:.2f}" + (f"; {took}" if took else ""))
    if report["best_of_torch"] is not None:
        lines.append(f"best PyTorch variant: geometric mean of the ratios {report['best_of_torch']:.2f}")
    best = [(row["best"]["ratio"], row["case"]) for row in report["rows"] if row["best"]]
    if best:
        lines.append(f"best of all peers: geometric mean of the ratios {mean_and_least(best)}")
        if (limit := at_product_rate(report)) is not None:
            lines.append(f"it would be {limit:.2f} at the rate of the matrix product in every case")
    what, goal = GOALS.get(report["suite"], ("", 0.0))
    if reached := ratios(report, what) if what else []:
        lines.append(f"{what}: geometric mean of the ratios {mean_and_least(reached)}")
        lines.append(f"goal of {what}: {goal}, none below 1.0")
    rounded = [e for row in report["rows"] for e in row["libraries"].values() if "precision" in e]
    if rounded:
        lines.append(
            '*: faster with `torch.set_float32_matmul_precision("medium")`, so timed with it; results are '
            f"off by up to {max(e['error'] for e in rounded):.0e} of the largest entry, "
            f"{rounded[0]['tolerance']} allowed"
        )
    for row in report["rows"]:
        each = row["libraries"].values()
        lines += [f"{row['case']}, bfloat16: {e[WRONG]}" for e in each if WRONG in e]
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
            f"other processes took up to {busy:.0%} of the cores during a case: its times may be too long"
        )
    transfers = [(t, row["case"]) for row in report["rows"] for t in row.get("transfers", ()) if t]
    if transfers and max(transfers)[0] > APART * min(transfers)[0]:
        (low, _), (high, case) = min(transfers), max(transfers)
        lines.append(
            f"a cache line took {low * 1e9:.0f} to {high * 1e9:.0f} ns between two threads, most at {case}: "
            "the cores did not always share a cache, so some times may be too long"
        )
    return lines


def save(report: dict[str, Any], path: str) -> None:
    """Write the report as JSON."""
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def load(path: str) -> dict[str, Any]:
    """Read what ``save`` wrote."""
    return json.loads(Path(path).read_text())
