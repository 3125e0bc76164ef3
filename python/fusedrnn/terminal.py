"""The output of the command line: with rich if it is installed, else in plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table. The first ``left`` columns are text; the others are numbers, aligned to the right."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain_table(title, header, rows, left))
        return
    rich_table = Table(box=None, padding=(0, 2, 0, 0))
    for k, name in enumerate(header):
        rich_table.add_column(name, justify="left" if k < left else "right", no_wrap=True)
    for row in rows:
        rich_table.add_row(*map(Text, row))
    console = Console(highlight=False)
    edge, console.width = console.width, 1000
    console.width = max(edge, console.measure(rich_table).maximum)  # a narrow terminal wraps, nothing is cut
    print(title)
    console.print(rich_table)


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The table as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [title] if title else []
    for row in (header, *rows):
        cells = (
            text.ljust(width) if k < left else text.rjust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Progress:
    """A task under way, for the time of a ``with`` block: a line at every tenth part."""

    def __init__(self, total: int, description: str, done: int) -> None:
        self.total, self.description, self.done = total, description, done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, note: str = "") -> None:
        """One more of the total is done; ``note`` says how it stands."""
        before, self.done = self.done, self.done + 1
        if self.done * 10 // self.total > before * 10 // self.total:
            print(f"{self.description} {self.done}/{self.total}  {note}".rstrip(), flush=True)


class RichProgress(Progress):
    """A progress bar, with the remaining time and the note."""

    def __init__(self, total: int, description: str, done: int) -> None:
        from rich import progress as rich

        middle = rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn()
        self.bar = rich.Progress("{task.description}", *middle, "{task.fields[note]}")
        self.task = self.bar.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self, note: str = "") -> None:
        self.bar.update(self.task, advance=1, note=note)


class Report:
    """The output of a program, in plain text."""

    def progress(self, total: int, description: str, done: int = 0) -> Progress:
        """A task of ``total`` parts, of which ``done`` are done already."""
        return Progress(total, description, done)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table. The first column is text, the others are numbers."""
        print(plain_table(title, columns, rows))

    def line(self, text: str) -> None:
        """One line of text."""
        print(text, flush=True)


class RichReport(Report):
    """The same on a terminal."""

    def progress(self, total: int, description: str, done: int = 0) -> RichProgress:
        return RichProgress(total, description, done)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table(title, columns, rows)


def rich_report() -> RichReport | None:
    """A report for a terminal. None if rich is not installed or the output is not a terminal."""
    try:
        import rich.progress  # noqa: F401
    except ImportError:
        return None
    return RichReport() if sys.stdout.isatty() else None
