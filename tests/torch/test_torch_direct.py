"""Calls of which no graph is recorded, which the compiled module alone checks: as with a graph."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from test_torch_layers import configurations, laid_out
from torch_pairs import (
    assert_close,
    every_kind,
    every_layer,
    flat,
    ft,
    misaligned,
    module_pair,
    state_of,
)

pytestmark = pytest.mark.usefixtures("no_fallback")

T, B, I, H = 5, 3, 4, 20


def made(kind, **options):
    """PyTorch's module, ours, x and a state."""
    theirs, ours = module_pair(kind, I, H, **options)
    x = torch.randn(*((T, B, I) if isinstance(ours, torch.nn.RNNBase) else (B, I)))
    return theirs, ours, x, state_of(ours, B, x)


def outcome(module, *args):
    """What a call returns, or its error."""
    try:
        return flat(module(*args))
    except Exception as error:
        return [(type(error), str(error))]


def assert_alike(got, expected):
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, torch.Tensor):
            assert_close(a, b)
        else:
            assert a == b


def assert_same_bits(got, expected):
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b)


def checks(module):
    """Counts the calls that are checked in Python."""
    own = type(module)._unsupported
    return mock.patch.object(type(module), "_unsupported", autospec=True, side_effect=own)


@given(configurations)
@settings(max_examples=60)
def test_random_configurations(c):
    torch.manual_seed(c["seed"])
    (steps, batch, features, hidden), dtype, kind = c["sizes"], c["dtype"], c["kind"]
    options = {k: c[k] for k in ("bidirectional", "batch_first", "bias")} | {"num_layers": c["layers"]}
    options["dropout"] = c["dropout"] if c["layers"] > 1 else 0.0
    if kind == "RNN":
        options["nonlinearity"] = "relu" if c["relu"] else "tanh"
    _, ours = module_pair(kind, features, hidden, **options, dtype=dtype)
    ours.train(c["training"])
    unbatched, packed = c["form"] == "unbatched", c["form"].startswith("packed")
    shape = (steps,) if unbatched else (batch, steps) if c["batch_first"] else (steps, batch)
    x = laid_out(torch.randn(*shape, features, dtype=dtype), c["layout"])
    hx = state_of(ours, None if unbatched else batch, x) if c["hx"] else None
    if packed:
        lengths = [1 + k % steps for k in range(batch)]
        x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, c["batch_first"], enforce_sorted=False)
    expected = seeded(ours, x, hx)
    assert expected[0].requires_grad
    masks = c["training"] and options["dropout"]
    straight = not (packed or masks) and (x.stride(-1) == 1 or features == 1)
    within = torch.inference_mode if c["mode"] == "inference_mode" else torch.no_grad
    with within(), checks(ours) as checked:
        assert_same_bits(seeded(ours, x, hx), expected)
    assert checked.called != straight


def seeded(module, x, hx):
    """The results of a call, and the numbers that its masks leave behind."""
    torch.manual_seed(1)
    found = flat(module(x, hx))
    assert module.last_path == "fused"
    return [*found, torch.rand(1)]


FORMS = {
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[..., :1, :].expand(t.shape),
    "negated": torch._neg_view,
    "not aligned": misaligned,
    "a parameter": torch.nn.Parameter,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "sparse": torch.Tensor.to_sparse,
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "on another device": lambda t: t.to("meta"),
    "of another dtype": torch.Tensor.half,
}


@every_kind
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_forms_of_tensors(kind, warned):
    """What the compiled module refuses is computed, or is an error, as with a graph."""
    theirs, ours, x, hx = made(kind)
    given = (x, *flat(hx))
    for form, place in itertools.product(FORMS.values(), range(len(given))):
        t = form(given[place])
        calls = []
        for each in (t, t.clone()):  # PyTorch's own LSTM takes no zeros without memory
            x2, *states = [*given[:place], each, *given[place + 1 :]]
            calls.append((x2, tuple(states) if len(states) == 2 else states[0]))
        assert_alike(outcome(ours, *calls[0]), outcome(theirs, *calls[1]))
    with checks(ours) as checked:
        for args in ((x, hx), (x,)):
            assert_alike(outcome(ours, *args), outcome(theirs, *args))
    assert not checked.called
    assert ours.last_path == "fused"


