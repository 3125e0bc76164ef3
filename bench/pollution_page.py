"""Writes docs/pollution.md's table from bench/results/pollution.json.

python bench/pollution_page.py            write the table
python bench/pollution_page.py --check    only see whether it is up to date
"""

from __future__ import annotations

import json
import statistics
import sys

from measured import RESULTS, table, update


def section(found: dict) -> str:
    seeds = found["seeds"]
    header = ["epochs", *(f"seed {s['seed']}" for s in seeds), "median", "training loss, median"]
    lines = []
    for rows in zip(*(s["after"] for s in seeds), strict=True):
        scores = [row["MSE"] for row in rows]
        loss = statistics.median(row["train_loss"] for row in rows)
        figures = [*scores, statistics.median(scores), loss]
        lines.append([str(rows[0]["epochs"]), *(f"{figure:.1f}" for figure in figures)])
    reported = found["reported"]
    return (
        f"{table(header, lines)}\n\n"
        f"Reported after {reported['epochs']} epochs: MSE {reported['MSE']:.2f}. {found['model']}, batch "
        f"{found['batch']}, truncated after {found['steps']} steps, {found['optimizer']}, {found['dtype']}; "
        f"{found['machine']}, {found['date']}; {found['note']}."
    )


def main() -> int:
    found = json.loads((RESULTS / "pollution.json").read_text())
    return update("docs/pollution.md", "pollution_page.py", section(found), "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
