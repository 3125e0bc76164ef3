"""Draws every picture of the documentation again.

    python docs/pictures.py

Needs matplotlib. The pictures of docs/howto/plots.md are made by its own code. Those of measurements come
from the files in bench/results; for docs/irregular.png two networks are trained again, which takes a minute.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import tile
from PIL import Image

import fusedrnn.layers as L
from fusedrnn import plot
from fusedrnn.programs.feeding_back import CURVES, N, forgetting

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent


def save(ax, name: str) -> None:
    ax.figure.savefig(DOCS / name)


def howto() -> None:
    """The code of docs/howto/plots.md, in its folder."""
    page = DOCS / "howto" / "plots.md"
    os.chdir(page.parent)
    exec("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)), {"__name__": "page"})
    Path("mine.png").unlink()


def gradient_norms() -> None:
    """|dL/dh_t| of a loss on the last step alone, where each gate's recurrent weights are orthogonal."""
    T, B, I, H = 100, 8, 4, 64

    def flow(layer: L.Recurrent, gain: float, forget_bias: float = 0.0) -> np.ndarray:
        draw = np.random.default_rng(3)
        G = layer.cell.blocks["weight_hh"]
        orthogonal = [gain * np.linalg.qr(draw.standard_normal((H, H)))[0] for _ in range(G)]
        layer.weight_hh.data = np.concatenate(orthogonal)
        layer.weight_ih.data = 0.1 * draw.standard_normal((G * H, I))
        if G == 4:
            layer.bias_ih.data = np.repeat([0, forget_bias, 0, 0], H).astype(float)
        steps = [layer(x) for x in draw.standard_normal((T, B, I))]
        steps[-1].backward(retain_grad=True, grad=draw.standard_normal((B, H)))
        return np.array([y.grad.data for y in steps]) / np.linalg.norm(steps[-1].grad.data)

    def elman() -> L.RNN:
        return L.RNN(H, I, dtype="float64")

    def lstm() -> L.LSTM:
        return L.LSTM(H, I, dtype="float64")

    ax = plot.gradient_flow(
        {
            "Elman, gain 1.6": flow(elman(), 1.6),
            "Elman, gain 1.0": flow(elman(), 1.0),
            "Elman, gain 0.8": flow(elman(), 0.8),
            "LSTM, forget bias 4": flow(lstm(), 0.5, 4.0),
            "LSTM, forget bias 0": flow(lstm(), 0.5),
        }
    )
    ax.set_ylabel("|dL/dh|, relative to the last step")
    save(ax, "gradient_norms.png")


def forgetting_curves() -> None:
    """The weights of days in the loss of the program feeding-back."""
    ax = plt.figure().add_subplot()
    for curve in CURVES[1:]:
        label = "tanh(e t/N)" if curve == "e" else f"alpha {curve}"
        ax.plot(forgetting(curve, np.arange(N)), label=label)
    ax.set(xlabel="day t of the training part", ylabel="weight in the loss", xlim=(0, N))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(ax, "forgetting_curves.png")


def measured() -> None:
    """The pictures of what was measured, from bench/results."""
    sys.path.append(str(ROOT / "bench"))
    import plot_readme
    import scaling

    plot_readme.draw()
    scaling.draw(json.loads(scaling.FILE.read_text()), scaling.PLOT)


def irregular() -> None:
    """The two best networks of examples/irregular.py, trained again for their predictions."""
    sys.path.append(str(ROOT / "examples"))
    import irregular
    import irregular_series as task

    found = json.loads((ROOT / "bench/results/irregular.json").read_text())
    training, test = task.draw(found["series"], seed=1), task.draw(task.TEST, seed=2)
    predictions = {
        name: irregular.train(*task.NETWORKS[name], training, test, 0, found["epochs"])[2]
        for name in irregular.best(found)
    }
    irregular.plot(DOCS / "irregular.png", found, *test, predictions)


if __name__ == "__main__":
    mpl.use("Agg")
    with plot.style():
        mpl.rcParams["savefig.dpi"] = 150
        for draw in (howto, gradient_norms, forgetting_curves, tile.main, measured, irregular):
            draw()
            plt.close("all")
    for path in DOCS.rglob("*.png"):  # 128 colours are enough, and half the size
        few = Image.open(path).quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
        print(path.relative_to(ROOT), path.stat().st_size)
