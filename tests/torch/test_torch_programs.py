"""The programs of examples/torch: the losses of plain PyTorch step by step, and what they claim."""

from __future__ import annotations

import importlib
import math
import os
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

EXAMPLES = Path(__file__).parents[2] / "examples" / "torch"
STEPS = 20


@pytest.fixture(autouse=True)
def no_fallbacks(threads):
    """A layer that ran PyTorch's own kernels would agree with them; ``threads`` puts the thread pool back."""
    import fusedrnn.torch

    fusedrnn.torch.set_fallback_errors(True)
    yield
    fusedrnn.torch.set_fallback_errors(False)


@pytest.fixture
def example(monkeypatch):
    """Imports one, as it is when it runs from its folder."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return importlib.import_module


@pytest.fixture
def wordle():
    folder = os.environ.get("FUSEDRNN_DATA")
    if not folder:
        pytest.skip("FUSEDRNN_DATA is not set: the folder with wordle_reported_2022.csv")
    return str(Path(folder) / "wordle_reported_2022.csv")


def side_by_side(module, *arguments):
    """What program() gives with PyTorch's layers and with ours: the losses of both."""
    found = []
    for layers in ("torch", "fusedrnn"):
        losses, *_ = module.program(module.arguments().parse_args([*arguments, "--layers", layers]))
        found.append(losses)
    return found


# PROGRAMS: arguments for a little more than 20 steps
PROGRAMS = {
    "passenger_flow": ["--epochs", "20"],
    "waves": ["--epochs", "1"],
    "classify": ["--epochs", "1", "--size", "1400"],
    "continual": ["--epochs", "2", "--size", "1000"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_losses_are_those_of_pytorch(example, name, capsys):
    theirs, ours = side_by_side(example(name), *PROGRAMS[name])
    assert len(ours) >= STEPS
    assert ours[:STEPS] == pytest.approx(theirs[:STEPS], rel=1e-5, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--over", "valid", "--ragged", "packed"], ["--forgetting", "5"]])
def test_the_losses_of_feeding_back_are_those_of_pytorch(example, wordle, options, capsys):
    theirs, ours = side_by_side(example("feeding_back"), wordle, "--epochs", str(STEPS), *options)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=0)


def test_compare_prints_both(example, capsys):
    waves = example("waves")
    example("side_by_side").main(waves.arguments().parse_args(["--compare", "--epochs", "1"]), waves.program)
    printed = capsys.readouterr().out
    assert "--- torch" in printed
    assert "--- fusedrnn" in printed
    assert "largest relative difference: first 20 steps" in printed
    assert "times as fast" in printed


# --- feeding back ------------------------------------------------------------------------------------------


@pytest.fixture
def series():
    """Looks like the daily counts, for what needs no data file."""
    day = torch.arange(359.0)
    return torch.sin(day / 40) + 0.1 * torch.randn(359, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layers", ["torch", "fusedrnn"])
def test_a_carried_state_gives_what_recomputing_the_prefix_gives(example, series, layers):
    program = example("feeding_back")
    torch.manual_seed(1)
    model = program.build(layers).double()
    known = series[:100].double()
    carried = program.feed_back(model, known, 30)
    torch.testing.assert_close(carried, program.feed_back_recomputing(model, known, 30), rtol=0, atol=1e-12)
    assert carried.std() > 0


def test_padding_a_packed_sequence_and_lengths_give_the_same_on_the_valid_steps(example, series):
    program = example("feeding_back")
    torch.manual_seed(1)
    x, y, lengths, _ = program.draw_sequences(series.double())
    valid = torch.arange(len(x))[:, None] < lengths
    assert lengths.min() == 0
    found = {}
    for layers, ragged in (("torch", "packed"), *(("fusedrnn", r) for r in ("padded", "packed", "lengths"))):
        torch.manual_seed(2)
        model = program.build(layers).double()
        error = program.outputs(model, x, lengths, ragged) - y
        (error.square()[valid].mean()).backward()
        found[layers, ragged] = error.detach()[valid], [p.grad for p in model.parameters()]
    expected = found.pop(("torch", "packed"))
    for values in found.values():
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


def test_a_step_is_weighted_by_its_day(example):
    program = example("feeding_back")
    begins = torch.tensor([0, 130])
    assert program.forgetting("2", begins)[20, 1].item() == pytest.approx(math.tanh(2 * (150 / 250 - 1)) + 1)
    assert program.forgetting("e", begins)[0, 0] == 0
    assert (program.forgetting("none", begins) == 1).all()


def test_641_parameters(example):
    assert sum(p.numel() for p in example("feeding_back").build("fusedrnn").parameters()) == 641


def test_a_missing_data_file_is_a_clear_message(example):
    with pytest.raises(SystemExit, match="there is no file nowhere"):
        example("feeding_back").read("nowhere.csv")


# --- the others --------------------------------------------------------------------------------------------


def test_one_bias(example, capsys):
    waves = example("waves")
    x, y = waves.windows("combined", 1000)
    model, _, _ = waves.train(waves.arguments().parse_args(["--epochs", "1"]), x[:64], y[:64])
    assert (model.rnn.bias_hh_l0 == 0).all()
    assert (model.rnn.bias_ih_l0 != 0).all()
    assert len(x) == 950


def test_the_best_model_is_kept_and_training_stops_early(example, capsys):
    classify = example("classify")
    torch.manual_seed(0)
    training, validation = classify.draw(128), classify.draw(64)
    losses = iter([0.5, 0.4, 0.6, 0.7, 0.8])
    states = []

    def validate(model, *data):
        states.append({name: w.clone() for name, w in model.state_dict().items()})
        return next(losses)

    before, classify.validate = classify.validate, validate
    try:
        args = classify.arguments().parse_args(["--epochs", "9", "--patience", "3"])
        model, _, _ = classify.train(args, training, validation)
    finally:
        classify.validate = before
    assert len(states) == 5
    for name, w in model.state_dict().items():
        assert torch.equal(w, states[1][name])


def test_the_two_processes_differ_in_order_alone_and_the_likelihood_ratio_tells_them_apart(example):
    classify = example("classify")
    torch.manual_seed(0)
    x, lengths, label = classify.draw(4000)
    for process in (0, 1):
        some = x[label == process][:, : classify.SHORTEST]
        assert some.mean().item() == pytest.approx(0, abs=0.05)
        assert some.var().item() == pytest.approx(classify.DEVIATION**2, abs=0.02)
    assert (classify.likelihood_ratio(x, lengths) == label).float().mean() > 0.95


def test_learning_goes_on_from_a_checkpoint(example, capsys):
    continual = example("continual")
    continual.program(continual.arguments().parse_args(["--epochs", "8"]))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    old, new = ({row[0]: float(row[k]) for row in rows[-3:]} for k in (1, 2))
    assert new["after"] < new["before"] / 2
    assert old["before"] < old["persistence"]
