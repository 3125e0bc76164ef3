"""What the programs share: how they report, the models that they train, files, scores, and figures."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn import functions as F
from fusedrnn import layers
from fusedrnn.autograd import Array, Variable, no_grad
from fusedrnn.models import Model
from fusedrnn.plot import style
from fusedrnn.terminal import Report

CELLS: dict[str, Callable[..., layers.Recurrent]] = {
    "rnn": layers.RNN,
    "lstm": layers.LSTM,
    "gru": layers.GRU,
}


def at_least(least: int, most: int = 2**31 - 1, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """For argparse: a number from ``least`` to ``most``."""
    words = "a whole number" if kind is int else "a number"

    def parse(text: str) -> int | float:
        value: int | float = math.nan
        with contextlib.suppress(ValueError):
            value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {words} from {least} to {most}, got {text!r}")
        return value

    return parse


seed = at_least(0, 2**32 - 1)  # for argparse: what NumPy's global generator takes


def refuse(args: argparse.Namespace, options: Iterable[str], what: str) -> None:
    """Raise if one of the options was given, which has no effect with something else that was."""
    for option in options:
        value = getattr(args, option)
        if value is not None and value is not False:
            raise ValueError(f"--{option}: not with {what}")


def add_arguments(parser: argparse.ArgumentParser, default_seed: int = 0, *, cell: bool = False) -> None:
    """The options of every program, with ``cell`` also that one."""
    if cell:
        parser.add_argument("--cell", choices=list(CELLS), default="lstm", help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=default_seed, help="default: %(default)s")
    parser.add_argument(
        "--out", type=folder, default=".", metavar="DIR", help="where the files go (default: here)"
    )
    parser.add_argument("--no-plot", action="store_true", help="no PNG files")


def add_count(parser: argparse.ArgumentParser, name: str, least: int, default: int, text: str) -> None:
    """An option that is a whole number."""
    text += " (default: %(default)s)"
    parser.add_argument(name, type=at_least(least), default=default, metavar="N", help=text)


class Forecaster(Model):
    """A recurrent layer and, on its every step, a Linear."""

    def __init__(self, rnn: layers.Recurrent, fc: layers.Linear) -> None:
        super().__init__()
        self.rnn = rnn
        self.fc = fc

    def forward(self, x: Any) -> Variable:
        return self.fc.forward(self.rnn(x))

    def loss(self, x: Any, t: Any) -> Variable:
        """That of a batch, as ``functions.mean_squared_error`` has it."""
        return F.mean_squared_error(self(x), t)

    def predict(self, x: Any) -> Array:
        """The outputs for x, from a zero state, without a graph."""
        self.reset_state()
        with no_grad():
            y: Array = self(x).data
        return y


class LastState(Forecaster):
    """A recurrent layer from a zero state, and a Linear on its last state: x ``(B, T, I)`` to ``(B, O)``."""

    def forward(self, x: Any, lengths: Any = None) -> Variable:
        self.reset_state()
        self.rnn(np.swapaxes(x, 0, 1), lengths=lengths)
        h, *_ = self.rnn.state or ()  # of each row after its own last step
        return self.fc.forward(h)


def windows(series: Array, size: int) -> tuple[Array, Array]:
    """Every ``size`` values in a row ``(N, size)``, and the one after them ``(N,)``."""
    return np.lib.stride_tricks.sliding_window_view(series[:-1], size), series[size:]


def find(data: str | None, name: str, where: str) -> Path:
    """The file given, else that of this name in FUSEDRNN_DATA, else an error that says ``where`` it is."""
    folder = os.environ.get("FUSEDRNN_DATA")
    if data is None and not folder:
        raise FileNotFoundError(f"no data file. {where}")
    path = Path(data) if data is not None else Path(folder or "") / name
    if path.is_dir():
        raise IsADirectoryError(f"expected a file, got the folder {path}. {where}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. {where}")
    return path


def scores(prediction: Array, truth: Array) -> dict[str, float]:
    """MSE, RMSE, MAE and R2, in float64."""
    p, t = prediction.astype(np.float64).ravel(), truth.astype(np.float64).ravel()
    error, total = np.sum((t - p) ** 2), np.sum((t - t.mean()) ** 2)
    mse = float(np.mean((t - p) ** 2))
    return {
        "MSE": mse,
        "RMSE": mse**0.5,
        "MAE": float(np.mean(np.abs(t - p))),
        "R2": float(1 - error / total) if total else math.nan,  # of equal values it is not defined
    }


def score_table(report: Report, title: str, found: dict[str, dict[str, float]]) -> None:
    """Scores of several forecasts, one below the other."""
    names = list(next(iter(found.values())))
    rows = [(name, *(f"{values[n]:.6g}" for n in names)) for name, values in found.items()]
    report.table(title, ("", *names), rows)


def compare(report: Report, found: dict[str, dict[str, float]], by: str, most: bool = False) -> None:
    """A line: which of the others the first one does not beat, by the least score or by the ``most``."""
    name, *others = found
    sign = -1 if most else 1
    own = sign * found[name][by]
    ahead = [other for other in others if not sign * found[other][by] > own]  # it beats none with a NaN
    verdict = f"does not beat: {', '.join(ahead)}." if ahead else "beats all others."
    report.line(f"By {by}, {name} {verdict}")


def will_plot(no_plot: bool, report: Report) -> bool:
    """Whether a plot is wanted and Matplotlib is installed; where it is missing, says so before the work."""
    if no_plot:
        return False
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        report.line(
            "No plot, Matplotlib is not installed: pip install 'fusedrnn[plot]' (--no-plot silences this)."
        )
        return False
    return True


@style()
def plot(path: Path, draw: Callable[[Any], None], report: Report) -> None:
    """A PNG of one pair of axes, on which ``draw`` draws."""
    from matplotlib.figure import Figure

    figure = Figure(dpi=150)
    draw(figure.add_subplot())
    figure.savefig(path)
    report.line(f"plot: {path}")


def folder(name: str) -> Path:
    """For argparse: an output folder, made if it is missing, where a file can be written."""
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a folder to write to, got {name!r}: {error.strerror}"
        ) from None


def output_file(name: str) -> Path:
    """For argparse: a file in such a folder, which can be written to if it exists."""
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {name!r}")
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file to write to, got {name!r}: Permission denied")
    return folder(str(path.parent)) / path.name
