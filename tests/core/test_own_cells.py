"""Cells that a user writes: sequences by the reference, unfused, in PyTorch's operations and by Numba.

The values of a step are tested in tests/cells; here it is what a layer does around it: padding, resets,
directions, layers, regularization, files.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fusedrnn.layers as L
from fusedrnn import Model, Variable, checkpoint, gradcheck_suite, kernels
from fusedrnn.backends import get
from fusedrnn.backends.protocol import Regularization
from fusedrnn.cells import cell, lstm, maximum, minimum, relu, sigmoid, softplus, tanh, where
from fusedrnn.gradcheck import gradcheck
from problems import assert_close, name, problem, run
from rewritten import REFUSED, WARNED, mgu_of

REFERENCE, NUMBA, CPU = get("reference"), get("numba"), get("cpu")
needs_cpu = pytest.mark.skipif(CPU.unavailable() is not None, reason=str(CPU.unavailable()))
needs_numba = pytest.mark.skipif(NUMBA.unavailable() is not None, reason=str(NUMBA.unavailable()))


@cell
def mgu(p, x, h):
    """Zhou et al. 2016."""
    f = sigmoid(p.dense("f", x, h))
    n = tanh(p.dense("n", x, f * h))
    return n + (1 - f) * (h - n)


@cell
def ind_rnn(p, x, h):
    """Li et al. 2018."""
    return relu(p.dense("a", x) + p.vector("u", init=(0.0, 1.0)) * h)


@cell
def normed(p, x, h, c, n=1):
    """Three states, of which one starts from 1; two operands beside x; a norm; a vector from a function."""
    i, f, o = p.layer_norm("all", *p.dense("i f o", x, h))
    f, n = sigmoid(f + 0.2 * p.vector("decay", init=np.ones) * c), sigmoid(f) * n + sigmoid(i)
    c = f * c + tanh(i) + tanh(p.dense("q", c / n))
    return sigmoid(o) * tanh(c / n), c, n


OWN = [mgu, ind_rnn, normed]
own = pytest.mark.parametrize("cell", OWN, ids=name)
OPTIONS = [
    {},
    {"reverse": True, "reset": True},
    {"lengths": True, "return_states": True},
    {"lengths": True, "reset": True, "reverse": True, "return_states": True},
    {"biases": "none", "state0": False, "reset": True},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


# --- the reference ------------------------------------------------------------------------------------------


@own
def test_the_gradient_check_of_the_suite(cell):
    backends = ["oracle", "reference"]
    rows = gradcheck_suite.run_suite(
        cells=[cell], backends=backends, sizes=gradcheck_suite.QUICK, dtypes=["float64"]
    )
    assert len(rows) == len(backends) * sum("layer-norm" not in name for name in gradcheck_suite.OPTIONS)
    assert [row.note for row in rows if not row.passed] == []


@pytest.mark.parametrize("seed", [None, 7])
@own
def test_the_reference_with_masks_and_detach_every(cell, seed):
    """Against PyTorch's recording of the same steps. Rows end where gradients stop: ends are not cut off."""
    rates = [0.25 if state in cell.states else 0.0 for state in "hc"]
    dropout = 0.25 if "weight_hh" in cell.blocks else 0.0
    options = {"regularization": Regularization(dropout, *rates, seed), "detach_every": 2, "lengths": True}
    for reverse in (False, True):
        torch_recurrence_is_the_reference(cell, options | {"reverse": reverse})


def test_a_state_starts_from_its_default_and_again_after_a_reset():
    p = problem(normed, 5, 3, 2, 7, state0=False)
    cut = np.zeros((5, 3), bool)
    cut[3] = True
    whole = kernels.forward(normed, p.x, p.weights, reset=cut, backend="reference")
    start = tuple(np.full((3, 7), n) for n in (0.0, 0.0, 1.0))
    first = kernels.forward(normed, p.x[:3], p.weights, start, backend="reference")
    second = kernels.forward(normed, p.x[3:], p.weights, backend="reference")
    np.testing.assert_array_equal(whole.y, np.concatenate([first.y, second.y]))
    np.testing.assert_array_equal(whole.stateT[2], second.stateT[2])
    back = kernels.backward(whole.tape, whole.y)
    assert not any(d is None for d in back.dweights.values())


# --- layers -------------------------------------------------------------------------------------------------


