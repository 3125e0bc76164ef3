"""Air pollution in Beijing, hour by hour: trained from scratch, with checkpoints, beside persistence.

Two tasks on the same data. ``same-row``, the published one, asks for the pollution of the very row that is
the input: copying the input scores an error of 0 there, so its score says how well a network learns to copy,
no more. ``ahead`` asks for the next hour, where the forecast to beat is persistence: as now.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import checkpoint, layers
from fusedrnn import functions as F
from fusedrnn.autograd import Array, no_grad
from fusedrnn.dataloaders import SeqDataLoader
from fusedrnn.datasets import Series
from fusedrnn.optimizers import Adam
from fusedrnn.programs import common
from fusedrnn.programs.common import CELLS, Forecaster, Report

FILE = "beijing_pollution.csv"
INPUTS = ("pollution", "dew", "temp", "press", "wnd_spd", "snow", "rain")
HIDDEN, BATCH, TRUNCATION = 100, 128, 30
EPOCHS = {"same-row": 3000, "ahead": 20}  # 20: best on the last 30 % of the training part
WHERE = (
    "The data are public: Beijing PM2.5 by Song Chen, UCI Machine Learning Repository, "
    "https://archive.ics.uci.edu/dataset/381/beijing+pm2+5+data, CC BY 4.0, in the arrangement known as "
    "'LSTM-Multivariate pollution' with the columns date,pollution,dew,temp,press,wnd_dir,wnd_spd,snow,rain. "
    f"Pass --data FILE, or name the folder that holds {FILE} in the environment variable FUSEDRNN_DATA."
)


class Result(NamedTuple):
    losses: list[float]  # of every epoch, mean over the steps
    prediction: Array  # of the test part
    truth: Array
    scores: dict[str, dict[str, float]]
    model: Forecaster


def find(data: str | None) -> Path:
    """The file given, else that in FUSEDRNN_DATA, else an error that says where it is to be had."""
    folder = os.environ.get("FUSEDRNN_DATA")
    if data is None and not folder:
        raise FileNotFoundError(f"no data file. {WHERE}")
    path = Path(data) if data is not None else Path(folder or "") / FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. {WHERE}")
    return path


def read(path: Path) -> Array:
    """The inputs ``(N, 7)``, float32, unscaled."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        missing = [name for name in INPUTS if name not in (lines.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}. {WHERE}")
        rows = []
        for line in lines:
            try:
                rows.append([float(line[name]) for name in INPUTS])
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {lines.line_num}: not a number in {line}") from None
    return np.array(rows, np.float32)


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
        raise ValueError(f"{len(rows)} rows, expected at least {2 * BATCH}")
    pollution = rows[:, :1]
    if task == "same-row":
        train, test = Series(rows[:n], pollution[:n]), Series(rows[n:], pollution[n:])
        truth = pollution[n:, 0]
        return Task(train, test, truth, truth, "copying the input", lambda outputs: outputs)
    x = (rows - rows[:n].mean(axis=0)) / np.maximum(rows[:n].std(axis=0), 1e-3)
    change = np.diff(pollution, axis=0)
    scale = change[: n - 1].std()
    train, test = (Series(x[a:b], change[a:b] / scale) for a, b in ((0, n - 1), (n, len(rows) - 1)))
    now, truth = pollution[n:-1, 0], pollution[n + 1 :, 0]
    return Task(train, test, truth, now, "persistence: as now", lambda outputs: now + scale * outputs)


