"""The measured part of a page: what stands between two markers is written by a script from bench/results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
END = "<!-- measured: end -->"


def run(
    script: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any] | None],
    section: Callable[[dict[str, Any]], str],
    page: str,
    file: Path,
) -> int:
    """A script that measures, keeps the figures in a file and writes the page; with --check the last alone.

    Args:
        script: The script's path.
        parser: With the options of ``measure``.
        measure: The figures, to which the environment is added; None: write nothing.
        section: The page's text from the figures.
        page: From the root of the project.
        file: For the figures.

    Returns:
        The exit code: 1 where the check finds another text.
    """
    parser.add_argument("--check", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.check:
        from fusedrnn import system

        if (found := measure(options)) is None:
            return 0
        file.write_text(json.dumps({"environment": system.environment()} | found, indent=1) + "\n")
    return update(page, Path(script).name, section(json.loads(file.read_text())), options.check)


def busy(rows: Iterable[dict[str, Any]]) -> str:
    """What other processes took of the cores while rows were measured, at most."""
    return f"{max(row['others'] or 0.0 for row in rows):.0%} of the cores"


def update(name: str, script: str, section: str, check: bool, part: str = "") -> int:
    """Put ``section`` into the measured part of a page, or with ``check`` only see whether it is there.

    Args:
        name: The page, from the root of the project.
        script: What the page's marker names, bench/SCRIPT.
        section: The new text.
        check: Change nothing.
        part: What the marker names besides, on a page with several measured parts.

    Returns:
        The exit code: 1 where the check finds another text.
    """
    page = ROOT / name
    begin = f"<!-- measured: begin, by bench/{script}{part and ': ' + part} -->"
    text = page.read_text()
    before, rest = text.split(begin)
    wanted = f"{before}{begin}\n{section}\n{END}{rest.split(END, 1)[1]}"
    if check:
        if text != wanted:
            print(f"{name} does not show what bench/results holds: run python bench/{script}")
        return int(text != wanted)
    page.write_text(wanted)
    return 0
