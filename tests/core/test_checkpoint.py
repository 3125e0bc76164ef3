"""Weights in files, and checkpoints: exact resume, damage, atomic writing."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import (
    DataLoader,
    Model,
    Parameter,
    SeqDataLoader,
    Variable,
    checkpoint,
    datasets,
    npz,
    optimizers,
)
from fusedrnn.checkpoint import CheckpointError

H, I = 5, 3


class Net(Model):
    def __init__(self, rnn, fc=None):
        super().__init__()
        self.rnn = rnn
        self.fc = L.Linear(1) if fc is None else fc

    def forward(self, x):
        return self.fc(self.rnn(x))


def known(kind=L.LSTM, **options):
    return Net(kind(H, I, **options), L.Linear(2, in_size=H))


def rewrite(path, change):
    """The same file with some entries changed."""
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)


# --- weights ----------------------------------------------------------------------------------------------

LAYERS = [
    (L.RNN, {}),
    (L.LSTM, {}),
    (L.LSTM, {"bias": False}),
    (L.GRU, {}),
    (L.GRU, {"reset_after": False}),
    (L.GRU, {"num_layers": 2, "bidirectional": True}),
]


@pytest.mark.quick
@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.parametrize("lazy", [True, False])
def test_weights_there_and_back(tmp_path, kind, options, lazy):
    model = known(kind, **options)
    width = 2 * H if "bidirectional" in options else H
    model.fc = L.Linear(2, in_size=width)
    path = tmp_path / "weights"  # exactly this name
    model.save_weights(path)
    with np.load(path) as file:
        assert set(file.files) == {name for name, _ in model.named_params()}
    other = (
        Net(kind(H, **options), L.Linear(2))
        if lazy
        else Net(kind(H, I, **options), L.Linear(2, in_size=width))
    )
    other.load_weights(path)
    assert (other.rnn.in_size, other.fc.in_size) == (I, width)
    for (name, p), (name2, q) in zip(model.named_params(), other.named_params(), strict=True):
        assert name == name2
        np.testing.assert_array_equal(p.data, q.data)
    x = np.random.default_rng(0).standard_normal((4, 2, I))
    np.testing.assert_array_equal(model(x).data, other(x).data)


def original(rng, gates, prefix="rnn/"):
    """DeZero's layout: W float64, b float32."""
    arrays = {"fc/W": rng.standard_normal((H, 2)), "fc/b": rng.standard_normal(2).astype(np.float32)}
    for g in gates:
        arrays[f"{prefix}x2{g}/W"] = rng.standard_normal((I, H))
        arrays[f"{prefix}x2{g}/b"] = rng.standard_normal(H).astype(np.float32)
        arrays[f"{prefix}h2{g}/W"] = rng.standard_normal((H, H))
    return arrays


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("kind", "gates"), [(L.RNN, "h"), (L.LSTM, "ifuo")])
def test_dezeros_layout(tmp_path, kind, gates, dtype):
    arrays = original(np.random.default_rng(1), gates)
    np.savez(tmp_path / "w.npz", **arrays)
    model = Net(kind(H, dtype=dtype), L.Linear(2, dtype=dtype))
    model.load_weights(tmp_path / "w.npz")
    for k, g in enumerate(gates):
        rows = slice(k * H, (k + 1) * H)
        for own, entry in (("weight_ih", f"x2{g}/W"), ("weight_hh", f"h2{g}/W"), ("bias_ih", f"x2{g}/b")):
            p = getattr(model.rnn, own)
            assert p.dtype == dtype
            np.testing.assert_array_equal(p.data[rows], arrays[f"rnn/{entry}"].T.astype(dtype))
    np.testing.assert_array_equal(model.fc.W.data, arrays["fc/W"].astype(dtype))
    model(np.zeros((2, 3, I)))


def test_a_layer_alone_and_a_users_layer_of_linears(tmp_path):
    arrays = original(np.random.default_rng(1), "ifuo", prefix="")
    del arrays["fc/W"], arrays["fc/b"]
    np.savez(tmp_path / "w.npz", **arrays)
    layer = L.LSTM(H)
    layer.load_weights(tmp_path / "w.npz")

    class Linears(Model):
        def __init__(self):
            for g in "ifuo":
                setattr(self, f"x2{g}", L.Linear(H, dtype=np.float64))
                setattr(self, f"h2{g}", L.Linear(H, dtype=np.float64, nobias=True))

    user = Linears()
    user.load_weights(tmp_path / "w.npz")
    np.testing.assert_array_equal(user.x2u.W.data, arrays["x2u/W"])


