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

from measured import RESULTS, table, update


def spread(network: dict) -> str:
    scores = [run["rmse"] for run in network["runs"]]
    return f"{statistics.mean(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})"


def section(native: dict, pytorch: dict) -> str:
    rows = [[name, "", f"{score:.4f}", "the same"] for name, score in native["baselines"].items()]
    for name, network in native["networks"].items():
        scores = [spread(network), spread(pytorch["networks"][name])]
        rows.append([name, str(network["parameters"]), *scores])
    return (
        f"{table(['forecast', 'parameters', 'RMSE, native', 'RMSE, PyTorch'], rows)}\n\n"
        f"Mean (minimum to maximum) of {len(network['runs'])} seeds. {native['epochs']} epochs, "
        f"{native['series']} series."
    )


def main() -> int:
    found = [json.loads((RESULTS / f"irregular{end}.json").read_text()) for end in ("", "_torch")]
    if any(found[0][what] != found[1][what] for what in ("series", "epochs", "baselines")):
        print("irregular.json and irregular_torch.json are of different tasks")
        return 1
    return update("docs/irregular.md", "irregular_page.py", section(*found), "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
