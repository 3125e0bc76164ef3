"""What neither the kernels nor ``torch.nn`` can compute: the cell's steps in PyTorch's operations."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")

import fusedrnn.torch as ft  # noqa: E402
from torch_pairs import assert_close, every_layer, flat  # noqa: E402

T, B, I, H = 6, 3, 4, 5
LENGTHS = [6, 2, 4]
OPTIONS = {
    "lengths": ({}, {"lengths": LENGTHS}),
    "resets and states": ({"bidirectional": True}, {"reset": [[0, 1, 0]] * T, "return_states": True}),
    "truncated": ({"num_layers": 2, "batch_first": True}, {"detach_every": 2}),
    "layer norm": ({"layer_norm": True}, {}),
    "zoneout": ({"zoneout_h": 0.25, "recurrent_dropout": 0.25}, {"lengths": LENGTHS}),
}
every_option = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def _told_before():
    """PyTorch's own rules of forward mode warn too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(kind, option, dtype=torch.float64):
    """-> a layer, a function of its input that gives one number, an input"""
    made_with, call = OPTIONS[option]
    torch.manual_seed(0)
    layer = getattr(ft, kind)(I, H, dtype=dtype, **made_with)
    shape = (B, T, I) if layer.batch_first else (T, B, I)
    weighs = None

    def function(x):
        nonlocal weighs
        torch.manual_seed(1)  # of masks
        found = flat(layer(x, **call))
        if weighs is None:
            weighs = [torch.randn(t.shape, dtype=torch.float64) for t in found]
        return sum((t * w).sum() for t, w in zip(found, weighs, strict=True))

    return layer, function, torch.randn(shape, dtype=dtype)


def gradient(function, x):
    x = x.clone().requires_grad_()
    function(x).backward()
    return x.grad


@every_option
@every_layer
def test_transforms_with_an_option(kind, option):
    layer, function, x = made(kind, option)
    expected, v = gradient(function, x), torch.randn_like(x)
    assert layer.last_path == "fused"
    assert_close(torch.func.grad(function)(x), expected)
    assert layer.last_path == "steps in PyTorch: a transform of torch.func is at work"
    assert_close(torch.func.jvp(function, (x,), (v,))[1], (expected * v).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        assert_close(torch.autograd.forward_ad.unpack_dual(function(dual)).tangent, (expected * v).sum())
    assert layer.last_path == "steps in PyTorch: forward-mode differentiation is at work"


@pytest.mark.parametrize("made_with", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@every_layer
def test_gradients_of_each_sample(kind, made_with):
    torch.manual_seed(0)
    layer = getattr(ft, kind)(I, H, dtype=torch.float64, **made_with)
    xs = torch.randn(4, T, B, I, dtype=torch.float64)
    weights = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, xs)
    assert layer.last_path.startswith("steps in PyTorch: ")
    for k, x in enumerate(xs):
        layer.zero_grad()
        layer(x)[0].square().sum().backward()
        assert layer.last_path == "fused"
        for name, p in layer.named_parameters():
            assert_close(found[name][k], p.grad, name)


@every_layer
def test_an_ensemble_of_models(kind):
    layers = [getattr(ft, kind)(I, H, dtype=torch.float64) for _ in range(3)]
    weights, _ = torch.func.stack_module_state(layers)
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = torch.func.vmap(lambda w: torch.func.functional_call(layers[0], w, (x,))[0])(weights)
    for y, layer in zip(found, layers, strict=True):
        assert_close(y, layer(x)[0])


@every_option
@every_layer
def test_other_dtypes_with_an_option(kind, option):
    """In float16 as in float64, within its precision."""
    layer, _, x = made(kind, option)
    lower = made(kind, option, torch.float16)[0]
    lower.load_state_dict(layer.state_dict())
    got, want = (flat(each(x.to(d), **OPTIONS[option][1])) for each, d in
                 ((seeded(lower), torch.float16), (seeded(layer), torch.float64)))  # fmt: skip
    assert lower.last_path == "steps in PyTorch: the dtype is torch.float16"
    for a, b in zip(got, want, strict=True):
        assert a.dtype is torch.float16
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02)
    assert all(g.dtype is torch.float16 for g in torch.autograd.grad(got[0].sum(), [*lower.parameters()]))


def seeded(layer):
    def call(*args, **options):
        torch.manual_seed(1)
        return layer(*args, **options)

    return call


def test_autocast_with_an_option(monkeypatch):
    monkeypatch.setattr(ft.paths, "has_bfloat16", lambda key: False)  # as where the processor has none
    layer = ft.LSTM(I, H, layer_norm=True)
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)[0]
    assert layer.last_path == "steps in PyTorch: autocast is on"
    assert_close(y, layer(x)[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("LSTM", {}), ("LSTM", {"layer_norm": True}), ("LSTM", {"proj_size": 3}), ("RNN", {})],
    ids=str,
)
def test_autocast_of_an_input_that_is_of_its_dtype_already(kind, options):
    """As after a Linear: the steps compute in the dtype of the weights."""
    layer = getattr(ft, kind)(I, H, **options)
    x = torch.randn(T, B, I).half()
    want = layer(x.float(), lengths=LENGTHS)
    with torch.autocast("cpu", dtype=torch.float16):
        got = layer(x, lengths=LENGTHS)
    assert layer.last_path.startswith("steps in PyTorch: ")
    for a, b in zip(flat(got), flat(want), strict=True):
        assert a.dtype is torch.float16
        torch.testing.assert_close(a.float(), b, rtol=2e-3, atol=2e-3)


def test_a_projection_over_a_batch_of_inputs():
    layer, x = ft.LSTM(I, H, proj_size=3), torch.randn(2, T, B, I)
    found = torch.func.vmap(lambda x: layer(x)[0])(x)
    for y, each in zip(found, x, strict=True):
        assert_close(y, layer(each)[0])


def test_it_is_told_and_may_be_refused():
    layer = ft.GRU(I, H).half()
    x = torch.randn(T, B, I).half()
    ft.set_fallback_errors(True)
    try:
        with pytest.raises(RuntimeError, match="GRU runs its steps in PyTorch's operations: the dtype is"):
            layer(x, lengths=LENGTHS)
    finally:
        ft.set_fallback_errors(False)
    with ft.fallback(), pytest.raises(RuntimeError, match="lengths needs the kernels of fusedrnn, which"):
        layer(x, lengths=LENGTHS)
    with pytest.raises(RuntimeError, match="lengths needs the kernels of fusedrnn"):
        layer(x.float(), lengths=LENGTHS)


def test_a_frozen_layer_in_a_transform():
    layer = ft.LSTM(I, H, dtype=torch.float64).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    want = gradient(lambda x: layer(x, lengths=LENGTHS)[0].sum(), x)
    ft.freeze(layer)
    assert_close(torch.func.grad(lambda x: layer(x, lengths=LENGTHS)[0].sum())(x), want)
