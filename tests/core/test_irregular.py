"""The example of irregularly sampled series: that it runs, and that its baselines are what they say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def series(monkeypatch):
    """What both scripts share, as they import it."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("irregular_series")


def script(path):
    """The native script and the one in PyTorch have the same name."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def file(series, monkeypatch, tmp_path):
    """Where what was found of few held-out series goes."""
    monkeypatch.setattr(series, "TEST", 16)
    return tmp_path / "found.json"


@pytest.mark.quick
def test_the_script_runs(series, file, capsys):
    script("examples/irregular.py").main(
        ["--seeds", "1", "--epochs", "2", "--series", "80", "--json", str(file)]
    )
    check(series, file, capsys.readouterr().out)


def test_the_script_in_pytorch_runs(series, file, capsys):
    pytest.importorskip("torch", reason="needs PyTorch")
    args = ["--seeds", "1", "--epochs", "2", "--series", "80", "--json", str(file)]
    series.compare(script("examples/torch/irregular.py").train, series.arguments("").parse_args(args))
    check(series, file, capsys.readouterr().out)


def check(series, file, printed):
    """What a run of one seed and two epochs wrote and printed."""
    found = json.loads(file.read_text())
    assert list(found["networks"]) == list(series.NETWORKS)
    for name, network in found["networks"].items():
        (run,) = network["runs"]
        assert len(run["losses"]) == 2
        assert f"{name:46} RMSE {run['rmse']:.4f}" in printed


def test_both_scripts_compute_the_same(series):
    """Loss and gradients, from the same weights and batch, to eps times the number of terms of a sum."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    native, other = script("examples/irregular.py"), script("examples/torch/irregular.py")
    drawn = series.draw(4, seed=3)
    for name, (cell, gap_is_input) in series.NETWORKS.items():
        x, gaps, target = series.inputs(*drawn, gap_is_input)
        ours, theirs = native.Net(cell, x.shape[2]), other.Net(cell, x.shape[2])
        pairs = {"fc.weight": ours.fc.W, "fc.bias": ours.fc.b}
        pairs |= {f"rnn.{b}_l0": getattr(ours.rnn, b) for b in cell.blocks}
        with torch.no_grad():
            for key, p in theirs.named_parameters():
                if pairs[key] is None:  # the second of two biases that are always added
                    p.zero_()
                else:
                    pairs[key].assign(p.numpy().T.copy() if key == "fc.weight" else p.numpy().copy())
        loss = native.loss_of(ours, x, gaps, target)
        loss.backward()
        expected = other.loss_of(theirs, *map(torch.from_numpy, (x, gaps, target)))
        expected.backward()
        assert theirs.rnn.last_path == "fused"
        eps = float(np.finfo(np.float32).eps) * gaps.size
        assert float(loss) == pytest.approx(expected.item(), rel=eps), name
        for key, p in theirs.named_parameters():
            if pairs[key] is not None:
                found, grad = pairs[key].grad.data, p.grad.numpy()
                found = found.T if key == "fc.weight" else found
                np.testing.assert_allclose(
                    found, grad, rtol=0, atol=eps * abs(grad).max(), err_msg=name + key
                )


def test_the_picture(series, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    native = script("examples/irregular.py")
    found = json.loads((ROOT / "bench/results/irregular.json").read_text())
    values, gaps = series.draw(1, seed=3)
    native.plot(tmp_path / "a.png", found, values, gaps, dict.fromkeys(series.NETWORKS, values[:-1]))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.quick
def test_the_filter_is_the_conditional_mean(series):
    """Of a Gaussian process with the covariance of the three processes, solved with the whole matrix."""
    values, gaps = series.draw(2, seed=3)
    predictions = series.kalman_filter(values, gaps)
    for b in range(2):
        time = np.concatenate([[0], gaps[:, b].cumsum()])
        apart = abs(time[:, None] - time)[:, :, None]
        covariance = (
            np.exp(-apart / series.TAU) * np.cos(2 * np.pi * apart / series.PERIOD) @ series.AMPLITUDE**2
        )
        noisy = covariance + series.NOISE**2 * np.eye(len(time))
        for t in range(1, len(time)):
            expected = covariance[t, :t] @ np.linalg.solve(noisy[:t, :t], values[:t, b])
            assert predictions[t - 1, b] == pytest.approx(expected, rel=0, abs=1e-10)


def test_the_series_have_that_covariance(series):
    values, gaps = series.draw(10_000, seed=4)
    dt = gaps[0]
    far = dt > np.median(dt)
    expected = np.exp(-dt[:, None] / series.TAU) * np.cos(2 * np.pi * dt[:, None] / series.PERIOD)
    error = values[0] * values[1] - expected @ series.AMPLITUDE**2
    for some in (far, ~far):
        assert abs(error[some].mean()) < 4 * error[some].std() / some.sum() ** 0.5
    variance = (series.AMPLITUDE**2).sum() + series.NOISE**2
    assert values[-1].var() == pytest.approx(variance, rel=4 * (2 / len(dt)) ** 0.5)


def test_no_forecast_sees_what_it_predicts(series):
    training, (values, gaps) = series.draw(64, seed=1), series.draw(4, seed=2)
    later, later_gaps = values.copy(), gaps.copy()
    later[31:], later_gaps[31:] = 9, 9
    for forecast in (series.kalman_filter, lambda *given: series.linear_regression(training, *given)):
        before, after = forecast(values, gaps), forecast(later, later_gaps)
        np.testing.assert_array_equal(after[:31], before[:31])
        assert (after[31] != before[31]).all()


def test_the_page_shows_the_cell_of_the_examples():
    page = (ROOT / "docs" / "irregular.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code in (ROOT / "examples" / "irregular_series.py").read_text()
