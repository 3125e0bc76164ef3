"""The programs: figures they must reach, the user's own layer, files, resuming after a kill, forecasts."""

import argparse
import csv
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import fusedrnn.functions as F
import fusedrnn.layers as L
from example_scripts import run_example
from fusedrnn import DataLoader, Layer, Model, cuda, datasets, no_grad, optimizers, programs, terminal
from fusedrnn.programs import airline, common, pollution, sine, uci_pollution

# --- P1: a sine by truncated back-propagation -------------------------------------------------------------

BATCHED = {
    "rnn": {"MSE": 0.0012268895240442074, "RMSE": 0.0350270, "MAE": 0.0184630, "R2": 0.9975486673818644},
    "lstm": {"MSE": 0.00065248940, "R2": 0.99869632},
}
ONE_LINE = {"rnn": (10, 0.00386179739, 0.00408311133), "lstm": (3, 0.01112860530, 0.00917100735)}
COSINE = np.cos(np.linspace(0, 4 * np.pi, 1000))
cells = pytest.mark.parametrize("cell", ["rnn", "lstm"])


class Net(Model):
    """As in the original scripts."""

    def __init__(self, layer, hidden_size=100, out_size=1):
        super().__init__()
        self.rnn = layer(hidden_size)
        self.fc = L.Linear(out_size)

    def reset_state(self):
        self.rnn.reset_state()

    def forward(self, x):
        return self.fc(self.rnn(x))


def fresh(layer):
    """Seeded as in the original scripts: nothing is drawn before training but the data."""
    np.random.seed(42)
    dataset = datasets.SinCurve(train=True)
    return Net(layer), dataset


@pytest.mark.quick
@cells
def test_batched_by_chunks(cell):
    model, dataset = sine.start(cell, 42)
    sine.train(model, dataset, epochs=100, chunks=True)
    found = common.scores(sine.predict(model, COSINE), COSINE)
    for name, expected in BATCHED[cell].items():
        assert found[name] == pytest.approx(expected, rel=1e-4), name


# Other ways to do the same are after 3 epochs where the training by chunks is on its way to the figures.
EPOCHS = 3


def by_chunks(cell):
    model, dataset = sine.start(cell, 42)
    losses = sine.train(model, dataset, epochs=EPOCHS, chunks=True)
    return losses, sine.predict(model, COSINE)


@cells
def test_batched_by_single_steps(cell):
    losses, predictions = by_chunks(cell)
    model, dataset = fresh(common.CELLS[cell])
    assert sine.train(model, dataset, epochs=EPOCHS) == pytest.approx(losses, rel=1e-6)
    assert sine.predict(model, COSINE) == pytest.approx(predictions, abs=1e-5)


@cells
def test_one_line_by_single_steps(cell):
    epochs, loss, mse = ONE_LINE[cell]
    model, dataset = fresh(common.CELLS[cell])
    losses = sine.train(model, dataset, batch=1, epochs=epochs)
    assert losses[-1] == pytest.approx(loss, rel=1e-5)
    assert common.scores(sine.predict(model, COSINE), COSINE)["MSE"] == pytest.approx(mse, rel=1e-5)


@pytest.mark.quick
@cells
def test_one_line_by_chunks(cell):
    epochs, loss, mse = ONE_LINE[cell]
    model, dataset = sine.start(cell, 42)
    losses = sine.train(model, dataset, batch=1, epochs=epochs, chunks=True)
    assert losses[-1] == pytest.approx(loss, rel=1e-4)
    assert common.scores(sine.predict(model, COSINE), COSINE)["MSE"] == pytest.approx(mse, rel=1e-4)


