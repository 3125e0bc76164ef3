"""Draws docs/tile.png, for docs/pictures.py: one tile of the forward pass of an LSTM."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from fusedrnn.plot import BLUE, GREEN, GREY, PURPLE, VERMILION

ROWS, GATES, STEPS = 6, "ifgo", 9
COLOURS = BLUE, VERMILION, GREEN, PURPLE
LINE = {"edgecolor": "white", "linewidth": 0.8}


def grid(ax, x: float, y: float, columns: int, rows: int, colour, width=1.0, marked=None) -> None:
    """A matrix of cells; ``marked`` says which are drawn strong, ``colour`` gives each column's."""
    for r in range(rows):
        for c in range(columns):
            strong = marked is None or marked(r, c)
            ax.add_patch(
                Rectangle(
                    (x + c * width, y - r - 1),
                    width,
                    1,
                    facecolor=colour(c),
                    alpha=1 if strong else 0.25,
                    **LINE,
                )
            )


def arrow(ax, begin: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": GREY, "lw": 1.6}
    ax.annotate("", end, begin, arrowprops=style)


def main() -> None:
    figure, ax = plt.subplots(figsize=(10, 5.2))
    k = 3  # the step of the sum that is shown
    grid(ax, 0, 0, STEPS, ROWS, lambda c: GREY, marked=lambda r, c: c == k)
    ax.text(STEPS / 2, 0.35, "x and h of 6 rows", ha="center", va="bottom", fontsize=11)
    ax.text(k + 0.5, -ROWS - 0.3, "k", ha="center", va="top", fontsize=11, style="italic")

    left, width = 13, 2.2
    grid(ax, left, 10.6, len(GATES), STEPS, lambda c: COLOURS[c], width, lambda r, c: r == k)
    ax.text(left - 0.4, 10.6 - k - 0.5, "k", ha="right", va="center", fontsize=11, style="italic")
    middle = left + 2 * width
    ax.text(middle, 10.9, "weights of 16 units, packed", ha="center", va="bottom", fontsize=11)

    grid(ax, left, 0, len(GATES), ROWS, lambda c: COLOURS[c], width)
    for c, gate in enumerate(GATES):
        ax.text(left + (c + 0.5) * width, -ROWS - 0.3, gate, ha="center", va="top", fontsize=11)
    ax.text(
        middle,
        -ROWS - 1.5,
        "24 vector registers:\nthe sums of 6 rows, 4 gates, 16 units",
        ha="center",
        va="top",
        fontsize=11,
    )
    arrow(ax, (STEPS + 0.4, -3), (left - 0.4, -3))
    ax.text((STEPS + left) / 2, -2.7, "multiply\nand add", ha="center", va="bottom", fontsize=10)
    arrow(ax, (middle, 1.45), (middle, 0.15))

    right = left + len(GATES) * width + 5.5
    grid(ax, right, 0, 2, ROWS, lambda c: ("#aaaaaa", GREY)[c], width)
    for c, name in enumerate(("c", "h")):
        ax.text(right + (c + 0.5) * width, -ROWS - 0.3, name, ha="center", va="top", fontsize=11)
    ax.text(right + width, 0.35, "new state", ha="center", va="bottom", fontsize=11)
    arrow(ax, (right - 5.1, -3), (right - 0.4, -3))
    ax.text(right - 2.75, -2.7, "the cell,\nin registers", ha="center", va="bottom", fontsize=10)

    ax.set_xlim(-1, right + 2 * width + 1)
    ax.set_ylim(-ROWS - 4.2, 12.4)
    ax.set_aspect("equal")
    ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight")
