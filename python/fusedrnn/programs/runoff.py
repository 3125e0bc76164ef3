"""Predict the runoff of many catchments from their weather with one LSTM, and compare simpler forecasts.

The catchments are generated (``programs.catchments``). Snow and groundwater store water, so the runoff of a
day depends on the weather of months. The inputs are the weather of each day and numbers that describe the
catchment, but not the runoff. The network is trained on nine years and tested on five later years, and on
catchments that it has never seen. The score is the Nash-Sutcliffe efficiency (1970): 1 is perfect, 0 is as
good as the mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import functions as F
from fusedrnn import layers, plot
from fusedrnn.autograd import Array, Variable
from fusedrnn.dataloaders import SeqDataLoader
from fusedrnn.datasets import Series
from fusedrnn.optimizers import Adam
from fusedrnn.programs import catchments, common, simple_runoff, speed, training
from fusedrnn.programs.catchments import YEAR, Catchments
from fusedrnn.programs.common import Forecaster
from fusedrnn.programs.training import Result, Training
from fusedrnn.terminal import Report

TRAINING, TEST = 9, 5  # years; one more before them is for the state to become right
HIDDEN, STEPS, RATE, FORGET = 64, 122, 0.02, 3.0  # chosen with seed 100
NAME = "LSTM, this library"


class Inputs(NamedTuple):
    """What the network reads, of all days and catchments, and what it learns from."""

    x: Array  # (days, C, I), float32
    attributes: Array  # (C, A), standardised
    part: Series  # the training days of the catchments seen, one after the other
    scale: float  # mm a day, of the network's output


def prepare(data: Catchments, seen: int, n: int) -> Inputs:
    """Standardise by the training days of the catchments seen. The first year has no weight in the loss.

    The loss divides an error by the standard deviation of the catchment's runoff plus 0.1 mm (Kratzert et al.
    2019), as the efficiency does, so that each counts alike.
    """
    climate = data.forcing[:n, :, :2].mean(axis=0)
    attributes = np.hstack([data.site, climate])
    attributes = (attributes - attributes[:seen].mean(axis=0)) / attributes[:seen].std(axis=0)
    known = data.forcing[:n, :seen]
    forcing = (data.forcing - known.mean(axis=(0, 1))) / known.std(axis=(0, 1))
    days = len(forcing)
    x = np.concatenate([forcing, np.broadcast_to(attributes, (days, *attributes.shape))], axis=2)
    x = x.astype(np.float32)
    runoff = data.runoff[:n, :seen]
    scale = float(runoff[YEAR:].std())
    weight = scale / (runoff[YEAR:].std(axis=0) + 0.1) * (np.arange(n)[:, np.newaxis] >= YEAR)
    label = np.stack([runoff / scale, weight], axis=2).astype(np.float32)
    lines = [np.swapaxes(a, 0, 1).reshape(seen * n, -1) for a in (x[:n, :seen], label)]
    return Inputs(x, attributes, Series(*lines), scale)


def build(inputs: int, backend: str | None = None) -> Forecaster:
    """The LSTM's forget gates begin open, so that it remembers from the start."""
    rnn = layers.LSTM(HIDDEN, in_size=inputs, backend=backend)
    bias = dict(rnn.named_params())["bias_ih"]
    bias.data[HIDDEN : 2 * HIDDEN] = FORGET
    return Forecaster(rnn, layers.Linear(1, in_size=HIDDEN))


def train(model: Forecaster, part: Series, seen: int, epochs: int, **options: Any) -> Training:
    """Some months of all catchments are an update, the state carried. The rate falls along a cosine."""
    loader = SeqDataLoader(part, seen, steps=STEPS)
    optimizer = Adam(RATE, max_norm=1.0)

    def step(x: Array, t: Array) -> Variable:
        done = optimizer.t / max(1, epochs * loader.max_iter)
        optimizer.alpha = RATE * (1 + math.cos(math.pi * done)) / 2
        runoff, weight = t[..., :1], t[..., 1:]
        return F.mean_squared_error(weight * model(x), weight * runoff) / len(x)

    return Training(model, optimizer, step, loader, **options)


def predict(model: Forecaster, inputs: Inputs) -> Array:
    """``(days, C)``, mm a day: in one call, the state carried from the first day to the last."""
    y = model.predict(inputs.x)[:, :, 0]
    model.reset_state()
    return np.maximum(y, 0) * inputs.scale


def simple_forecasts(
    data: Catchments, inputs: Inputs, seen: int, n: int, trees: bool, report: Report
) -> dict[str, Array]:
    """By name. What is fitted to one catchment alone ends at ``seen``."""
    own = data.forcing[:, :seen], data.runoff[:, :seen], n
    makers: dict[str, Callable[[], Array]] = {
        "climatology: mean of the day of the year": lambda: simple_runoff.climatology(*own[1:]),
        "ridge regression on lags, one each": lambda: simple_runoff.ridge(*own),
        "bucket model with snow, calibrated for each": lambda: simple_runoff.bucket(*own),
    }
    if trees:
        makers["gradient-boosted trees on lags"] = lambda: simple_runoff.trees(
            data.forcing, data.runoff, inputs.attributes, n, seen
        )
    found = {}
    with report.progress(len(makers), "without a network") as progress:
        for name, make in makers.items():
            found[name] = make()
            progress.advance(name.partition(" on ")[0])
    return found