class TheirLSTM(Layer):
    """A user's layer: eight Linears, one node per operation."""

    def __init__(self, hidden_size, in_size=None):
        super().__init__()
        H, I = hidden_size, in_size
        self.x2f, self.x2i, self.x2o, self.x2u = (L.Linear(H, in_size=I) for _ in range(4))
        self.h2f, self.h2i, self.h2o, self.h2u = (L.Linear(H, in_size=H, nobias=True) for _ in range(4))
        self.reset_state()

    def reset_state(self):
        self.h = None
        self.c = None

    def forward(self, x):
        gates = {}
        for name, act in (("f", F.sigmoid), ("i", F.sigmoid), ("o", F.sigmoid), ("u", F.tanh)):
            a = getattr(self, "x2" + name)(x)
            gates[name] = act(a if self.h is None else a + getattr(self, "h2" + name)(self.h))
        new = gates["i"] * gates["u"]
        self.c = new if self.c is None else gates["f"] * self.c + new
        self.h = gates["o"] * F.tanh(self.c)
        return self.h


class TheirSeqDataLoader(DataLoader):
    """A user's loader of parallel time lines, step by step."""

    def __init__(self, dataset, batch_size, gpu=False):
        super().__init__(dataset=dataset, batch_size=batch_size, shuffle=False, gpu=gpu)

    def __next__(self):
        if self.iteration >= self.max_iter:
            self.reset()
            raise StopIteration
        jump = self.data_size // self.batch_size
        index = [(i * jump + self.iteration) % self.data_size for i in range(self.batch_size)]
        batch = [self.dataset[i] for i in index]
        xp = cuda.cupy if self.gpu else np
        x, t = xp.array([b[0] for b in batch]), xp.array([b[1] for b in batch])
        self.iteration += 1
        return x, t


def test_the_users_own_layer_and_loader_give_the_same():
    model, dataset = fresh(TheirLSTM)
    loader = TheirSeqDataLoader(dataset, batch_size=30)
    optimizer = optimizers.Adam().setup(model)
    for _ in range(EPOCHS):
        model.reset_state()
        loss = 0
        for count, (x, t) in enumerate(loader, 1):
            y = model(x)
            loss += F.mean_squared_error(y, t)
            if count % 30 == 0 or count == 999:
                model.cleargrads()
                loss.backward()
                loss.unchain_backward()
                assert model.rnn.h.creator is None
                assert model.rnn.c.creator is None
                optimizer.update()
    model.reset_state()
    predictions = []
    with no_grad():
        for x in COSINE:
            x = np.array(x).reshape(1, 1)
            predictions.append(model(x).data.item())
    assert predictions == pytest.approx(by_chunks("lstm")[1], abs=1e-5)


# --- what all programs share ------------------------------------------------------------------------------


def arguments(name, *given):
    parser = argparse.ArgumentParser()
    programs.PROGRAMS[name].add_arguments(parser)
    return parser.parse_args(given)


class Silent(terminal.Report):
    """Keeps what was reported."""

    def __init__(self):
        self.lines, self.tables = [], {}

    def line(self, text):
        self.lines.append(text)

    def table(self, title, columns, rows):
        self.tables[title] = {row[0]: row[1:] for row in rows}


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


@pytest.mark.quick
def test_scores():
    found = common.scores(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 5.0]))
    assert found == {
        "MSE": pytest.approx(4 / 3),
        "RMSE": pytest.approx((4 / 3) ** 0.5),
        "MAE": pytest.approx(2 / 3),
        "R2": pytest.approx(1 - 4 / (26 / 3)),
    }


def test_without_matplotlib_a_program_runs_and_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = Silent()
    sine.run(arguments("sine", "--epochs", "1", "--out", str(tmp_path)), report)
    assert [line for line in report.lines if "pip install 'fusedrnn[plot]'" in line] == report.lines[:1]
    assert not list(tmp_path.glob("*.png"))


