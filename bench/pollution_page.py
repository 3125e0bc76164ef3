"""Writes docs/pollution.md's table from bench/results/pollution.json.

python bench/pollution_page.py            write the table
python bench/pollution_page.py --check    only see whether it is up to date
"""

from __future__ import annotations

import json
import statistics
import sys

from measured import ROOT, update


def table(found: dict) -> str:
    seeds = found["seeds"]
    lines = [
        "| epochs | "
        + " | ".join(f"seed {s['seed']}" for s in seeds)
        + " | median | training loss, median |",
        "|---:|" + "---:|" * (len(seeds) + 2),
    ]
    for rows in zip(*(s["after"] for s in seeds), strict=True):
        scores = [row["MSE"] for row in rows]
        loss = statistics.median(row["train_loss"] for row in rows)
        cells = " | ".join(f"{score:.1f}" for score in scores)
        lines.append(f"| {rows[0]['epochs']} | {cells} | {statistics.median(scores):.1f} | {loss:.1f} |")
    reported = found["reported"]
    lines += [
        "",
        f"Reported after {reported['epochs']} epochs: MSE {reported['MSE']:.2f}. {found['model']}, batch "
        f"{found['batch']}, truncated after {found['steps']} steps, {found['optimizer']}, {found['dtype']}; "
        f"{found['machine']}, {found['date']}; {found['note']}.",
    ]
    return "\n".join(lines)


def main() -> int:
    found = json.loads((ROOT / "bench" / "results" / "pollution.json").read_text())
    return update("docs/pollution.md", "pollution_page.py", table(found), "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