@own
def test_layers_fused_and_unfused_are_the_same(cell):
    rng = np.random.default_rng(1)
    x, n = rng.standard_normal((6, 3, 4)), [6, 0, 4]
    fused, unfused = (
        L.Recurrent(cell, 5, 4, num_layers=2, bidirectional=True, dtype="float64", **how)
        for how in ({"backend": "reference"}, {"fused": False})
    )
    for p, q in zip(fused.params(), unfused.params(), strict=True):
        p.data = q.data = rng.standard_normal(p.shape) / 2
    found, reset = [], rng.random((6, 3)) < 0.3
    reset[0, 0] = reset[3, 2] = True
    for net in (fused, unfused):
        given = Variable(x)
        y = net(given, lengths=n, reset=reset)
        (y * y).sum().backward()
        found.append({"y": y.data, "dx": given.grad.data} | {n: p.grad.data for n, p in net.named_params()})
    assert found[0].keys() == found[1].keys()
    assert_close(found[0], found[1], 1e-13)


def test_numbers_do_not_widen_an_unfused_layer():
    """As fused, all is in the dtype of the layer, also with a state of another one."""

    @cell
    def bounded(p, x, h):
        a = maximum(p.dense("a", x, h), -0.5)
        return where(a > 0, minimum(a, 0.5), softplus(a) * where(h > 0, 1.0, -1.0))

    x = np.random.default_rng(0).standard_normal((4, 2, 2))
    for dtype in (np.float32, np.float64):
        layer = L.Recurrent(bounded, 3, 2, dtype=dtype, fused=False)
        assert layer(x).dtype == layer.h.dtype == dtype
        assert layer(x, (np.ones((2, 3)),)).dtype == layer.h.dtype == dtype
        layer(x).sum().backward()
        assert layer.weight_ih.grad.dtype == dtype


@pytest.mark.parametrize("how", [{"backend": "reference"}, {"fused": False}], ids=str)
@own
def test_a_layer_passes_the_gradient_check(cell, how):
    net = L.Recurrent(cell, 5, 4, dtype="float64", **how)
    x = np.random.default_rng(0).standard_normal((6, 3, 4))
    assert gradcheck(net, x, options={"lengths": [6, 1, 3]})
    assert gradcheck(net, x, method="central", fast_mode=True)
    assert gradcheck(net, x[0])  # one step, from the state that the layer carries


def test_what_vectors_start_from():
    net = L.Recurrent(normed, 8, 3)
    assert net.decay.data.tolist() == net.gain_all.data.tolist()[:8] == [1] * 8
    u = L.Recurrent(ind_rnn, 1000, 3).u.data
    assert u.dtype == np.float32
    assert 0 <= u.min() < 0.1 < 0.9 < u.max() <= 1


def test_a_layer_carries_each_state_by_its_name():
    net = L.Recurrent(normed, 5, 4, backend="reference", dtype="float64")
    x = np.random.default_rng(0).standard_normal((6, 3, 4))
    whole = net(x).data
    net.reset_state()
    halves = [net(x[:3]).data, net(x[3:]).data]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    net.reset_state()
    net.c = np.zeros((3, 5))  # the others where they start
    assert [s.data.ravel()[0] for s in net.state] == [0, 0, 1]
    np.testing.assert_array_equal(net(x).data, whole)


def test_a_name_that_a_layer_has_already_is_refused():
    @cell
    def careless(p, x, dtype):
        return tanh(p.dense("a", x, dtype))

    with pytest.raises(ValueError, match=r"cell: expected states .* not attributes of a layer, got dtype"):
        L.Recurrent(careless, 5)


def test_weights_in_a_file_and_pickled_models(tmp_path):
    net = L.Recurrent(ind_rnn, 5, 4, num_layers=2, backend="reference")
    net.save_weights(tmp_path / "w.npz")
    other = L.Recurrent(ind_rnn, 5, num_layers=2, backend="reference")
    other.load_weights(tmp_path / "w.npz")
    x = np.random.default_rng(0).standard_normal((6, 3, 4))
    want = net(x).data
    carried = pickle.loads(pickle.dumps(net))  # with the state that the call left
    np.testing.assert_array_equal(carried.state[0].data, net.state[0].data)
    assert carried.state[0].creator is None
    for same in (other, carried, copy.deepcopy(net)):
        same.reset_state()
        np.testing.assert_array_equal(same(x).data, want)


class Net(Model):
    def __init__(self, rnn):
        super().__init__()
        self.first, self.rnn = L.Linear(2, in_size=2), rnn


def values_of(model):
    return {name: p.data.copy() for name, p in model.named_params()}


FILES = [
    (lambda model, path: model.save_weights(path), lambda model, path: model.load_weights(path)),
    (lambda model, path: checkpoint.save(path, model), lambda model, path: checkpoint.load(path, model)),
]
files = pytest.mark.parametrize(("save", "load"), FILES, ids=["weights", "checkpoint"])


@files
@pytest.mark.parametrize("change", REFUSED)
def test_a_cell_with_other_gates_or_states_loads_no_weights(tmp_path, save, load, change):
    save(Net(L.Recurrent(mgu_of(), 5, 4)), tmp_path / "w")
    model = Net(L.Recurrent(mgu_of(change), 5, 4))
    before = values_of(model)
    with pytest.raises(ValueError, match=f"entry 'rnn/cell': .*{REFUSED[change]}"):
        load(model, tmp_path / "w")
    for key, array in values_of(model).items():
        np.testing.assert_array_equal(array, before[key])


