"""The programs that exist in PyTorch too: their losses, what they claim, interruption and resuming."""

import argparse
import functools
import importlib
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from example_scripts import run_example
from fusedrnn import Model, cli, no_grad, programs, terminal
from fusedrnn.layers import LSTM, Linear
from fusedrnn.optimizers import Adam
from fusedrnn.programs import (
    classify,
    common,
    continual,
    feeding_back,
    passenger_flow,
    runoff,
    simple_runoff,
    speed,
    training,
    waves,
)

EXAMPLES = Path(__file__).parents[2] / "examples" / "torch"
STEPS = 6


def run(name, *given, plots=False):
    """Returns the result, and what was reported."""
    parser = argparse.ArgumentParser()
    programs.PROGRAMS[name].add_arguments(parser)
    lines, tables = [], {}

    class Report(terminal.Report):
        def line(self, text):
            lines.append(text)

        def table(self, title, columns, rows):
            tables[title] = rows

    given += () if plots else ("--no-plot",)
    return programs.PROGRAMS[name].run(parser.parse_args(given), Report()), lines


def losses_of(trained, epochs=1):
    """Of the first steps, one by one."""
    found = []
    step = trained.step

    def noted(*batch):
        loss = step(*batch)
        found.append(float(loss.data))
        return loss

    trained.step = noted
    trained.run(epochs)
    return found[:STEPS]


@pytest.fixture
def daily(tmp_path):
    """A file of the right form, which needs no data: a slow wave, 359 days."""
    path = tmp_path / "daily.csv"
    day = np.arange(359)
    values = 90000 + 80000 * np.sin(day / 40) + np.random.default_rng(0).normal(0, 5000, 359)
    dates = np.datetime64("2022-01-07") + np.arange(359)
    rows = [f"{date},{v:.0f}" for date, v in zip(dates, values, strict=True)]
    path.write_text("\n".join(["date,reported", *rows]) + "\n")
    return path


# --- the same losses as in PyTorch ------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch):
    """Imports an example whose Adam is ours: eps stands elsewhere in PyTorch's, and so is made negligible."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.setattr(torch.optim, "Adam", functools.partial(torch.optim.Adam, eps=1e-16))
    for module in (passenger_flow, feeding_back, waves, classify, continual):
        monkeypatch.setattr(module, "Adam", functools.partial(Adam, eps=1e-16))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.from_numpy(np.random.permutation(n)))
    return importlib.import_module


def twin(theirs, ours):
    """Gives ours the weights of PyTorch's model, whose second bias stays zero from here on."""
    import torch

    arrays = {}
    for name, p in theirs.named_parameters():
        layer, _, weight = name.rpartition(".")
        layer = {"head.0": "hidden", "head.2": "out"}.get(layer, layer)
        if "bias_hh" in name:
            torch.nn.init.zeros_(p).requires_grad_(False)
        elif layer in ("lstm", "rnn"):
            key = layer if hasattr(ours, layer) else "rnn"
            single = f"{weight.removesuffix('_l0')}" if ours.__dict__[key].num_layers == 1 else weight
            arrays[f"{key}/{single}"] = p.detach().numpy().copy()
        else:
            arrays[f"{layer}/{'W' if weight == 'weight' else 'b'}"] = p.detach().numpy().T.copy()
    ours.assign_weights(arrays, "PyTorch")
    return theirs


