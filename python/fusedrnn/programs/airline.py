"""Forecast the number of airline passengers one month ahead, and compare the usual simple forecasts.

The series is in the package: 144 months, from 1949 to 1960. Both the numbers and their seasonal variation
grow. All choices are made on the first 70 %. Each forecast of the last 30 % knows all months before it.

The input of the network is ``w``, the change of the yearly growth: with ``s[t] = log y[t] - log y[t-12]``,
``w[t] = s[t] - s[t-1]``. The network predicts the next w. With so few months it soon overfits. So it is
trained on copies with noise, for the number of epochs that was best for the last months of the training part.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import layers, plot
from fusedrnn.autograd import Array
from fusedrnn.optimizers import Adam
from fusedrnn.programs import common, speed
from fusedrnn.programs.common import CELLS, Forecaster
from fusedrnn.terminal import Report

YEAR = 12
HIDDEN, COPIES, NOISE, EPOCHS, HELD_OUT = 32, 32, 1.0, 150, 24


class Result(NamedTuple):
    scores: dict[str, dict[str, float]]  # best first
    forecasts: dict[str, Array]  # of the test part
    truth: Array
    epochs: int  # that were found best


def passengers() -> tuple[list[str], Array]:
    """Months, and thousands of passengers."""
    text = resources.files("fusedrnn.programs").joinpath("data/airline_passengers.csv").read_text()
    rows = list(csv.reader(text.splitlines()))[1:]
    return [month for month, _ in rows], np.array([float(value) for _, value in rows])


# The simple forecasts, of every month from the months before it. Parameters are fitted to the first n months
# alone, by trying all of a grid at once.


def holt_winters(y: Array, n: int, damping: float) -> Array:
    """Level, trend and factors of the season, smoothed (Winters 1960; damped trend: Gardner 1985)."""
    grid = np.meshgrid(np.linspace(0.05, 0.95, 19), np.linspace(0, 0.5, 11), np.linspace(0.05, 0.95, 19))
    alpha, beta, gamma = (g.ravel() for g in grid)
    first, second = y[:YEAR].mean(), y[YEAR : 2 * YEAR].mean()
    trend = np.full(alpha.shape, (second - first) / YEAR)
    level = first + trend * (YEAR - 1) / 2
    season = [np.full(alpha.shape, value / first) for value in y[:YEAR]]
    forecasts = np.full((len(y), len(alpha)), np.nan)
    for t in range(YEAR, len(y)):
        expected = level + damping * trend
        forecasts[t] = expected * season[t - YEAR]
        level = alpha * y[t] / season[t - YEAR] + (1 - alpha) * expected
        trend = beta * (level - expected) + damping * trend
        season.append(gamma * y[t] / level + (1 - gamma) * season[t - YEAR])
    return _best(forecasts, y, n)


def airline_model(y: Array, n: int) -> Array:
    """SARIMA (0,1,1)(0,1,1)12 of the logarithms, named after this very series (Box and Jenkins 1970)."""
    log = np.log(y)
    theta, seasonal = (g.ravel() for g in np.meshgrid(np.linspace(-0.9, 0.9, 37), np.linspace(-0.9, 0.9, 37)))
    errors = np.zeros((len(y), len(theta)))
    forecasts = np.full((len(y), len(theta)), np.nan)
    for t in range(YEAR + 1, len(y)):
        before = log[t - 1] + log[t - YEAR] - log[t - YEAR - 1]
        forecasts[t] = before - theta * errors[t - 1] - seasonal * errors[t - YEAR]
        forecasts[t] += theta * seasonal * errors[t - YEAR - 1]
        errors[t] = log[t] - forecasts[t]
    return np.exp(_best(forecasts, log, n))


def _best(forecasts: Array, y: Array, n: int) -> Array:
    """Of forecasts ``(months, grid)``, those with the least squared error from the third year to month n."""
    errors = np.sum((forecasts[2 * YEAR : n] - y[2 * YEAR : n, np.newaxis]) ** 2, axis=0)
    best: Array = forecasts[:, int(np.argmin(errors))]
    return best


def simple_forecasts(y: Array, n: int) -> dict[str, Array]:
    """Of the months from n on."""
    months = range(n, len(y))

    def each(forecast: Callable[[int], Any]) -> Array:
        return np.array([forecast(t) for t in months])

    return {
        "mean of all": each(lambda t: y[:t].mean()),
        "naive: as last month": each(lambda t: y[t - 1]),
        "naive with drift": each(lambda t: y[t - 1] + (y[t - 1] - y[0]) / (t - 1)),
        "seasonal naive: as a year ago": each(lambda t: y[t - YEAR]),
        "seasonal naive with drift": each(lambda t: y[t - YEAR] + np.mean(y[YEAR:t] - y[: t - YEAR])),
        "seasonal naive with growth": each(lambda t: y[t - YEAR] * y[t - 1] / y[t - YEAR - 1]),
        "Holt-Winters": holt_winters(y, n, 1.0)[n:],
        "Holt-Winters, damped": holt_winters(y, n, 0.9)[n:],
        "SARIMA (0,1,1)(0,1,1)12 of logs": airline_model(y, n)[n:],
    }


# The network


def update(model: Forecaster, optimizer: Adam, x: Array, t: Array, noise: float) -> float:
    """One update by sequences ``(T, B, ·)``, with noise on x; returns the mean squared error."""
    model.reset_state()
    loss = model.loss(x + noise * np.random.standard_normal(x.shape) if noise else x, t) / len(x)
    model.cleargrads()
    loss.backward()
    optimizer.update()
    return float(loss.data)


class Training:
    """Noisy copies of one series of w, side by side as a batch; an epoch is one update."""

    def __init__(self, w: Array, cell: str, seed: int, backend: str | None = None) -> None:
        np.random.seed(seed)
        rnn = CELLS[cell](HIDDEN, in_size=1, backend=backend)
        self.model = Forecaster(rnn, layers.Linear(1, in_size=HIDDEN))
        self.optimizer = Adam(0.003, max_norm=1.0).setup(self.model)
        self.x = np.broadcast_to(w[:-1, np.newaxis, np.newaxis], (len(w) - 1, COPIES, 1))
        self.target = np.broadcast_to(w[1:, np.newaxis, np.newaxis], self.x.shape)

    def epoch(self) -> float:
        """One update; returns the mean squared error."""
        return update(self.model, self.optimizer, self.x, self.target, NOISE)

    def predict(self, w: Array) -> Array:
        """Of each month's w, the next one."""
        return self.model.predict(w[:, np.newaxis, np.newaxis])[:, 0, 0]


