"""Classify sequences of different lengths by the noisy process that made them, with early stopping.

Both processes are ``x[t] = a x[t-1] + noise``, with a = -0.4 or a = 0.4. They have the same mean and
variance, so only the order of the values tells them apart. The model that is best on the validation part is
kept, and tested once. The likelihood ratio, which knows a, is the best possible classifier.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np

from fusedrnn import functions as F
from fusedrnn import layers, plot
from fusedrnn.autograd import Array, Variable, no_grad
from fusedrnn.dataloaders import DataLoader
from fusedrnn.datasets import Series
from fusedrnn.optimizers import Adam
from fusedrnn.programs import common, training
from fusedrnn.programs.common import LastState
from fusedrnn.programs.training import Result, Training
from fusedrnn.terminal import Report

COEFFICIENTS, SHORTEST, LONGEST, HIDDEN, BATCH = np.array([-0.4, 0.4]), 10, 50, 64, 64
DEVIATION = 0.5


def build() -> LastState:
    return LastState(layers.LSTM(HIDDEN, in_size=1), layers.Linear(2, in_size=HIDDEN))


def draw(count: int) -> Series:
    """Sequences ``(count, 50, 1)`` padded with zeros; of each its length and its process ``(count, 2)``."""
    process = np.random.randint(2, size=count)
    lengths = np.random.randint(SHORTEST, LONGEST + 1, size=count)
    a = COEFFICIENTS[process]
    steps = [np.random.randn(count)]
    for _ in range(LONGEST - 1):
        steps.append(a * steps[-1] + np.sqrt(1 - a * a) * np.random.randn(count))
    x = DEVIATION * np.stack(steps, axis=1) * (np.arange(LONGEST) < lengths[:, np.newaxis])
    return Series(x[:, :, np.newaxis].astype(np.float32), np.stack([lengths, process], axis=1))


def likelihood_ratio(part: Series) -> Array:
    """The best possible answer, from the processes themselves."""
    x, lengths = part.data[:, :, 0], part.label[:, :1]
    valid = np.arange(1, LONGEST) < lengths
    likely = []
    for a in COEFFICIENTS:
        variance = DEVIATION**2 * (1 - a * a)
        error = (x[:, 1:] - a * x[:, :-1]) ** 2 / variance
        likely.append(-(valid * (error + np.log(variance))).sum(axis=1))
    best: Array = np.argmax(likely, axis=0)
    return best


def loss(model: LastState, x: Array, t: Array) -> Variable:
    lengths, process = t.T
    return F.softmax_cross_entropy(model(x, lengths), process)


def prepare(model: LastState, part: Series, validation: Series, patience: int, **options: Any) -> Training:
    def validate() -> float:
        with no_grad():
            return float(loss(model, validation.data, validation.label).data)

    step, loader = partial(loss, model), DataLoader(part, BATCH)
    return Training(model, Adam(0.01), step, loader, validate=validate, patience=patience, **options)


def scores(predicted: Array, process: Array) -> dict[str, float]:
    """Accuracy; precision, recall and F1 of process 1."""
    hits = int(np.sum(predicted & process))
    precision, recall = hits / max(1, predicted.sum()), hits / max(1, process.sum())
    return {
        "accuracy": float(np.mean(predicted == process)),
        "precision": precision,
        "recall": recall,
        "F1": 2 * hits / max(1, predicted.sum() + process.sum()),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_count(parser, "--size", 4, 4000, "training sequences; a quarter as many are for validation")
    common.add_count(parser, "--patience", 1, 6, "epochs without a better one before it stops")
    training.add_arguments(parser, epochs=30)


def run(args: argparse.Namespace, report: Report) -> Result:
    """Train, go back to the best model, test."""
    plots = common.will_plot(args.no_plot, report)
    np.random.seed(args.seed)
    part, validation, test = draw(args.size), draw(args.size // 4), draw(2000)
    model = build()
    settings = {"program": "classify", "seed": args.seed, "size": args.size, "patience": args.patience}
    files = {"path": args.checkpoint, "every": args.every}
    trained = prepare(model, part, validation, args.patience, settings=settings, **files)
    training.go(trained, args.epochs, args.resume, report, "LSTM on two processes")
    trained.keep_best()
    if trained.best:
        best = int(np.argmin(trained.validation))
        report.line(f"best epoch: {best + 1}, validation loss {trained.validation[best]:.4f}")
    out = args.out
    model.save_weights(out / "classify.npz")
    report.line(f"weights: {out / 'classify.npz'}")

    lengths, process = test.label.T
    with no_grad():
        predicted = model(test.data, lengths).data.argmax(axis=1)
    found = {
        "LSTM": scores(predicted, process),
        "always process 1": scores(np.ones_like(process), process),
        "likelihood ratio (a is known)": scores(likelihood_ratio(test), process),
    }
    common.score_table(report, "Which process, 2000 test sequences", found)
    common.compare(report, found, "accuracy", most=True)
    if plots and trained.losses:

        def curves(axes: Any) -> None:
            plot.losses({"training": trained.losses, "validation": trained.validation}, ax=axes)
            axes.set_ylabel("cross entropy")

        common.plot(out / "classify.png", curves, report)
    return Result(trained.losses, trained.seconds, found, model)
