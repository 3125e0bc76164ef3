"""Learn the air pollution in Beijing from hourly data: a long training, with checkpoints.

There are two tasks. In ``same-row``, the published one, the target is the pollution of the same row, which is
also an input. Copying it would give an error of 0, so the score only shows how well a network learns to copy.
In ``ahead``, the target is the pollution of the next hour; it is compared with persistence, the value now.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import layers, plot
from fusedrnn.autograd import Array, no_grad
from fusedrnn.dataloaders import SeqDataLoader
from fusedrnn.datasets import Series, read_csv
from fusedrnn.optimizers import Adam
from fusedrnn.programs import common
from fusedrnn.programs import training as train
from fusedrnn.programs.common import CELLS, Forecaster
from fusedrnn.programs.training import Training
from fusedrnn.terminal import Report

FILE = "beijing_pollution.csv"
INPUTS = ("pollution", "dew", "temp", "press", "wnd_spd", "snow", "rain")
HIDDEN, BATCH, TRUNCATION = 100, 128, 30
EPOCHS = {"same-row": 3000, "ahead": 20}  # 20: best on the last 30 % of the training part
WHERE = (
    "The data are public: Beijing PM2.5 by Song Chen, UCI Machine Learning Repository, "
    "https://archive.ics.uci.edu/dataset/381/beijing+pm2+5+data, CC BY 4.0, in the arrangement known as "
    "'LSTM-Multivariate pollution' with the columns date,pollution,dew,temp,press,wnd_dir,wnd_spd,snow,rain: "
    f"python -m fusedrnn.programs.uci_pollution PRSA_data_2010.1.1-2014.12.31.csv {FILE} makes it. "
    f"Pass --data FILE, or name the folder that holds {FILE} in the environment variable FUSEDRNN_DATA."
)


class Result(NamedTuple):
    losses: list[float]  # of every epoch, mean over the steps
    prediction: Array  # of the test part
    truth: Array
    scores: dict[str, dict[str, float]]
    model: Forecaster


def read(data: str | None) -> Array:
    """The inputs ``(N, 7)``, float32, unscaled."""
    return read_csv(common.find(data, FILE, WHERE), INPUTS, hours=1).astype(np.float32)


class Task(NamedTuple):
    """What is trained on, and what its outputs mean."""

    train: Series
    test: Series
    truth: Array  # of the test part, µg/m³
    trivial: Array  # the forecast without any learning
    name: str  # of that
    forecast: Callable[[Array], Array]  # from the network's outputs on the test part


def prepare(rows: Array, task: str) -> Task:
    """Training and test part: the first 70 % of the rows, and the rest.

    ``same-row``: inputs and target as they are. ``ahead``: inputs standardised by the training part; the
    target is the change until the next hour, in units of its standard deviation there, so that an output of
    0 is persistence.
    """
    n = int(0.7 * len(rows))
    if n < BATCH or len(rows) - n < 2:
        least = -(-10 * BATCH // 7)
        raise ValueError(f"the data file: expected at least {least} rows, got {len(rows)}")
    pollution = rows[:, :1]
    if task == "same-row":
        train, test = Series(rows[:n], pollution[:n]), Series(rows[n:], pollution[n:])
        truth = pollution[n:, 0]
        return Task(train, test, truth, truth, "copying the input", lambda outputs: outputs)
    x = (rows - rows[:n].mean(axis=0)) / np.maximum(rows[:n].std(axis=0), 1e-3)
    change = np.diff(pollution, axis=0)
    scale = change[: n - 1].std()
    if scale == 0:
        raise ValueError("pollution: expected changes from hour to hour that differ, got the same in each")
    train, test = (Series(x[a:b], change[a:b] / scale) for a, b in ((0, n - 1), (n, len(rows) - 1)))
    now, truth = pollution[n:-1, 0], pollution[n + 1 :, 0]
    return Task(train, test, truth, now, "persistence: as now", lambda outputs: now + scale * outputs)


def training(model: Forecaster, part: Series, **options: Any) -> Training:
    """Chunks of 30 steps of 128 parallel time lines, the state carried from chunk to chunk."""
    loader = SeqDataLoader(part, BATCH, steps=TRUNCATION)
    return Training(model, Adam(), model.loss, loader, steps=loader.round, **options)


def build(cell: str, seed: int, **options: Any) -> Forecaster:
    np.random.seed(seed)
    rnn = CELLS[cell](HIDDEN, in_size=len(INPUTS), **options)
    return Forecaster(rnn, layers.Linear(1, in_size=HIDDEN, dtype=rnn.dtype))


def predict(model: Forecaster, part: Series) -> Array:
    """Step by step, batch 1, through the whole part, the state carried."""
    model.reset_state()
    with no_grad():
        return np.array([model(row[np.newaxis]).data.item() for row in part.data])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE", help=f"the CSV file (default: $FUSEDRNN_DATA/{FILE})")
    parser.add_argument(
        "--task",
        choices=("same-row", "ahead"),
        default="same-row",
        help="the pollution of the input row, as published, or that one hour ahead (default: %(default)s)",
    )
    train.add_arguments(parser, ", ".join(f"{n} of {task}" for task, n in EPOCHS.items()), cell=True)
    parser.add_argument("--weights", metavar="FILE", help="train nothing: load these weights (.npz) and test")


def run(args: argparse.Namespace, report: Report) -> Result:
    """Train or load, test, plot."""
    if args.weights:
        common.refuse(args, ("epochs", "checkpoint", "every", "resume"), "--weights, which trains nothing")
    plots = common.will_plot(args.no_plot, report)
    task = prepare(read(args.data), args.task)
    epochs = EPOCHS[args.task] if args.epochs is None else args.epochs
    out = args.out
    model = build(args.cell, args.seed)
    losses: list[float] = []
    if args.weights:
        model.load_weights(args.weights)
    else:
        settings = {"program": "pollution", "task": args.task, "cell": args.cell, "seed": args.seed}
        trained = training(model, task.train, settings=settings, path=args.checkpoint, every=args.every)
        train.go(trained, epochs, args.resume, report, f"{args.cell.upper()} on air pollution")
        losses = trained.losses
        model.save_weights(out / "pollution.npz")
        report.line(f"weights: {out / 'pollution.npz'}")
    prediction = task.forecast(predict(model, task.test))
    name = args.cell.upper()
    found = {name: common.scores(prediction, task.truth), task.name: common.scores(task.trivial, task.truth)}
    if args.task == "ahead":
        common.score_table(report, "One hour ahead, on the test part", found)
    else:
        common.score_table(report, "Pollution of the input row itself, on the test part", found)
        report.line("The target is one of the inputs: copying scores an error of 0.")
        report.line("A forecast of the next hour, beside persistence: --task ahead")
    if plots:
        draw_plots(out, name, losses, prediction, task.truth, report)
    return Result(losses, prediction, task.truth, found, model)


def draw_plots(
    out: Path, name: str, losses: list[float], prediction: Array, truth: Array, report: Report
) -> None:
    def draw_losses(axes: Any) -> None:
        plot.losses(losses, ax=axes)
        axes.set(ylabel="training loss (mean squared error)")

    def draw_prediction(axes: Any) -> None:
        last = slice(-500, None)
        hours = np.arange(len(truth))[last]
        plot.forecast(truth[last], {name: prediction[last]}, x=hours, ax=axes)
        axes.set(title="The end of the test part", xlabel="hour of the test part", ylabel="PM2.5, µg/m³")

    common.plot(out / "pollution-prediction.png", draw_prediction, report)
    if losses:
        common.plot(out / "pollution-loss.png", draw_losses, report)
