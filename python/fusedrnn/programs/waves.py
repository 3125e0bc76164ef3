"""Predict the next value of combined waves from the fifty values before it, with an Elman network.

The network reads a window, starting from a zero state. A Linear layer on its last state gives the prediction.
The initial weights are uniform within ±0.177 (hidden layer) and ±1 (output). The initial biases are zero.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fusedrnn import layers, plot
from fusedrnn.autograd import Array
from fusedrnn.dataloaders import DataLoader
from fusedrnn.datasets import Series
from fusedrnn.optimizers import Adam
from fusedrnn.programs import common, training
from fusedrnn.programs.common import LastState
from fusedrnn.programs.training import Result, Training
from fusedrnn.terminal import Report

WINDOW, HIDDEN, BATCH = 50, 32, 32


def build() -> LastState:
    """Kaiming's start with a = sqrt(5), on matrices that are stored input first."""
    model = LastState(layers.RNN(HIDDEN, in_size=1), layers.Linear(1, in_size=HIDDEN))
    for name, p in model.named_params():
        if "bias" not in name and name != "fc/b":
            bound = 1.0 if name == "fc/W" else 0.177
            p.data = np.random.uniform(-bound, bound, p.shape).astype(np.float32)
    return model


def data(wave: str, n: int) -> tuple[Array, Array]:
    """Windows ``(N, 50, 1)``, and the value after each ``(N, 1)``."""
    t = np.linspace(0, 0.1 * n, n)
    series = np.sin(t) if wave == "sine" else np.sin(t) + np.cos(t) + np.sign(np.sin(t))
    x, y = common.windows(series.astype(np.float32), WINDOW)
    return x[:, :, np.newaxis], y[:, np.newaxis]


def prepare(model: LastState, x: Array, t: Array, **options: Any) -> Training:
    return Training(model, Adam(0.01), model.loss, DataLoader(Series(x, t), BATCH), **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wave", choices=("combined", "sine"), default="combined", help="default: combined")
    training.add_arguments(parser, epochs=100)


def run(args: argparse.Namespace, report: Report) -> Result:
    """Train, save, load, test, plot."""
    plots = common.will_plot(args.no_plot, report)
    np.random.seed(args.seed)
    x, t = data(args.wave, 1000)
    n = int(0.8 * len(x))
    model = build()
    settings = {"program": "waves", "wave": args.wave, "seed": args.seed}
    trained = prepare(model, x[:n], t[:n], settings=settings, path=args.checkpoint, every=args.every)
    training.go(trained, args.epochs, args.resume, report, f"Elman network on waves: {args.wave}")
    out = args.out
    model.save_weights(out / "waves.npz")
    report.line(f"weights: {out / 'waves.npz'}")

    model = build()
    model.load_weights(out / "waves.npz")
    found = {
        "RNN": common.scores(model.predict(x[n:]), t[n:]),
        "persistence: the last value again": common.scores(x[n:, -1], t[n:]),
    }
    common.score_table(report, f"The next value, {len(x) - n} windows", found)
    common.compare(report, found, "MSE")
    if plots:
        x, t = data(args.wave, 2560)  # 100 values of the test part of a longer wave
        part = slice(int(0.8 * len(x)), int(0.8 * len(x)) + 100)

        def draw(axes: Any) -> None:
            plot.forecast(t[part], {"RNN": model.predict(x[part])}, ax=axes)
            axes.set(xlabel="step of the test part")

        common.plot(out / "waves.png", draw, report)
    return Result(trained.losses, trained.seconds, found, model)