def wrong_entries():
    def drop(key):
        return lambda a: a.pop(key)

    def put(key, value):
        return lambda a: a.__setitem__(key, value)

    own = [
        (drop("rnn/weight_hh"), r"entry 'rnn/weight_hh' is missing"),
        (drop("fc/b"), r"entry 'fc/b' is missing"),
        (put("rnn/more", np.ones(1)), r"extra entries that the model does not have: 'rnn/more'"),
        (
            put("rnn/weight_ih", np.ones((4 * H, 2))),
            r"'rnn/weight_ih': expected shape \(20, 3\), got \(20, 2\)",
        ),
        (put("rnn/bias_ih", np.ones((4 * H, 1))), r"'rnn/bias_ih': expected shape \(20,\), got \(20, 1\)"),
        (put("fc/W", np.array([["a", "b"]] * H)), r"'fc/W': expected real numbers, got <U1"),
        (put("fc/W", np.ones((H, 2), complex)), r"'fc/W': .* complex128"),
        (put("fc/W", np.array([None])), r"'fc/W' is pickled, which is never loaded"),
    ]
    theirs = [
        (drop("rnn/h2u/W"), r"entry 'rnn/h2u/W' is missing"),
        (drop("rnn/x2i/b"), r"entry 'rnn/x2i/b' is missing"),
        (put("rnn/h2f/b", np.ones(H)), r"extra entries .* 'rnn/h2f/b'"),
        (put("rnn/x2o/W", np.ones((2, H))), r"'rnn/x2o/W': expected shape \(3, 5\), got \(2, 5\)"),
        (put("rnn/h2f/W", np.array([None])), r"'rnn/h2f/W' is pickled"),
    ]
    return [("own", *w) for w in own] + [("dezero", *w) for w in theirs]


@pytest.mark.quick
@pytest.mark.parametrize(("layout", "change", "message"), wrong_entries())
def test_a_wrong_entry_is_named_and_nothing_changes(tmp_path, layout, change, message):
    path = tmp_path / "w.npz"
    if layout == "own":
        known().save_weights(path)
    else:
        np.savez(path, **original(np.random.default_rng(1), "ifuo"))
    rewrite(path, change)
    model = known()
    before = [p.data.copy() for p in model.params()]
    with pytest.raises(ValueError, match=message):
        model.load_weights(path)
    for p, q in zip(model.params(), before, strict=True):
        np.testing.assert_array_equal(p.data, q)


def test_what_is_no_npz_file(tmp_path):
    path = tmp_path / "w"
    for content in (b"", b"not a zip file", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not an \.npz file"):
            known().load_weights(path)
    with pytest.raises(FileNotFoundError):
        known().load_weights(tmp_path / "none")


def test_pickled_bytes_are_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "w.npz"
    known().save_weights(path)
    rewrite(path, lambda a: a.__setitem__("fc/b", np.array([Bomb()], object)))
    with pytest.raises(ValueError, match="'fc/b' is pickled"):
        known().load_weights(path)
    assert not (tmp_path / "ran").exists()


def test_weights_without_values_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="rnn/weight_ih has no values yet"):
        Net(L.LSTM(H)).save_weights(tmp_path / "w.npz")
    assert not list(tmp_path.iterdir())


# --- checkpoints ------------------------------------------------------------------------------------------


