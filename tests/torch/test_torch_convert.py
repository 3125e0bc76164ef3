"""convert, to_torch and patched: our layers in models that were built with ``torch.nn``'s, and back."""

from __future__ import annotations

import copy
import warnings

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch

from torch_pairs import CELLS, LAYERS, assert_close, every_kind, flat, ft

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("no_fallback")]


class Wrapped(torch.nn.Module):
    """PyTorch scripts its layers only within a module."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor):
        return self.layer(x)


class Model(torch.nn.Module):
    """A bit of everything, one layer under two names."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleDict({kind: getattr(torch.nn, kind)(3, 3) for kind in LAYERS + CELLS})
        self.again = self.layers["LSTM"]
        self.head = torch.nn.Linear(3, 2)

    def forward(self, x):
        for kind in LAYERS:
            x = self.layers[kind](x)[0]
        x = self.again(x)[0]
        return self.head(x + sum(flat(self.layers[kind](x[0]))[0] for kind in CELLS))


def test_convert_and_back():
    model = Model()
    plain, x = copy.deepcopy(model), torch.randn(4, 2, 3)
    before, optimizer = dict(model.named_parameters()), torch.optim.SGD(model.parameters(), 0.1)
    found = ft.convert(model)
    assert found.model is model
    assert found.converted == {f"layers.{kind}": kind for kind in LAYERS + CELLS}
    assert found.left == {}
    assert str(found).count("\n") == 5
    assert type(model.again) is ft.LSTM
    assert all(p is before[name] for name, p in model.named_parameters())
    other = torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(3):
        losses = []
        for m, o in ((plain, other), (model, optimizer)):
            o.zero_grad()
            loss = m(x).square().sum()
            loss.backward()
            o.step()
            losses.append(loss)
        assert_close(losses[1], losses[0])
    assert all(layer.last_path == "fused" for layer in model.layers.values())
    assert ft.convert(model).converted == {}  # they are ours already
    back = ft.to_torch(model)
    assert back.model is model
    assert back.converted == {f"layers.{kind}": kind for kind in LAYERS + CELLS}
    assert back.left == {}
    assert type(model.again) is torch.nn.LSTM
    assert not any("fusedrnn" in name or name == "last_path" for m in model.modules() for name in vars(m))
    assert_close(model(x), plain(x))


@every_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_one_layer_and_torchscript(kind):
    layer = getattr(torch.nn, kind)(3, 4)
    x = torch.randn(*(5, 2, 3)[len(kind) > 4 :])
    expected = flat(layer(x))
    assert ft.convert(layer).converted == {"": kind}
    for a, b in zip(flat(layer(x)), expected, strict=True):
        assert_close(a, b)
    ft.to_torch(layer)
    scripted = torch.jit.script(layer if kind in CELLS else Wrapped(layer))
    for a, b in zip(flat(scripted(x)), expected, strict=True):
        assert_close(a, b)


def test_what_is_left_and_why():
    class Own(torch.nn.LSTM):
        pass

    class Mine(ft.LSTM):
        pass

    found = ft.convert(torch.nn.Sequential(Own(2, 3), Mine(3, 3)))
    assert found.converted == {}
    assert found.left == {
        "0": "its class Own is not torch.nn's own",
        "1": "its class Mine is not torch.nn's own",
    }
    found = ft.to_torch(torch.nn.Sequential(Own(2, 3), Mine(3, 3)))
    assert found.converted == {}
    assert found.left == {"1": "its class Mine is derived from fusedrnn.torch's"}
    assert str(found) == "1: left as it is, its class Mine is derived from fusedrnn.torch's"
    assert str(ft.convert(torch.nn.Linear(1, 1))) == "no recurrent layer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LSTM(3, 5)))
    assert ft.convert(scripted).left == {"1": "it is a TorchScript module"}
    for wrong in (ft.convert, ft.to_torch):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
            wrong(3)


@every_kind
def test_parametrized_layers_are_converted_both_ways(kind):
    layer, x = getattr(torch.nn, kind)(3, 4), torch.randn(*(5, 2, 3)[len(kind) > 4 :])
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0" if kind in LAYERS else "weight_hh")
    model = torch.nn.Sequential(layer)
    other, expected = copy.deepcopy(layer), flat(model(x))
    assert ft.convert(model).converted == {"0": kind}
    assert not isinstance(other, getattr(ft, kind))  # the copy had the same class
    for a, b in zip(flat(model(x)), expected, strict=True):
        assert_close(a, b)
    assert layer.last_path == "fused"
    sum(t.sum() for t in flat(model(x))).backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert ft.to_torch(model).converted == {"0": kind}
    for a, b in zip(flat(model(x)), expected, strict=True):
        assert torch.equal(a, b)
    assert not isinstance(layer, getattr(ft, kind))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
@pytest.mark.usefixtures("warned")
@pytest.mark.parametrize("kind", LAYERS)
def test_torchscript_takes_pytorchs_layer_and_says_so(kind):
    model = torch.nn.Sequential(getattr(ft, kind)(3, 4)).eval()
    x = torch.randn(5, 2, 3)
    expected = model(x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scripted = torch.jit.script(model)
    assert any(w.category is ft.FallbackWarning and "to_torch" in str(w.message) for w in told)
    assert type(model[0]) is getattr(torch.nn, kind)
    assert_close(scripted(x)[0], expected[0])
    ft.set_fallback_errors(True)
    try:
        with pytest.raises(RuntimeError, match="TorchScript"):
            torch.jit.script(torch.nn.Sequential(getattr(ft, kind)(3, 4)))
    finally:
        ft.set_fallback_errors(False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_torchscript_of_what_torch_nn_lacks():
    class Mine(ft.LSTM):
        pass

    layers = {"zoneout_h": ft.LSTM(3, 4, zoneout_h=0.1), r"Mine.*derive it from torch\.nn": Mine(3, 4)}
    for text, layer in layers.items():
        with pytest.raises((ValueError, RuntimeError), match=text):
            torch.jit.script(torch.nn.Sequential(layer))


def test_patched():
    before = torch.nn.LSTM
    with ft.patched():
        built = [getattr(torch.nn, kind)(3, 4) for kind in LAYERS + CELLS]
        assert torch.nn.modules.rnn.GRU is ft.GRU
        with ft.patched():
            pass
    assert torch.nn.LSTM is before
    for layer, kind in zip(built, LAYERS + CELLS, strict=True):
        assert type(layer) is getattr(ft, kind)
    with pytest.raises(ValueError, match="inside"), ft.patched():
        raise ValueError("inside")
    assert torch.nn.LSTM is before


def test_a_switch_is_true_or_false():
    with pytest.raises(TypeError, match="on: expected True or False, got str"):
        ft.set_fallback_errors("no")
    with pytest.raises(TypeError, match="compilable: expected True or False, got str"):
        ft.convert(torch.nn.LSTM(3, 4), compilable="no")
