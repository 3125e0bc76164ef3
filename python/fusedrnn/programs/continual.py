"""Predict the next value of a noisy wave, then continue to learn from a checkpoint, with new data.

The new data are a wave of another period. Meanwhile the network forgets the old one. The table shows how
much.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn import layers, plot
from fusedrnn.autograd import no_grad
from fusedrnn.dataloaders import DataLoader
from fusedrnn.datasets import Series
from fusedrnn.optimizers import Adam, Optimizer
from fusedrnn.programs import common, training
from fusedrnn.programs.common import LastState
from fusedrnn.programs.training import Result, Training
from fusedrnn.terminal import Report

WINDOW, HIDDEN, BATCH = 30, 64, 64
PERIODS = {"old data": 25, "new data": 17}


def build() -> LastState:
    return LastState(layers.LSTM(HIDDEN, in_size=1), layers.Linear(1, in_size=HIDDEN))


def draw(period: float, size: int) -> tuple[Series, Series, Series]:
    """Windows of a noisy sine: of training, validation and test, in the order of time."""
    t = np.arange(size + WINDOW)
    series = np.sin(2 * np.pi * t / period) + 0.1 * np.random.randn(len(t))
    x, y = common.windows(series.astype(np.float32), WINDOW)
    x, y = x[:, :, np.newaxis], y[:, np.newaxis]
    a, b = int(0.7 * size), int(0.85 * size)
    return Series(x[:a], y[:a]), Series(x[a:b], y[a:b]), Series(x[b:], y[b:])


def error(model: LastState, part: Series) -> float:
    with no_grad():
        return float(model.loss(part.data, part.label).data)


def prepare(
    model: LastState,
    optimizer: Optimizer,
    part: Series,
    validation: Series,
    watched: Mapping[str, Series] | None = None,
    **options: Any,
) -> Training:
    loader, validate = DataLoader(part, BATCH), partial(error, model, validation)
    options["watch"] = {name: partial(error, model, other) for name, other in (watched or {}).items()}
    return Training(model, optimizer, model.loss, loader, validate=validate, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_count(parser, "--size", 20, 1500, "windows of each series")
    training.add_arguments(parser, epochs=100)


def run(args: argparse.Namespace, report: Report) -> Result:
    """Train on the old data; take up the checkpoint and train on the new; test on both each time."""
    plots = common.will_plot(args.no_plot, report)
    np.random.seed(args.seed)
    parts = {name: draw(period, args.size) for name, period in PERIODS.items()}
    out = args.out
    path = Path(args.checkpoint or out / "continual.ckpt")
    if args.checkpoint is None and not args.resume:  # those of an earlier run
        for kept in (path, Path(f"{path}.new")):
            kept.unlink(missing_ok=True)
    elif not args.resume and (kept := Path(f"{path}.new")).exists():  # not only after the first training
        training.refuse(kept)
    settings = {"program": "continual", "seed": args.seed, "size": args.size}
    old, new = parts["old data"], parts["new data"]

    model = build()
    watched = {name: validation for name, (_, validation, _) in parts.items()}
    options: dict[str, Any] = {"watched": watched, "every": args.every, "path": path, "settings": settings}
    first = prepare(model, Adam(0.01), *old[:2], **options)
    training.go(first, args.epochs, args.resume, report, "LSTM on the old data")
    before = {name: error(model, part[2]) for name, part in parts.items()}

    # Later, in another process: nothing is left but the checkpoint.
    model = build()
    again = prepare(model, Adam(0.01), *old[:2], **options)
    again.resume()
    options |= {"settings": settings | {"epochs": args.epochs}, "path": f"{path}.new"}
    second = prepare(model, again.optimizer, *new[:2], **options)
    training.go(second, args.epochs // 4, args.resume, report, "LSTM on the new data")
    found = {
        "LSTM, before": before,
        "LSTM, after": {name: error(model, part[2]) for name, part in parts.items()},
        "persistence: the last value again": {
            name: common.scores(part[2].data[:, -1], part[2].label)["MSE"] for name, part in parts.items()
        },
    }
    common.score_table(report, "Mean squared error of the next value, of which 0.01 is noise", found)
    for name in PERIODS:
        common.compare(report, {k: v for k, v in found.items() if k != "LSTM, before"}, name)
    report.line(f"checkpoints: {path}, {path}.new")
    losses = first.losses + second.losses
    if plots and losses:

        def draw_errors(axes: Any) -> None:
            errors = {name: first.watched[name] + second.watched[name] for name in PERIODS}
            plot.losses(errors, changes={"trained on the new data": len(first.losses)}, ax=axes)
            axes.set_ylabel("mean squared error, validation")

        common.plot(out / "continual.png", draw_errors, report)
    return Result(losses, first.seconds + second.seconds, found, model)
