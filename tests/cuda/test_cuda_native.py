"""The native API on arrays that are not NumPy's, fake_cupy.py's: layers, optimizers, files, gradcheck."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import emulated
import fake_cupy
import fusedrnn
from fusedrnn import backends, checkpoint, cli, gradcheck_suite, kernels, multilayer, optimizers, system
from fusedrnn import functions as F
from fusedrnn import layers as L
from fusedrnn.backends.cuda import CudaBackend, cupy_device
from fusedrnn.cells import lstm, rnn
from fusedrnn.gradcheck import GradcheckError, gradcheck
from problems import error, problem, run

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")

EVERYTHING = {"lengths": True, "reset": True, "return_states": True}


@pytest.fixture
def gpu(monkeypatch):
    """A computer with CuPy and a GPU, as far as anything here can tell."""
    cupy, device = fake_cupy.module(), fake_cupy.HiddenDevice(multiprocessors=16)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cupy_device, "unavailable", lambda: None)
    monkeypatch.setattr(cupy_device, "current", lambda: device)
    backend = CudaBackend()
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda name: backend if name == "cuda" else load(name))
    return cupy


def put(*arrays):
    made = tuple(fusedrnn.cuda.as_cupy(a) for a in arrays)
    return made if len(made) > 1 else made[0]


def same_on_both(work, tolerance):
    """What ``work`` returns of arrays of NumPy's and, from the same seed, of the GPU's is the same."""
    found = []
    for move in (np.asarray, put):
        np.random.seed(0)
        found.append([fusedrnn.cuda.as_numpy(a) for a in work(move)])
    for want, got in zip(*found, strict=True):
        assert error(got, want) <= tolerance


def place(layer, move):
    """The layer where ``move`` puts arrays."""
    if move is put:
        layer.to_gpu()
    return layer


def test_modules_of_arrays(gpu):
    host, there = np.arange(3.0), put(np.arange(3.0))
    assert fusedrnn.cuda.gpu_enable
    for x, module in ((host, np), (3.5, np), (there, gpu), (fusedrnn.Variable(there), gpu)):
        assert fusedrnn.cuda.get_array_module(x) is module
    np.testing.assert_array_equal(fusedrnn.cuda.as_numpy(there), host)
    assert fusedrnn.as_array(there) is there


def test_arrays_choose_the_backend(gpu, monkeypatch):
    p = problem(lstm, 3, 2, 3, 7, **EVERYTHING)
    on_gpu = fake_cupy.hidden(p)
    monkeypatch.setenv("FUSEDRNN_BACKEND", "reference")  # what chooses among those for NumPy
    want = run(kernels, p)
    got = run(kernels, on_gpu)
    assert all(isinstance(a, fake_cupy.ndarray) for a in got.values())
    assert max(error(a.get(), want[key]) for key, a in got.items()) <= 2e-14
    packed = kernels.pack(lstm, on_gpu.weights)
    assert packed.backend.name == "cuda"
    for x, weights, wrong in ((p.x, on_gpu.weights, "weight_ih"), (on_gpu.x, p.weights, "weight_ih")):
        with pytest.raises(TypeError, match=rf"^{wrong}: expected a"):
            kernels.forward(lstm, x, weights)
    with pytest.raises(TypeError, match=r"^weight_ih: expected a NumPy array, got cupy.ndarray"):
        kernels.forward(lstm, on_gpu.x, on_gpu.weights, backend="reference")


def test_the_code_of_the_page_runs(gpu):
    """That of docs/cuda.md, after what it takes as given."""
    page = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    p = problem(lstm, 3, 2, 3, 7, lengths=True)
    names = {name: put(array) for name, array in p.weights.items()}
    names |= {"x": put(p.x), "dy": put(p.dy), "lengths": p.lengths, "model": Net(L.LSTM, in_size=3)}
    names |= {"SeqDataLoader": fusedrnn.SeqDataLoader, "dataset": fusedrnn.datasets.SinCurve()}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "docs/cuda.md", "exec"), names)
    batch, target = next(names["loader"])
    gpus = [names["y"], names["dx"], *names["dweights"].values(), *names["dstate0"], batch, target]
    assert all(isinstance(a, fake_cupy.ndarray) for a in gpus)
    assert all(isinstance(p.data, fake_cupy.ndarray) for p in names["model"].params() if p.data is not None)


def test_packed_rows(gpu):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((6, 3)), problem(lstm, 2, 2, 3, 7).weights

    def work(move):
        moved = {n: move(w) for n, w in weights.items()}
        out = kernels.forward(lstm, move(x), moved, batch_sizes=np.array([3, 2, 1]))
        back = kernels.backward(out.tape, move(np.ones((6, 7))))
        return out.y, *out.stateT, back.dx, back.dweights["weight_hh"]

    same_on_both(work, 2e-14)


class Net(fusedrnn.Model):
    """A layer with all its paths, dropout, a loss with integers."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(5, **options)
        self.out = L.Linear(3)

    def forward(self, x):
        return self.out(F.dropout(self.rnn(x), 0.3))


