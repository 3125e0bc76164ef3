"""The measured part of a page: what stands between two markers is written by a script from bench/results."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- measured: end -->"


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