class Run:
    """A training with all that has a state: dropout, a shuffled loader, generators, a carried state."""

    def __init__(self, path, sequential, optimizer):
        np.random.seed(11)
        self.path = path
        self.dataset = datasets.SinCurve()
        self.model = Net(L.LSTM(H, num_layers=2, dropout=0.3))
        self.optimizer = optimizer().setup(self.model)
        if sequential:
            self.loader = SeqDataLoader(self.dataset, 50, steps=4)
        else:
            self.loader = DataLoader(self.dataset, 100)
        self.sequential = sequential
        self.generators = [np.random.default_rng(5), np.random.Generator(np.random.MT19937(5))]
        self.losses = []
        self.model(np.zeros((2, 50, 1)))  # settles the sizes
        self.model.rnn.reset_state()

    def updates(self, n):
        done = 0
        while done < n:
            if self.loader.iteration == 0:
                self.model.rnn.reset_state()
            for x, t in self.loader:
                if not self.sequential:
                    self.model.rnn.reset_state()
                x = x + sum(g.normal(0, 0.01) for g in self.generators)
                y = self.model(x if self.sequential else x[np.newaxis])
                loss = F.mean_squared_error(y, t if self.sequential else t[np.newaxis])
                self.model.cleargrads()
                loss.backward()
                loss.unchain_backward()
                self.optimizer.update()
                self.losses.append(float(loss.data))
                done += 1
                if done == n:
                    break

    def save(self):
        checkpoint.save(
            self.path,
            self.model,
            self.optimizer,
            self.loader,
            self.generators,
            losses=self.losses,
            note={"a": [1, "b"]},
            array=np.arange(3),
        )

    def load(self):
        return checkpoint.load(self.path, self.model, self.optimizer, self.loader, self.generators)

    def bits(self):
        return [p.data.tobytes() for p in self.model.params()], self.losses


@pytest.mark.quick
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("optimizer", [optimizers.Adam, optimizers.SGD])
@pytest.mark.parametrize("at", [3, 10, 23])  # within a round, at its end, in a later one
def test_resume_gives_the_same_bits(tmp_path, sequential, optimizer, at):
    whole = Run(tmp_path / "a", sequential, optimizer)
    whole.updates(30)
    first = Run(tmp_path / "b", sequential, optimizer)
    first.updates(at)
    first.save()
    np.random.seed(99)
    second = Run(tmp_path / "b", sequential, optimizer)
    second.updates(5)  # somewhere else altogether
    progress = second.load()
    assert progress["note"] == {"a": [1, "b"]}
    np.testing.assert_array_equal(progress["array"], np.arange(3))
    second.losses = progress["losses"]
    assert second.losses == first.losses
    second.updates(30 - at)
    assert second.bits() == whole.bits()


def test_a_lazy_model_is_taken_up(tmp_path):
    first = Run(tmp_path / "a", True, optimizers.Adam)
    first.updates(3)
    first.save()
    first.updates(5)  # before the other takes the random state, which they share
    second = Run(tmp_path / "a", True, optimizers.Adam)
    second.model = Net(L.LSTM(H, num_layers=2, dropout=0.3))
    second.optimizer.setup(second.model)
    second.load()
    second.updates(5)
    assert second.bits()[0] == first.bits()[0]


def test_a_users_carried_variables_are_kept(tmp_path):
    model = known()
    model.rnn(np.ones((2, I))).unchain_backward()
    model.memory = model.rnn.c
    checkpoint.save(tmp_path / "c", model)
    other = known()
    checkpoint.load(tmp_path / "c", other)
    for name in ("h", "c"):
        np.testing.assert_array_equal(getattr(other.rnn, name).data, getattr(model.rnn, name).data)
    np.testing.assert_array_equal(other.memory.data, model.memory.data)
    model.rnn.reset_state()
    checkpoint.save(tmp_path / "c", model)
    checkpoint.load(tmp_path / "c", other)
    assert other.rnn.state is None


def test_a_state_that_leads_into_a_graph_is_refused(tmp_path):
    model = known()
    model.rnn(np.ones((2, I)))
    with pytest.raises(ValueError, match=r"rnn/h: expected a state without a graph.*unchain_backward"):
        checkpoint.save(tmp_path / "c", model)
    assert not list(tmp_path.iterdir())


def test_every_truncation_is_a_clear_error(tmp_path):
    run = Run(tmp_path / "a", True, optimizers.Adam)
    run.updates(2)
    run.save()
    whole = run.path.read_bytes()
    for n in [*range(0, len(whole), 97), len(whole) - 1]:
        run.path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            run.load()
    changed = bytearray(whole)
    changed[-6] ^= 16  # where the directory begins
    run.path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        run.load()


