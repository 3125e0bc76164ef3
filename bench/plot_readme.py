"""Writes the README's tables and plot from the measured files in bench/results. No figure is typed by hand.

    python bench/plot_readme.py            write README.md's tables and docs/bench.png
    python bench/plot_readme.py --check    only see whether the tables are up to date

The summary has the runs of benchmarks_page.py, where it says how they are measured. Drawing needs matplotlib.
"""

from __future__ import annotations

import statistics
import sys

from benchmarks_page import RUNS, best_peers
from measured import ROOT, Report, by_family, captions, families, side_by_side, table, update

from fusedrnn.bench import report

PLOT = ROOT / "docs" / "bench.png"
MAIN, PLOTTED = "lstm-float32", "AMD Zen 5"  # the run that is plotted, and where it was measured
BESIDE = {
    "pytorch": "`torch.nn`, training steps",
    "programs": "the library's own way",
}  # in suites with a goal


def compared(found: Report) -> tuple[str, list[float]]:
    """Beside whom, and the ratio of each case."""
    suite = found["suite"]
    if suite in BESIDE and (reached := report.ratios(found, report.GOALS[suite][0])):
        return BESIDE[suite], [ratio for ratio, _ in reached]
    best = [row["best"]["ratio"] for row in found["rows"] if row["best"]]
    return ", ".join(found["peers"]), best


def summary() -> str:
    """Geometric mean and least ratio of every run, on all families."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, (_, title) in RUNS.items():
        for family, found in by_family(name).items():
            beside, ratios = compared(found)
            if ratios:
                figures = f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f})"
                rows.setdefault((title, beside), {})[family] = figures
    lines = [
        [*row, *(each.get(family, "not measured") for family in families())] for row, each in rows.items()
    ]
    return table(["", "compared with the fastest of", *families()], lines, left=2)


def section() -> str:
    """What stands between the markers."""
    reports = by_family(MAIN)
    lines = [
        f"![Time of each peer divided by time of fusedrnn, for each shape, on {PLOTTED}](docs/bench.png)",
        "",
        "Each ratio is the time of the fastest other library divided by ours: the geometric mean over all "
        "shapes and, in brackets, the lowest. For each shape, it is the median over rounds in which all "
        "libraries ran. Below 1, fusedrnn is slower. `torch` is PyTorch's layer, called once. `torch-cell` "
        "calls PyTorch's cell at each step. `torch-masked` calls the layer at each step, with masked states. "
        "`torch-packed` uses packed sequences, and `torch-segments` calls the layer for each part between "
        "two resets ([more](docs/benchmarks.md)).",
        "",
        summary(),
        "",
        "The LSTM in float32 at each shape (T, B, I, H): forward and backward, memory allocation included. "
        "The libraries take turns within one run.",
        "",
        best_peers(reports),
        "",
        captions(reports),
    ]
    return "\n".join(lines)


def training_steps(found: Report) -> list[list[str]]:
    """Whole training steps with our layer beside those with PyTorch's, and a single step beside its cell."""
    rows = []
    for row in found["rows"]:
        each, shape = row["libraries"], ", ".join(map(str, row["shape"]))
        if row["kind"] == "update" and "torch" in each:
            more = row["case"].split(" update")[1].removesuffix(" PyTorch layer")
            rows.append((shape + more.replace(" ", ", ", 1), each["torch"], each[report.OURS]))
        elif row["kind"] == "step" and row["api"] == "cell" and row["cell"] == "lstm":
            rows.append((f"{shape}, one step of `LSTMCell`", each["torch-cell"], each[report.OURS]))
    return [
        [case, f"{theirs['ms']:.3g}", f"{ours['ms']:.3g}", f"**{theirs['ratio']:.2f}**"]
        for case, theirs, ours in rows
    ]


def pytorch_section() -> str:
    """The first table of the page."""
    reports = by_family("pytorch-float32")
    rows = {family: training_steps(found) for family, found in reports.items()}
    lines = [
        "Training steps (forward, backward, Adam) of an LSTM layer, and one step of `LSTMCell` without "
        "gradients, in float32. T is the number of time steps, B the batch size, I the input size, H the "
        "hidden size. Times are medians. The ratio is the time with `torch.nn` divided by ours, the median "
        "over rounds in which both ran, so it can differ from the quotient of the two times.",
        "",
        side_by_side(["T, B, I, H", "torch.nn ms", "ours ms", "ratio"], rows),
        "",
        captions(reports),
        "",
        "[Frozen weights](docs/speed.md#the-cost-of-reading-the-weights-in-every-call) make inference faster "
        "still.",
    ]
    return "\n".join(lines)


def draw() -> None:
    """Draw docs/bench.png."""
    from fusedrnn.bench import plot

    plot.draw(by_family(MAIN)[PLOTTED], str(PLOT))


def main() -> int:
    check = "--check" in sys.argv[1:]
    outdated = update("README.md", "plot_readme.py", section(), check)
    outdated |= update("README.md", "plot_readme.py", pytorch_section(), check, part="pytorch")
    if check:
        if not PLOT.exists():
            print("docs/bench.png is missing: run python bench/plot_readme.py")
        return int(outdated or not PLOT.exists())
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
