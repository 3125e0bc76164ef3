"""Writes the README's table and plot from the measured files in bench/results. No figure is typed by hand.

    fusedrnn bench --json bench/results/lstm-float32.json    measure, on a quiet machine
    python bench/plot_readme.py            write README.md's table and docs/bench.png
    python bench/plot_readme.py --check    only see whether the table is up to date

Other runs of the core suite are CELL-DTYPE.json beside it, repeats of the main one lie in
bench/results/repeats.
Drawing needs matplotlib; the table needs nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "bench.png"
BEGIN, END = "<!-- measured: begin, by bench/plot_readme.py -->", "<!-- measured: end -->"
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
        f"load average before {found['load before']:.1f}",
        f"commit {(found['commit'] or 'unknown')[:10]}",
    ]
    return ", ".join(parts)


def section(all_reports: dict[str, dict[str, Any]]) -> str:
    """What stands between the markers."""
    report = all_reports[MAIN]
    more = [peer for peer in report["geometric_mean"] if peer != "torch"]
    lines = [
        "![Time of PyTorch divided by time of fusedrnn, for each shape](docs/bench.png)",
        "",
        "LSTM, float32, forward + backward, allocation included, one run, participants in turn. "
        f"{caption(report)}.",
        "",
        "| T, B, I, H | fusedrnn ms | GFLOP/s | PyTorch ms | PyTorch / fusedrnn |"
        + "".join(f" {peer} / fusedrnn |" for peer in more),
        "|---|---:|---:|---:|---:|" + "---:|" * len(more),
    ]
    for row in report["rows"]:
        each = row["participants"]
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
    repeats = [
        json.loads(path.read_text()) for path in sorted((ROOT / "bench/results/repeats").glob("*.json"))
    ]
    if repeats:
        means = ", ".join(f"{each['geometric_mean']['torch']:.2f}" for each in repeats)
        lines += ["", f"The same run again, just before and after: geometric means {means}."]
    others = [
        f"{each['cell'].upper()} {each['dtype']} {each['geometric_mean']['torch']:.2f}"
        for name, each in all_reports.items()
        if name != MAIN
    ]
    if others:
        lines += ["", f"Geometric means against PyTorch of the other measured runs: {', '.join(others)}."]
    return "\n".join(lines)


def draw(report: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labels = [", ".join(map(str, row["shape"])) for row in report["rows"]]
    ratios = [row["participants"]["torch"]["ratio"] for row in report["rows"]]
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    colours = ["#0072b2" if ratio >= 1 else "#d55e00" for ratio in ratios]
    bars = axes.barh(labels, ratios, color=colours)
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(
        xlabel="time of PyTorch / time of fusedrnn (right of the line: fusedrnn is faster)",
        ylabel="T, B, I, H",
    )
    found = report["environment"]
    machine = found["machine"]
    axes.set_title(
        f"LSTM training step, float32, {report['threads']} threads: geometric mean "
        f"{report['geometric_mean']['torch']:.2f}\n{machine.get('model name', machine['architecture'])}, "
        f"{found['isa']}, PyTorch {found['torch']}, {found['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(PLOT, dpi=110)


def main() -> int:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    all_reports = reports()
    wanted = f"{head}{BEGIN}\n{section(all_reports)}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if text != wanted or not PLOT.exists():
            print("README.md does not show what bench/results holds: run python bench/plot_readme.py")
            return 1
        return 0
    README.write_text(wanted)
    draw(all_reports[MAIN])
    return 0


if __name__ == "__main__":
    sys.exit(main())
