"""freeze and unfreeze: weights that stand still, and what is refused meanwhile."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from torch.nn.utils import prune

from bfloat16 import needs_bfloat16
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.cells.zoo import mgu
from torch_pairs import every_kind, every_layer, flat, ft, module_pair, state_of

pytestmark = [pytest.mark.kernel, pytest.mark.quick, pytest.mark.usefixtures("no_fallback")]

I, H, T, B = 5, 7, 6, 3


def made(kind, **options):
    _, ours = module_pair(kind, I, H, **options)
    x = torch.randn(*((T, B, I) if isinstance(ours, torch.nn.RNNBase) else (B, I)))
    return ours.eval(), x, state_of(ours, B, x)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits(kind, dtype):
    ours, x, hx = made(kind)
    ours, x = ours.to(dtype), x.to(dtype)
    hx = tuple(s.to(dtype) for s in hx) if isinstance(hx, tuple) else hx.to(dtype)
    with torch.no_grad():
        expected = [flat(ours(x, hx)), flat(ours(x)), flat(ours(x[..., 0, :]))]
        assert ft.freeze(ours) is ours
        for want, args in zip(expected, ((x, hx), (x,), (x[..., 0, :],)), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(flat(ours(*args)), want, strict=True))
    assert ours.last_path == "fused"
    ft.freeze(ft.unfreeze(ours).requires_grad_(False))
    for a, b in zip(flat(ours(x)), expected[1], strict=True):  # where no gradient could be asked for
        assert torch.equal(a, b)


@every_kind
@needs_bfloat16
def test_the_same_bits_in_bfloat16(kind):
    ours, x, hx = made(kind, **({} if kind.endswith("Cell") else {"num_layers": 2, "bidirectional": True}))
    ours, x = ours.bfloat16(), x.bfloat16()
    hx = tuple(s.bfloat16() for s in hx) if isinstance(hx, tuple) else hx.bfloat16()
    with torch.no_grad():
        want = flat([ours(x, hx), ours(x[:1])])
        ft.freeze(ours)
        got = flat([ours(x, hx), ours(x[:1])])
    assert ours.last_path == "fused"
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_bfloat16
@pytest.mark.parametrize("options", [{"layer_norm": True}, {"proj_size": 5}], ids=str)
def test_options_in_bfloat16(options):
    ours, x = ft.LSTM(I, H, **options).bfloat16().eval(), torch.randn(T, B, I).bfloat16()
    with torch.no_grad():
        want = flat(ours(x))
        got = flat(ft.freeze(ours)(x))
    assert ours.last_path == "fused"
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_weight_that_a_hook_computes_is_refused():
    """Between a change of what it is computed from and the next call it is that of before."""
    hooks = {
        "weight_norm": lambda layer, name: torch.nn.utils.weight_norm(layer, name),
        "pruning": lambda layer, name: prune.l1_unstructured(layer, name, 0.5),
    }
    for hook in hooks.values():
        for kind, name in (("LSTM", "weight_hh_l0"), ("GRUCell", "weight_hh")):
            ours = made(kind)[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one of them is deprecated
                hook(ours, name)
            with pytest.raises(RuntimeError, match=f"{name} is not a parameter, but computed by a hook"):
                ft.freeze(ours)
    ours = made("LSTM")[0]
    hooks["pruning"](ours, "weight_hh_l0")
    prune.remove(ours, "weight_hh_l0")
    ft.freeze(ours)


def test_a_cell_of_ones_own_in_bfloat16_is_refused():
    with pytest.raises(RuntimeError, match=r"the kernels cannot run it: the dtype is torch\.bfloat16"):
        ft.freeze(ft.RecurrentCell(mgu, 2, 3).bfloat16().eval())


@every_layer
def test_every_option_of_a_call(kind):
    ours, x, _ = made(kind, num_layers=2, bidirectional=True)
    given = {"lengths": [T, 2, 0], "reset": torch.rand(T, B) < 0.3, "return_states": True}
    packed = torch.nn.utils.rnn.pack_sequence([x[:n, 0] for n in (5, 4, 1)])
    with torch.no_grad():
        want = [flat(ours(x, **given)), flat(ours(packed))]
    ft.freeze(ours.requires_grad_(False))
    for a, b in zip([*flat(ours(x, **given)), *flat(ours(packed))], [*want[0], *want[1]], strict=True):
        assert torch.equal(a, b)


def test_what_is_refused_meanwhile():
    model = torch.nn.Sequential(torch.nn.Linear(I, I), ft.LSTM(I, H)).eval()
    layer, state = model[1], {name: p.clone() for name, p in model.state_dict().items()}
    x = torch.randn(T, B, I)
    ft.freeze(model)
    ft.freeze(model)  # it is already
    for call, text in (
        (model.train, "train: the layer is frozen"),
        (lambda: model.load_state_dict(state), "the layer is frozen"),
        (lambda: model.load_state_dict(state, assign=True), "the layer is frozen"),
        (model.double, "the layer is frozen"),
        (model.share_memory, "the layer is frozen"),
        (lambda: layer(x), r"gradient.*torch\.no_grad\(\): the layer is frozen"),
        (lambda: ft.to_torch(model), r"1: it is frozen; fusedrnn\.torch\.unfreeze"),
    ):
        with pytest.raises(RuntimeError, match=text):
            call()
    for name, p in layer.state_dict().items():
        assert torch.equal(p, state[f"1.{name}"])
    with torch.no_grad():
        layer(x)
        with pytest.raises(RuntimeError, match=r"input: expected torch\.float32 on cpu.* got torch\.float64"):
            layer(x.double())
    assert ft.unfreeze(model) is model
    ft.unfreeze(model)
    model.float().train()
    model.load_state_dict(state)
    model(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None


def in_place(layer):
    layer.weight_hh_l0[0, 0] += 1


def by_another_parameter(layer):
    layer.bias_ih_l0 = torch.nn.Parameter(layer.bias_ih_l0.clone())


def by_other_memory(layer):
    layer.bias_hh_l0.data = layer.bias_hh_l0.data.clone()


def initialised(layer):
    layer.reset_parameters()


@pytest.mark.parametrize("change", [in_place, by_another_parameter, by_other_memory, initialised])
@torch.no_grad()
def test_changed_weights_are_an_error_of_the_next_call(change):
    layer = ft.LSTM(I, H).eval()
    x = torch.randn(T, B, I)
    ft.freeze(layer)
    layer(x)
    change(layer)
    with pytest.raises(RuntimeError, match=r"(weight|bias)_.h_l0 was changed: the layer is frozen"):
        layer(x)
    want = ft.unfreeze(layer)(x)[0]
    assert torch.equal(ft.freeze(layer)(x)[0], want)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_step_of_an_optimizer_is_an_error(kind, options):
    """Also of those whose writes PyTorch does not count; without gradients for the layer it may go on."""
    layer, other = ft.LSTM(I, H).eval(), torch.nn.Linear(I, H)
    before = [p.clone() for p in layer.parameters()]
    optimizer = kind([*other.parameters(), *layer.parameters()], lr=0.1, **options)
    ft.freeze(layer)
    other(torch.randn(3, I)).sum().backward()
    optimizer.step()
    layer.bias_hh_l0.grad = torch.ones_like(layer.bias_hh_l0)
    weight = other.weight.clone()
    with pytest.raises(RuntimeError, match="bias_hh_l0: the layer is frozen"):
        optimizer.step()
    assert torch.equal(other.weight, weight)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before, strict=True))
    ft.unfreeze(layer)
    optimizer.step()
    assert not torch.equal(layer.bias_hh_l0, before[-1])


def test_gradients_are_refused_as_parameters_are_now():
    x = torch.randn(T, B, I)
    for layer in (ft.LSTM(I, H).eval(), ft.LSTMCell(I, H).eval()):
        given = x if isinstance(layer, torch.nn.LSTM) else x[0]
        ft.freeze(layer)
        layer.requires_grad_(False)
        layer(given)
        layer.requires_grad_(True)
        with pytest.raises(RuntimeError, match="a gradient could be asked for"):
            layer(given)


@every_kind
def test_copies_are_not_frozen(kind):
    ours, x, _ = made(kind)
    with torch.no_grad():
        want = flat(ours(x))
    ft.freeze(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for a, b in zip(flat(other(x)), want, strict=True):
            assert torch.equal(a, b)
        other.train()
        with torch.no_grad():
            other.double()


def test_what_cannot_be_frozen():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        ft.freeze(3)
    with pytest.raises(ValueError, match="no layer of fusedrnn"):
        ft.freeze(torch.nn.LSTM(2, 3).eval())
    with pytest.raises(RuntimeError, match=r"rnn: expected a layer in evaluation; call eval\(\)"):
        ft.freeze(torch.nn.ModuleDict({"rnn": ft.LSTM(2, 3)}))
    with pytest.raises(RuntimeError, match=r"the kernels cannot run it: the dtype is torch\.float16"):
        ft.freeze(ft.LSTM(2, 3).half().eval())
    with torch.inference_mode():
        layer = ft.LSTM(2, 3).eval()
        with pytest.raises(
            RuntimeError, match=r"the model: weight_ih_l0 was made in torch\.inference_mode\(\)"
        ):
            ft.freeze(layer)


def test_where_one_layer_cannot_be_frozen_none_is():
    first = ft.LSTM(2, 3).eval()
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"^1: the kernels cannot run it") as held:
        ft.freeze(torch.nn.ModuleList([first, ft.LSTM(2, 3).half().eval()]))
    first(torch.randn(4, 1, 2))[0].sum().backward()
    optimizer.step()  # while the error, which knows what was made, is still there
    assert held.value is not None


def test_layers_that_share_parameters_and_layer_norm():
    first, second = ft.LSTM(H, H, layer_norm=True).eval(), ft.LSTM(H, H, layer_norm=True).eval()
    second.weight_hh_l0 = first.weight_hh_l0
    model = torch.nn.ModuleList([first, second])
    x = torch.randn(T, B, H)
    with torch.no_grad():
        want = [layer(x)[0] for layer in model]
        ft.freeze(model)
        assert all(torch.equal(layer(x)[0], y) for layer, y in zip(model, want, strict=True))
    ft.unfreeze(model).train()
    sum(layer(x)[0].sum() for layer in model).backward()


def test_tracing_sees_a_frozen_layer():
    from torch.fx.experimental.proxy_tensor import make_fx

    ours, x, _ = made("LSTM")
    ft.freeze(ours.requires_grad_(False))
    traced = make_fx(lambda v: ours(v)[0])(x)
    other = torch.randn(T, B, I)
    assert torch.equal(traced(other), ours(other)[0])


@torch.no_grad()
def test_without_kernels_for_bfloat16_autocast_runs_pytorchs_layer(warned, monkeypatch):
    monkeypatch.setattr(CpuBackend, "has_bfloat16", lambda self: False)
    theirs, ours = module_pair("RNN", I, H)
    ft.freeze(ours.eval())
    for dtype in (torch.float32, torch.bfloat16):  # as a Linear before it gives
        x = torch.randn(T, B, I, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings(action="ignore"):
            assert torch.equal(ours(x)[0], theirs(x)[0])
        assert ours.last_path.startswith("fallback: ")


@every_kind
@needs_bfloat16
@torch.no_grad()
def test_autocast_changes_a_frozen_layer_as_any_other(kind):
    """The same bits and dtypes; also for input in bfloat16, as a Linear before it gives."""
    ours, x, hx = made(kind)
    low = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = flat([ours(x, hx), ours(x), ours(low)])
        ft.freeze(ours)
        got = flat([ours(x, hx), ours(x), ours(low)])
        assert ours.last_path == "fused"
        assert [t.dtype for t in got] == [t.dtype for t in want]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        next(ours.parameters()).mul_(2)
        with pytest.raises(RuntimeError, match="was changed: the layer is frozen"):
            ours(x)
    with pytest.raises(RuntimeError, match="was changed: the layer is frozen"):
        ours(x)


@needs_bfloat16
@pytest.mark.parametrize("options", [{"layer_norm": True}, {"proj_size": 5}], ids=str)
@torch.no_grad()
def test_options_and_sequences_of_a_frozen_layer_in_autocast(options):
    ours, x = ft.LSTM(I, H, num_layers=2, **options).eval(), torch.randn(T, B, I)
    ragged = torch.nn.utils.rnn.pack_sequence([x[:n, 0] for n in (5, 4, 1)])  # float32, as in PyTorch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = flat([ours(x), ours(x, lengths=[T, 2, 0], return_states=True), ours(ragged)])
        ft.freeze(ours)
        got = flat([ours(x), ours(x, lengths=[T, 2, 0], return_states=True), ours(ragged)])
    assert ours.last_path == "fused"
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