def test_the_first_losses_are_those_of_pytorch(example, monkeypatch, daily, capsys):
    import torch

    found, expected = {}, {}

    def theirs(name, model, *arguments, epochs=1):
        """The losses of an example's train(args, ...), on a model of PyTorch's."""
        module = example(name)
        monkeypatch.setattr(module, "build", lambda layers: twin(module.Net(LSTMS[name]), model))
        given = ["x"] if name == "feeding_back" else []
        args = module.arguments().parse_args([*given, "--epochs", str(epochs), "--layers", "torch"])
        np.random.seed(1)
        tensors = [torch.from_numpy(np.asarray(a)) if isinstance(a, np.ndarray) else a for a in arguments]
        expected[name] = module.train(args, *tensors)[1][:STEPS]
        np.random.seed(1)

    LSTMS = dict.fromkeys(("passenger_flow", "feeding_back", "classify", "continual"), torch.nn.LSTM)
    LSTMS["waves"] = torch.nn.RNN

    x, y = common.windows(np.sin(np.arange(60.0, dtype=np.float32)), passenger_flow.WINDOW)
    x, y, model = x[:, np.newaxis].copy(), y.reshape(-1, 1, 1).copy(), passenger_flow.build()
    theirs("passenger_flow", model, x, y, STEPS, 1e-2)
    found["passenger_flow"] = passenger_flow.train(model, x, y, STEPS, 1e-2)

    x, y = waves.data("combined", 50 + 32 * STEPS)
    model = waves.build()
    theirs("waves", model, x.copy(), y.copy())
    found["waves"] = losses_of(waves.prepare(model, x, y))

    part, model = classify.draw(64 * STEPS), classify.build()
    lengths, process = part.label.T
    module = example("classify")
    monkeypatch.setattr(module, "validate", lambda *data: 0.0)
    some = tuple(map(torch.from_numpy, (part.data, lengths.copy(), process.copy())))
    theirs("classify", model, some, some)
    found["classify"] = losses_of(classify.prepare(model, part, part, 9))

    z = feeding_back.read(str(daily))
    z = (z - z.mean()) / z.std()
    model, module = feeding_back.Net(), example("feeding_back")
    np.random.seed(1)
    some = [a[..., ::20, :] if a.ndim == 3 else a[::20] for a in feeding_back.draw_sequences(z)]
    monkeypatch.setattr(feeding_back, "draw_sequences", lambda z: some)
    monkeypatch.setattr(module, "draw_sequences", lambda z: [torch.from_numpy(a.copy()) for a in some])
    theirs("feeding_back", model, torch.from_numpy(z), "5", epochs=STEPS)
    found["feeding_back"] = losses_of(feeding_back.prepare(model, z, curve="5"), epochs=STEPS)

    module, model = example("continual"), continual.build()
    parts = continual.draw(25, 64 * 12)[:2]
    ours = twin(module.Net(torch.nn.LSTM), model)
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=0.01)
    np.random.seed(1)
    some = [tuple(torch.from_numpy(a.copy()) for a in (p.data, p.label)) for p in parts]
    expected["continual"] = module.train(ours, optimizer, *some, 1)[:STEPS]
    np.random.seed(1)
    found["continual"] = losses_of(continual.prepare(model, continual.Adam(0.01), *parts))

    for name, losses in expected.items():
        assert len(losses) == STEPS
        assert losses[-1] != losses[0]
        assert found[name] == pytest.approx(losses, rel=1e-5, abs=0), name


# --- what they claim --------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        ("passenger-flow", ["--epochs", "20"], "does not beat: naive: as last month"),
        ("waves", ["--epochs", "2"], "RNN beats all others."),
        ("classify", ["--epochs", "2", "--size", "400"], "LSTM does not beat: likelihood ratio"),
        ("continual", ["--epochs", "4", "--size", "300"], "By new data, LSTM, after "),
    ],
)
def test_programs_run_and_say_where_they_lose(name, given, line, tmp_path):
    result, lines = run(name, *given, "--out", str(tmp_path))
    assert any(line in said for said in lines), lines
    assert len(result.losses) == int(given[1]) * (1.25 if name == "continual" else 1)
    assert result.losses[-1] < result.losses[0]


@pytest.mark.quick
def test_feeding_back(daily, monkeypatch):
    result, lines = run("feeding-back", "--data", str(daily), "--epochs", "2")
    assert "in all" in lines[0]
    assert lines[0].split()[-1] == "601"  # PyTorch's 641 without its second bias of 40
    assert any("days again" in line for line in lines)
    z = np.sin(np.arange(150) / 20)
    carried = feeding_back.feed_back(result.model, z, 20)
    again = feeding_back.feed_back_recomputing(result.model, z, 20)
    np.testing.assert_allclose(carried, again, rtol=0, atol=2e-6)
    assert carried.std() > 0


@pytest.mark.quick
def test_a_forecast_that_diverges_is_told(daily, monkeypatch):
    known = np.array([0.5, 0.0, 1.0])
    assert feeding_back.far_off(np.array([2.0, -1.0]), known) == ""
    said = feeding_back.far_off(np.array([2.0, -1.5, 9.0]), known)
    assert said == "Fed back, the forecast diverges: day 2 is -1.5, all known days are from 0 to 1."
    _, lines = run("feeding-back", "--data", str(daily), "--epochs", "0")
    assert not any("diverges" in line for line in lines)
    monkeypatch.setattr(feeding_back, "feed_back", lambda model, known, steps: np.arange(steps))
    _, lines = run("feeding-back", "--data", str(daily), "--epochs", "0")
    assert sum("diverges: day " in line for line in lines) == 2


