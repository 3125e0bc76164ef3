"""Forecast a growing series with a two-layer LSTM on windows of five values, a common recipe that fails.

In the recipe, the airline passengers are scaled to [0, 1], the features of a step are a window of five
months, and the whole training part is one sequence. The series grows beyond the values seen in training, so
simple forecasts are better. The same network on the change of the yearly growth is about as good as the best
of them. As in ``airline``, it is trained on 32 copies with noise, because it soon overfits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fusedrnn import layers, plot
from fusedrnn.autograd import Array
from fusedrnn.optimizers import Adam
from fusedrnn.programs import common
from fusedrnn.programs.airline import YEAR, passengers, update
from fusedrnn.programs.common import Forecaster
from fusedrnn.programs.training import Result
from fusedrnn.terminal import Report

WINDOW, COPIES = 5, 32
RECIPE, GROWTH = "LSTM, scaled to [0, 1]", "LSTM on the change of growth"


def build() -> Forecaster:
    rnn = layers.LSTM(45, in_size=WINDOW, num_layers=2)
    return Forecaster(rnn, layers.Linear(1, in_size=45))


def train(
    model: Forecaster,
    x: Array,
    t: Array,
    epochs: int,
    lr: float,
    noise: float = 0.0,
    after_epoch: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """All in one batch, x ``(T, B, 5)`` and t ``(T, B, 1)``; returns the loss of every epoch."""
    optimizer = Adam(lr).setup(model)
    losses = []
    for _ in range(epochs):
        losses.append(update(model, optimizer, x, t, noise))
        after_epoch(losses[-1])
    return losses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_count(parser, "--epochs", 0, 200, "of the recipe; the other network takes a quarter")
    common.add_arguments(parser)


def run(args: argparse.Namespace, report: Report) -> Result:
    """Train both, compare with forecasts without a network."""
    plots = common.will_plot(args.no_plot, report)
    months, values = passengers()
    low, high = values.min(), values.max()
    series = (values - low) / (high - low)
    x, y = common.windows(series, WINDOW)
    n = int(0.7 * len(x))
    truth, first = y[n:], n + WINDOW  # of the test part, a month's index in the series

    np.random.seed(args.seed)
    model = build()
    start = time.perf_counter()
    with report.progress(args.epochs, "LSTM on windows of five") as progress:
        losses = train(
            model,
            x[:n, np.newaxis],
            y[:n, np.newaxis, np.newaxis],
            args.epochs,
            lr=1e-2,
            after_epoch=lambda loss: progress.advance(f"loss {loss:.4f}"),
        )
    seconds = time.perf_counter() - start

    # The same network on w, the change of the yearly growth, scaled by the training part alone.
    log = np.log(values)
    growth = log[YEAR:] - log[:-YEAR]
    w = np.diff(growth)  # w[j] belongs to month j + YEAR + 1
    known = first - YEAR - 1  # so many w belong to the training part
    scale = w[:known].std(ddof=1)
    wx, wy = common.windows(w / scale, WINDOW)
    m = known - WINDOW
    np.random.seed(args.seed)
    grown = build()
    many_x, many_t = (np.repeat(a[:m].reshape(m, 1, -1), COPIES, axis=1) for a in (wx, wy))
    train(grown, many_x, many_t, args.epochs // 4, lr=3e-3, noise=1.0)
    # It reads the training part first, then goes on from its state.
    change = scale * grown.predict(wx[:, np.newaxis])[m:, 0, 0]

    before = log[first - YEAR : -YEAR] + growth[first - YEAR - 1 : -1]
    forecasts = {
        RECIPE: model.predict(x[n:, np.newaxis])[:, 0, 0],
        "naive: as last month": series[first - 1 : -1],
        "seasonal naive: as a year ago": series[first - YEAR : -YEAR],
        "growth as last month": (np.exp(before) - low) / (high - low),
        GROWTH: (np.exp(before + change) - low) / (high - low),
    }
    found = {name: common.scores(forecast, truth) for name, forecast in forecasts.items()}
    part = f"{len(truth)} months from {months[first]}"
    common.score_table(report, f"Passengers scaled to [0, 1], one month ahead, {part}", found)
    common.compare(report, found, "MSE")
    common.compare(report, {name: found[name] for name in (GROWTH, *list(found)[:-1])}, "MSE")
    report.line("The scaling uses the largest value of the whole series: it looks into the test part.")
    if plots:

        def draw(axes: Any) -> None:
            scaled_back = {name: forecasts[name] * (high - low) + low for name in (RECIPE, GROWTH)}
            plot.forecast(values, scaled_back, test=first, ax=axes)
            axes.set(xlabel=f"months since {months[0]}", ylabel="passengers a month, thousands")

        common.plot(args.out / "passenger-flow.png", draw, report)
    return Result(losses, seconds, found, model)
