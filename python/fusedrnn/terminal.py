"""What the command line prints: with rich where it is installed, in plain text otherwise."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table; the first ``left`` columns are text, the others are numbers, aligned to the right."""
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
    """The same as text."""
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
    """A bar, with the time that is left and a note."""

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
        """One more of the total is done; ``note`` says how it stands."""
        self.bar.update(self.task, advance=1, note=note)


class RichReport:
    """What a program tells, on a terminal; the same in plain text is ``programs.common.PlainReport``."""

    def progress(self, total: int, description: str, done: int = 0) -> RichProgress:
        """A task of ``total`` parts, of which ``done`` were done before."""
        return RichProgress(total, description, done)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text, the others are numbers."""
        table(title, columns, rows)

    def line(self, text: str) -> None:
        """One line of text."""
        print(text, flush=True)


def rich_report() -> RichReport | None:
    """None where rich is not installed, or where nobody watches a bar move."""
    try:
        import rich.progress  # noqa: F401
    except ImportError:
        return None
    return RichReport() if sys.stdout.isatty() else None