def judge(forecasts: dict[str, Array], truth: Array, seen: int) -> dict[str, dict[str, float]]:
    """Of the test days: the efficiencies of the catchments seen, and of those never seen."""
    each = {name: simple_runoff.efficiency(f, truth[:, : f.shape[1]]) for name, f in forecasts.items()}
    first = np.stack([e[:seen] for e in each.values()]).argmax(axis=0)
    return {
        name: {
            "median": float(np.median(e[:seen])),
            "worst tenth": float(np.quantile(e[:seen], 0.1)),
            f"best of {seen}": float(np.sum(first == k)),
        }
        | ({"never seen: median": float(np.median(e[seen:]))} if len(e) > seen else {})
        for k, (name, e) in enumerate(each.items())
    }


def sketch(values: Array, top: float) -> str:
    """A line of characters whose height is that of the values, means of five days."""
    levels = "▁▂▃▄▅▆▇█"
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        levels = "_.-:=+*#"
    means = values[: len(values) // 5 * 5].reshape(-1, 5).mean(axis=1)
    return "".join(levels[min(int(8 * v / top), 7)] for v in means)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_count(parser, "--catchments", 4, 64, "trained on; a quarter as many more are never seen")
    training.add_arguments(parser, epochs=50)
    parser.add_argument(
        "--trees", action="store_true", help="gradient-boosted trees too: needs scikit-learn, takes minutes"
    )


def run(args: argparse.Namespace, report: Report) -> Result:
    """Generate, train, compare, sketch, plot, time."""
    if args.trees and importlib.util.find_spec("sklearn") is None:
        raise ImportError("--trees needs scikit-learn: pip install 'fusedrnn[examples]'")
    plots = common.will_plot(args.no_plot, report)
    seen, n = args.catchments, (1 + TRAINING) * YEAR
    data = catchments.draw(args.seed, seen + seen // 4, 1 + TRAINING + TEST)
    inputs = prepare(data, seen, n)
    np.random.seed(args.seed)
    model = build(inputs.x.shape[2])
    settings = {"program": "runoff", "seed": args.seed, "catchments": seen, "epochs": args.epochs}
    options = {"settings": settings, "path": args.checkpoint, "every": args.every}
    trained = train(model, inputs.part, seen, args.epochs, **options)
    training.go(trained, args.epochs, args.resume, report, f"LSTM on {seen} catchments")

    forecasts = {NAME: predict(model, inputs)}
    forecasts |= simple_forecasts(data, inputs, seen, n, args.trees, report)
    found = judge({name: f[n:] for name, f in forecasts.items()}, data.runoff[n:], seen)
    columns = list(found[NAME])
    rows = [
        (name, *(f"{scores[c]:.{0 if 'best' in c else 3}f}" if c in scores else "" for c in columns))
        for name, scores in sorted(found.items(), key=lambda item: -item[1]["median"])
    ]
    title = f"Runoff, {TEST} years after those of training: Nash-Sutcliffe efficiency, best first"
    report.table(title, ("", *columns), rows)
    common.compare(report, found, "median", most=True)
    if not args.trees:
        report.line("Gradient-boosted trees, second in docs/programs.md, take minutes: --trees adds them.")
    limit = np.median(simple_runoff.efficiency(data.exact[n:, :seen], data.runoff[n:, :seen]))
    report.line(f"Nothing can do better than {limit:.3f}: that is runoff without its measuring error.")

    of_each = simple_runoff.efficiency(forecasts[NAME][n:, :seen], data.runoff[n:, :seen])
    typical = int(np.argsort(of_each)[seen // 2])
    other = next(name for name, *_ in rows if name != NAME)
    year = slice(n, n + YEAR)
    shown = {"measured": data.runoff, NAME: forecasts[NAME], other: forecasts[other]}
    lines = {name: series[year, typical] for name, series in shown.items()}
    report.line("One year of a catchment in the middle, from October; a character is five days:")
    precipitation = data.forcing[year, typical, 0]
    top = max(float(line.reshape(-1, 5).mean(axis=1).max()) for line in lines.values())
    report.line(f"{sketch(precipitation, 5 * precipitation.mean())} precipitation")
    for name, line in lines.items():
        report.line(f"{sketch(line, top)} {name}")
    if plots:

        def draw(axes: Any) -> None:
            measured, *others = lines
            plot.forecast(lines[measured], {k: lines[k] for k in others}, ax=axes)
            axes.set(xlabel="day from 1 October", ylabel="runoff, mm a day")

        common.plot(args.out / "runoff.png", draw, report)

    def start(backend: str) -> Callable[[], None]:
        timed = train(build(inputs.x.shape[2], backend), inputs.part, seen, 1)
        x, t = timed.loader.batch(0) if timed.loader else ((), ())

        def update() -> None:
            timed.model.reset_state()
            timed.step(x, t).backward()

        return update

    speed.compare(start, f"forward and backward of {STEPS} days", report)
    return Result(trained.losses, trained.seconds, found, model)