def test_each_draws_its_plot(daily, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    for name, *given in (
        ("passenger-flow", "--epochs", "4"),
        ("waves", "--epochs", "1"),
        ("classify", "--epochs", "2", "--size", "40"),
        ("continual", "--epochs", "4", "--size", "40"),
        ("feeding-back", "--epochs", "1", "--data", str(daily)),
    ):
        _, lines = run(name, *given, "--out", str(tmp_path), plots=True)
        assert f"plot: {tmp_path / name}.png" in lines
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.quick
def test_padding_and_lengths_are_the_same_on_the_valid_days():
    z = np.sin(np.arange(359) / 40)
    np.random.seed(0)
    model = feeding_back.Net()
    losses, gradients = [], []
    for use_lengths in (False, True):
        np.random.seed(1)
        trained = feeding_back.prepare(model, z, curve="5", over="valid", use_lengths=use_lengths)
        loss = trained.step()
        model.cleargrads()
        loss.backward()
        losses.append(float(loss.data))
        gradients.append([p.grad.data for p in model.params()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max())
    np.random.seed(1)
    x, t, lengths, begins = feeding_back.draw_sequences(z)
    valid = np.arange(99)[:, np.newaxis] < lengths
    model.reset_state()
    with no_grad():
        y = model(x, lengths).data
    weight = np.tanh(5 * ((begins + np.arange(99)[:, np.newaxis]) / 250 - 1)) + 1
    assert losses[0] != pytest.approx(((y - t)[valid] ** 2).mean(), rel=1e-3)
    expected = (weight[valid] * ((y - t)[valid] ** 2)[:, 0]).sum() / lengths.sum()
    assert losses[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.quick
def test_waves_start_as_published():
    np.random.seed(0)
    model = waves.build()
    assert not model.rnn.bias_ih.data.any()
    assert not model.fc.b.data.any()
    for weight, bound in ((model.rnn.weight_ih, 0.177), (model.rnn.weight_hh, 0.177), (model.fc.W, 1.0)):
        assert 0.8 * bound < np.abs(weight.data).max() <= bound
    assert len(waves.data("combined", 1000)[0]) == 950


@pytest.mark.quick
def test_scores_of_a_classifier():
    found = classify.scores(np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1]))
    assert found == {
        "accuracy": pytest.approx(0.6),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "F1": pytest.approx(2 / 3),
    }


# --- the same in one file each, as a reader would copy it ------------------------------------------------

MSE = ["MSE"]
ALL = ["accuracy", "precision", "recall", "F1"]
BOTH = ["old data", "new data"]
PERSISTENCE = "persistence: the last value again"
PRINTED = {  # the options of the program, and which of its scores the script prints
    "passenger_flow": ([], dict.fromkeys((passenger_flow.RECIPE, passenger_flow.GROWTH), MSE)),
    "feeding_back": (
        ["--over", "valid", "--lengths"],
        {"LSTM": ["MSE", "60 days beyond"], "holding the last known day": MSE},
    ),
    "waves": ([], {"RNN": MSE, PERSISTENCE: MSE}),
    "classify": ([], {"LSTM": ALL, "always process 1": ALL}),
    "continual": ([], dict.fromkeys(("LSTM, before", "LSTM, after", PERSISTENCE), BOTH)),
}


@pytest.mark.parametrize("name", PRINTED)
def test_examples_find_what_the_programs_find(name, daily, tmp_path, monkeypatch, capsys):
    if name == "classify":
        pytest.importorskip("sklearn", reason="the extra 'examples' is not installed")
    data = [str(daily)] if name == "feeding_back" else []
    epochs = 1 if name == "classify" else 4  # of thousands of sequences
    monkeypatch.chdir(tmp_path)
    run_example(monkeypatch, name, epochs, *data)
    printed = np.array([float(number) for number in re.findall(r"-?\d+\.?\d*", capsys.readouterr().out)])
    given, rows = PRINTED[name]
    options = [*given, *(["--data", *data] if data else [])]
    result, _ = run(name.replace("_", "-"), *options, "--epochs", str(epochs))
    for row, scores in rows.items():
        for score in scores:
            expected = result.scores[row][score]
            assert np.isclose(printed, expected, rtol=1e-4, atol=6e-5).any(), (row, score, expected)


# --- training: early stopping, interruption, resuming -----------------------------------------------------


@pytest.mark.quick
def test_the_best_model_is_kept_and_training_stops_early(tmp_path):
    """Also where it was resumed after the best epoch."""
    part = classify.draw(64)
    validation = iter([0.5, 0.4, 0.6, 0.7, 0.8, 0.1])
    weights = []
    for epochs in (3, 9):
        trained = classify.prepare(classify.build(), part, part, patience=3, path=tmp_path / "c")
        if epochs == 9:
            trained.resume()

        def validate(model=trained.model):
            weights.append({name: p.data.copy() for name, p in model.named_params()})
            return next(validation)

        trained.validate = validate
        trained.run(epochs)
    assert len(weights) == 5
    trained.keep_best()
    for name, p in trained.model.named_params():
        np.testing.assert_array_equal(p.data, weights[1][name])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "step"), [("classify", 6), ("continual", 5), ("feeding-back", 3), ("runoff", 5)]
)
def test_interrupted_and_resumed_to_the_same_bits(name, step, daily, tmp_path, monkeypatch, capsys):
    """Ctrl-C at this step, where an epoch has several in the middle of one."""
    given = ["--epochs", "4"]
    given += {"classify": ["--size", "200"], "continual": ["--size", "150"]}.get(name, [])
    if name == "runoff":
        given += ["--catchments", "4"]
        for setting in ((runoff, "TRAINING", 2), (simple_runoff, "ROUNDS", 1), (speed, "TIMED", 1)):
            monkeypatch.setattr(*setting)
    given += ["--data", str(daily)] if name == "feeding-back" else []

    def start(folder, *more):
        out = tmp_path / folder
        command = ["train", name, *given, "--out", str(out), "--checkpoint", str(out / "c"), "--no-plot"]
        return cli.main([*command, *more]), capsys.readouterr()

    assert start("whole")[0] == 0
    backward, steps = training.Variable.backward, [0]

    def interrupting(self, *args, **options):
        steps[0] += 1
        if steps[0] == step:
            signal.raise_signal(signal.SIGINT)
        return backward(self, *args, **options)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(training.Variable, "backward", interrupting)
            code, printed = start("stopped")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert printed.err.startswith("interrupted after epoch ")
    assert printed.err.endswith(f"saved in {tmp_path / 'stopped' / 'c'}, --resume goes on\n")
    assert steps[0] == step
    code, printed = start("stopped", "--resume")
    assert code == 0, printed.err
    assert "resumed from" in printed.out
    for end in ("c", "c.new") if name == "continual" else ("c",):
        a, b = (np.load(tmp_path / folder / end) for folder in ("whole", "stopped"))
        with a, b:
            assert a.files == b.files
            for entry in a.files:
                assert a[entry].tobytes() == b[entry].tobytes(), entry