def trained(kind, options, *, gpu, optimizer=optimizers.Adam, moves=(), **more):
    """Losses and parameters of a few steps of training, the net and its optimizer."""
    np.random.seed(3)
    net = Net(kind, dtype=np.float64, **options)
    if gpu:
        net.to_gpu()
    opt = optimizer(0.05, **more).setup(net)
    rng = np.random.default_rng(1)
    x, t = rng.standard_normal((3, 6, 4, 2)), rng.integers(0, 3, (3, 24))
    reset = rng.random((6, 4)) < 0.2
    losses, carries = [], not options.get("bidirectional")
    for k in range(3):
        if k in moves:  # to the other side and on
            (net.to_cpu if gpu else net.to_gpu)()
            gpu = not gpu
        move = put if gpu else np.asarray
        if carries:
            net.rnn.sequence(move(x[k]), lengths=[6, 2, 0, 5], reset=move(reset))
        y = net(move(x[k]))
        loss = F.softmax_cross_entropy(F.reshape(y, (24, 3)), move(t[k]))
        loss = loss + F.mean_squared_error(y, move(np.zeros((6, 4, 3)))) * 0.1
        loss = loss + F.sum(F.relu(y[1:, [0, 0, 2]]) ** 2) / 7 - F.mean(F.tanh(y) * F.sigmoid(y))
        loss = loss + F.sum(F.log(F.exp(F.softmax(F.reshape(y, (24, 3)))[:, :2])))
        net.cleargrads()
        loss.backward()
        if carries:
            loss.unchain_backward()
            net.rnn.reset_state()
        opt.update()
        losses.append(float(loss.data))
    return losses, {n: fusedrnn.cuda.as_numpy(p.data) for n, p in net.named_params()}, net, opt


def assert_same_training(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    assert got[1].keys() == want[1].keys()
    for key in got[1]:
        assert error(got[1][key], want[1][key]) <= 1e-11, key


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (L.RNN, {}),
        (L.LSTM, {"num_layers": 2, "dropout": 0.5}),
        (L.GRU, {"bidirectional": True}),
        (L.GRU, {"reset_after": False}),
        (L.LSTM, {"fused": False}),
        (L.LSTM, {"recompute": True}),
        (L.LSTM, {"fused": False, "layer_norm": True}),
    ],
    ids=["rnn", "lstm-2", "gru-bi", "gru-before", "unfused", "recompute", "unfused-norm"],
)
def test_training(gpu, kind, options):
    """The same numbers as on the CPU, masks of dropout included; every array stays where it belongs."""
    got, want = (trained(kind, options, gpu=gpu, max_norm=1.0, weight_decay=0.01) for gpu in (True, False))
    assert_same_training(got, want)
    assert all(isinstance(p.data, fake_cupy.ndarray) for p in got[2].params())


def test_training_that_moves_and_by_another_optimizer(gpu):
    want = trained(L.LSTM, {}, gpu=False)
    assert_same_training(trained(L.LSTM, {}, gpu=True, moves=(1, 2)), want)
    assert_same_training(trained(L.LSTM, {}, gpu=False, moves=(2,)), want)
    got, want = (trained(L.LSTM, {}, gpu=gpu, optimizer=optimizers.SGD) for gpu in (True, False))
    assert_same_training(got, want)


