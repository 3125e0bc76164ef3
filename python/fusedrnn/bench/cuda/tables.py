"""What people read of a run on a GPU: tables, lines, and how far it reaches its goals."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from fusedrnn.bench.cuda.runs import PEERS, Row
from fusedrnn.bench.report import Table, against_full
from fusedrnn.bench.runner import FULL, OURS


class Goal(NamedTuple):
    """A promise about some rows: the figure of each of them is at least, or at most, ``wanted``."""

    name: str
    rows: dict[str, Collection[Any]]  # what these fields of a row, T, B and H among them, may be
    # "us_per_step" of ours, or a library: its time over ours; where at most is wanted, ours over its.
    figure: str
    wanted: float
    at_least: bool = True


LAYER: dict[str, Collection[Any]] = {"ragged": [False], "resets": [0.0], "api": [""], "cell": ["lstm", "gru"]}
WIDE = LAYER | {"H": range(193, 1025), "B": range(1, 65)}
LSTM, GRU = WIDE | {"cell": ["lstm"]}, WIDE | {"cell": ["gru"]}
FLASH = LAYER | {"cell": ["lstm"], "mode": ["fp16"], "T": [1024], "B": [16], "H": [768]}
STEP: dict[str, Collection[Any]] = {"cell": ["lstm"], "api": ["cell"], "T": [1], "B": [8], "H": [256]}
GOALS = (
    Goal("LSTM, TF32 and bf16: times cuDNN", LSTM | {"mode": ["tf32", "bf16"]}, "torch", 2.0),
    Goal("GRU, 16 bits and TF32: times cuDNN", GRU | {"mode": ["tf32", "bf16", "fp16"]}, "torch", 2.0),
    Goal("float32, B <= 16: times cuDNN", WIDE | {"mode": ["fp32"], "B": range(1, 17)}, "torch", 2.0),
    Goal("float32, B > 16: times cuDNN", WIDE | {"mode": ["fp32"], "B": range(17, 65)}, "torch", 1.2),
    # cuDNN on an H100, NX-AI/flashrnn, head_dim--lstm.svg: 2.01 and 5.19 ms for 1024 steps.
    Goal("LSTM fp16, H = 768, B = 16: us a step", FLASH | {"kind": ["forward"]}, "us_per_step", 1.96, False),
    Goal("the same with backward: us a step", FLASH | {"kind": ["training"]}, "us_per_step", 5.07, False),
    Goal("resets: time / time without", {"resets": [0.03]}, FULL, 1.05, False),
    Goal("ragged lengths: time / time of full", {"ragged": [True]}, FULL, 1.05, False),
    Goal("T = 1, B = 8, H = 256: times LSTMCell", STEP, "torch-cell", 1.0),
    Goal("air pollution: times DeZero", {"case": ["an epoch of the program"]}, "dezero", 20.0),
)


def judge(rows: Sequence[Row], expected: Sequence[Row], epoch: float | None = None) -> list[dict[str, Any]]:
    """Each goal with the figure of the row that is furthest from it, and whether it holds.

    ``ratio`` says how far it is reached, from 1 on it is. Where ours failed in a row, or one is too slow, the
    goal does not hold; else, where a row was not measured, nobody knows: None.

    Args:
        rows: Of a run's report.
        expected: What ``runs.expected`` says of the same cases: a run may end before all of them.
        epoch: The time of DeZero's epoch divided by ours, where it was measured.
    """
    epoch_row: Row = {"case": "an epoch of the program", "mode": "tf32", "shape": []}
    epoch_row |= {} if epoch is None else {"libraries": {"dezero": {"ratio": epoch}}}
    every = {f"{row['case']} {row['mode']}": row for row in (*expected, *rows, epoch_row)}
    return [verdict(g, {name: row for name, row in every.items() if concerns(g, row)}) for g in GOALS]


def concerns(goal: Goal, row: Row) -> bool:
    """Whether the goal speaks of this row."""
    fields = row | dict(zip("TBIH", row["shape"], strict=False))
    return all(fields.get(name) in values for name, values in goal.rows.items())


def figure(goal: Goal, row: Row) -> float | None:
    """The goal's figure of a row; None where it was not measured."""
    libraries: dict[str, dict[str, float]] = row.get("libraries", {})
    if goal.figure == "us_per_step":
        return libraries.get(OURS, {}).get("us_per_step")
    ratio = libraries.get(goal.figure, {}).get("ratio")
    return ratio if goal.at_least or ratio is None else 1 / ratio