@pytest.mark.quick
def test_wrong_checkpoints_and_files_are_one_line(daily, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FUSEDRNN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    trained = ["--checkpoint", "c", "--no-plot", "--epochs", "1"]

    def fails(*command):
        try:
            code = cli.main(["train", *command])
        except SystemExit as stop:  # of the parser
            code = stop.code
        assert code == cli.USAGE
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert cli.main(["train", "waves", *trained]) == 0
    before = Path("c").read_bytes()
    assert "saved with wave combined, expected sine" in fails("waves", *trained, "--resume", "--wave", "sine")
    assert "saved with seed 0, expected 1" in fails("waves", *trained, "--resume", "--seed", "1")
    assert "c cannot be loaded" in fails("classify", *trained, "--resume", "--size", "99")
    assert Path("c").read_bytes() == before
    Path("c").write_bytes(before[: len(before) // 2])
    assert "c cannot be loaded: c: not an .npz file" in fails("waves", *trained, "--resume")
    assert "c exists: --resume continues from it" in fails("classify", *trained, "--size", "99")
    assert "--resume needs --checkpoint" in fails("waves", "--resume", "--no-plot")
    assert "--every needs --checkpoint" in fails("waves", "--every", "0", "--no-plot")
    assert "--checkpoint: expected a file, got the folder '.'" in fails("waves", "--checkpoint", ".")
    assert "--out: expected a folder to write to, got 'c'" in fails("sine", "--out", "c")
    assert cli.main(["train", "waves", "--checkpoint", "new/d", *trained[2:], "--resume"]) == 0
    assert "there is no new/d yet: starting from the beginning" in capsys.readouterr().out
    assert "expected a file, got the folder ." in fails("feeding-back", "--data", ".")

    assert "no data file. The data are those of" in fails("feeding-back")
    assert "there is no file none.csv" in fails("feeding-back", "--data", "none.csv")
    text = daily.read_text()
    for change, words in (
        (text.replace("reported", "results"), "daily.csv: expected each of the columns date, reported once"),
        (text.replace("01-14,", "01-14,nan\n"), "line 9, column reported: expected a finite number"),
        (text.replace("01-14,", "01-14,x"), "line 9, column reported: expected a number"),
        ("\n".join(text.split("\n")[:200]), "expected at least 350 rows"),
        ("", "expected each of the columns date, reported once"),
    ):
        daily.write_text(change)
        assert words in fails("feeding-back", "--data", str(daily))
    assert "--lengths: expected --over valid" in fails("feeding-back", "--lengths")


@pytest.mark.quick
def test_summary():
    class Net(Model):
        def __init__(self):
            super().__init__()
            self.rnn = LSTM(3, in_size=2)
            self.fc = Linear(1)

    lines = Net().summary().splitlines()
    assert lines[1].split() == ["rnn/weight_ih", "(12,", "2)", "24"]
    assert lines[4].split() == ["fc/W", "at", "the", "first", "call", "?"]
    assert lines[-1].split() == ["in", "all", "73"]