def test_single_steps(gpu):
    x = np.random.default_rng(0).standard_normal((4, 3, 2))

    def work(move):
        layer = place(L.LSTM(5, dtype=np.float64), move)
        ys = [layer(move(step)) for step in x]
        loss = F.sum(F.stack(ys) * F.concatenate(ys, axis=0).reshape(4, 3, 5))
        loss.backward()
        return loss.data, layer.c.data, layer.weight_hh.grad.data

    same_on_both(work, 1e-13)


def test_to_gpu_and_back(gpu):
    np.random.seed(0)
    net = fusedrnn.models.Sequential(L.LSTM(4, in_size=2), L.Linear(1))  # the second one's size is open
    x = np.random.randn(3, 2, 2).astype(np.float32)
    F.sum(net.layers[0](x)).backward()
    before = {n: p.data.copy() for n, p in net.named_params() if p.data is not None}
    gradient = net.layers[0].weight_hh.grad.data.copy()
    net.to_cpu()
    assert net.layers[0].h.creator is not None  # it was there already
    h = net.layers[0].h.data
    net.to_gpu()
    assert net.layers[0].h.creator is None
    np.testing.assert_array_equal(net.layers[0].h.data.get(), h)
    np.testing.assert_array_equal(net.layers[0].weight_hh.grad.data.get(), gradient)
    net(put(x))
    assert isinstance(net.layers[1].W.data, fake_cupy.ndarray)
    net.to_cpu()
    assert type(net.layers[1].W.data) is np.ndarray
    for n, p in net.named_params():
        if n in before:
            np.testing.assert_array_equal(p.data, before[n])
    assert net(x).shape == (3, 2, 1)


def test_mixing_is_an_error_that_names_the_argument(gpu):
    np.random.seed(0)
    x = np.zeros((3, 2, 4), np.float32)
    layer, linear = L.LSTM(4, in_size=4), L.Linear(2, in_size=4)
    for wrong, own, given in (("cupy", "numpy", put(x)), ("numpy", "cupy", x)):
        mixed = rf"x: expected an array of {own}, .* of {wrong}"
        with pytest.raises(TypeError, match=rf"^{mixed}"):
            layer(given)
        with pytest.raises(TypeError, match=rf"^{mixed}"):
            linear(given)
        layer.to_gpu(), linear.to_gpu()
    state = np.zeros((2, 4), np.float32)
    with pytest.raises(TypeError, match=r"^state: expected an array of cupy, .* numpy"):
        layer.sequence(put(x), (state, state))
    layer.state = state, state
    with pytest.raises(TypeError, match=r"^the layer's state: expected an array of cupy, .* numpy"):
        layer(put(x))
    weights = {n: put(w) for n, w in problem(rnn, 2, 1, 4, 4).weights.items()}
    with pytest.raises(TypeError, match=r"^masks\[0\]: expected an array of cupy, like x"):
        multilayer.forward_multilayer(
            rnn, put(np.zeros((3, 2, 4))), [weights, weights], masks=[np.ones((3, 2, 4))]
        )