def verdict(goal: Goal, rows: dict[str, Row]) -> dict[str, Any]:
    """The goal beside the rows that it speaks of."""
    known = {name: value for name, row in rows.items() if (value := figure(goal, row)) is not None}
    reached = {n: v / goal.wanted if goal.at_least else goal.wanted / v for n, v in known.items()}
    worst = min(reached, key=lambda name: reached[name], default="")
    held = sum(value >= 1 for value in reached.values())
    failed = [f"{name}: {row['failed'][OURS]}" for name, row in rows.items() if OURS in row.get("failed", ())]
    unknown = len(rows) - len(known) - len(failed)
    holds = False if failed or held < len(known) else None if unknown or not known else True
    found = {"goal": goal.name, "wanted": goal.wanted, "at_least": goal.at_least, "holds": holds}
    found |= {"figure": known.get(worst), "ratio": reached.get(worst), "row": worst}
    return found | {"rows": len(rows), "held": held, "failed": failed, "not_measured": unknown}


def table(report: dict[str, Any]) -> Table:
    """Title, header and rows: ours, PyTorch's variants and the ratio to each."""
    rows = report["rows"]
    there = {name for row in rows for name in row["libraries"]}
    peers = [peer for peer in PEERS if peer in there]
    header = ["case", "precision", "us/step", "±", "of bound", "bound by"]
    header += [name for peer in peers for name in (peer, "ratio")]
    header += [*(["against full"] if FULL in there else []), "ours ran"]
    cells = []
    for row in rows:
        each = row["libraries"]
        mine = ["failed", "–", "–"]
        if OURS in each:
            mine = [
                f"{each[OURS]['us_per_step']:.2f}",
                *(f"{each[OURS][k]:.0%}" for k in ("spread", "of_bound")),
            ]
        line = [row["case"], row["mode"], *mine, row["bound"]["by"]]
        for peer in peers:
            entry = each.get(peer, {})
            us = f"{entry['us_per_step']:.2f}" if entry else "failed" if peer in row["failed"] else "–"
            line += [us, f"{entry['ratio']:.2f}" if "ratio" in entry else "–"]
        if FULL in there:
            line.append(against_full(row) if OURS in each else "–")
        plans = each[OURS]["plans"] if OURS in each else ["–"]
        cells.append([*line, " / ".join(plan.partition(",")[0] for plan in plans)])  # the kernels alone
    what = f"{report['suite'] or 'cases'} on {report['gpu']['name']}"
    return f"{what}: microseconds a step, and peer / ours (above 1 ours is faster)", header, cells


def goal_table(judged: Sequence[dict[str, Any]]) -> Table:
    """Every goal with its figure."""
    header = ["goal", "row furthest from it", "wanted", "figure", "ratio", "rows that hold", "holds"]
    cells = []
    for goal in judged:
        wanted = f"{'>=' if goal['at_least'] else '<='} {goal['wanted']:g}"
        figures = [f"{goal[key]:.2f}" if goal[key] is not None else "–" for key in ("figure", "ratio")]
        holds = {True: "yes", False: "no", None: "not all measured"}[goal["holds"]]
        rows = f"{goal['held']} of {goal['rows']}"
        cells.append([goal["goal"], goal["row"] or "–", wanted, *figures, rows, holds])
    return "goals (a ratio of 1 or more: it holds)", header, cells


def summary(report: dict[str, Any]) -> list[str]:
    """The lines under the table: means, rates, who failed and why, the machine."""
    lines = []
    for mode in report["modes"]:
        for peer in PEERS:
            entries = [row["libraries"].get(peer, {}) for row in report["rows"] if row["mode"] == mode]
            if ratios := [entry["ratio"] for entry in entries if "ratio" in entry]:
                mean = statistics.geometric_mean(ratios)
                lines.append(f"{mode}, {peer}: geometric mean of {len(ratios)} ratios {mean:.2f}")
    rates, gpu = report["rates"], report["gpu"]
    lines += [
        f"matrix product, {mode}: {rate / 1e12:.1f} TFLOP/s" for mode, rate in rates["operations"].items()
    ]
    lines.append(f"memory: {rates['bytes'] / 1e9:.0f} GB/s (a copy, read and written)")
    if rates["steps"]:
        lines.append(f"from one step to the next: {1e6 / rates['steps']:.2f} us (RNN of one row)")
    for row in report["rows"]:
        lines += [f"failed: {who}, {row['case']}, {row['mode']}: {why}" for who, why in row["failed"].items()]
    lines += [f"left out: {text}" for text in report["skipped"]]
    return [*lines, f"{gpu['name']}, cuDNN {gpu.get('cuDNN')}, {report['environment']['date']}"]
