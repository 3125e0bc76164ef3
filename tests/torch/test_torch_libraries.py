"""Public libraries that train LSTMs of ``torch.nn``, on ours: the same losses.

``nox -s thirdparty`` installs them and runs this file; docs/third_party.md says what it found.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fusedrnn.torch  # noqa: E402

ROOT = Path(__file__).parents[2]
# The libraries' own warnings are theirs.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("openmp_pool", "one_thread")]


@pytest.fixture
def one_thread():
    """Steps as small as these wait for threads rather than gain by them where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- sb3-contrib: RecurrentPPO ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppo():
    """The example, loaded as a module."""
    pytest.importorskip("sb3_contrib", reason="nox -s thirdparty installs sb3-contrib")
    spec = importlib.util.spec_from_file_location("recurrent_ppo", ROOT / "examples/torch/recurrent_ppo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_update(ppo, variant, **options):
    """One rollout of 8 x 32 frames and two epochs of updates: the model, its rollout and its losses."""
    model = ppo.build(variant, seed=3, n_steps=32, batch_size=64, n_epochs=2, **options)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(8 * 32)
    losses = {k: v for k, v in model.logger.name_to_value.items() if "loss" in k or k == "train/approx_kl"}
    return model, before, losses


@pytest.mark.parametrize("variant", ["fusedrnn", "fusedrnn, reset", "convert"])
def test_recurrent_ppo_takes_the_same_first_steps(ppo, variant):
    """The same actions, values, losses and weights as with torch.nn, given the same seed."""
    plain, start, expected = first_update(ppo, "torch.nn")
    if variant == "convert":
        model = ppo.build("torch.nn", seed=3, n_steps=32, batch_size=64, n_epochs=2)
        report = fusedrnn.torch.convert(model.policy)
        assert report.converted == {"lstm_actor": "LSTM", "lstm_critic": "LSTM"}
        before = copy.deepcopy(model.policy.state_dict())
        model.learn(8 * 32)
        losses = {k: model.logger.name_to_value[k] for k in expected}
    else:
        model, before, losses = first_update(ppo, variant)
    assert type(model.policy.lstm_actor) is fusedrnn.torch.LSTM
    assert model.policy.lstm_actor.last_path == model.policy.lstm_critic.last_path == "fused"
    assert all(torch.equal(before[k], start[k]) for k in start)
    np.testing.assert_array_equal(model.rollout_buffer.actions, plain.rollout_buffer.actions)
    np.testing.assert_allclose(model.rollout_buffer.values, plain.rollout_buffer.values, rtol=0, atol=1e-6)
    assert set(losses) == set(expected)
    assert {"train/loss", "train/value_loss", "train/policy_gradient_loss"} <= set(losses)
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    moved = max(float((start[k] - v).abs().max()) for k, v in plain.policy.state_dict().items())
    apart = {
        k: float((v - model.policy.state_dict()[k]).abs().max()) for k, v in plain.policy.state_dict().items()
    }
    assert moved > 1e-3  # else nothing was trained
    assert max(apart.values()) < moved / 100, apart


def test_reset_cuts_where_the_time_loop_does(ppo):
    """Episodes that start within a sequence, not only at its beginning as sb3-contrib arranges them."""
    from sb3_contrib.ppo_recurrent import MlpLstmPolicy

    torch.manual_seed(0)
    lstm = fusedrnn.torch.LSTM(3, 7)
    features = torch.randn(4 * 9, 3)
    states = (torch.randn(1, 4, 7), torch.randn(1, 4, 7))
    starts = (torch.rand(4 * 9) < 0.3).float()
    assert 0 < float(starts.sum()) < 36
    found = []
    for policy in (MlpLstmPolicy, ppo.ResetPolicy):
        lstm.zero_grad()
        y, final = policy._process_sequence(features, states, starts, lstm)
        (y.square().sum() + final[0].sum() + final[1].sum()).backward()
        found.append([y, *final, *(p.grad.clone() for p in lstm.parameters())])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_recurrent_ppo_learns(ppo):
    """Without a time loop: episodes twice as long as the untrained policy's after some 20,000 frames."""
    model = ppo.build("fusedrnn, reset", seed=0, learning_rate=1e-3)
    model.learn(8 * 128)
    before = np.mean([e["l"] for e in model.ep_info_buffer])
    model.learn(20 * 8 * 128, reset_num_timesteps=False)
    assert np.mean([e["l"] for e in model.ep_info_buffer]) > 2 * before


# --- NeuralHydrology --------------------------------------------------------------------------------------

STEPS = 20  # of each of two epochs, the second at a higher learning rate


def basin(folder):
    """Rain and temperature of a made-up catchment, and its discharge, a leaky sum of the rain."""
    pandas, xarray = pytest.importorskip("pandas"), pytest.importorskip("xarray")
    rng = np.random.default_rng(0)
    days = pandas.date_range("2000-01-01", periods=1200)
    rain = rng.gamma(0.3, 8, len(days))
    heat = 10 + 10 * np.sin(2 * np.pi * np.arange(len(days)) / 365) + rng.standard_normal(len(days))
    flow = np.zeros(len(days))
    for t in range(1, len(days)):
        flow[t] = 0.95 * flow[t - 1] + 0.05 * rain[t] * (heat[t] < 22)
    (folder / "time_series").mkdir()
    data = xarray.Dataset(
        {name: ("date", values) for name, values in (("rain", rain), ("heat", heat), ("flow", flow))},
        {"date": days},
    )
    data.to_netcdf(folder / "time_series" / "made_up.nc")
    (folder / "basins.txt").write_text("made_up\n")


def hydrology(folder, variant):
    """Losses of the first steps of NeuralHydrology's own trainer, and its model."""
    from neuralhydrology.training.basetrainer import BaseTrainer
    from neuralhydrology.utils.config import Config

    cfg = Config(
        {
            "experiment_name": variant,
            "run_dir": str(folder / variant),
            "data_dir": str(folder),
            "dataset": "generic",
            **{
                f"{period}_basin_file": str(folder / "basins.txt")
                for period in ("train", "validation", "test")
            },
            "train_start_date": "01/01/2000",
            "train_end_date": "31/12/2002",
            "dynamic_inputs": ["rain", "heat"],
            "target_variables": ["flow"],
            "model": "cudalstm",
            "head": "regression",
            "output_activation": "linear",
            "hidden_size": 32,
            "initial_forget_bias": 3,
            "output_dropout": 0.4,
            "optimizer": "Adam",
            "loss": "NSE",
            "learning_rate": {0: 1e-3, 2: 1e-2},
            "batch_size": 32,
            "epochs": 2,
            "max_updates_per_epoch": STEPS,
            "clip_gradient_norm": 1,
            "predict_last_n": 60,
            "seq_length": 120,
            "num_workers": 0,
            "log_interval": 5,
            "log_tensorboard": False,
            "log_n_figures": 0,
            "save_weights_every": 1,
            "verbose": 0,
            "device": "cpu",
            "seed": 7,
        }
    )
    trainer = BaseTrainer(cfg)
    if variant == "patched":
        with fusedrnn.torch.patched():
            trainer.initialize_training()
    else:
        trainer.initialize_training()
    if variant == "convert":
        assert fusedrnn.torch.convert(trainer.model).converted == {"lstm": "LSTM"}
    losses = []
    trainer.loss_obj.register_forward_hook(lambda module, args, result: losses.append(result[0].item()))
    trainer.train_and_validate()
    return losses, trainer.model


@pytest.mark.parametrize("variant", ["convert", "patched"])
def test_neuralhydrology_trains_to_the_same_loss(tmp_path, variant):
    """Its CudaLSTM, by its own trainer, with output dropout and forget bias: the loss of every step."""
    pytest.importorskip("neuralhydrology", reason="nox -s thirdparty installs neuralhydrology")
    basin(tmp_path)
    expected, plain = hydrology(tmp_path, "plain")
    losses, model = hydrology(tmp_path, variant)
    assert type(plain.lstm) is torch.nn.LSTM
    assert model.lstm.last_path == "fused"
    assert len(losses) == len(expected) == 2 * STEPS
    np.testing.assert_allclose(losses[:STEPS], expected[:STEPS], rtol=1e-5)
    for run in (losses, expected):  # and both learn; at the higher rate rounding has parted them
        assert np.mean(run[-5:]) < np.mean(run[:5]) / 2
    (saved,) = (tmp_path / variant).rglob("model_epoch002.pt")
    plain.load_state_dict(torch.load(saved))  # what it saved loads into the plain model
