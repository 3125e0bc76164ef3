"""Forecast by feeding back: each day's prediction is the next day's input.

The data are the daily numbers of reported Wordle results, 359 days of 2022. The training part has 500
sequences of 0 to 99 days, padded with zeros. With ``--lengths``, the LSTM gets their lengths and computes
nothing past the end; the results on the valid days are the same. A forgetting curve weights the days in the
loss.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np

from fusedrnn import functions as F
from fusedrnn import layers, plot
from fusedrnn.autograd import Array, Variable, no_grad
from fusedrnn.datasets import read_csv
from fusedrnn.models import Model
from fusedrnn.optimizers import Adam
from fusedrnn.programs import common, training
from fusedrnn.programs.training import Result, Training
from fusedrnn.terminal import Report

FILE = "wordle_reported_2022.csv"
WHERE = (
    "The data are those of the Mathematical Contest in Modeling 2023, problem C (COMAP): the daily number of "
    "reported results from 7 January 2022 on, as a CSV file with the columns date,reported, the faulty value "
    f"of 30 November mended. Pass --data FILE, or name the folder that holds {FILE} in the environment "
    "variable FUSEDRNN_DATA."
)
N, AHEAD, LONGEST = 250, 60, 100  # training days; days beyond the data; sequences are shorter than this
CURVES = ("none", "e", "2", "5", "7", "10")


class Net(Model):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = layers.LSTM(10, in_size=1)
        self.hidden = layers.Linear(10, in_size=10)
        self.out = layers.Linear(1, in_size=10)

    def forward(self, x: Any, lengths: Any = None) -> Variable:
        y = self.lstm(x) if lengths is None else self.lstm(x, lengths=lengths)
        return self.out.forward(F.tanh(self.hidden(y)))


def read(data: str | None) -> Array:
    """The daily numbers ``(359,)``."""
    path = common.find(data, FILE, WHERE)
    values = read_csv(path, ["reported"], hours=24)[:, 0]
    if len(values) < N + LONGEST:
        raise ValueError(f"{path}: expected at least {N + LONGEST} rows, got {len(values)}. {WHERE}")
    if values.min() == values.max():
        raise ValueError(f"{path}: expected numbers that differ in reported, got only {values[0]:g}")
    return values


def draw_sequences(z: Array) -> tuple[Array, Array, Array, Array]:
    """500 sequences: x, t ``(99, 500, 1)``, lengths and first days ``(500,)``.

    The target of z[day] is z[day + 1]. Five times an end is drawn; with each the lengths are 0 to 99.
    """
    ends = np.repeat(np.random.randint(LONGEST, N, size=5), LONGEST)
    lengths = np.tile(np.arange(LONGEST), 5)
    begins = ends - lengths
    step = np.arange(LONGEST - 1)[:, np.newaxis]
    x, t = (
        np.where(step < lengths, z[begins + step + later], 0)[:, :, np.newaxis].astype(np.float32)
        for later in (0, 1)
    )
    return x, t, lengths, begins


def forgetting(curve: str, day: Array) -> Array:
    """The weight of a day: that of step t of a sequence from day s on is ``w[s + t]``."""
    if curve == "none":
        return np.ones(day.shape)
    if curve == "e":
        return np.tanh(math.e * day / N)
    return np.tanh(float(curve) * (day / N - 1)) + 1


def prepare(
    model: Net, z: Array, *, curve: str = "none", over: str = "all", use_lengths: bool = False, **options: Any
) -> Training:
    """All sequences are one batch. The loss is over all steps, padding too, or over the valid ones."""
    x, t, lengths, begins = draw_sequences(z)
    step = np.arange(len(x))[:, np.newaxis]
    weight = forgetting(curve, begins + step)
    if over == "valid":
        weight = weight * (step < lengths)
    weight = weight[:, :, np.newaxis].astype(np.float32)
    terms = x.size if over == "all" else int(lengths.sum())

    def loss() -> Variable:
        model.reset_state()
        y = model(x, lengths if use_lengths else None)
        total: Variable = (weight * (y - t) ** 2).sum()
        return total / terms

    return Training(model, Adam(0.01), loss, **options)


def feed_back(model: Net, known: Array, steps: int) -> Array:
    """Read what is known, then feed each prediction back. The state is carried: each day is computed once."""
    model.reset_state()
    with no_grad():
        predictions = [model(known.reshape(-1, 1, 1)).data[-1]]
        while len(predictions) < steps:
            predictions.append(model(predictions[-1]).data)
    return np.concatenate(predictions).ravel()


def feed_back_recomputing(model: Net, known: Array, steps: int) -> Array:
    """The same without the state: all days again for every prediction."""
    days = known.reshape(-1, 1, 1).astype(np.float32)
    with no_grad():
        for _ in range(steps):
            model.reset_state()
            days = np.concatenate([days, model(days).data[-1:]])
    return days[len(known) :].ravel()


def far_off(days: Array, known: Array) -> str:
    """A line where predictions are outside the range of the known days by more than its width, else none."""
    low, high = known.min(), known.max()
    outside = np.maximum(low - days, days - high)
    if outside.max() <= high - low:
        return ""
    first = int(np.argmax(outside > high - low))
    return (
        f"Fed back, the forecast diverges: day {first + 1} is {days[first]:.3g}, all known days are from "
        f"{low:.3g} to {high:.3g}."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE", help=f"the CSV file (default: $FUSEDRNN_DATA/{FILE})")
    parser.add_argument("--lengths", action="store_true", help="pass the lengths; with --over valid")
    parser.add_argument("--over", choices=("all", "valid"), default="all", help="steps of the loss")
    parser.add_argument(
        "--forgetting",
        choices=CURVES,
        default="none",
        help="weights of days: e for tanh(e t/N), an alpha for tanh(alpha (t/N - 1)) + 1 (default: none)",
    )
    training.add_arguments(parser, epochs=800)


def run(args: argparse.Namespace, report: Report) -> Result:
    """Train, feed back through the test part and beyond the data, time both ways."""
    plots = common.will_plot(args.no_plot, report)
    if args.lengths and args.over == "all":
        raise ValueError("--lengths: expected --over valid with it, got all, whose padding it never computes")
    values = read(args.data)
    mean, deviation = values.mean(), values.std(ddof=1)
    z = (values - mean) / deviation
    np.random.seed(args.seed)
    model = Net()
    report.line(model.summary())
    kind = {"curve": args.forgetting, "over": args.over, "use_lengths": args.lengths}
    settings = {"program": "feeding-back", "seed": args.seed} | kind
    trained = prepare(model, z, **kind, settings=settings, path=args.checkpoint, every=args.every)
    training.go(trained, args.epochs, args.resume, report, "LSTM on sequences of 0 to 99 days")

    truth = z[N:]
    start = time.perf_counter()
    fed = feed_back(model, z[:N], len(truth))
    between = time.perf_counter()
    again = feed_back_recomputing(model, z[:N], len(truth))
    ratio = (time.perf_counter() - between) / (between - start)
    beyond = feed_back(model, z, AHEAD)
    found = {}
    for name, days, last in (
        ("LSTM", fed, beyond[-1] * deviation + mean),
        ("holding the last known day", np.full(len(truth), z[N - 1]), values[-1]),
        ("holding the last training target", np.full(len(truth), z[N]), values[-1]),
    ):
        found[name] = {
            "MSE": common.scores(days, truth)["MSE"],
            "last day": float(days[-1]),
            f"{AHEAD} days beyond": float(last),
        }
    title = f"{len(truth)} days fed back, standardised (the last day is {z[-1]:.3f})"
    common.score_table(report, title, found)
    common.compare(report, found, "MSE")
    for days, known in ((fed, z[:N]), (beyond, z)):
        if said := far_off(days, known):
            report.line(said)
    report.line("Mean and deviation are those of the whole series: they look into the test part.")
    if args.over == "all":
        report.line("Half of the loss is padding with target 0: not comparable with a loss over valid days.")
    report.line(
        f"Carrying the state or computing all days again for each: largest difference "
        f"{np.abs(fed - again).max():.1e}, {ratio:.1f} times as fast"
    )
    if plots:

        def draw(axes: Any) -> None:
            plot.forecast(z, {"fed back": fed}, test=N, ax=axes)
            for curve in CURVES[1:]:
                weight = forgetting(curve, np.arange(N))
                axes.plot(weight, color=plot.GREY, lw=0.8, ls="-" if curve == args.forgetting else ":")
            axes.text(N, 1.1, "weights of days, --forgetting  ", ha="right")
            axes.set(xlabel="day", ylabel="reported results, standardised")

        common.plot(args.out / "feeding-back.png", draw, report)
    return Result(trained.losses, trained.seconds, found, model)
