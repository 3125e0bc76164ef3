"""Losses and gradients that are not finite: who says so, and that all stays as it was."""

from __future__ import annotations

import numpy as np
import pytest

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import Variable, cli, models, optimizers
from fusedrnn.dataloaders import DataLoader
from fusedrnn.datasets import Series
from fusedrnn.programs import waves
from fusedrnn.programs.training import Training

pytestmark = pytest.mark.quick


def arrays(model):
    return {name: p.data.copy() for name, p in model.named_params()}


def assert_same(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("kind", [optimizers.SGD, optimizers.Adam])
def test_an_update_names_the_first_gradient_that_is_not_finite_and_changes_nothing(kind, options):
    model = models.Sequential(L.Linear(3, in_size=2), L.LSTM(4, in_size=3))
    optimizer = kind(0.01, **options).setup(model)
    x = np.ones((5, 2, 2), np.float32)
    for value in (1.0, np.nan):
        x[2, 0, 1] = value
        model.reset_state()
        loss = F.mean_squared_error(model(x), np.zeros((5, 2, 4)))
        model.cleargrads()
        loss.backward()
        if value == 1:
            optimizer.update()
    before, state = arrays(model), optimizer.state()
    words = "^update: expected a finite gradient of l0/W, got 6 of 6 values that are not; no parameter has"
    with pytest.raises(FloatingPointError, match=words):
        optimizer.update()
    assert_same(before, arrays(model))
    assert_same(state, optimizer.state())
    assert optimizer.t == 1


def test_large_finite_gradients_are_no_error():
    layer = L.Linear(2, in_size=2, nobias=True)
    layer.W.grad = Variable(np.full((2, 2), 3e38, np.float32))  # their sum is not finite in float32
    before = layer.W.data.copy()
    optimizers.SGD(1e-37).setup(layer).update()
    np.testing.assert_allclose(before - layer.W.data, 30, rtol=1e-6)


def training(path, spoil=None, **options):
    """Five steps an epoch, of which ``spoil`` changes the loss of the eighth."""
    np.random.seed(0)
    x = np.random.randn(50, 2).astype(np.float32)
    model = models.Sequential(L.Linear(1, in_size=2))
    steps = []

    def step(x, t):
        loss = F.mean_squared_error(model(x), t)
        steps.append(arrays(model))
        return spoil(loss) if spoil and len(steps) == 8 else loss

    loader = DataLoader(Series(x, x[:, :1]), 10)
    return Training(model, optimizers.Adam(0.01), step, loader, path=path, every=0, **options), steps


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda loss: loss * np.float32(np.nan), "expected a finite loss, got nan"),
        (lambda loss: loss * np.float32(np.inf), "expected a finite loss, got inf"),
        (lambda loss: loss + (loss * 0) ** 0.5, "update: expected a finite gradient of l0/W, got 2 of 2"),
    ],
    ids=["loss", "overflow", "gradient"],
)
def test_a_training_stops_and_keeps_its_last_checkpoint(tmp_path, spoil, words):
    trained, steps = training(tmp_path / "c", spoil)
    with pytest.raises(FloatingPointError, match=rf"^after epoch 1: {words}.*; the last checkpoint is .*c$"):
        trained.run(3)
    assert len(steps) == 8
    assert_same(steps[-1], arrays(trained.model))
    again, _ = training(tmp_path / "c")
    again.resume()
    assert_same(steps[-1], arrays(again.model))
    assert again.optimizer.t == 7


def test_a_validation_loss_that_is_not_finite_is_never_the_best(tmp_path):
    trained, _ = training(None, validate=iter([0.5, np.nan]).__next__)
    words = "^after epoch 2: expected a finite validation loss, got nan; there is no checkpoint$"
    with pytest.raises(FloatingPointError, match=words):
        trained.run(3)
    assert trained.best
    assert trained.validation == [0.5]


def test_a_program_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    data = waves.data

    def spoiled(wave, n):
        x, t = data(wave, n)
        t[100] = np.nan
        return x, t

    monkeypatch.setattr(waves, "data", spoiled)
    files = ["--out", str(tmp_path), "--checkpoint", str(tmp_path / "c")]
    assert cli.main(["train", "waves", "--epochs", "2", "--no-plot", *files]) == 1
    err = capsys.readouterr().err
    assert err == "fusedrnn train: after epoch 0: expected a finite loss, got nan; there is no checkpoint\n"
    assert list(tmp_path.iterdir()) == []