def test_every_flipped_byte_is_an_error_or_does_not_matter(tmp_path):
    model = known()
    checkpoint.save(tmp_path / "c", model, epoch=3)
    whole = (tmp_path / "c").read_bytes()
    expected = [p.data.tobytes() for p in model.params()]
    refused = 0
    for n in range(0, len(whole), 11):
        changed = bytearray(whole)
        changed[n] ^= 0x41
        (tmp_path / "c").write_bytes(changed)
        other = known()
        try:
            progress = checkpoint.load(tmp_path / "c", other)
        except CheckpointError:
            refused += 1
        else:  # a time stamp, or the like
            assert progress == {"epoch": 3}
            assert [p.data.tobytes() for p in other.params()] == expected
    assert refused > len(whole) / 11 / 2


def test_what_does_not_fit_is_named(tmp_path):
    run = Run(tmp_path / "a", True, optimizers.Adam)
    run.save()
    other = known()
    adam = optimizers.Adam().setup(other)
    for load, message in (
        (lambda: checkpoint.load(run.path, run.model), "optimizer: .* Adam, got None"),
        (
            lambda: checkpoint.load(run.path, run.model, optimizers.SGD().setup(run.model)),
            "optimizer: .* Adam, got SGD",
        ),
        (lambda: checkpoint.load(run.path, run.model, run.optimizer), "loader: expected"),
        (lambda: checkpoint.load(run.path, run.model, run.optimizer, run.loader), "generators: .* 2 .* 0"),
        (
            lambda: checkpoint.load(run.path, other, adam, run.loader, run.generators),
            "entry 'rnn/weight_ih' is missing",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            load()
    known().save_weights(run.path)  # weights are no checkpoint
    with pytest.raises(CheckpointError, match="expected a checkpoint, got another file"):
        run.load()
    checkpoint.save(run.path, known())
    with pytest.raises(ValueError, match="expected weights, got a checkpoint"):
        known().load_weights(run.path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none", run.model)


def test_what_does_not_fit_is_found_before_anything_changes(tmp_path):
    run = Run(tmp_path / "a", False, optimizers.Adam)
    run.model.memory = Model()
    run.model.memory.kept = Variable(np.ones(2))
    run.updates(2)
    run.model.rnn.reset_state()
    run.save()
    run.updates(1)

    def there():
        states = [np.random.get_state(), *(g.bit_generator.state for g in run.generators)]
        return run.optimizer.t, run.loader.iteration, run.loader.index.tolist(), repr(states)

    without, short = Net(L.LSTM(H, num_layers=2, dropout=0.3)), DataLoader([(0, 0)] * 9, 3)
    size = run.loader.batch_size
    other, steps = DataLoader(run.loader.dataset, size + 1), SeqDataLoader(run.loader.dataset, size, steps=2)
    before = there()
    for model, loader, generators, message in (
        (run.model, run.loader, run.generators[::-1], "generators: expected PCG64, as saved, got MT19937"),
        (run.model, short, run.generators, "loader: expected 999 samples, as saved, got 9"),
        (run.model, other, run.generators, f"batch_size={size}, shuffle=True, as .* batch_size={size + 1}"),
        (run.model, steps, run.generators, "as saved, got SeqDataLoader .* steps=2"),
        (without, run.loader, run.generators, "state memory/kept: the model does not have this layer"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(run.path, model, run.optimizer, loader, generators)
        assert there() == before


def test_progress_comes_back_as_it_was(tmp_path):
    given = {
        "losses": [np.float32(0.5), np.array(0.25), 1],
        "best": {"epoch": np.int64(3), "weights": {"w": np.arange(3, dtype=np.int16)}},
        "shapes": [np.zeros((0, 3), "f"), np.ones((2, 1)), np.array(["a", "bc"])],
    }
    checkpoint.save(tmp_path / "c", known(), **given)
    found = checkpoint.load(tmp_path / "c", known())
    assert found["losses"] == [0.5, 0.25, 1]
    assert found["best"]["epoch"] == 3
    np.testing.assert_array_equal(found["best"]["weights"]["w"], np.arange(3), strict=False)
    for got, array in zip(found["shapes"], given["shapes"], strict=True):
        np.testing.assert_array_equal(got, array, strict=True)
    for wrong, message in (
        ({1: 2}, "keys of type str, got the key 1"),
        ({"a": {2}}, "set"),
        ([np.ones(2, complex)], "wrong: expected arrays of numbers or text, got complex128"),
        ({"array": [1], "dtype": "f4"}, "wrong: expected dicts with other keys than array, dtype"),
    ):
        with pytest.raises(TypeError, match=message):
            checkpoint.save(tmp_path / "c", known(), wrong=wrong)
    assert checkpoint.load(tmp_path / "c", known())["losses"] == found["losses"]


def test_the_one_before_is_kept_and_named(tmp_path):
    path = tmp_path / "c"
    model = known()
    checkpoint.save(path, model, epoch=1)
    assert not checkpoint.previous(path).exists()
    checkpoint.save(path, model, epoch=2)
    checkpoint.save(path, model, epoch=3)
    assert checkpoint.load(path, model)["epoch"] == 3
    assert checkpoint.load(checkpoint.previous(path), model)["epoch"] == 2
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"previous checkpoint is .*c\.previous"):
        checkpoint.load(path, model)


@pytest.mark.quick
def test_a_folder_that_is_missing_or_in_place_of_the_file_is_named(tmp_path):
    layer = L.Linear(1, in_size=1)
    with pytest.raises(IsADirectoryError, match=f"expected a file to write to, got the folder {tmp_path}"):
        layer.save_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"w\.npz: there is no folder .*missing$"):
        checkpoint.save(tmp_path / "missing" / "w.npz", layer)


@pytest.mark.parametrize("moment", ["write_array", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "c"
    model = known()
    checkpoint.save(path, model, epoch=1)
    before = path.read_bytes()
    owner = np.lib.format if moment == "write_array" else os

    def fail(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(owner, moment, fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, model, epoch=2)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    assert checkpoint.load(path, model)["epoch"] == 1


def test_without_links_the_one_before_is_a_copy(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", fail)
    path = tmp_path / "c"
    for epoch in (1, 2):
        checkpoint.save(path, known(), epoch=epoch)
    assert checkpoint.load(checkpoint.previous(path), known())["epoch"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {"c", "c.previous"}


@pytest.mark.parametrize("kind", [Model, lambda: L.Linear(2, in_size=3), lambda: L.LSTM(2, 3)])
@pytest.mark.parametrize("name", ["file", "allow_pickle", "args"])
def test_any_name_of_a_parameter(tmp_path, name, kind):
    """Also those of arguments of np.savez; and of one that is added to a layer."""
    layer = kind()
    setattr(layer, name, Parameter(np.arange(3.0)))
    layer.save_weights(tmp_path / "w.npz")
    getattr(layer, name).data = np.zeros(3)
    layer.load_weights(tmp_path / "w.npz")
    np.testing.assert_array_equal(getattr(layer, name).data, np.arange(3.0))


@pytest.mark.parametrize("kind", [lambda: L.Linear(2, in_size=2), lambda: L.RNN(2, 2)])
def test_a_parameter_of_two_layers(tmp_path, kind):
    """It is saved once, and loaded into both."""
    models = []
    for _ in range(2):
        model = Net(kind(), kind())
        name = "W" if hasattr(model.rnn, "W") else "weight_ih"
        setattr(model.fc, name, getattr(model.rnn, name))
        models.append(model)
    first, second = models
    first.save_weights(tmp_path / "w.npz")
    second.load_weights(tmp_path / "w.npz")
    assert getattr(second.fc, name) is getattr(second.rnn, name)
    for (key, p), q in zip(first.named_params(), second.params(), strict=True):
        np.testing.assert_array_equal(p.data, q.data, err_msg=key)


def test_the_order_of_writing(tmp_path, monkeypatch):
    """Content to the disk before the name changes, the folder after it."""
    events = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append("fsync"), real_fsync(f))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), real_replace(a, b))[1])
    npz.write(tmp_path / "a", {"x": np.ones(1)})
    assert events == ["fsync", "replace", "fsync"]


def test_bytes_after_an_array_are_an_error(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    with zipfile.ZipFile(tmp_path / "a", "w") as file:
        file.writestr("x.npy", buffer.getvalue() + b"more")
    with pytest.raises(ValueError, match="entry 'x'"):
        npz.read(tmp_path / "a")