@files
def test_a_cell_that_computes_something_else_loads_weights_with_a_warning(tmp_path, save, load):
    saved = Net(L.Recurrent(mgu_of(), 5, 4))
    save(saved, tmp_path / "w")
    for change in ("arithmetic", ""):  # the last is the same cell, defined again
        model = Net(L.Recurrent(mgu_of(change), 5, 4))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            load(model, tmp_path / "w")
        assert [(str(w.message), w.filename) for w in found] == [(WARNED, __file__)] * bool(change)
        for key, array in values_of(model).items():
            np.testing.assert_array_equal(array, values_of(saved)[key])


def test_weights_without_the_order_of_the_gates_load(tmp_path):
    layer = L.Recurrent(mgu_of(), 5, 4)
    layer.save_weights(tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as file:
        arrays = dict(file)
    assert arrays.pop("cell")[1].tolist() == ["weight_ih", "f n"]
    np.savez(tmp_path / "old.npz", **arrays)
    L.Recurrent(mgu_of("order"), 5, 4).load_weights(tmp_path / "old.npz")
    for named in (L.LSTM(5, 4), L.GRU(5, 4), L.RNN(5, 4), L.Recurrent(lstm, 5, 4)):
        named.save_weights(tmp_path / "named.npz")
        with np.load(tmp_path / "named.npz") as file:
            assert set(file) == {name for name, _ in named.named_params()}


# --- PyTorch ------------------------------------------------------------------------------------------------


def in_torch(p):
    """Results and gradients by name, as ``problems.run`` has them."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from fusedrnn.torch.differentiable import recurrence

    def leaf(a):
        return torch.from_numpy(a.copy()).requires_grad_()

    x, weights = leaf(p.x), {n: leaf(w) for n, w in p.weights.items()}
    state0 = None if p.state0 is None else [leaf(s) for s in p.state0]
    y, final, every = recurrence(p.cell, x, weights, state0, **p.options)
    pairs = [(y, p.dy), *zip(final, p.dstateT, strict=True), *zip(every or (), p.dstates or (), strict=True)]
    valid = torch.ones(len(y), y.shape[1], 1, dtype=torch.bool)
    if p.lengths is not None:
        valid = (torch.arange(len(y))[:, None] < torch.as_tensor(p.lengths))[..., None]
    loss = sum(
        torch.where(valid, a * torch.from_numpy(np.nan_to_num(d)), 0).sum() if a.ndim == 3
        else (a * torch.from_numpy(d)).sum()
        for a, d in pairs
    )  # fmt: skip
    loss.backward()
    found = {"y": y, "dx": x.grad} | {f"d{n}": w.grad for n, w in weights.items()}
    found |= {f"{s}T": a for s, a in zip(p.cell.states, final, strict=True)}
    found |= dict(zip(p.cell.states, every or (), strict=False))
    if state0 is not None:
        found |= {f"d{s}0": a.grad for s, a in zip(p.cell.states, state0, strict=True)}
    return {n: a.detach().numpy() for n, a in found.items()}


def torch_recurrence_is_the_reference(cell, options):
    p = problem(cell, 7, 3, 4, 5, **options)
    if p.detach_every:
        p = replace(p, lengths=p.lengths // p.detach_every * p.detach_every)
    want = run(REFERENCE, p)
    if p.state0 is None:  # a gradient that goes nowhere in PyTorch
        want = {n: a for n, a in want.items() if n not in {f"d{s}0" for s in cell.states}}
    assert_close(in_torch(p), want, 1e-13)


@options
@own
def test_in_pytorchs_operations(cell, options):
    torch_recurrence_is_the_reference(cell, options)


@own
def test_derivatives_of_gradients_in_pytorch(cell):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from fusedrnn.torch.differentiable import recurrence

    p = problem(cell, 3, 2, 2, 3)
    names = list(p.weights)
    arrays = [torch.from_numpy(a).requires_grad_() for a in (p.x, *p.state0, *p.weights.values())]

    def function(x, *rest):
        n = len(cell.states)
        weights = dict(zip(names, rest[n:], strict=True))
        y, final, _ = recurrence(cell, x, weights, rest[:n], reset=np.array([[0, 0], [0, 1], [1, 0]], bool))
        return (y, *final)

    assert torch.autograd.gradcheck(function, arrays, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arrays, fast_mode=True)


# --- C++ ----------------------------------------------------------------------------------------------------


@needs_cpu
@options
@own
def test_by_the_compiled_module(cell, options):
    p = problem(cell, 7, 3, 4, 5, **options)
    assert_close(run(CPU, p), run(REFERENCE, p), 1e-13)


@needs_cpu
@own
def test_the_gradient_check_of_the_suite_by_the_compiled_module(cell):
    rows = gradcheck_suite.run_suite(
        cells=[cell], backends=["cpu"], sizes=gradcheck_suite.QUICK, dtypes=["float64"]
    )
    assert len(rows) == 16
    assert [row.note for row in rows if not row.passed] == []


@needs_cpu
@own
def test_a_layer_by_the_compiled_module(cell):
    """It is what runs where nothing else is asked for."""
    net = L.Recurrent(cell, 5, 4, num_layers=2, bidirectional=True, dtype="float64")
    x = np.random.default_rng(0).standard_normal((6, 3, 4))
    assert gradcheck(net, x, options={"lengths": [6, 1, 3]})
    net = L.Recurrent(cell, 5, 4, backend="cpu", dtype="float64")
    assert gradcheck(net, x, method="central", fast_mode=True)
    assert gradcheck(net, x[0])  # one step, from the state that the layer carries
    whole = net(x).data
    net.reset_state()
    np.testing.assert_array_equal(np.concatenate([net(x[:3]).data, net(x[3:]).data]), whole)


@needs_cpu
def test_a_layer_with_masks_and_recompute_by_the_compiled_module():
    options = {"recurrent_dropout": 0.2, "zoneout_h": 0.1, "num_layers": 2, "dtype": "float64"}
    x = np.random.default_rng(0).standard_normal((40, 3, 4))
    found = []
    for backend in ("cpu", "reference"):
        np.random.seed(0)
        net = L.Recurrent(mgu, 5, 4, recompute=True, backend=backend, **options)
        given = Variable(x)
        y = net(given)
        (y * y).sum().backward()
        found.append({"y": y.data, "dx": given.grad.data} | {n: p.grad.data for n, p in net.named_params()})
    assert_close(*found, 1e-13)
    assert gradcheck(L.Recurrent(mgu, 5, 4, recompute=True, **options), x[:6])


# --- Numba --------------------------------------------------------------------------------------------------


@needs_numba
@options
@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=[pytest.mark.slow] * (c is not ind_rnn)) for c in OWN], ids=name
)
def test_by_numba(cell, options):
    """What the others have is in cells of numba/test_numba_cells.py; ind_rnn has no product with h."""
    p = problem(cell, 7, 3, 4, 5, **options)
    assert_close(run(NUMBA, p), run(REFERENCE, p), 1e-13)


# --- what is refused ----------------------------------------------------------------------------------------


def test_masks_of_what_a_cell_does_not_have():
    with pytest.raises(ValueError, match=r"zoneout_c: expected 0 for the cell mgu, which has no c, got 0\.5"):
        L.Recurrent(mgu, 5, zoneout_c=0.5)
    message = (
        r"recurrent_dropout: expected 0 for the cell ind_rnn, whose p.dense multiplies x alone, got 0\.5"
    )
    with pytest.raises(ValueError, match=message):
        L.Recurrent(ind_rnn, 5, recurrent_dropout=0.5)
    p = problem(ind_rnn, 2, 1, 3, 4)
    for seed in (None, 1):
        with pytest.raises(ValueError, match=message):
            kernels.forward(ind_rnn, p.x, p.weights, regularization=Regularization(0.5, seed=seed))


def test_a_cell_of_a_name_that_computes_something_else_is_not_pickled(monkeypatch):
    """As after a second definition in a notebook, and after an edit of the file."""

    @cell
    def other(p, x, h):
        return 2 * tanh(p.dense("n", x, h))

    kept = pickle.dumps(mgu)
    monkeypatch.setitem(globals(), "mgu", other)
    with pytest.raises(pickle.UnpicklingError, match=r"test_own_cells.mgu does not compute the same"):
        pickle.loads(kept)
    with pytest.raises(pickle.PicklingError, match=r"the cell mgu is not what test_own_cells.mgu is now"):
        pickle.dumps(OWN[0])
    assert OWN[0].digest != OWN[1].digest


def test_a_cell_inside_a_function_is_not_pickled():
    @cell
    def hidden(p, x, h):
        return tanh(p.dense("a", x, h))

    assert copy.deepcopy(hidden) is hidden
    with pytest.raises(pickle.PicklingError, match="the cell hidden is defined inside a function; define it"):
        pickle.dumps(hidden)
    for one in (mgu, lstm, lstm.with_options(layer_norm=True)):
        assert pickle.loads(pickle.dumps(one)) == one


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page(capsys):
    page = (Path(__file__).parents[2] / "docs" / "cells.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["y"].shape == (50, 8, 32)
    assert "mgu(p, x, h)\n  weight_ih: f n\n" in capsys.readouterr().out
