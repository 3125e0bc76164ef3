"""Writes docs/irregular.md's table from bench/results/irregular.json and irregular_torch.json.

python examples/irregular.py --json bench/results/irregular.json --plot docs/irregular.png
python examples/torch/irregular.py --json bench/results/irregular_torch.json
python bench/irregular_page.py            write the table
python bench/irregular_page.py --check    only see whether it is up to date
"""

from __future__ import annotations

import json
import statistics
import sys

from measured import ROOT, update


def spread(network: dict) -> str:
    scores = [run["rmse"] for run in network["runs"]]
    return f"{statistics.mean(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})"


def table(native: dict, pytorch: dict) -> str:
    lines = ["| forecast | parameters | RMSE, native | RMSE, PyTorch |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | | {score:.4f} | the same |" for name, score in native["baselines"].items()]
    for name, network in native["networks"].items():
        scores = f"{spread(network)} | {spread(pytorch['networks'][name])}"
        lines.append(f"| {name} | {network['parameters']} | {scores} |")
    seeds = len(network["runs"])
    lines += [
        "",
        f"Mean (minimum to maximum) of {seeds} seeds. {native['epochs']} epochs, {native['series']} series.",
    ]
    return "\n".join(lines)


def main() -> int:
    results = ROOT / "bench" / "results"
    found = [json.loads((results / f"irregular{end}.json").read_text()) for end in ("", "_torch")]
    if any(found[0][what] != found[1][what] for what in ("series", "epochs", "baselines")):
        print("irregular.json and irregular_torch.json are of different tasks")
        return 1
    return update("docs/irregular.md", "irregular_page.py", table(*found), "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