def best_epochs(w: Array, cell: str, seed: int, after_epoch: Callable[[float], None]) -> int:
    """How many epochs serve the last ``HELD_OUT`` months best, learning from those before."""
    training = Training(w[:-HELD_OUT], cell, seed)
    errors = []
    for _ in range(EPOCHS):
        after_epoch(training.epoch())
        errors.append(np.mean((training.predict(w[:-1])[-HELD_OUT:] - w[-HELD_OUT:]) ** 2))
    smooth = np.convolve(errors, np.ones(9) / 9, "valid")
    return int(np.argmin(smooth)) + 5  # the middle of the best nine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_arguments(parser, cell=True)


def run(args: argparse.Namespace, report: Report) -> Result:
    """Train, forecast, compare, plot, time."""
    plots = common.will_plot(args.no_plot, report)
    months, y = passengers()
    n = int(0.7 * len(y))
    log = np.log(y)
    s = log[YEAR:] - log[:-YEAR]  # s[j] belongs to month j + 12
    w = np.diff(s)  # w[j] belongs to month j + 13
    known = n - YEAR - 1  # so many w belong to the training part
    scale = w[:known].std()
    w = w / scale

    with report.progress(EPOCHS, f"{args.cell.upper()}: how many epochs") as progress:
        epochs = best_epochs(w[:known], args.cell, args.seed, lambda e: progress.advance(f"loss {e:.3f}"))
    training = Training(w[:known], args.cell, args.seed)
    with report.progress(epochs, f"{args.cell.upper()}: training") as progress:
        for _ in range(epochs):
            progress.advance(f"loss {training.epoch():.3f}")
    change = scale * training.predict(w)[known - 1 : -1]  # from the month before each of the test part
    name = f"{args.cell.upper()}, this library"
    forecasts = simple_forecasts(y, n)
    forecasts[name] = np.exp(log[n - YEAR : -YEAR] + s[n - YEAR - 1 : -1] + change)

    truth = y[n:]
    found = {k: common.scores(v, truth) for k, v in forecasts.items()}
    found = dict(sorted(found.items(), key=lambda item: item[1]["MSE"]))
    part = f"{len(truth)} months from {months[n]}"
    common.score_table(report, f"Passengers (thousands), one month ahead, {part}, best first", found)
    place = list(found).index(name) + 1
    report.line(f"{name}: place {place} of {len(found)}, trained for {epochs} epochs on {n} months.")

    if plots:
        best = next(k for k in found if k != name)

        def draw(axes: Any) -> None:
            years = np.arange(len(y)) / YEAR + int(months[0][:4])
            plot.forecast(y, {k: forecasts[k] for k in (name, best)}, test=n, x=years, ax=axes)
            axes.set(xlabel="year", ylabel="passengers a month, thousands")

        common.plot(args.out / "airline.png", draw, report)

    speed.compare(
        lambda backend: Training(w[:known], args.cell, 0, backend).epoch, "a training epoch", report
    )
    return Result(found, forecasts, truth, epochs)
