"""The results of the suite as tables of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusedrnn import backends as registry

ORACLE = "oracle"  # in the column of the backends: the check of the oracle itself


@dataclass(frozen=True)
class Row:
    """One cell, backend, dtype and option; for each tensor the worst error over the sizes."""

    cell: str
    backend: str
    isa: str  # instruction set, of the cpu backend
    dtype: str
    option: str
    errors: dict[str, float]  # largest difference from the oracle, relative to the tensor's largest entry
    numpy: dict[str, float]  # that of plain NumPy in the same dtype
    limits: dict[str, float]
    passed: bool | None  # None: not run; note has the reason
    seconds: float
    note: str = ""


COLUMNS = ("cell", "backend", "dtype", "option", "outputs", "NumPy", "gradients", "NumPy", "s", "passed")


def format_rows(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of text: the worst output and the worst gradient of each row, next to plain NumPy's."""

    def worst(figures: Mapping[str, float], gradient: bool) -> str:
        found = [v for name, v in figures.items() if name.startswith("d") == gradient]
        return f"{max(found):.1e}" if found else ""

    return COLUMNS, [
        (
            row.cell,
            f"{row.backend} {row.isa}".strip(),
            row.dtype,
            row.option,
            worst(row.errors, False),
            worst(row.numpy, False),
            worst(row.errors, True),
            worst(row.numpy, True),
            f"{row.seconds:.2f}" if row.passed is not None else "",
            {True: "yes", False: "NO", None: "not run"}[row.passed],
        )
        for row in rows
    ]


def summarize(rows: Sequence[Row]) -> list[Row]:
    """One row for each cell, backend and dtype, with the worst error of each tensor over the options.

    ``option`` is the number of options that have passed.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row.cell, row.backend, row.isa, row.dtype), []).append(row)
    return [_worst(same) for same in found.values()]


def _worst(rows: Sequence[Row]) -> Row:
    """The rows of one cell, backend and dtype as one."""
    run = [row for row in rows if row.passed is not None]
    if not run:
        return rows[0]

    def largest(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: max(f.get(name, 0.0) for f in figures) for each in figures for name in each}

    return dataclasses.replace(
        run[0],
        option=f"{sum(bool(row.passed) for row in run)} of {len(rows)}",
        errors=largest([row.errors for row in run]),
        numpy=largest([row.numpy for row in run]),
        limits=largest([row.limits for row in run]),
        passed=all(row.passed for row in run),
        seconds=sum(row.seconds for row in run),
    )


def format_notes(rows: Sequence[Row]) -> list[str]:
    """What failed, and why something was not run: one line for each reason."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.passed is not True:
            found.setdefault(("failed" if row.passed is False else "not run", row.note), []).append(row)
    lines = []
    for (what, note), same in found.items():
        first = same[0]
        where = (first.cell, first.backend, first.isa, first.dtype, first.option)
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        lines.append(f"{what}: {', '.join(filter(None, where))}{more}: {note}")
    return lines


def format_tensors(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of text: the worst error of each cell, dtype and tensor over all options, by backend.

    The second last column is plain NumPy's error in the same dtype, the last the limit.
    """
    run = [row for row in rows if row.passed is not None and row.backend not in (ORACLE, "reference")]
    run.sort(key=lambda row: registry.NAMES.index(row.backend))
    columns = list(dict.fromkeys(row.isa or row.backend for row in run))
    worst: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in run:
        for tensor, error in row.errors.items():
            found = worst.setdefault((row.cell, row.dtype, tensor), {})
            for column, value in (
                (row.isa or row.backend, error),
                ("NumPy", row.numpy[tensor]),
                ("limit", row.limits[tensor]),
            ):
                found[column] = max(found.get(column, 0.0), value)
    columns += ["NumPy", "limit"]
    order = list(dict.fromkeys(tensor for row in run for tensor in row.errors))
    cells = list(dict.fromkeys(row.cell for row in run))
    keys = sorted(worst, key=lambda k: (cells.index(k[0]), k[1], order.index(k[2])))
    return ("cell", "dtype", "tensor", *columns), [
        (*key, *(f"{worst[key][c]:.1e}" if c in worst[key] else "" for c in columns)) for key in keys
    ]