def test_weights_and_checkpoints_go_through_files(gpu, tmp_path):
    _, _, net, opt = trained(L.LSTM, {}, gpu=True)
    net.rnn(put(np.ones((2, 4, 2))))
    net.rnn.h.unchain_backward()
    loader = fusedrnn.DataLoader(fusedrnn.datasets.SinCurve(), 10, gpu=True)
    net.save_weights(tmp_path / "w.npz")
    checkpoint.save(tmp_path / "c", net, opt, loader, losses=put(np.arange(3.0)))
    for on_gpu in (True, False):
        fresh = Net(L.LSTM, dtype=np.float64)
        new_opt = optimizers.Adam(0.05).setup(fresh)
        if on_gpu:
            fresh.to_gpu()
        fresh.load_weights(tmp_path / "w.npz")
        progress = checkpoint.load(tmp_path / "c", fresh, new_opt, loader)
        np.testing.assert_array_equal(progress["losses"], np.arange(3.0))
        for p, q in zip(fresh.params(), net.params(), strict=True):
            assert isinstance(p.data, fake_cupy.ndarray if on_gpu else np.ndarray)
            np.testing.assert_array_equal(fusedrnn.cuda.as_numpy(p.data), q.data.get())
        np.testing.assert_array_equal(fusedrnn.cuda.as_numpy(fresh.rnn.c.data), net.rnn.c.data.get())
        F.sum(fresh((put if on_gpu else np.asarray)(np.ones((2, 4, 2))))).backward()
        new_opt.update()  # its state has gone where the parameters are


def test_loaders(gpu):
    np.random.seed(0)
    dataset = fusedrnn.datasets.SinCurve()
    for loader in (
        fusedrnn.DataLoader(dataset, 7, shuffle=False, gpu=True),
        fusedrnn.SeqDataLoader(dataset, 7, gpu=True),
        fusedrnn.SeqDataLoader(dataset, 7, gpu=True, steps=5),
    ):
        there = next(loader)
        assert all(isinstance(a, fake_cupy.ndarray) for a in there)
        loader.reset()
        loader.to_cpu()
        for got, want in zip(there, next(loader), strict=True):
            np.testing.assert_array_equal(got.get(), want)
        loader.to_gpu()
        assert isinstance(next(loader)[0], fake_cupy.ndarray)


@pytest.mark.parametrize("fused", [True, False])
def test_lists_numbers_and_masked_losses(gpu, fused):
    """Lengths, resets and masks of NumPy's and Python's beside arrays of the GPU, and Variables there."""
    rng = np.random.default_rng(2)
    x, t, labels = rng.standard_normal((5, 3, 2)), rng.standard_normal((5, 3, 4)), rng.integers(0, 4, (5, 3))
    lengths, reset = [5, 0, 2], (rng.random((5, 3)) < 0.3).astype(int).tolist()
    mask = np.arange(5)[:, None] < lengths

    def work(move):
        net = place(fusedrnn.models.Sequential(L.LSTM(4, in_size=2, dtype=np.float64, fused=fused)), move)
        y = net(move(x), lengths=lengths, reset=reset)
        loss = F.mean_squared_error(y, move(t), mask) + F.softmax_cross_entropy(y, move(labels), mask)
        loss.backward()
        assert f"{loss:.6f}" == f"{float(loss):.6f}"
        grads = [p.grad.data for p in net.params()]
        again = net.layers[0]
        again.reset_state()
        y.unchain_backward()
        with fusedrnn.no_grad():
            same = again(move(x), lengths=np.array(lengths, "i2"), reset=move(np.array(reset, "u1")))
        np.testing.assert_array_equal(np.asarray(same), np.asarray(y))
        return np.asarray(y), loss.item(), *grads

    same_on_both(work, 2e-14)


def test_the_gradcheck_suite(gpu):
    """What ``fusedrnn gradcheck --backend cuda`` runs."""
    options = ["plain", "all-together", "recompute", "2-layers-bidirectional-all", "zoneout", "layer-norm"]
    rows = gradcheck_suite.run_suite(
        cells=["lstm", "gru"], backends=["cuda"], sizes=gradcheck_suite.QUICK[:1], options=options
    )
    assert [r for r in rows if r.passed is False] == []
    unbuilt = {(r.cell, r.option) for r in rows if r.passed is None}
    projected = {("lstm project=True", option) for option in options}
    assert unbuilt == {("gru reset_after=False", "layer-norm"), *projected}
    assert sum(r.passed is True for r in rows) == 3 * 2 * len(options) - 2


