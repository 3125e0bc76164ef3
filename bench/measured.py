"""The measured part of a page: what stands between two markers is written by a script from bench/results.

    python bench/measured.py           the folder for results of this machine
    python bench/measured.py FILE      the folder for a result that was measured elsewhere

bench/results has a folder for each family of processors. What holds no times lies in bench/results itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
END = "<!-- measured: end -->"

# Vendor, family, models and name, as in arch/x86/kernel/cpu/amd.c and arch/x86/include/asm/intel-family.h.
FAMILIES = (
    ("AuthenticAMD", "25", (*range(0x10, 0x20), *range(0x60, 0xB0)), "AMD Zen 4"),
    ("AuthenticAMD", "25", (*range(0x10), *range(0x20, 0x60)), "AMD Zen 3"),
    ("AuthenticAMD", "26", (*range(0x30), *range(0x40, 0x50), *range(0x60, 0x80)), "AMD Zen 5"),
    ("GenuineIntel", "6", (0x8F,), "Intel Sapphire Rapids"),
    ("GenuineIntel", "6", (0xCF,), "Intel Emerald Rapids"),
)
VERSIONS = {"torch": "PyTorch", "jax": "JAX", "speechbrain": "SpeechBrain", "sb3-contrib": "sb3-contrib"}

Report = dict[str, Any]


def family(machine: Mapping[str, Any]) -> str:
    """The family of a processor that ``fusedrnn.system.machine`` described; vendor-family-model if it is new.

    Without /proc/cpuinfo of x86 (ARM, macOS, Windows) a file says no more than the architecture.
    """
    vendor, number, model = (machine.get(key, "") for key in ("vendor_id", "cpu family", "model"))
    for *processor, models, name in FAMILIES:
        if processor == [vendor, number] and int(model) in models:
            return name
    return "-".join(filter(None, (vendor or machine["architecture"], number, model)))


def folder(machine: Mapping[str, Any]) -> Path:
    """Where the results of a machine lie. It is made if need be."""
    path = RESULTS / re.sub(r" (?=\d)", "", family(machine)).lower().replace(" ", "-")
    path.mkdir(parents=True, exist_ok=True)
    return path


def by_family(name: str) -> dict[str, Report]:
    """What each family has in its file of that name."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}.json"))]
    return {family(report["environment"]["machine"]): report for report in reports}


@functools.cache
def families() -> list[str]:
    """All of which there is any file."""
    return sorted(set().union(*(by_family(path.stem) for path in RESULTS.glob("*/*.json"))))


def caption(found: Report) -> str:
    """Machine, versions and date of one file."""
    each = found["environment"]
    machine, rows = each["machine"], found.get("rows")
    parts = [
        f"{machine.get('model name', machine['architecture'])} (family {machine.get('cpu family', '?')}, "
        f"model {machine.get('model', '?')})",
        f"{machine['cores']} cores",
        each["isa"],
    ]
    if isinstance(threads := found.get("threads"), int):
        parts.append(f"{threads} thread" + "s" * (threads > 1))
    parts += [
        f"{text} {value}" for key, text in VERSIONS.items() if (value := each.get(key) or found.get(key))
    ]
    parts += [each["compiler"], each["date"][:10]]
    if each.get("load before") is not None:
        parts.append(f"load average {each['load before']:.1f} before the run")
    if isinstance(rows, list) and "others" in rows[0]:
        parts.append(f"other processes used up to {busy(rows)}")
        if transfers := [t * 1e9 for row in rows for t in row.get("transfers", ()) if t]:
            parts.append(f"a cache line took {min(transfers):.0f} to {max(transfers):.0f} ns between threads")
    return ", ".join([*parts, f"commit {(each['commit'] or 'unknown')[:10]}"])


def captions(reports: Mapping[str, Report]) -> str:
    """A list of all families: where the figures come from, or that there are none."""
    texts = {name: caption(reports[name]) if name in reports else "not measured" for name in families()}
    return "\n".join(f"- {name}: {text}" for name, text in texts.items())


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """In Markdown, the first ``left`` columns text and the others numbers."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def side_by_side(header: Sequence[str], rows: Mapping[str, Sequence[Sequence[str]]], left: int = 1) -> str:
    """Rows of several families as one table: the first ``left`` cells, then the others of each family.

    Rows belong together where these first cells are equal. A dash stands where a family has no such row.
    """
    prefix = "{}: {}" if len(rows) > 1 else "{1}"
    head = [*header[:left], *(prefix.format(name, column) for name in rows for column in header[left:])]
    each = [{tuple(row[:left]): row[left:] for row in of} for of in rows.values()]
    gaps = ["–"] * (len(header) - left)
    keys = dict.fromkeys(key for of in each for key in of)
    return table(head, [[*key, *(cell for of in each for cell in of.get(key, gaps))] for key in keys], left)


def run(
    script: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Report | None],
    section: Callable[[dict[str, Report]], str],
    page: str,
    name: str,
) -> int:
    """A script that measures, keeps the figures in a file and writes the page; with --page the last alone.

    Args:
        script: The script's path.
        parser: With the options of ``measure``.
        measure: The figures, to which the environment is added; None: write nothing.
        section: The page's text from the figures of each family.
        page: From the root of the project.
        name: Of the file for the figures.

    Returns:
        The exit code: 1 where the check finds another text.
    """
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page anew")
    parser.add_argument("--check", action="store_true", help="only see whether the page is up to date")
    options = parser.parse_args()
    if not (options.page or options.check):
        if (found := measure(options)) is None:
            return 0
        save(found, name)
    return update(page, Path(script).name, section(by_family(name)), options.check)


def save(found: Report, name: str) -> None:
    """Keep figures of this machine, with the environment if they do not bring it."""
    from fusedrnn import system

    found = {"environment": system.environment()} | found
    path = folder(found["environment"]["machine"]) / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


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


def main() -> None:
    """Print a folder."""
    if sys.argv[1:]:
        machine = json.loads(Path(sys.argv[1]).read_text())["environment"]["machine"]
    else:
        from fusedrnn import system

        machine = system.machine()
    print(folder(machine))


if __name__ == "__main__":
    main()
