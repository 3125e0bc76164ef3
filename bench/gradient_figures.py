"""Measures the error of every gradient on every instruction set, and writes docs/accuracy.md's tables.

    python bench/gradient_figures.py            measure, write bench/results/gradients.json and the page
    python bench/gradient_figures.py --page     only write the page anew from the file
    python bench/gradient_figures.py --check    only see whether the page is up to date

Beside the sizes of ``fusedrnn gradcheck`` it runs one of those that people train.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from measured import ROOT, update

FILE = ROOT / "bench" / "results" / "gradients.json"
NAMES = {
    "y": "y",
    "hT": "final h",
    "cT": "final c",
    "h states": "h of every step",
    "c states": "c of every step",
}


def measure() -> dict[str, Any]:
    from fusedrnn import gradcheck_suite, system
    from fusedrnn.gradcheck import tables
    from fusedrnn.problems import Shape

    def progress(done: int, total: int, row: tables.Row) -> None:
        print(
            end=f"\r\x1b[K{done} of {total}: {row.cell} {row.backend} {row.isa} {row.option}", file=sys.stderr
        )

    sizes = (*gradcheck_suite.SIZES, Shape(30, 16, 5, 64))
    rows = gradcheck_suite.run_suite(
        sizes=sizes, levels=gradcheck_suite.available_levels() or None, progress=progress
    )
    print(file=sys.stderr)
    for row in rows:
        if row.passed is not True:
            print(f"{row.cell} {row.backend} {row.isa} {row.dtype} {row.option}: {row.note}", file=sys.stderr)
    header, text = tables.format_tensors(rows)
    proofs = dict.fromkeys(gradcheck_suite.variants(), 0.0)
    for row in rows:
        if row.backend == tables.ORACLE:
            proofs[row.cell] = max(proofs[row.cell], *row.errors.values())
    return {
        "environment": system.environment(),
        "sizes": [list(size) for size in sizes],
        "options": list(gradcheck_suite.OPTIONS),
        "passed": sum(row.passed is True for row in rows),
        "failed": sum(row.passed is False for row in rows),
        "not run": sum(row.passed is None for row in rows),
        "proof limit": gradcheck_suite.PROOF,
        "proof": proofs,
        "header": header,
        "tensors": text,
    }


def section(report: dict[str, Any]) -> str:
    """What stands between the markers."""
    found = report["environment"]
    machine = found["machine"]
    commit = found["commit"] or "unknown"
    commit = commit[:10] + "+" * commit.endswith("+")  # the plus: with changes
    sizes = ", ".join("(" + ",".join(map(str, size)) + ")" for size in report["sizes"])
    lines = [
        f"{report['passed']} rows passed, {report['failed']} failed, {report['not run']} not run. "
        f"{machine.get('model name', machine['architecture'])} (family {machine.get('cpu family', '?')}, "
        f"model {machine.get('model', '?')}), {found['compiler']}, NumPy {found['numpy']}, "
        f"{found['date'][:10]}, commit {commit}.",
        f"(T, B, I, H): {sizes}. Options: {'; '.join(report['options'])}.",
        "",
        f"The oracle against complex steps, worst tensor, limit {report['proof limit']:.0e}: "
        + ", ".join(f"{cell} {error:.0e}" for cell, error in report["proof"].items())
        + ".",
    ]
    _, _, _, *columns = report["header"]
    for cell, dtype in dict.fromkeys((row[0], row[1]) for row in report["tensors"]):
        lines += ["", f"### {cell}, {dtype}", "", "| tensor | " + " | ".join(columns) + " |"]
        lines.append("|---|" + "---:|" * len(columns))
        for row in report["tensors"]:
            if (row[0], row[1]) == (cell, dtype):
                lines.append(f"| {NAMES.get(row[2], row[2])} | " + " | ".join(row[3:]) + " |")
    return "\n".join(lines)


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    if not check and sys.argv[1:] != ["--page"]:
        FILE.write_text(json.dumps(measure(), indent=1) + "\n")
    report = json.loads(FILE.read_text())
    outdated = update("docs/accuracy.md", "gradient_figures.py", section(report), check)
    return outdated if check else int(report["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
