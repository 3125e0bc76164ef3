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


class RichProgress:
    """A progress bar, with the remaining time and a note."""

    def __init__(self, total: int, description: str, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.task = self.bar.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self, note: str = "") -> None:
        """Advance the bar by one; ``note`` describes the current state."""
        self.bar.update(self.task, advance=1, note=note)


class RichReport:
    """The output of a program on a terminal; ``programs.common.PlainReport`` is the same in plain text."""

    def progress(self, total: int, description: str, done: int = 0) -> RichProgress:
        """A task of ``total`` parts, of which ``done`` are done already."""
        return RichProgress(total, description, done)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table. The first column is text, the others are numbers."""
        table(title, columns, rows)

    def line(self, text: str) -> None:
        """Print one line of text."""
        print(text, flush=True)


def rich_report() -> RichReport | None:
    """A report for a terminal. None if rich is not installed or the output is not a terminal."""
    try:
        import rich.progress  # noqa: F401
    except ImportError:
        return None
    return RichReport() if sys.stdout.isatty() else None
