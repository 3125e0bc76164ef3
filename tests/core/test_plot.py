"""fusedrnn.plot: what is drawn is what was given. How it looks: docs/pictures.py."""

import sys

import numpy as np
import pytest

from fusedrnn import layers, plot
from fusedrnn.cells import cell
from fusedrnn.gradcheck.tables import Row


@pytest.fixture
def ax():
    figure = pytest.importorskip("matplotlib.figure", reason="the extra 'plot' is not installed")
    return figure.Figure().add_subplot()


def drawn(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"fusedrnn\.plot needs Matplotlib: pip install 'fusedrnn\[plot\]'"):
        plot.losses([1, 2])


def test_losses(ax):
    assert plot.losses({"training": [8, 2, 1], "validation": [3, 3]}, changes={"new": 2}, ax=ax) is ax
    assert drawn(ax)["training"] == [[1, 8], [2, 2], [3, 1]]
    assert drawn(ax)["validation"] == [[1, 3], [2, 3]]
    assert ax.lines[2].get_xdata()[0] == 2.5
    names = [text.get_text().strip() for text in ax.texts]
    assert {"training", "validation", "new"} <= set(names)


@pytest.mark.parametrize(
    ("history", "scale"), [([9, 1, np.nan], "log"), ([2, 1], "linear"), ([9, -1], "linear")]
)
def test_losses_that_differ_much_are_on_a_logarithmic_axis(ax, history, scale):
    plot.losses(history, ax=ax)
    assert ax.get_yscale() == scale
    assert not ax.texts  # one curve needs no name


@pytest.mark.parametrize("ends", [(1.01, 1.02, 3), (2.98, 2.99, 3)], ids=str)
def test_labels_are_apart_and_in_the_order_of_their_lines(ax, ends):
    """At the bottom and at the top."""
    plot.losses({name: [1, end] for name, end in zip("bac", ends, strict=True)}, ax=ax)
    b, a, c = sorted(text.xy[1] for text in ax.texts)
    assert {text.get_text(): text.xy[1] for text in ax.texts} == {"b": b, "a": a, "c": c}
    assert 0 < b < b + 0.999 * plot.LINE_OF_TEXT < a < a + 0.999 * plot.LINE_OF_TEXT < c < 1


def test_forecasts_belong_to_the_last_steps(ax):
    plot.forecast([5, 6, 7, 8], {"LSTM": np.array([[1], [2]])}, test=2, x=[10, 20, 30, 40], ax=ax)
    assert drawn(ax)["truth"] == [[10, 5], [20, 6], [30, 7], [40, 8]]
    assert drawn(ax)["LSTM"] == [[30, 1], [40, 2]]
    assert ax.lines[2].get_xdata()[0] == 25
    with pytest.raises(
        ValueError, match="predictions: expected at most 2 steps, as truth has, got 3 of LSTM"
    ):
        plot.forecast([1, 2], {"LSTM": [1, 2, 3]}, ax=ax)
    with pytest.raises(ValueError, match="test: expected a step from 0 to 1, got 2"):
        plot.forecast([1, 2], [1], test=2, ax=ax)
    with pytest.raises(ValueError, match="x: expected 2 numbers, as truth has, got 1"):
        plot.forecast([1, 2], [1], x=[1], ax=ax)


def images(ax):
    return {t.get_text(): i.get_array().T for t, i in zip(ax.get_yticklabels(), ax.images, strict=True)}


@pytest.mark.parametrize("options", [{}, {"reset_after": False}, {"layer_norm": True}], ids=str)
def test_gates_give_the_states(ax, options):
    """The candidate and the gates of a GRU, put together again, are its outputs."""
    layer = layers.GRU(3, 2, **options)
    x = np.random.default_rng(0).standard_normal((7, 2))
    g = images(plot.gates(layer, x, ax=ax))
    assert list(g) == ["r", "z", "n"]
    h = np.zeros(3)
    for t, y in enumerate(layer(x[:, np.newaxis]).data[:, 0]):
        h = g["n"][t] + g["z"][t] * (h - g["n"][t])
        np.testing.assert_allclose(h, y, rtol=0, atol=1e-6)


def test_gates_of_other_layers(ax):
    x = np.ones((4, 2))
    assert list(images(plot.gates(layers.LSTM(3, 2), x, ax=ax))) == ["i", "f", "g", "o"]
    with pytest.raises(ValueError, match="layer: expected one layer and direction, got 2"):
        plot.gates(layers.LSTM(3, 2, num_layers=2), x, ax=ax)
    with pytest.raises(ValueError, match=r"x: expected shape \(T, I\), one sequence, got \(4,\)"):
        plot.gates(layers.LSTM(3, 2), np.ones(4), ax=ax)

    @cell
    def linear(p, x, h):
        return p.dense("a", x, h)

    with pytest.raises(ValueError, match="layer: expected a cell with gates that are activated, got linear"):
        plot.gates(layers.Recurrent(linear, 3, 2), x, ax=ax)


def test_gradient_flow_goes_back_in_time(ax):
    plot.gradient_flow({"RNN": np.array([[[3.0, 4.0]], [[0.0, 1.0]]])}, ax=ax)
    assert drawn(ax)["RNN"] == [[0, 1], [1, 5]]


def test_errors_are_the_largest_of_the_options(ax):
    def row(option, error, passed=True, backend="cpu"):
        figures = {"y": error, "dx": 0.0}
        return Row(
            "lstm", backend, "", "float32", option, figures, figures, {"y": 1e-6, "dx": 1e-6}, passed, 0
        )

    rows = [row("a", 1e-8), row("b", 3e-8), row("c", 1.0, None), row("d", 1.0, backend="oracle")]
    plot.errors(rows, ax=ax)
    assert drawn(ax)["cpu, float32"] == [[3e-8, 0], [1e-18, 1]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["y", "dx"]
    with pytest.raises(ValueError, match="rows: expected at least one that was run on a backend, got none"):
        plot.errors(rows[3:], ax=ax)