class Training:
    """A training that a checkpoint can take up at any chunk."""

    def __init__(self, model: Forecaster, part: Series, checkpoint: Path | None, every: float) -> None:
        self.model = model
        self.optimizer = Adam().setup(model)
        self.loader = SeqDataLoader(part, BATCH, steps=TRUNCATION)
        self.checkpoint = checkpoint
        self.every = every  # seconds
        self.losses: list[float] = []
        self.total, self.steps = 0.0, 0  # of the epoch under way
        self.saved = time.monotonic()

    def save(self) -> None:
        self.saved = time.monotonic()
        checkpoint.save(
            self.checkpoint or "",
            self.model,
            self.optimizer,
            self.loader,
            losses=self.losses,
            total=self.total,
            steps=self.steps,
        )

    def resume(self) -> None:
        progress = checkpoint.load(self.checkpoint or "", self.model, self.optimizer, self.loader)
        self.losses, self.total, self.steps = (progress[k] for k in ("losses", "total", "steps"))

    def run(self, epochs: int, after_epoch: Callable[[float], None]) -> None:
        """Go on until there are ``epochs`` epochs."""
        while len(self.losses) < epochs:
            if self.loader.iteration == 0:
                self.model.reset_state()
                self.total, self.steps = 0.0, 0
            for x, t in self.loader:
                loss = F.mean_squared_error(self.model(x), t)
                self.model.cleargrads()
                loss.backward()
                loss.unchain_backward()
                self.optimizer.update()
                self.total += float(loss.data)
                self.steps += len(x)
                if self.checkpoint and time.monotonic() - self.saved >= self.every:
                    self.save()
            self.losses.append(self.total / self.steps)
            after_epoch(self.losses[-1])
        if self.checkpoint:
            self.save()


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
    parser.add_argument("--cell", choices=list(CELLS), default="lstm", help="the cell (default: %(default)s)")
    defaults = ", ".join(f"{n} of {task}" for task, n in EPOCHS.items())
    parser.add_argument(
        "--epochs",
        type=common.at_least(0),
        metavar="N",
        help=f"how many in all; 0 trains nothing (default: {defaults})",
    )
    parser.add_argument("--seed", type=common.at_least(0), default=0, help="default: %(default)s")
    parser.add_argument("--out", default=".", metavar="DIR", help="where the files go (default: here)")
    parser.add_argument("--checkpoint", metavar="FILE", help="where checkpoints go (default: none are made)")
    parser.add_argument(
        "--every",
        type=float,
        default=30,
        metavar="SECONDS",
        help="between checkpoints (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint, if it exists")
    parser.add_argument("--weights", metavar="FILE", help="train nothing: load these weights (.npz) and test")
    parser.add_argument("--no-plot", action="store_true", help="no PNG files")


def run(args: argparse.Namespace, report: Report) -> Result:
    """Train or load, test, plot."""
    plots = common.will_plot(args.no_plot, report)
    if args.resume and not args.checkpoint:
        raise ValueError("--resume needs --checkpoint FILE")
    rows = read(find(args.data))
    task = prepare(rows, args.task)
    epochs = EPOCHS[args.task] if args.epochs is None else args.epochs
    out = common.folder(args.out)
    model = build(args.cell, args.seed)
    losses: list[float] = []
    if args.weights:
        model.load_weights(args.weights)
    else:
        training = Training(model, task.train, Path(args.checkpoint) if args.checkpoint else None, args.every)
        if args.resume and Path(args.checkpoint).exists():
            training.resume()
            report.line(f"resumed from {args.checkpoint}, epoch {len(training.losses)}")
        losses = training.losses
        with report.progress(epochs, f"{args.cell.upper()} on air pollution", len(losses)) as progress:
            training.run(epochs, lambda loss: progress.advance(f"mean loss {loss:.4g}"))
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
        for path in draw_plots(out, name, losses, prediction, task.truth):
            report.line(f"plot: {path}")
    return Result(losses, prediction, task.truth, found, model)


def draw_plots(out: Path, name: str, losses: list[float], prediction: Array, truth: Array) -> list[Path]:
    def draw_losses(axes: Any) -> None:
        axes.semilogy(range(1, len(losses) + 1), losses, lw=1)
        axes.set(title="Training", xlabel="epoch", ylabel="mean loss")

    def draw_prediction(axes: Any) -> None:
        last = slice(-500, None)
        hours = range(len(truth))[last]
        axes.plot(hours, truth[last], color="0.6", lw=3, label="measured")
        axes.plot(hours, prediction[last], color="C0", lw=1.2, label=name)
        axes.set(title="The last 500 hours of the test part", xlabel="hour", ylabel="PM2.5, µg/m³")
        axes.legend(frameon=False)

    paths = [out / "pollution-prediction.png"]
    common.plot(paths[0], draw_prediction)
    if losses:
        paths.append(out / "pollution-loss.png")
        common.plot(paths[1], draw_losses)
    return paths
