"""Learn a noisy sine with truncated backpropagation, then predict a cosine.

The data are 999 pairs (value k, value k + 1) of one period. An epoch has 30 parallel sequences of 34 steps,
or a single one of 999 steps. The weights are updated after every 30 steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import functions as F
from fusedrnn import layers, plot
from fusedrnn.autograd import Array, Variable, no_grad
from fusedrnn.dataloaders import SeqDataLoader
from fusedrnn.datasets import SinCurve
from fusedrnn.models import Model
from fusedrnn.optimizers import Adam
from fusedrnn.programs import common
from fusedrnn.programs.common import CELLS, Forecaster
from fusedrnn.terminal import Report

HIDDEN = 100
TRUNCATION = 30  # steps


class Result(NamedTuple):
    losses: list[float]  # of every epoch, mean over the steps
    prediction: Array  # (1000,)
    truth: Array  # (1000,), the cosine, which is also the input
    scores: dict[str, float]


def train(
    model: Model,
    dataset: SinCurve,
    *,
    batch: int = 30,
    epochs: int = 100,
    chunks: bool = False,
    after_epoch: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """Train a model that has ``reset_state``; returns the loss of every epoch.

    Single steps: the losses of an epoch add up, and are cut from their past after each update. With
    ``chunks`` 30 steps are one fused node.
    """
    optimizer = Adam().setup(model)
    loader = SeqDataLoader(dataset, batch, steps=TRUNCATION if chunks else None)
    losses = []
    for _ in range(epochs):
        model.reset_state()
        loss: Any = 0
        count = 0
        rows = batch == 1 and not chunks  # one time line is the data set itself, row by row
        steps: Any = dataset if rows else loader
        for x, t in steps:
            y = model(x.reshape(1, 1) if rows else x)
            loss += F.mean_squared_error(y, t)
            count += len(x) if chunks else 1
            if count % TRUNCATION == 0 or count == len(dataset):
                model.cleargrads()
                loss.backward()
                loss.unchain_backward()
                optimizer.update()
        losses.append(float(loss.data) / count)
        after_epoch(losses[-1])
    return losses


def predict(model: Model, x: Array) -> Array:
    """The model's outputs for a series ``(N,)``, fed one value at a time from a fresh state."""
    model.reset_state()
    with no_grad():
        return np.array([model(value.reshape(1, 1)).data.item() for value in x])


def start(cell: str, seed: int, **options: Any) -> tuple[Forecaster, SinCurve]:
    """Data and model, drawn in the order in which a training by single steps draws them."""
    np.random.seed(seed)
    dataset = SinCurve()
    model = Forecaster(CELLS[cell](HIDDEN, **options), layers.Linear(1))
    with no_grad():
        for _ in range(2):  # an RNN draws its hidden matrix at the second step
            model(Variable(np.zeros((1, 1))))
    model.reset_state()
    return model, dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs",
        type=common.at_least(0),
        metavar="N",
        help="0 trains nothing (default: 100, or with --one-line 10)",
    )
    parser.add_argument("--one-line", action="store_true", help="one time line of 999 steps instead of 30")
    parser.add_argument("--steps", action="store_true", help="single steps instead of chunks of 30")
    common.add_arguments(parser, 42, cell=True)


def run(args: argparse.Namespace, report: Report) -> Result:
    """Train, score, plot."""
    plots = common.will_plot(args.no_plot, report)
    epochs = args.epochs
    if epochs is None:
        epochs = 10 if args.one_line else 100
    model, dataset = start(args.cell, args.seed)
    with report.progress(epochs, f"{args.cell.upper()} on a sine") as progress:
        losses = train(
            model,
            dataset,
            batch=1 if args.one_line else 30,
            epochs=epochs,
            chunks=not args.steps,
            after_epoch=lambda loss: progress.advance(f"loss {loss:.3g}"),
        )
    truth = np.cos(np.linspace(0, 4 * np.pi, 1000))
    prediction = predict(model, truth)
    found = common.scores(prediction, truth)
    name = args.cell.upper()
    scores = {name: found, "copying the input": common.scores(truth, truth)}
    common.score_table(report, "On a cosine, compared with its own input", scores)
    common.compare(report, scores, "MSE")
    if plots:

        def draw(axes: Any) -> None:
            plot.forecast(truth, {name: prediction}, ax=axes)
            axes.set(title=f"A cosine, one step at a time: R2 {found['R2']:.5f}")

        common.plot(args.out / "sine.png", draw, report)
    return Result(losses, prediction, truth, found)
