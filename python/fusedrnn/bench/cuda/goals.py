"""What is to be reached, and whether a run reaches it. A published figure is named with its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fusedrnn.bench.runner import FULL, OURS

Row = dict[str, Any]
Value = Callable[[Row], float | None]  # None where the row was not measured


class Goal(NamedTuple):
    """One promise about some rows: a figure of every one of them is at least, or at most, ``wanted``."""

    name: str
    rows: Callable[[Row], bool]
    value: Value
    wanted: float
    at_least: bool


def against(peer: str) -> Value:
    """The time of a peer divided by ours; of a peer that does not run there is none."""

    def value(row: Row) -> float | None:
        ratio: float | None = row["libraries"].get(peer, {}).get("ratio")
        return ratio

    return value


def us_per_step(row: Row) -> float | None:
    """Ours."""
    found: float | None = row["libraries"].get(OURS, {}).get("us_per_step")
    return found


def against_full(row: Row) -> float | None:
    """Our time divided by that without lengths and resets."""
    ratio = row["libraries"].get(FULL, {}).get("ratio")
    return None if ratio is None else 1 / ratio


def published(row: Row) -> bool:
    """The size of the published comparison, in the dtype in which cuDNN is the fastest there."""
    shape = row["shape"] == [1024, 16, 768, 768]
    return row["cell"] == "lstm" and row["mode"] == "fp16" and shape and plain(row)


def plain(row: Row) -> bool:
    """Whether ``torch.nn``'s layer does the same."""
    return not (row["ragged"] or row["resets"] or row["api"] == "cell")


def beside_cudnn(cell: str, mode: str, kind: str) -> Callable[[Row], bool]:
    """The range of sizes in which ours is to be twice as fast."""

    def chosen(row: Row) -> bool:
        T, B, _, H = row["shape"]
        same = (row["cell"], row["mode"], row["kind"]) == (cell, mode, kind)
        return same and T > 1 and B <= 64 and 192 < H <= 1024 and plain(row)

    return chosen


def one_step(row: Row) -> bool:
    """A step of the LSTM cell at the size of a policy."""
    T, B, _, H = row["shape"]
    step = (T, B, H, row["kind"], row["api"]) == (1, 8, 256, "step", "cell")
    return step and row["cell"] == "lstm"


KINDS = {"forward": "forward", "training": "forward + backward"}

GOALS = (
    *(
        Goal(
            f"{cell.upper()} {mode}, {KINDS[kind]}, 192 < H <= 1024, B <= 64: times cuDNN",
            beside_cudnn(cell, mode, kind),
            against("torch"),
            2.0,
            True,
        )
        for cell in ("lstm", "gru")
        for mode in ("fp32", "tf32", "bf16", "fp16")
        for kind in KINDS
    ),
    # cuDNN on an H100, NX-AI/flashrnn, head_dim--lstm.svg: 2.01 and 5.19 ms for 1024 steps.
    *(
        Goal(
            f"LSTM fp16, H = 768, B = 16, T = 1024, {KINDS[kind]}: us a step",
            lambda row, kind=kind: published(row) and row["kind"] == kind,  # type: ignore[misc]
            us_per_step,
            wanted,
            False,
        )
        for kind, wanted in (("forward", 1.96), ("training", 5.07))
    ),
    Goal("resets: time / time without", lambda row: bool(row["resets"]), against_full, 1.05, False),
    Goal("ragged lengths: time / time of full", lambda row: bool(row["ragged"]), against_full, 1.05, False),
    Goal("T = 1, B = 8, H = 256: times LSTMCell", one_step, against("torch-cell"), 1.0, True),
)
EPOCH = ("an epoch of the air pollution program: times faster than DeZero", 20.0)


def judge(rows: Sequence[Row], expected: Sequence[Row], epoch: float | None = None) -> list[dict[str, Any]]:
    """Each goal with its figure, that of the row that is furthest from it, and whether it holds.

    ``ratio`` says how far it is reached, from 1 on it is. Where ours failed in a row, or one is too slow, the
    goal does not hold; else, where a row was not measured, nobody knows: None.

    Args:
        rows: Of a run's report.
        expected: What ``runner.expected`` says of the same cases: a run may end before all of them.
        epoch: The time of DeZero's epoch divided by ours, where it was measured.
    """
    measured = {(row["case"], row["mode"]) for row in rows}
    absent = [row for row in expected if (row["case"], row["mode"]) not in measured]
    of_epoch = _verdict(*EPOCH, True, [(epoch, "")], [], int(epoch is None))
    return [*(_judged(goal, rows, absent) for goal in GOALS), of_epoch]


def _judged(goal: Goal, rows: Sequence[Row], absent: Sequence[Row]) -> dict[str, Any]:
    chosen = [row for row in rows if goal.rows(row)]
    figures = [(goal.value(row), f"{row['case']} {row['mode']}") for row in chosen]
    failed = [
        f"{row['case']} {row['mode']}: {row['failed'][OURS]}" for row in chosen if OURS in row["failed"]
    ]
    without = sum(value is None for value, _ in figures) - len(failed) + sum(map(goal.rows, absent))
    return _verdict(goal.name, goal.wanted, goal.at_least, figures, failed, without)


def _verdict(
    name: str,
    wanted: float,
    at_least: bool,
    figures: Sequence[tuple[float | None, str]],
    failed: list[str],
    without: int,
) -> dict[str, Any]:
    """``without``: the number of rows that nobody measured."""
    reached = sorted(_reached(figures, wanted, at_least))
    found: dict[str, Any] = {"goal": name, "wanted": wanted, "at_least": at_least}
    found |= {"figure": None, "ratio": None, "row": None}
    if reached:
        found["ratio"], found["figure"], found["row"] = reached[0]
    held = sum(each[0] >= 1 for each in reached)
    found |= {"rows": len(reached) + len(failed) + without, "held": held, "failed": failed}
    found["not_measured"] = without
    found["holds"] = False if failed or held < len(reached) else None if without or not reached else True
    return found


def _reached(
    figures: Sequence[tuple[float | None, str]], wanted: float, at_least: bool
) -> Iterator[tuple[float, float, str]]:
    for value, row in figures:
        if value is not None:
            yield (value / wanted if at_least else wanted / value), value, row