@every_kind
@pytest.mark.parametrize("form", ["strided", "negated", "not aligned"])
def test_forms_of_weights(kind, form):
    _, ours, x, hx = made(kind)
    for p in ours.parameters():
        p.data = FORMS[form](p.data)
        with torch.no_grad():
            got = outcome(ours, x, hx)
        assert_alike(got, outcome(ours, x, hx))


@every_layer
def test_masks_are_drawn_once_where_a_layer_above_is_refused(kind):
    _, ours, x, hx = made(kind, num_layers=2, dropout=0.5)
    ours.weight_ih_l1.data = ours.weight_ih_l1.data.t().contiguous().t()
    expected = seeded(ours, x, hx)
    with torch.no_grad():
        assert_same_bits(seeded(ours, x, hx), expected)


def by_other_weights(module):
    for name, p in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(2 * p.detach()))


def without_a_bias(module):
    name = next(name for name, _ in module.named_parameters() if name.startswith("bias_ih"))
    delattr(module, name)


def parametrized(module):
    name = next(name for name, _ in module.named_parameters())
    torch.nn.utils.parametrizations.weight_norm(module, name)
    module.get_parameter(f"parametrizations.{name}.original0").data.mul_(2)


def in_place(module):
    for p in module.parameters():
        p.data.mul_(2)


def by_other_memory(module):
    for p in module.parameters():
        p.data = 2 * p.data


@every_kind
@pytest.mark.parametrize(
    "change", [by_other_weights, without_a_bias, parametrized, in_place, by_other_memory]
)
def test_changed_weights_are_read_as_they_are(kind, change):
    _, ours, x, hx = made(kind)
    with torch.no_grad():
        before = flat(ours(x, hx))[0]
    change(ours)
    with torch.no_grad():
        got = ours(x, hx)
    assert not torch.equal(flat(got)[0], before)
    assert_same_bits(got, ours(x, hx))


@every_layer
@pytest.mark.parametrize("more", [(0, 1), (1, 0), (1, 1)])
def test_weights_of_another_size(kind, more):
    """That they match one another and the input is not enough: PyTorch goes by the sizes of the layer."""
    _, ours, _, _ = made(kind)
    other = type(ours)(I + more[0], H + more[1])
    for name, p in other.named_parameters():
        setattr(ours, name, p)
    x = torch.randn(T, B, other.input_size)
    for hx in (None, state_of(ours, B, x), state_of(other, B, x)):
        expected = outcome(ours, x, hx)
        assert isinstance(expected[0], tuple)
        with torch.no_grad():
            assert outcome(ours, x, hx) == expected


@every_kind
def test_who_has_to_see_the_operator_does(kind):
    _, ours, x, _ = made(kind)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            ours(x)
        assert counter.get_total_flops() > 0
        with torch.profiler.profile() as profile:
            ours(x)
        assert any(event.key == "fusedrnn::recurrence" for event in profile.key_averages())


@every_kind
@pytest.mark.filterwarnings("ignore")
def test_what_the_kernels_do_not_support(kind, warned):
    theirs, ours, x, _ = made(kind)
    expected = outcome(torch.func.vmap(ours), x[None])
    with torch.no_grad():
        assert_alike(outcome(torch.func.vmap(ours), x[None]), expected)
        assert_alike(*[outcome(torch.func.jvp, module, (x,), (x,)) for module in (ours, theirs)])
        with ft.fallback():
            ours(x)
        assert ours.last_path == "fallback: fusedrnn.torch.fallback()"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = flat(ours(x)), flat(theirs(x))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)
