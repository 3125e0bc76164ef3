"""Writes the README's table and plot from the measured files in bench/results. No figure is typed by hand.

    fusedrnn bench --json bench/results/lstm-float32.json    measure, on a quiet machine
    python bench/plot_readme.py            write README.md's table and docs/bench.png
    python bench/plot_readme.py --check    only see whether the table is up to date

Other runs of the core suite are CELL-DTYPE.json beside it. Drawing needs fusedrnn and matplotlib; the table
needs nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from measured import ROOT, update

PLOT = ROOT / "docs" / "bench.png"
MAIN = "lstm-float32.json"  # the one that is plotted


def reports() -> dict[str, dict[str, Any]]:
    return {
        f"{cell}-{dtype}.json": json.loads(path.read_text())
        for cell in ("lstm", "gru", "rnn")
        for dtype in ("float32", "float64")
        if (path := ROOT / f"bench/results/{cell}-{dtype}.json").exists()
    }


def caption(report: dict[str, Any]) -> str:
    """Machine, versions and date of one report."""
    found = report["environment"]
    machine = found["machine"]
    caches = machine.get("caches", {})
    parts = [
        f"{machine.get('model name', machine['architecture'])} "
        f"(family {machine.get('cpu family', '?')}, model {machine.get('model', '?')}, "
        f"{caches.get('L2 unified', '?')} L2 per core)",
        f"{found['isa']}, {report['threads']} threads",
        f"PyTorch {found['torch']}",
        found["compiler"],
        found["date"][:10],
        f"load average before the run: {found['load before']:.1f}",
        f"commit {(found['commit'] or 'unknown')[:10]}",
    ]
    return ", ".join(parts)


def section(all_reports: dict[str, dict[str, Any]]) -> str:
    """What stands between the markers."""
    report = all_reports[MAIN]
    more = [peer for peer in report["geometric_mean"] if peer != "torch"]
    lines = [
        "![Time of each peer divided by time of fusedrnn, for each shape](docs/bench.png)",
        "",
        "LSTM, float32, forward + backward, allocation included, one run, libraries interleaved. "
        f"{caption(report)}.",
        "",
        "| T, B, I, H | fusedrnn ms | GFLOP/s | PyTorch ms | PyTorch / fusedrnn |"
        + "".join(f" {peer} / fusedrnn |" for peer in more),
        "|---|---:|---:|---:|---:|" + "---:|" * len(more),
    ]
    for row in report["rows"]:
        each = row["libraries"]
        ours, torch = each["fusedrnn"], each["torch"]
        lines.append(
            f"| {', '.join(map(str, row['shape']))} | {ours['ms']:.3g} | {ours['gflops']:.0f} "
            f"| {torch['ms']:.3g} | {torch['ratio']:.2f} |"
            + "".join(f" {each[peer]['ratio']:.2f} |" if peer in each else " – |" for peer in more)
        )
    means = report["geometric_mean"]
    lines.append(
        f"| geometric mean | | | | **{means['torch']:.2f}** |"
        + "".join(f" {means[peer]:.2f} |" for peer in more)
    )
    if more:
        lines += ["", f"Against the best of all peers at each shape: {report['best_of_all']:.2f}."]
    others = [
        f"{each['cell'].upper()} {each['dtype']} {each['geometric_mean']['torch']:.2f}"
        for name, each in all_reports.items()
        if name != MAIN
    ]
    if others:
        lines += ["", f"Geometric means against PyTorch of the other measured runs: {', '.join(others)}."]
    return "\n".join(lines)


def pytorch_section(report: dict[str, Any]) -> str:
    """Whole training steps with our layer beside those with PyTorch's, and a single step beside its cell."""
    lines = [
        "Training steps (forward, backward, Adam) of one LSTM layer, float32: time with `torch.nn.LSTM` "
        f"divided by ours. {caption(report)}.",
        "",
        "| T, B, I, H | torch.nn ms | ours ms | ratio |",
        "|---|---:|---:|---:|",
    ]
    for row in report["rows"]:
        each = row["libraries"]
        if row["kind"] == "update" and "torch" in each:
            lines.append(
                f"| {', '.join(map(str, row['shape']))} | {each['torch']['ms']:.3g} "
                f"| {each['fusedrnn']['ms']:.3g} | **{each['torch']['ratio']:.2f}** |"
            )
    steps = [r for r in report["rows"] if r["kind"] == "step" and r["api"] == "cell" and r["cell"] == "lstm"]
    for row in steps:
        _, B, _, H = row["shape"]
        ratio = row["libraries"]["torch-cell"]["ratio"]
        lines += [
            "",
            f"A single step in inference with B = {B}, H = {H}, beside `torch.nn.LSTMCell`: {ratio:.2f}; "
            "[with frozen weights](docs/speed.md) it is faster than PyTorch's.",
        ]
    return "\n".join(lines)


def main() -> int:
    all_reports = reports()
    check = "--check" in sys.argv[1:]
    outdated = update("README.md", "plot_readme.py", section(all_reports), check)
    pytorch = json.loads((ROOT / "bench/results/pytorch-float32.json").read_text())
    outdated |= update("README.md", "plot_readme.py", pytorch_section(pytorch), check, part="pytorch")
    if check:
        if not PLOT.exists():
            print("docs/bench.png is missing: run python bench/plot_readme.py")
        return int(outdated or not PLOT.exists())
    from fusedrnn.bench import plot

    plot.draw(all_reports[MAIN], str(PLOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
