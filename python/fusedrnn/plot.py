"""Plots of losses, forecasts, gates, gradients, and the errors of the gradient check.

They need Matplotlib, which the extra ``plot`` installs. Each function draws on ``ax``, or on a new figure if
it is None, and returns the Axes, so that you can add titles and lines:

::

    ax = plot.losses({"training": losses, "validation": validation})
    ax.figure.savefig("losses.png")

The colours are from Okabe and Ito's palette, which colour-blind readers can tell apart, with a lighter blue.
They are visible on white and on black. Lines also differ by their dashes, and points by their markers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusedrnn import kernels
from fusedrnn.backends.arguments import check_whole
from fusedrnn.backends.protocol import Array
from fusedrnn.cells.graph import Node
from fusedrnn.cuda import as_numbers
from fusedrnn.gradcheck.tables import ORACLE, Row, summarize
from fusedrnn.layers import Recurrent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["errors", "forecast", "gates", "gradient_flow", "losses", "style"]

COLOURS = BLUE, VERMILION, GREEN, PURPLE = "#0d84c6", "#d55e00", "#009e73", "#cc79a7"
DASHES = "-", "--", "-.", ":"
MARKERS = "o", "s", "^", "D"
GREY = "#7a7a7a"  # the same contrast on white and on black
ACTIVATIONS = "sigmoid", "tanh", "relu"
LINE_OF_TEXT = 0.075  # its height in that of the Axes


@contextmanager
def style() -> Iterator[None]:
    """Use the style of this module for your own plots, as a context manager or a decorator.

    Files that are saved within it have a transparent background, for white and for dark pages.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("fusedrnn.plot needs Matplotlib: pip install 'fusedrnn[plot]'") from error
    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    dashes = [DASHES[(k + k // 4) % 4] for k in range(16)]  # no two lines look the same
    rc: dict[Any, Any] = dict.fromkeys(grey, GREY) | {
        "axes.prop_cycle": f"cycler(color={COLOURS * 4}, linestyle={dashes})",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "figure.constrained_layout.use": True,
        "figure.figsize": (7, 3.2),
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "savefig.transparent": True,
    }
    with mpl.rc_context(rc):
        yield


def _axes(ax: Axes | None, height: float = 3.2) -> Axes:
    """What to draw on."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(7, height)).add_subplot()


def _label(ax: Any, lines: Sequence[Any]) -> None:
    """The labels of lines beside their right ends, in their colours, none on another."""
    ax.get_ylim()  # settles the limits
    labels = []
    for line in lines:
        points = line.get_xydata()
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) and not line.get_label().startswith("_"):  # Matplotlib's name of one without a label
            y = (ax.transScale + ax.transLimits).transform(points[-1])[1]
            places = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
            text = textwrap.fill(line.get_label(), 22)
            labels.append(ax.annotate(text, (1, y), (6, 0), color=line.get_color(), **places))
    labels.sort(key=lambda label: label.xy[1])
    for direction, edge in ((1, 0.0), (-1, 1.0)):  # up from the bottom, then down from the top
        for label in labels[::direction]:
            half = direction * LINE_OF_TEXT * (1 + label.get_text().count("\n")) / 2
            y = max(label.xy[1], edge + half) if direction == 1 else min(label.xy[1], edge + half)
            label.xy = (1, y)
            edge = y + half


def _border(ax: Any, x: float, left: str, right: str) -> None:
    """A vertical line, with words above it on both sides."""
    ax.axvline(x, color=GREY, linewidth=1, linestyle=":")
    above = ax.get_xaxis_transform()
    ax.text(x, 1.01, f"{left}  ", transform=above, ha="right", va="bottom")
    ax.text(x, 1.01, f"  {right}", transform=above, ha="left", va="bottom")


def _named(values: Any, name: str) -> Mapping[str, Any]:
    """Several by name; one alone gets this name."""
    return values if isinstance(values, Mapping) else {name: values}


@style()
def losses(
    history: Mapping[str, npt.ArrayLike] | npt.ArrayLike,
    *,
    changes: Mapping[str, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The loss of every epoch.

    The axis is logarithmic if all losses are positive and the largest is over 5 times the smallest.

    Args:
        history: (epochs,) numbers; or several curves by name, ``{"training": ..., "validation": ...}``.
        changes: Epochs after which something changed, by name, ``{"new data": 100}``. A line marks each.
        ax: The Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    curves = {name: np.ravel(as_numbers("history", v)) for name, v in _named(history, "").items()}
    ax = _axes(ax)
    from matplotlib.ticker import LogLocator, MaxNLocator

    lines = [ax.plot(np.arange(1, len(v) + 1), v, label=name)[0] for name, v in curves.items()]
    every = np.concatenate([*curves.values(), []])
    every = every[np.isfinite(every)]
    if len(every) and every.max() > 5 * every.min() > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
    ax.margins(x=0)
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 5, 10), integer=True))
    ax.set(xlabel="epoch", ylabel="loss")
    for text, epochs in (changes or {}).items():
        _border(ax, epochs + 0.5, "", text)
    _label(ax, lines)
    return ax


@style()
def forecast(
    truth: npt.ArrayLike,
    predictions: Mapping[str, npt.ArrayLike] | npt.ArrayLike,
    *,
    test: int | None = None,
    x: npt.ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A series and its forecasts, with a line between the training part and the test part.

    Args:
        truth: (N,) the series.
        predictions: (M,) the forecast of the last M steps, M at most N; or several forecasts by name.
        test: The first step of the test part, from 0 to N - 1. None: no line.
        x: (N,) the positions of the steps on the axis, such as years. None: 0 to N - 1.
        ax: The Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: A forecast is longer than the series, ``x`` has another length, or ``test`` is no step.
    """
    series = np.ravel(as_numbers("truth", truth))
    at = np.arange(len(series)) if x is None else np.ravel(x)
    if len(at) != len(series):
        raise ValueError(f"x: expected {len(series)} numbers, as truth has, got {len(at)}")
    ax = _axes(ax)
    lines = ax.plot(at, series, color=GREY, linestyle="-", linewidth=3, alpha=0.6, label="truth")
    for name, given in _named(predictions, "forecast").items():
        values = np.ravel(as_numbers("predictions", given))
        if len(values) > len(series):
            raise ValueError(
                f"predictions: expected at most {len(series)} steps, as truth has, got {len(values)} of "
                f"{name}"
            )
        lines += ax.plot(at[len(at) - len(values) :], values, label=name)
    ax.margins(x=0)
    ax.set(xlabel="step", ylabel="value")
    if test is not None:
        if not 0 <= check_whole("test", test, 0) < len(series):
            raise ValueError(f"test: expected a step from 0 to {len(series) - 1}, got {test}")
        _border(ax, (at[max(test - 1, 0)] + at[test]) / 2, "training", "test")
    _label(ax, lines)
    return ax


@style()
def gates(layer: Recurrent, x: npt.ArrayLike, *, ax: Axes | None = None) -> Axes:
    """The gates of a layer over time for one sequence, with one row for each unit.

    The values are those after the activation function: from 0 to 1 after a sigmoid, from -1 to 1 after a
    tanh. The sequence begins with the initial state of the cell.

    Args:
        layer: A recurrent layer of ``fusedrnn.layers``, of any cell, of one layer and direction.
        x: (T, I) one sequence.
        ax: The Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError, ValueError: The layer has several layers or directions, its cell has no gates that are
            activated or has row scalars, or ``x`` has another shape.
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer: expected a recurrent layer of fusedrnn.layers, got {type(layer).__name__}")
    if len(layer.suffixes) != 1:
        raise ValueError(f"layer: expected one layer and direction, got {len(layer.suffixes)}")
    inputs = np.asarray(x, layer.dtype)
    if inputs.ndim != 2 or not len(inputs):
        raise ValueError(f"x: expected shape (T, I), one sequence, got {inputs.shape}")
    values = _gate_values(layer, inputs)
    if not values:
        raise ValueError(f"layer: expected a cell with gates that are activated, got {layer.cell.name}")
    (T, _), H = inputs.shape, layer.hidden_size
    ax = _axes(ax)
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("gates", [VERMILION, "#f7f7f7", BLUE])
    middles = []
    for k, gate in enumerate(values.values()):
        top = -k * (H + max(1, H // 8))
        middles.append(top - H / 2)
        place: Any = (-0.5, T - 0.5, top - H, top)
        image = ax.imshow(gate.T, colours, vmin=-1, vmax=1, extent=place, interpolation="nearest")
    ax.set(aspect="auto", xlim=(-0.5, T - 0.5), ylim=(top - H, 0))
    ax.set(xlabel="time step", ylabel="gate, a row for each unit")
    ax.set_yticks(middles, list(values))
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label="value of the gate", ticks=(-1, 0, 1)).outline.set_visible(False)
    return ax


def _gate_values(layer: Recurrent, x: Array) -> dict[str, Array]:
    """Of each gate, by name, its values (T, H), computed by the reference backend."""
    weights = {name: np.asarray(w) for name, w in layer.weights_of("").items()}
    tape: Any = kernels.forward(layer.cell, x[:, np.newaxis], weights, backend="reference").tape
    steps = [step for run in tape.tape.kept for step in run.steps]
    found: dict[str, Array] = {}
    for node in layer.cell.forward_nodes:
        names = _gates_behind(node.args) if node.op in ACTIVATIONS else set()
        if len(names) == 1:
            found.setdefault(names.pop(), np.concatenate([step.of(node) for step in steps]))
    order = [n.attribute.gate for n in layer.cell.forward_nodes if n.op == "dense"]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def _gates_behind(nodes: Sequence[Node]) -> set[str]:
    """The gates whose products these values are made of, without another activation in between."""
    found: set[str] = set()
    for node in nodes:
        if node.op == "dense":
            found.add(node.attribute.gate)
        elif node.op == "item":  # a gate out of those that were normalised together
            found |= _gates_behind([node.args[0].args[node.attribute]])
        elif node.op not in ACTIVATIONS:
            found |= _gates_behind(node.args)
    return found


@style()
def gradient_flow(gradients: Mapping[str, npt.ArrayLike] | npt.ArrayLike, *, ax: Axes | None = None) -> Axes:
    """The norm of the gradient at each step, from the last step back to the first.

    Args:
        gradients: (T, ...) the gradient of the loss with respect to the state or output of each step. Its
            2-norm over all axes except the first is drawn. Or several by name, to compare networks.
        ax: The Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    ax = _axes(ax)
    lines = []
    for name, given in _named(gradients, "").items():
        each = np.atleast_1d(as_numbers("gradients", given)).astype(np.float64)
        norms = np.linalg.norm(each.reshape(len(each), -1), axis=1)
        lines += ax.plot(np.arange(len(norms)), norms[::-1], label=name)
    ax.set_yscale("log")
    ax.margins(x=0)
    ax.set(xlabel="steps back in time", ylabel="norm of the gradient")
    _label(ax, lines)
    return ax


@style()
def errors(rows: Sequence[Row], *, ax: Axes | None = None) -> Axes:
    """The error of every output and gradient, and its limit, from the gradient check.

    The error is the largest difference from the reference in long double, relative to the largest entry, over
    all options and sizes.

    Args:
        rows: What ``fusedrnn.gradcheck_suite.run_suite`` returned.
        ax: The Axes to draw on. None: a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: There is no row that was run.
    """
    run = [row for row in summarize(rows) if row.passed is not None and row.backend != ORACLE]
    if not run:
        raise ValueError("rows: expected at least one that was run on a backend, got none")
    tensors = list(dict.fromkeys((row.cell, tensor) for row in run for tensor in row.errors))
    series: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for row in run:
        points = series.setdefault((row.isa or row.backend, row.dtype), [])
        points += [(tensors.index((row.cell, t)), e, row.limits[t]) for t, e in row.errors.items()]
    ax = _axes(ax, height=1.2 + 0.24 * len(tensors))
    for k, (names, points) in enumerate(series.items()):
        at, found, limits = np.array(points).T
        at = at + 0.15 * (k - (len(series) - 1) / 2)
        found = np.maximum(found, 1e-18)  # zero is on no logarithmic axis
        colour, marker = COLOURS[k % 4], MARKERS[(k + k // 4) % 4]
        ax.hlines(at, found, limits, color=colour, alpha=0.35, linewidth=1)
        ax.plot(limits, at, "|", color=colour, markersize=9, markeredgewidth=2)
        ax.plot(found, at, marker, color=colour, markersize=5, label=", ".join(names))
    ax.plot([], [], "|", color=GREY, markersize=9, markeredgewidth=2, label="limit")
    ax.set_xscale("log")
    several = len({cell for cell, _ in tensors}) > 1
    ax.set_yticks(range(len(tensors)), [" ".join(t) if several else t[1] for t in tensors])
    ax.invert_yaxis()
    ax.set_xlabel("largest error, relative to the largest entry")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series) + 1)
    return ax
