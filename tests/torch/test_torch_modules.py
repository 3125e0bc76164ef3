"""The layers of ``fusedrnn.torch`` as modules: seeds, copies, files, weights that others change."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from torch.nn.utils import parametrizations

from torch_pairs import (
    B,
    H,
    I,
    T,
    assert_close,
    assert_same,
    every_kind,
    every_layer,
    flat,
    ft,
    grads,
    inputs,
    module_pair,
)

pytestmark = pytest.mark.usefixtures("no_fallback")


# --- as modules -----------------------------------------------------------------------------------------


@every_layer
def test_the_same_seed_gives_the_same_weights_and_names(kind):
    torch.manual_seed(5)
    theirs = getattr(torch.nn, kind)(I, H, 2, bidirectional=True)
    torch.manual_seed(5)
    ours = getattr(ft, kind)(I, H, 2, bidirectional=True)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    for (n, p), (m, q) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert n == m
        assert torch.equal(p, q)


def forget_biases(layer):
    """The sum of the two, for each layer and direction."""
    H = layer.hidden_size
    both = [[p for n, p in layer.named_parameters() if n.startswith(b)] for b in ("bias_ih", "bias_hh")]
    return [(b + c)[H : 2 * H] for b, c in zip(*both, strict=True)]


@pytest.mark.parametrize("kind", [ft.LSTM, ft.compilable.LSTM, ft.LSTMCell])
def test_forget_bias(kind):
    """Initial values alone; the others are those of PyTorch for the seed."""
    more = {} if kind is ft.LSTMCell else {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(5)
    theirs = getattr(torch.nn, kind.__name__)(I, H, **more)
    torch.manual_seed(5)
    ours = kind(I, H, **more, forget_bias=1.5)
    gate = torch.arange(4 * H) // H
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        same = (gate != 1) if "bias" in name else slice(None)
        assert torch.equal(p[same], q[same])
    for start in forget_biases(ours):
        assert (start == 1.5).all()
    assert repr(ours) == repr(theirs)[:-1] + ", forget_bias=1.5)"
    drawn = ours.state_dict()["bias_hh" + ("" if kind is ft.LSTMCell else "_l0")].clone()
    ours.reset_parameters()
    for start in forget_biases(ours):
        assert (start == 1.5).all()
    assert not torch.equal(ours.state_dict()["bias_hh" + ("" if kind is ft.LSTMCell else "_l0")], drawn)
    x = torch.randn(*(() if kind is ft.LSTMCell else (T,)), B, I)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
        assert other.forget_bias == 1.5
        for a, b in zip(flat(other(x)), flat(ours(x)), strict=True):
            assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(flat(theirs(x)), flat(ours(x)), strict=True):
        assert_close(b, a)
    converted = ft.convert(torch.nn.ModuleList([ours]), compilable=True).model[0]
    assert converted.forget_bias == 1.5
    plain = ft.to_torch(ours).model
    assert type(plain) is type(theirs)
    assert repr(plain) == repr(theirs)
    assert vars(plain).keys() == vars(theirs).keys()
    ft.convert(plain)
    assert plain.forget_bias is None
    plain.reset_parameters()
    assert not any((start == 1.5).any() for start in forget_biases(plain))


@pytest.mark.parametrize("kind", [ft.LSTM, ft.GRU, ft.LSTMCell])
def test_a_weight_that_is_gone(kind):
    for begin in ("weight_ih", "weight_hh"):
        layer = kind(I, H)
        name = next(name for name, _ in layer.named_parameters() if name.startswith(begin))
        setattr(layer, name, None)
        for gone in (False, True):
            if gone:
                delattr(layer, name)
            for grad in (False, True):
                with torch.set_grad_enabled(grad), pytest.raises(TypeError) as error:
                    layer(torch.randn(*[4] * (kind is not ft.LSTMCell), 2, I))
                assert type(error.value) is TypeError
                assert str(error.value) == f"{name}: expected a tensor, got None"


def test_wrong_forget_biases():
    for kind in (ft.LSTM, ft.compilable.LSTM, ft.LSTMCell):
        for wrong in ("1", True, torch.ones(H), [1.0]):
            with pytest.raises(TypeError, match="forget_bias: expected a number or None, got "):
                kind(I, H, forget_bias=wrong)
        for wrong in (torch.nan, -torch.inf):
            with pytest.raises(ValueError, match=f"forget_bias: expected a finite number, got {wrong}"):
                kind(I, H, forget_bias=wrong)
        with pytest.raises(ValueError, match="forget_bias: expected None in a layer with bias=False, got 1"):
            kind(I, H, bias=False, forget_bias=1)
        assert kind(I, H, bias=False).forget_bias is None
        assert kind(I, H, forget_bias=np.float32(2), device="meta").forget_bias == 2
    for kind in (ft.GRU, ft.RNN, ft.GRUCell):
        with pytest.raises(TypeError, match="forget_bias"):
            kind(I, H, forget_bias=1.0)


@pytest.mark.quick
@every_layer
def test_state_dicts_load_both_ways(kind):
    theirs, ours = module_pair(kind, I, H, num_layers=2)
    x = torch.randn(T, B, I)
    ours(x)
    other = getattr(torch.nn, kind)(I, H, num_layers=2)
    other.load_state_dict(ours.state_dict())
    assert_close(other(x)[0], ours(x)[0])
    third = getattr(ft, kind)(I, H, num_layers=2)
    third(x)
    third.load_state_dict(theirs.state_dict())
    assert torch.equal(third(x)[0], ours(x)[0])


@every_layer
def test_copies(kind, tmp_path):
    _, ours = module_pair(kind, I, H, num_layers=2)
    ours.recompute = True
    x = torch.randn(T, B, I)
    expected = ours(x)[0]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(ours)
        assert other.recompute
        assert torch.equal(other(x)[0], expected)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.weight_hh_l0.zero_()
    assert not torch.equal(other(x)[0], expected)
    assert torch.equal(ours(x)[0], expected)


@every_layer
def test_safetensors(kind, tmp_path):
    safe = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    _, ours = module_pair(kind, I, H, num_layers=2, bidirectional=True)
    safe.save_file(ours.state_dict(), tmp_path / "layer.safetensors")
    other = getattr(ft, kind)(I, H, num_layers=2, bidirectional=True)
    safe.load_model(other, tmp_path / "layer.safetensors")
    x = torch.randn(T, B, I)
    assert torch.equal(other(x)[0], ours(x)[0])


@every_layer
def test_to_another_dtype(kind):
    theirs, ours = module_pair(kind, I, H)
    x, hx = inputs(ours)
    ours(x, hx)
    assert ours.double() is ours
    wide = tuple(s.double() for s in hx) if kind == "LSTM" else hx.double()
    assert_same(theirs.double(), ours, grads(x.detach().double()), wide)
    assert_same(theirs.to(torch.float32), ours.to(torch.float32), x, hx)


@every_layer
def test_frozen_weights(kind):
    theirs, ours = module_pair(kind, I, H, dtype=torch.float64)
    x, hx = inputs(ours, torch.float64)
    for frozen in (("weight",), ("bias",), ("weight_ih",), ("bias_hh", "weight_hh"), ("weight", "bias")):
        for layer in (theirs, ours):
            for name, p in layer.named_parameters():
                p.requires_grad_(not name.startswith(frozen))
        assert_same(theirs, ours, x, hx)
        assert_same(theirs, ours, x.detach(), hx)
        assert_same(theirs, ours, x.detach())
    if kind == "LSTM":
        assert_same(theirs, ours, x, (hx[0].detach(), hx[1]))
        assert_same(theirs, ours, x.detach(), (hx[0], hx[1].detach()))


@every_layer
def test_tied_weights(kind):
    pairs = [module_pair(kind, H, H, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(T, B, H, dtype=torch.float64)
    found = []
    for side in (0, 1):
        first, second = pairs[0][side], pairs[1][side]
        second.weight_hh_l0 = first.weight_hh_l0
        first.weight_ih_l0 = first.weight_hh_l0  # and within one layer
        second(first(x)[0])[0].square().sum().backward()
        found.append([p.grad for p in (*first.parameters(), *second.parameters())])
    for a, b in zip(*found, strict=True):
        assert_close(b, a)


@every_layer
def test_modes_without_gradients(kind):
    theirs, ours = module_pair(kind, I, H)
    x, hx = inputs(ours)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, _ = assert_same(theirs, ours, x, hx)
            assert not y.requires_grad
            assert y.is_inference() == (mode is torch.inference_mode)
    assert_same(theirs.eval(), ours.eval(), x, hx)
    with torch.inference_mode():  # parameters without a version
        theirs, ours = module_pair(kind, I, H)
        assert_same(theirs, ours, x.detach())
        ours.weight_hh_l0[0, 0] += 1
        theirs.weight_hh_l0[0, 0] += 1
        assert_same(theirs, ours, x.detach())


@every_kind
def test_parameters_made_in_inference_mode_learn(kind):
    """In torch.nn such a layer raises an error, and of a cell only the biases get a gradient."""
    with torch.inference_mode():
        ours = getattr(ft, kind)(I, H)
    plain = getattr(ft, kind)(I, H)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(*((B, I) if kind.endswith("Cell") else (T, B, I)), requires_grad=True)
    found = [torch.autograd.grad(flat(m(x))[0].sum(), [x, *m.parameters()]) for m in (ours, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_layer
def test_functional_call(kind):
    theirs, ours = module_pair(kind, I, H)
    x = torch.randn(T, B, I)
    expected = ours(x)[0]
    for _ in range(4):  # the temporaries often take the same memory again
        other = {name: torch.randn_like(p, requires_grad=True) for name, p in ours.named_parameters()}
        results = []
        for layer in (theirs, ours):
            y = torch.func.functional_call(layer, other, (x,))[0]
            results.append((y, *torch.autograd.grad(y.square().sum(), list(other.values()))))
        for a, b in zip(*results, strict=True):
            assert_close(b, a)
        assert ours.last_path == "fused"
        del other, results, y
    assert torch.equal(ours(x)[0], expected)


@every_layer
def test_flat_weights_are_not_read(kind):
    _, ours = module_pair(kind, I, H)
    x = torch.randn(T, B, I)
    want = ours(x)[0]
    ours._flat_weights = [torch.full_like(w, torch.nan) for w in ours._flat_weights]
    assert torch.equal(ours(x)[0], want)


@every_layer
@pytest.mark.parametrize("old", [False, True])
def test_weight_norm(kind, old):
    theirs, ours = module_pair(kind, I, H, dtype=torch.float64)
    x, hx = inputs(ours, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old one is deprecated
        for layer in (theirs, ours):
            layer(x)
            (torch.nn.utils.weight_norm if old else parametrizations.weight_norm)(layer, "weight_hh_l0")
    for _ in range(3):
        results = []
        for layer in (theirs, ours):
            optimizer = torch.optim.SGD(layer.parameters(), 0.1)
            optimizer.zero_grad()
            y = layer(x, hx)[0]
            y.square().sum().backward()
            results.append([y, *(p.grad.clone() for p in layer.parameters())])
            optimizer.step()
        assert ours.last_path == "fused"
        for a, b in zip(*results, strict=True):
            assert_close(b, a)


# --- packed weights are never stale ---------------------------------------------------------------------


def rename(layer, change):
    """Apply ``change`` to each parameter."""
    for p in layer.parameters():
        change(p)


def in_place(layer):
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] += 1


def step(layer):
    layer(torch.ones(2, 1, I))[0].sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()


def replace(layer):
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach() + 1)


def other_memory(layer):
    layer.weight_hh_l0.data = layer.weight_hh_l0.data + 1


def transposed(layer):
    layer.weight_hh_l0.data = torch.randn(H, layer.weight_hh_l0.size(0)).t()


def soft_update(layer):
    for p in layer.parameters():
        p.data.mul_(0.9).add_(0.1 * torch.ones_like(p))


def soft_update_of_one(layer):
    layer.bias_hh_l0.data.lerp_(torch.ones_like(layer.bias_hh_l0), 1e-3)


def copied_through_data(layer):
    layer.weight_ih_l0.data.copy_(torch.randn_like(layer.weight_ih_l0))


def cleared_through_data(layer):
    layer.weight_hh_l0.data[:] = 0


def initialised(layer):
    torch.nn.init.orthogonal_(layer.weight_hh_l0)


def loaded(layer):
    layer.load_state_dict({name: torch.randn_like(p) for name, p in layer.state_dict().items()})


def assigned(layer):
    layer.load_state_dict({name: torch.randn_like(p) for name, p in layer.state_dict().items()}, assign=True)


def through_numpy(layer):
    layer.weight_hh_l0.detach().numpy()[...] *= -1


def as_vector(layer):
    vector = torch.nn.utils.parameters_to_vector(layer.parameters())
    torch.nn.utils.vector_to_parameters(vector + 1, layer.parameters())


def renewed(layer):
    layer.reset_parameters()


def one_element(layer):
    layer.weight_hh_l0.data[1, 2] += 1


@pytest.mark.quick
@every_layer
@pytest.mark.parametrize(
    "change",
    [in_place, step, replace, other_memory, transposed, soft_update, soft_update_of_one, copied_through_data,
     cleared_through_data, initialised, loaded, assigned, through_numpy, as_vector, renewed, one_element],
)  # fmt: skip
@pytest.mark.parametrize("hidden", [3, H, 40])
def test_packed_weights_are_never_stale(kind, change, hidden, monkeypatch):
    monkeypatch.setitem(globals(), "H", hidden)
    theirs, ours = module_pair(kind, I, hidden)
    x = torch.randn(T, B, I)
    before = ours(x)[0]
    change(ours)
    got = ours(x)[0]
    assert not torch.equal(got, before)
    theirs.load_state_dict(ours.state_dict())
    assert_close(got, theirs(x)[0])