def test_sine_program(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    result = sine.run(arguments("sine", "--epochs", "20", "--out", str(tmp_path)), terminal.Report())
    assert is_picture(tmp_path / "sine.png")
    assert len(result.losses) == 20
    printed = capsys.readouterr().out
    assert "LSTM on a sine 20/20" in printed
    assert f"{result.scores['MSE']:.6g}" in printed
    assert "LSTM does not beat: copying the input" in printed


def test_sine_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = run_example(monkeypatch, "sine", 3)["mse"]
    result = sine.run(arguments("sine", "--epochs", "3", "--steps", "--no-plot"), Silent())
    assert found == pytest.approx(result.scores["MSE"], rel=1e-5)
    assert "copying the input scores 0" in capsys.readouterr().out


# --- P2: air pollution ------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A file of the right form: 900 hours."""
    rng = np.random.default_rng(0)
    path = tmp_path / "small.csv"
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["date", "pollution", "dew", "temp", "press", "wnd_dir", "wnd_spd", "snow", "rain"])
        level = 80.0
        for k in range(900):
            level = max(0.0, level + rng.normal(0, 8))
            row = [round(level), rng.integers(-20, 20), rng.integers(-10, 30), 1010 + rng.integers(0, 20)]
            out.writerow([np.datetime64("2010-01-02T00") + k, *row, "SE", round(rng.random() * 9, 2), 0, 0])
    return path