def test_the_gradcheck_suite_of_a_forced_kernel_leaves_out_what_it_cannot_run(gpu, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_CUDA_KERNEL", "grid")
    rows = gradcheck_suite.run_suite(
        cells=["gru"], backends=["cuda"], sizes=gradcheck_suite.QUICK[:1], options=["plain", "zoneout"]
    )
    ran = {(r.cell, r.option): r.passed for r in rows}
    assert ran.pop(("gru", "plain")) is True
    assert set(ran.values()) == {None}


METHODS = pytest.mark.parametrize("method", ["oracle", "central"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (L.RNN, {}),
        (L.LSTM, {"num_layers": 2, "dropout": 0.5}),
        (L.GRU, {"num_layers": 2, "bidirectional": True}),
        (L.LSTM, {"fused": False, "layer_norm": True, "num_layers": 2, "dropout": 0.5}),
    ],
    ids=["rnn", "lstm-2", "gru-bi", "unfused-norm"],
)
@METHODS
def test_gradcheck_of_a_layer(gpu, kind, options, method):
    """With lengths and a reset; afterwards the layer is as it was, and where it was."""
    np.random.seed(0)
    layer = place(kind(3, dtype=np.float64, **options), put)
    reset = np.zeros((4, 3), bool)
    reset[2, 0] = True
    calls = {"lengths": [4, 2, 3], "reset": put(reset)}
    x = put(np.random.randn(4, 3, 2))
    layer(x)  # its sizes are known from here on, and where it can it carries a state
    before = {n: p._data for n, p in layer.named_params()}
    h = layer.h
    assert gradcheck(layer, x, method=method, options=calls, fast_mode=method == "central")
    assert layer.gpu
    assert layer.h is h
    assert all(p._data is before[n] for n, p in layer.named_params())


@METHODS
def test_gradcheck_of_one_step_and_a_state(gpu, method):
    np.random.seed(0)
    layer = place(L.LSTM(3, in_size=2, dtype=np.float64), put)
    x, h, c = put(*(np.random.randn(2, n) for n in (2, 3, 3)))
    assert gradcheck(layer, (x, (h, c)), method=method)


@METHODS
@pytest.mark.parametrize("tensor", ["dx", "dweights"])
def test_gradcheck_finds_a_wrong_gradient(gpu, monkeypatch, method, tensor):
    """Of the backend that runs there: that is what was evaluated."""
    backend = backends.get("cuda")
    backward = backend.backward

    def wrong(*args, **kwargs):
        found = backward(*args, **kwargs)
        array = found.dx if tensor == "dx" else found.dweights["weight_hh"]
        array[(0,) * array.ndim] = array[(0,) * array.ndim] * 1.01
        return found

    monkeypatch.setattr(backend, "backward", wrong)
    layer = place(L.GRU(3, in_size=2, dtype=np.float64), put)
    name = {"dx": r"gradient of x|/ d inputs\[0\]", "dweights": "(gradient of|/ d) weight_hh"}[tensor]
    with pytest.raises(GradcheckError, match=name):
        gradcheck(layer, put(np.random.randn(4, 3, 2)), method=method)


def test_gradcheck_of_functions_and_models(gpu):
    a, b = (fusedrnn.Variable(put(np.random.randn(3, 2))) for _ in range(2))
    assert gradcheck(lambda a, b: F.tanh(a) * b, (a, b))
    np.random.seed(0)
    assert gradcheck(place(Net(L.GRU, dtype=np.float64), put), put(np.random.randn(3, 2, 2)))


def test_info_shows_plans(gpu, capsys):
    found = system.info()
    assert found["backends"]["cuda"] is None
    assert found["backend"] != "cuda"
    assert len(found["cuda"]) == len(system.PLANNED)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for size, plans in found["cuda"].items():
        assert f"cuda, {size}" in out
        assert plans in out


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_what_the_fake_offers_exists_in_cupy():
    import cupy

    assert all(callable(getattr(cupy, n)) for n in fake_cupy.NAMES)
    assert callable(cupy.add.at)
    assert all(
        hasattr(cupy.ndarray, n)
        for n in fake_cupy.VALUES + fake_cupy.METHODS + ["get", "data", "device", "T"]
    )
    for n in fake_cupy.OPERATORS:
        assert hasattr(cupy.ndarray, f"__{n.strip('_')}__")
