"""What people read of a run on a GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from fusedrnn.bench.cuda.runner import TORCH_VARIANTS
from fusedrnn.bench.report import Table, against_full
from fusedrnn.bench.runner import FULL, OURS

Row = dict[str, Any]


def table(report: dict[str, Any]) -> Table:
    """Title, header and rows: ours, PyTorch's variants and the ratio to each, what cuDNN was asked for."""
    rows = report["rows"]
    peers = [variant for variant in TORCH_VARIANTS if any(variant in row["libraries"] for row in rows)]
    full = any(FULL in row["libraries"] for row in rows)
    header = ["case", "precision", "us/step", "±", "of bound", "bound by"]
    for peer in peers:
        header += [peer, "ratio"]
    header += [*(["against full"] if full else []), "cuDNN is asked for", "ours ran"]
    cells = []
    for row in rows:
        each = row["libraries"]
        mine = each.get(OURS)
        line = [row["case"], row["mode"]]
        if mine is None:
            line += ["failed", "–", "–"]
        else:
            line += [f"{mine['us_per_step']:.2f}", f"{mine['spread']:.0%}", share(mine["of_bound"])]
        line.append(row["bound"]["by"] or "–")
        for peer in peers:
            entry = each.get(peer)
            missing = "failed" if peer in row["failed"] else "–"
            line.append(f"{entry['us_per_step']:.2f}" if entry else missing)
            line.append(f"{entry['ratio']:.2f}" if entry and "ratio" in entry else "–")
        line += [against_full(row) if mine else "–"] if full else []
        line.append(" / ".join(dict.fromkeys(row["cudnn"])) or "–")
        line.append(kernels(mine["plans"]) if mine else "–")
        cells.append(line)
    title = (
        f"{report['suite'] or 'cases'} on {report['gpu']['name']}: microseconds a step, and peer / ours "
        "(above 1 ours is faster)"
    )
    return title, header, cells


def share(value: float | None) -> str:
    """Of a whole."""
    return "–" if value is None else f"{value:.0%}"


def kernels(plans: Sequence[str]) -> str:
    """The kernels alone, forward and back."""
    return " / ".join(plan.partition(",")[0] for plan in plans)


def line(row: Row) -> str:
    """One row in one line, for who waits for the next."""
    parts = [f"{row['case']}, {row['mode']}:"]
    parts += [f"{who} {entry['us_per_step']:.2f} us a step," for who, entry in row["libraries"].items()]
    parts += [f"{who} failed: {why}," for who, why in row["failed"].items()]
    return " ".join(parts).rstrip(",:")


def goal_table(judged: Sequence[dict[str, Any]]) -> Table:
    """Every goal with its figure."""
    header = ["goal", "row furthest from it", "wanted", "figure", "ratio", "rows that hold", "holds"]
    cells = []
    for goal in judged:
        sign = ">=" if goal["at_least"] else "<="
        holds = {True: "yes", False: "no", None: "not all measured"}[goal["holds"]]
        figures = [f"{goal[key]:.2f}" if goal[key] is not None else "–" for key in ("figure", "ratio")]
        rows = f"{goal['held']} of {goal['rows']}"
        cells.append([goal["goal"], goal["row"] or "–", f"{sign} {goal['wanted']:g}", *figures, rows, holds])
    return "goals (a ratio of 1 or more: it holds)", header, cells


def summary(report: dict[str, Any]) -> list[str]:
    """The lines under the table: means, rates, who failed and why, the machine."""
    lines = []
    for mode in report["modes"]:
        for variant in TORCH_VARIANTS:
            ratios = [
                entry["ratio"]
                for row in report["rows"]
                if row["mode"] == mode and "ratio" in (entry := row["libraries"].get(variant, {}))
            ]
            if ratios:
                mean = math.exp(statistics.fmean(map(math.log, ratios)))
                lines.append(f"{mode}, {variant}: geometric mean of {len(ratios)} ratios {mean:.2f}")
    rates = report["rates"]
    for mode, rate in rates["operations"].items():
        if rate is not None:
            lines.append(f"matrix product, {mode}: {rate / 1e12:.1f} TFLOP/s")
    if rates["bytes"] is not None:
        lines.append(f"memory: {rates['bytes'] / 1e9:.0f} GB/s (a copy, read and written)")
    if rates["step"] is not None:
        lines.append(f"from one step to the next: {rates['step'] * 1e6:.2f} us (RNN of one row)")
    for row in report["rows"]:
        lines += [f"failed: {who}, {row['case']}, {row['mode']}: {why}" for who, why in row["failed"].items()]
    lines += [f"left out: {text}" for text in report["skipped"]]
    gpu = report["gpu"]
    versions = f", cuDNN {gpu['cudnn']}" if "cudnn" in gpu else ""
    lines.append(f"{gpu['name']}{versions}, {report['environment']['date']}")
    return lines
