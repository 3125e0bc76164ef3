"""The plot of a run: for every case the ratio to each peer, as dots on a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise ImportError("--plot needs matplotlib: pip install 'fusedrnn[plot]'") from error

from fusedrnn.plot import GREY, style

# Label, colour (Okabe and Ito's, which colour-blind readers tell apart) and marker.
STYLES: dict[str, tuple[str, str, str]] = {
    "torch": ("PyTorch layer", "#0d84c6", "o"),
    "torch-cell": ("PyTorch cell in a loop", "#56b4e9", "s"),
    "torch-packed": ("PyTorch packed sequence", "#0d84c6", "D"),
    "torch-masked": ("PyTorch loop with masks", "#0d84c6", "P"),
    "torch-segments": ("PyTorch from reset to reset", "#56b4e9", "P"),
    "torch-split": ("PyTorch split at resets", "#56b4e9", "D"),
    "onnxruntime": ("ONNX Runtime", "#d55e00", "v"),
    "jax": ("JAX lax.scan", "#009e73", "^"),
    "dezero": ("DeZero", "#cc79a7", "X"),
    "torch-loop": ("PyTorch loop", "#0d84c6", "o"),
    "torchscript": ("TorchScript loop", "#56b4e9", "s"),
    "jax-scan": ("JAX lax.scan", "#009e73", "^"),
    "torch-compile": ("PyTorch loop, compiled", "#56b4e9", "D"),
    "numba": ("our Numba backend", "#e69f00", "P"),
    "reference": ("our NumPy reference", "#999999", "*"),
}


def check_ending(path: Path) -> None:
    """A ValueError if Matplotlib writes no files with this ending."""
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ValueError(f"--plot: expected a name that ends in one of {', '.join(known)}, got {path}")


@style()
def draw(report: dict[str, Any], path: str | Path) -> None:
    """Draw the ratios of a report to a file, its kind by the ending of its name."""
    rows = report["rows"]
    one_cell = "," not in report["cell"]
    labels = [row["case"].removeprefix(row["cell"] + " ") if one_cell else row["case"] for row in rows]
    figure = Figure(figsize=(7.5, 1.9 + 0.34 * len(rows)), dpi=130)
    axes = figure.subplots()
    for k, row in enumerate(rows):
        ratios = [row["libraries"][p]["ratio"] for p in report["peers"] if p in row["libraries"]]
        if ratios:
            axes.hlines(k, min(1, *ratios), max(1, *ratios), color=GREY, alpha=0.3, linewidth=3, zorder=1)
        if row["best"]:
            axes.annotate(
                f"{row['best']['ratio']:.2f}",
                (row["best"]["ratio"], k),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center" if row["best"]["ratio"] > 1.15 else "left",  # beside the line at 1
                fontsize=7.5,
            )
    for peer in report["peers"]:
        places = [k for k, row in enumerate(rows) if peer in row["libraries"]]
        ratios = [rows[k]["libraries"][peer]["ratio"] for k in places]
        label, colour, marker = STYLES[peer]
        points = axes.scatter(ratios, places, 42, color=colour, marker=marker, label=label, zorder=3)
        points.set(edgecolor=GREY, linewidth=0.6)  # some colours are hardly seen on white
    axes.axvline(1, color=GREY, linewidth=1.5, zorder=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(rows)), labels, fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.8)
    axes.set_ylabel("T,B,I,H")
    axes.set_xlabel(
        "time of the peer / time of fusedrnn: above 1 fusedrnn is faster\nThe figure is that of the best peer"
    )
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    found = report["environment"]
    mean = report["best_of_all"]
    title = f"{report['suite'] or 'cases'}: {report['cell'].upper()}, {report['dtype']}, "
    title += f"{report['threads']} thread(s)"
    if mean is not None:
        title += f", geometric mean against the best of all peers {mean:.2f}"
    machine = found["machine"]
    versions = [f"PyTorch {found['torch']}"] if "torch" in found else []
    small = ", ".join(
        [
            machine.get("model name", machine["architecture"]),
            found["isa"] or "",
            *versions,
            found["date"][:10],
        ]
    )
    figure.suptitle(f"{title}\n{small}", fontsize=9.5)
    figure.savefig(path)
