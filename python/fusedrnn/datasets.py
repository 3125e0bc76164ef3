"""Data sets, which return pairs of input and target by index, and a reader for CSV files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from fusedrnn.backends.arguments import check_bool, check_number, check_sized

Transform = Callable[[Any], Any]
LARGEST = float(np.finfo(np.float32).max)


class Dataset:
    """A base class: ``prepare`` sets the arrays ``data`` and ``label``; sample k is ``(data[k], label[k])``.

    Without labels, the second of the pair is None. An index past the end raises an IndexError, which ends an
    iteration.

    Args:
        train: For ``prepare``: True for the training set, False for the test set.
        transform: A function for each input; None: inputs do not change.
        target_transform: A function for each target; None: targets do not change.
    """

    def __init__(
        self,
        train: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        self.train = check_bool("train", train)
        self.transform = transform
        self.target_transform = target_transform
        self.data: Any = None
        self.label: Any = None
        self.prepare()

    def prepare(self) -> None:
        """Set ``data`` and, if there are targets, ``label``."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x = self.data[index]
        t = None if self.label is None else self.label[index]
        return (
            x if self.transform is None else self.transform(x),
            t if self.target_transform is None else self.target_transform(t),
        )

    def __len__(self) -> int:
        return len(self.data)

    def is_plain(self) -> bool:
        """Whether indexing the two arrays gives the samples."""
        if type(self).__getitem__ is not Dataset.__getitem__:  # which then need not have arrays at all
            return False
        arrays = isinstance(self.data, np.ndarray) and isinstance(self.label, np.ndarray)
        return arrays and self.transform is None and self.target_transform is None


class Series(Dataset):
    """A data set of existing arrays of inputs and targets, ``Series(x, t)``, both of length N.

    Raises:
        TypeError, ValueError: One has no length, or the lengths differ.
    """

    def __init__(self, data: Any, label: Any) -> None:
        if check_sized("data", data) != check_sized("label", label):
            raise ValueError(f"label: expected {len(data)} rows, like data, got {len(label)}")
        self.rows = (data, label)
        super().__init__()

    def prepare(self) -> None:
        self.data, self.label = self.rows


class SinCurve(Dataset):
    """A noisy sine, or with ``train=False`` a cosine: 999 pairs (value k, value k + 1), each ``(1,)``.

    The curve has 1000 points over one period. The noise is uniform within ±0.05, drawn from NumPy's global
    generator. It is drawn for ``train=False`` too, so that later random numbers do not depend on ``train``.
    """

    def prepare(self) -> None:
        x = np.linspace(0, 2 * np.pi, 1000)
        noise = np.random.uniform(-0.05, 0.05, size=x.shape)
        y = (np.sin(x) + noise if self.train else np.cos(x))[:, np.newaxis]
        self.data, self.label = y[:-1], y[1:]


def read_csv(
    path: str | PathLike[str], columns: Sequence[str], *, hours: float | None = None
) -> npt.NDArray[np.float64]:
    """Read columns of a CSV file as an array ``(N, C)`` in float64.

    The first line has the names of the columns, separated by commas. The encoding is UTF-8. Empty lines are
    skipped, and at the end lines with commas alone.

    Args:
        path: The file.
        columns: The names of C columns.
        hours: If it is given, the column ``date`` must be this many hours later in each row than in the row
            before. A date is written as ``2024-12-31``, ``2024-12-31 23:00`` or ``31-12-2024 23:00``.

    Raises:
        TypeError: ``columns`` is not a list of names, or ``hours`` not a number.
        OSError: The file cannot be read.
        ValueError: ``hours`` is out of its range; a column is missing or exists twice; a row has too few or
            too many values; a value is not a number or not finite in float32; a date is not the expected
            one; there are no rows; or the file is not CSV in UTF-8. The message names the line, and the
            column of a wrong number.
    """
    named = check_sized("columns", columns) and all(isinstance(name, str) for name in columns)
    if isinstance(columns, str) or not named:
        raise TypeError(f"columns: expected a list of names, got {columns!r}")
    if hours is not None and not 0 < check_number("hours", hours) < 1e6:  # a hundred years
        raise ValueError(f"hours: expected a number above 0 and below 1e6, got {hours}")
    expected = [*columns] if hours is None else ["date", *columns]
    rows: list[list[float]] = []
    before: datetime | None = None
    empty = 0  # the last line with commas alone
    with open(path, newline="", encoding="utf-8-sig") as file:  # without the mark that Excel writes first
        lines = csv.reader(file, skipinitialspace=True)
        try:
            names = [name.strip() for name in next(lines, [])]
            if any(names.count(name) != 1 for name in expected):
                raise ValueError(
                    f"{path}: expected each of the columns {', '.join(expected)} once, separated by commas, "
                    f"got {','.join(names)[:80]!r}"
                )
            for values in lines:
                if not any(values):
                    empty = lines.line_num if len(values) > 1 else empty
                    continue
                if empty:  # leaving it out would move the rows behind it
                    raise ValueError(f"{path}, line {empty}: expected {len(names)} values, got none")
                at = f"{path}, line {lines.line_num}"
                if len(values) != len(names):
                    raise ValueError(f"{at}: expected {len(names)} values, got {len(values)}")
                line = dict(zip(names, map(str.strip, values), strict=True))
                rows.append([_number(line[name], f"{at}, column {name}") for name in columns])
                if hours is not None:
                    date = _date(line["date"], at)
                    if before is not None and date != (after := before + timedelta(hours=hours)):
                        raise ValueError(
                            f"{at}: expected the date {after:%Y-%m-%d %H:%M}, {hours:g} h after the row "
                            f"before, got {line['date']!r}"
                        )
                    before = date
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: expected a CSV file in UTF-8, got one that is not: {error}") from None
    if not rows:
        raise ValueError(f"{path}: expected rows with values, got none")
    return np.array(rows)


def _number(text: str, at: str) -> float:
    """A number that is finite in float32."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{at}: expected a number, got {text!r}") from None
    if not abs(value) <= LARGEST:
        raise ValueError(f"{at}: expected a finite number in float32, got {text!r}")
    return value


def _date(text: str, at: str) -> datetime:
    """A date as ISO 8601 writes it, or with the day first; with or without the time of day."""
    iso = f"{text[6:10]}-{text[3:5]}-{text[:2]}{text[10:]}" if text[2:3] == "-" else text
    try:
        return datetime.fromisoformat(iso)
    except ValueError:
        raise ValueError(
            f"{at}: expected a date such as 2024-12-31 or 31-12-2024 23:00, got {text!r}"
        ) from None
