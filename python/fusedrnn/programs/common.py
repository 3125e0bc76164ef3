"""What the programs share: how they report, the model that most of them train, scores, and figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from fusedrnn import layers, terminal
from fusedrnn.autograd import Array, Variable
from fusedrnn.models import Model

CELLS: dict[str, Callable[..., layers.Recurrent]] = {
    "rnn": layers.RNN,
    "lstm": layers.LSTM,
    "gru": layers.GRU,
}


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return value

    return parse


class Progress(Protocol):
    """A task under way, shown for the time of a ``with`` block."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def advance(self, note: str = "") -> None:
        """One more of the total is done; ``note`` says how it stands."""


class Report(Protocol):
    """Where a program tells what it does."""

    def progress(self, total: int, description: str, done: int = 0) -> Progress:
        """A task of ``total`` parts, of which ``done`` were done before."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text, the others are numbers."""

    def line(self, text: str) -> None:
        """One line of text."""


class PlainProgress:
    """A line at every tenth part."""

    def __init__(self, total: int, description: str, done: int) -> None:
        self.total, self.description, self.done = total, description, done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, note: str = "") -> None:
        before, self.done = self.done, self.done + 1
        if self.done * 10 // self.total > before * 10 // self.total:
            print(f"{self.description} {self.done}/{self.total}  {note}".rstrip(), flush=True)


class PlainReport:
    """Plain text on standard output."""

    def progress(self, total: int, description: str, done: int = 0) -> PlainProgress:
        return PlainProgress(total, description, done)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print(terminal.plain_table(title, columns, rows))

    def line(self, text: str) -> None:
        print(text, flush=True)


class Forecaster(Model):
    """A recurrent layer and, on its every step, a Linear."""

    def __init__(self, rnn: layers.Recurrent, fc: layers.Linear) -> None:
        super().__init__()
        self.rnn = rnn
        self.fc = fc

    def forward(self, x: Any) -> Variable:
        return self.fc.forward(self.rnn(x))


def scores(prediction: Array, truth: Array) -> dict[str, float]:
    """MSE, RMSE, MAE and R2, in float64."""
    p, t = prediction.astype(np.float64).ravel(), truth.astype(np.float64).ravel()
    mse = float(np.mean((t - p) ** 2))
    return {
        "MSE": mse,
        "RMSE": mse**0.5,
        "MAE": float(np.mean(np.abs(t - p))),
        "R2": float(1 - np.sum((t - p) ** 2) / np.sum((t - t.mean()) ** 2)),
    }


def score_table(report: Report, title: str, found: dict[str, dict[str, float]]) -> None:
    """Scores of several forecasts, one below the other."""
    names = list(next(iter(found.values())))
    rows = [(name, *(f"{values[n]:.6g}" for n in names)) for name, values in found.items()]
    report.table(title, ("", *names), rows)


def will_plot(no_plot: bool, report: Report) -> bool:
    """Whether a plot is wanted and Matplotlib is installed; where it is missing, says so before the work."""
    if no_plot:
        return False
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        report.line("No plot, Matplotlib is not installed: pip install matplotlib (--no-plot silences this).")
        return False
    return True


def plot(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (9, 4)) -> None:
    """A PNG of one pair of axes, on which ``draw`` draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    draw(axes)
    figure.savefig(path)


def folder(name: str) -> Path:
    """The output folder, made if it is missing."""
    path = Path(name)
    path.mkdir(parents=True, exist_ok=True)
    return path