def test_a_missing_file_says_where_the_data_are(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDRNN_DATA", raising=False)
    for given in (None, str(tmp_path / "none.csv")):
        with pytest.raises(FileNotFoundError, match=r"UCI Machine Learning Repository.*--data FILE"):
            pollution.read(given)
    monkeypatch.setenv("FUSEDRNN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        pollution.read(None)


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "wrong.csv"
    path.write_text("date,pollution\n1,2\n")
    with pytest.raises(
        ValueError, match=r"wrong\.csv: expected each of the columns date, pollution, dew, temp, .* once"
    ):
        pollution.read(str(path))
    names = ",".join(["date", *pollution.INPUTS])
    path.write_text(f"{names}\n2010-01-02 00:00,1,2,3,4,5,6,7\n2010-01-02 00:00,1,2,x,4,5,6,7\n")
    with pytest.raises(ValueError, match=r"wrong\.csv, line 3, column temp: expected a number"):
        pollution.read(str(path))
    path.write_text(f"{names}\n2010-01-02 00:00,1,2,nan,4,5,6,7\n")
    with pytest.raises(ValueError, match=r"wrong\.csv, line 2, column temp: expected a finite number"):
        pollution.read(str(path))
    path.write_bytes(b"\xff\x00\x80")
    with pytest.raises(ValueError, match=r"wrong\.csv: expected a CSV file in UTF-8"):
        pollution.read(str(path))


@pytest.mark.quick
def test_the_file_is_made_from_ucis(tmp_path):
    source, target = tmp_path / "uci.csv", tmp_path / "ours.csv"
    header = "No,year,month,day,hour,pm2.5,DEWP,TEMP,PRES,cbwd,Iws,Is,Ir"
    first = [f"{k + 1},2010,1,1,{k},NA,-21,-11,1021,NW,1.79,0,0" for k in range(24)]
    rest = ["25,2010,1,2,0,129,-16,-4,1020,SE,1.79,0,0", "26,2010,1,2,1,NA,-15,-4,1020,SE,2.68,1,2"]
    source.write_text("\n".join([header, *first, *rest]) + "\n")
    assert uci_pollution.convert(str(source), str(target)) == 2
    assert target.read_text().splitlines() == [
        "date,pollution,dew,temp,press,wnd_dir,wnd_spd,snow,rain",
        "02-01-2010 00:00,129,-16,-4,1020,SE,1.79,0,0",
        "02-01-2010 01:00,0,-15,-4,1020,SE,2.68,1,2",
    ]
    np.testing.assert_array_equal(pollution.read(str(target))[1], [0, -15, -4, 1020, np.float32(2.68), 1, 2])
    source.write_text("\n".join([header.replace("pm2.5", "pm10"), *first]))
    with pytest.raises(ValueError, match=r"uci\.csv: expected UCI's columns, got none named pm2\.5"):
        uci_pollution.convert(str(source), str(target))
    source.write_text("\n".join([header, *first]))
    with pytest.raises(ValueError, match="expected more than the 24 hours"):
        uci_pollution.convert(str(source), str(target))


@pytest.mark.parametrize("task", ["same-row", "ahead"])
def test_pollution_program(small, tmp_path, task):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    given = ["--data", str(small), "--task", task, "--out", str(tmp_path)]
    report = Silent()
    result = pollution.run(arguments("pollution", *given, "--epochs", "5"), report)
    assert all(map(is_picture, (tmp_path / "pollution-loss.png", tmp_path / "pollution-prediction.png")))
    assert len(result.prediction) == 270 - (task == "ahead")
    copied = result.scores["persistence: as now" if task == "ahead" else "copying the input"]["MSE"]
    assert (copied == 0) == (task == "same-row")
    assert any("copying scores an error of 0" in line for line in report.lines) == (task == "same-row")
    again = pollution.run(
        arguments("pollution", *given, "--weights", str(tmp_path / "pollution.npz"), "--no-plot"), Silent()
    )
    np.testing.assert_array_equal(again.prediction, result.prediction)
    for option in (["--resume"], ["--epochs", "0"], ["--every", "0"], ["--checkpoint", str(tmp_path / "c")]):
        with pytest.raises(ValueError, match=f"{option[0]}: not with --weights, which trains nothing"):
            pollution.run(arguments("pollution", *given, "--weights", "w.npz", *option), Silent())


def plain_lstm(arrays, rows):
    """The original's network in its own layout, in NumPy alone, float64, step by step."""
    h = c = np.zeros(pollution.HIDDEN)

    def sigmoid(a):
        with np.errstate(over="ignore"):  # exp of a large number, and 1 / inf is 0
            return 1 / (1 + np.exp(-a))

    out = []
    for x in rows.astype(np.float64):
        a = {
            g: x @ arrays[f"rnn/x2{g}/W"] + arrays[f"rnn/x2{g}/b"] + h @ arrays[f"rnn/h2{g}/W"]
            for g in "fiou"
        }
        c = sigmoid(a["f"]) * c + sigmoid(a["i"]) * np.tanh(a["u"])
        h = sigmoid(a["o"]) * np.tanh(c)
        out.append((h @ arrays["fc/W"] + arrays["fc/b"]).item())
    return np.array(out)


def dezero_layout(model):
    """The model's weights as the original's file has them: W float64, b float32."""
    H = pollution.HIDDEN
    rnn = model.rnn
    arrays = {"fc/W": model.fc.W.data.astype(np.float64), "fc/b": model.fc.b.data.astype(np.float32)}
    for k, g in enumerate("ifuo"):
        part = slice(k * H, (k + 1) * H)
        arrays[f"rnn/x2{g}/W"] = rnn.weight_ih.data[part].T.astype(np.float64)
        arrays[f"rnn/x2{g}/b"] = rnn.bias_ih.data[part].astype(np.float32)
        arrays[f"rnn/h2{g}/W"] = rnn.weight_hh.data[part].T.astype(np.float64)
    return arrays


needs_data = pytest.mark.skipif(
    "FUSEDRNN_DATA" not in os.environ, reason="FUSEDRNN_DATA is unset: it names the folder of the public data"
)


@needs_data
@pytest.mark.slow
def test_pollution_trained_and_evaluated_in_float64(tmp_path):
    """50 epochs on the public file; then, in the original's layout and float64, against plain NumPy."""
    task = pollution.prepare(pollution.read(None), "same-row")
    assert (len(task.train), len(task.test)) == (30659, 13141)
    model = pollution.build("lstm", seed=0)
    training = pollution.training(model, task.train)
    training.run(50, lambda loss: None)
    assert training.losses[-1] < 0.95 * training.losses[0]
    arrays = dezero_layout(model)
    np.savez(tmp_path / "original.npz", **arrays)
    wide = pollution.build("lstm", seed=1, dtype=np.float64)
    wide.load_weights(tmp_path / "original.npz")
    prediction = pollution.predict(wide, task.test)
    expected = plain_lstm(arrays, task.test.data)
    np.testing.assert_allclose(prediction, expected, rtol=1e-12, atol=1e-12)


@needs_data
@pytest.mark.slow
def test_pollution_trains_as_in_dezero(monkeypatch, tmp_path):
    """From one seed, with its layers, loader, optimiser and file: the same 8 updates of the first epoch."""
    monkeypatch.setattr(np, "int", int, raising=False)  # removed from NumPy since
    dezero = pytest.importorskip("dezero")
    task = pollution.prepare(pollution.read(None), "same-row")
    np.random.seed(0)
    theirs = dezero.Model()
    theirs.rnn, theirs.fc = dezero.layers.LSTM(100, in_size=7), dezero.layers.Linear(1, in_size=100)
    theirs.save_weights(tmp_path / "start.npz")
    optimizer = dezero.optimizers.Adam().setup(theirs)
    total, losses = 0, []
    for step, (x, t) in enumerate(dezero.SeqDataLoader(task.train, 128), 1):
        total = total + dezero.functions.mean_squared_error(theirs.fc(theirs.rnn(x)), t)
        if step % 30 == 0:
            theirs.cleargrads()
            total.backward()
            total.unchain_backward()
            optimizer.update()
            losses.append(float(total.data))
            total = 0
    assert step == 240
    theirs.save_weights(tmp_path / "end.npz")

    ours, end = (pollution.build("lstm", seed=0, dtype=np.float64) for _ in range(2))
    drawn = dezero_layout(pollution.build("lstm", seed=0))
    ours.load_weights(tmp_path / "start.npz")
    end.load_weights(tmp_path / "end.npz")
    start, end = dezero_layout(ours), dezero_layout(end)
    for key in start:
        np.testing.assert_allclose(drawn[key], start[key], rtol=1e-6)
    sums = []
    loss = F.mean_squared_error
    monkeypatch.setattr(F, "mean_squared_error", lambda *args: sums.append(loss(*args)) or sums[-1])
    pollution.training(ours, task.train).run(1, lambda loss: None)
    np.testing.assert_allclose([float(s.data) for s in sums], losses, rtol=1e-6)
    for key, after in dezero_layout(ours).items():
        assert np.linalg.norm(after - end[key]) < 1e-4 * np.linalg.norm(end[key] - start[key]), key


def test_the_example_goes_on_from_its_checkpoint(small, tmp_path, monkeypatch, capsys):
    """Stopped after two epochs or not, it ends with the same forecast."""
    forecasts = []
    for folder, stops in (("whole", [4]), ("stopped", [2, 4])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        for epochs in stops:
            names = run_example(monkeypatch, "pollution", epochs, str(small))
        forecasts.append(names["forecast"])
    assert forecasts[0].tobytes() == forecasts[1].tobytes()
    printed = capsys.readouterr().out
    assert re.findall(r"^epoch (\d)", printed, re.MULTILINE) == list("12341234")
    assert len(re.findall("^persistence: as now .*MSE", printed, re.MULTILINE)) == 3
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"python examples/pollution\.py FILE\.csv"):
        run_example(monkeypatch, "pollution", 1, "none.csv")


@needs_data
def test_persistence_one_hour_ahead():
    task = pollution.prepare(pollution.read(None), "ahead")
    found = common.scores(task.trivial, task.truth)
    assert found == common.scores(task.forecast(np.zeros(len(task.test))), task.truth)
    assert found["MSE"] == pytest.approx(569.6, abs=0.05)
    assert found["MAE"] == pytest.approx(12.31, abs=0.005)
    assert found["R2"] == pytest.approx(0.929, abs=0.0005)


PROGRAM = """
import argparse, sys
from fusedrnn import terminal
from fusedrnn.programs import pollution
parser = argparse.ArgumentParser()
pollution.add_arguments(parser)
pollution.run(parser.parse_args(sys.argv[1:]), terminal.Report())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9 here")
def test_killed_at_random_times_it_resumes_to_the_same_bits(small, tmp_path):
    """FUSEDRNN_KILLS says how often; with a checkpoint after every chunk many a kill hits its writing."""
    kills = int(os.environ.get("FUSEDRNN_KILLS", "2"))
    given = ["--data", str(small), "--no-plot", "--epochs", str(80 * kills), "--every", "0", "--resume"]

    def start(name):
        out = tmp_path / name
        files = ["--out", str(out), "--checkpoint", str(tmp_path / f"{name}.ckpt")]
        command = [sys.executable, "-c", PROGRAM, *given, *files]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start("whole")
    assert whole.wait(timeout=250) == 0, whole.stdout.read()
    whole.stdout.close()
    draw = random.Random(5)
    done = 0
    for _ in range(kills):
        process = start("killed")
        path = tmp_path / "killed.ckpt"
        deadline = time.monotonic() + 60
        before = path.stat().st_mtime_ns if path.exists() else 0
        while not (path.exists() and path.stat().st_mtime_ns != before):  # it has got going
            assert process.poll() is None or process.returncode == 0, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.random() * 0.1)
        process.kill()
        done += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert done == kills  # each was killed at work, none after its end
    last = start("killed")
    output = last.communicate(timeout=250)[0]
    assert last.returncode == 0, output
    assert "resumed from" in output
    a, b = (np.load(tmp_path / name / "pollution.npz") for name in ("whole", "killed"))
    with a, b:
        assert a.files == b.files
        for name in a.files:
            assert a[name].tobytes() == b[name].tobytes(), name
    checkpoints = [np.load(tmp_path / f"{name}.ckpt") for name in ("whole", "killed")]
    with checkpoints[0], checkpoints[1]:
        for name in checkpoints[0].files:  # weights, moments, random state, losses: everything
            assert checkpoints[0][name].tobytes() == checkpoints[1][name].tobytes(), name


# --- the airline passengers: the package's own series -----------------------------------------------------


@pytest.fixture(scope="module")
def airline_run(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    out = tmp_path_factory.mktemp("airline")
    report = Silent()
    return airline.run(arguments("airline", "--out", str(out)), report), report, out


def test_airline_program(airline_run):
    result, report, out = airline_run
    assert is_picture(out / "airline.png")
    (table,) = report.tables.values()
    assert list(table) == list(result.scores)
    errors = [values["MSE"] for values in result.scores.values()]
    assert errors == sorted(errors)
    assert len(result.scores) == 10
    # better than whatever needs no fitting; the strongest may win, and is there
    ours = result.scores["LSTM, this library"]["MSE"]
    assert ours < result.scores["seasonal naive with growth"]["MSE"]
    assert result.scores["SARIMA (0,1,1)(0,1,1)12 of logs"]["MSE"] < 230
    # scaled to [0, 1], as published: 0.0068 and 0.0091
    assert round(result.scores["seasonal naive: as a year ago"]["MSE"] / 518**2, 4) == 0.0068
    assert round(result.scores["naive: as last month"]["MSE"] / 518**2, 4) == 0.0091
    assert sum(line.startswith("Speed: ") for line in report.lines) == 1


def test_no_forecast_sees_its_own_month_or_a_later_one(monkeypatch):
    """Change the series from one month of the test part on: no forecast up to that month may move."""
    months, y = airline.passengers()
    n, t = int(0.7 * len(y)), 120
    monkeypatch.setattr(airline, "EPOCHS", 12)
    given = arguments("airline", "--no-plot")
    before = airline.run(given, Silent()).forecasts
    changed = np.concatenate([y[:t], y[t:] * np.linspace(1.3, 2, len(y) - t)])
    monkeypatch.setattr(airline, "passengers", lambda: (months, changed))
    after = airline.run(given, Silent()).forecasts
    for name in before:
        np.testing.assert_array_equal(before[name][: t - n + 1], after[name][: t - n + 1], err_msg=name)
        assert np.abs(before[name][t - n + 1 :] - after[name][t - n + 1 :]).max() > 1, name


def test_the_series_that_ships():
    months, y = airline.passengers()
    assert (len(y), months[0], months[-1], y[0], y[-1]) == (144, "1949-01", "1960-12", 112, 432)
