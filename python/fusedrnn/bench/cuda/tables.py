"""What people read of a run on a GPU beside the table: means, rates, and how far it reaches its goals."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from fusedrnn.bench.cuda.runs import PEERS, Row
from fusedrnn.bench.report import Table
from fusedrnn.bench.runner import FULL, OURS, means


class Goal(NamedTuple):
    """In each of some rows ours shall be at least ``wanted`` times as fast as something."""

    name: str
    rows: dict[str, Collection[Any]]  # what these fields of a row, T, B and H among them, may be
    against: str | float  # a library, or microseconds a step
    wanted: float


LAYER: dict[str, Collection[Any]] = {"ragged": [False], "resets": [0.0], "api": [""], "cell": ["lstm", "gru"]}
WIDE = LAYER | {"H": range(193, 1025), "B": range(1, 65)}
LSTM, GRU = WIDE | {"cell": ["lstm"]}, WIDE | {"cell": ["gru"]}
FLASH = LAYER | {"cell": ["lstm"], "mode": ["fp16"], "T": [1024], "B": [16], "H": [768]}
STEP: dict[str, Collection[Any]] = {"cell": ["lstm"], "api": ["cell"], "T": [1], "B": [8], "H": [256]}
GOALS = (
    Goal("LSTM in TF32 and bf16, times cuDNN", LSTM | {"mode": ["tf32", "bf16"]}, "torch", 2.0),
    Goal("GRU in 16 bits and TF32, times cuDNN", GRU | {"mode": ["tf32", "bf16", "fp16"]}, "torch", 2.0),
    Goal("float32, B <= 16, times cuDNN", WIDE | {"mode": ["fp32"], "B": range(1, 17)}, "torch", 2.0),
    Goal("float32, B > 16, times cuDNN", WIDE | {"mode": ["fp32"], "B": range(17, 65)}, "torch", 1.2),
    # cuDNN on an H100, NX-AI/flashrnn, head_dim--lstm.svg: 2.01 and 5.19 ms for 1024 steps.
    Goal("LSTM in fp16, H = 768, times 1.96 us a step", FLASH | {"kind": ["forward"]}, 1.96, 1.0),
    Goal("with backward, times 5.07 us a step", FLASH | {"kind": ["training"]}, 5.07, 1.0),
    Goal("resets, times ours without", {"resets": [0.03]}, FULL, 1 / 1.05),
    Goal("different lengths, times ours with full ones", {"ragged": [True]}, FULL, 1 / 1.05),
    Goal("one step, B = 8, H = 256, times LSTMCell", STEP, "torch-cell", 1.0),
)


def judge(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each goal with its figure in the row that is furthest from it, and whether it holds.

    It does not if ours failed or is too slow in a row; else, if a row was not measured, nobody knows.
    """
    found = []
    for goal in GOALS:
        mine = [row for row in rows if concerns(goal, row)]
        figures = {row["case"]: value for row in mine if (value := figure(goal, row)) is not None}
        furthest = min(figures, key=figures.__getitem__, default="")
        held = sum(value >= goal.wanted for value in figures.values())
        holds = "yes" if 0 < held == len(mine) else "not all measured"
        if held < len(figures) or any(OURS in row["failed"] for row in mine):
            holds = "no"
        found.append({"goal": goal.name, "row": furthest, "wanted": goal.wanted, "holds": holds})
        found[-1] |= {"figure": figures.get(furthest), "rows that hold": f"{held} of {len(mine)}"}
    return found


def concerns(goal: Goal, row: Row) -> bool:
    """Whether the goal speaks of this row."""
    fields = row | dict(zip("TBIH", row["shape"], strict=True))
    return all(fields[name] in values for name, values in goal.rows.items())


def figure(goal: Goal, row: Row) -> float | None:
    """How many times as fast ours is; None where it was not measured."""
    entries: dict[str, dict[str, float]] = row["libraries"]
    if isinstance(goal.against, float):
        return goal.against / entries[OURS]["us_per_step"] if OURS in entries else None
    return entries.get(goal.against, {}).get("ratio")


def goal_table(judged: Sequence[dict[str, Any]]) -> Table:
    """Every goal with its figure."""
    cells = [[f"{v:.2f}" if isinstance(v, float) else v or "–" for v in each.values()] for each in judged]
    return "goals, each with the row furthest from it", [*judged[0]], cells


def summary(report: dict[str, Any]) -> list[str]:
    """The lines under the table: means, rates, who failed and why, the machine."""
    lines = []
    for mode in report["modes"]:
        found = means([row for row in report["rows"] if row["mode"] == mode], [*PEERS])["geometric_mean"]
        lines += [f"{mode}, {peer}: geometric mean {mean:.2f}" for peer, mean in found.items() if mean]
    lines += [f"{name}: {rate:.3g} a second" for name, rate in report["rates"].items()]
    for row in report["rows"]:
        lines += [f"failed: {who}, {row['case']}: {why}" for who, why in row["failed"].items()]
    return [*lines, f"{report['environment']['gpu']}, {report['environment']['date']}"]
