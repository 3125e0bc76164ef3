"""Calls under autocast whose input, state and weights differ in dtype, as behind a ``Linear``."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from torch.nn.utils import rnn

from bfloat16 import needs_bfloat16
from torch_pairs import B, H, I, T, flat, ft, grads, module_pair, state_of

pytestmark = pytest.mark.usefixtures("no_fallback")

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
# In PyTorch, the results of these have the dtype of c_0, h_0 or without a state of the input.
KEPT = ["GRU", "GRUCell", "LSTMCell", "ragged GRU", "ragged LSTM"]
STATES = [None, (f32, f32), (bf16, bf16)]
MIXES = [(kind, states) for kind in KEPT for states in STATES]
MIXES += [(kind, states) for kind in ("LSTMCell", "ragged LSTM") for states in ((f32, bf16), (bf16, f32))]


def made(kind, dtype, states, low=bf16, **options):
    """PyTorch's layer, ours, the input and a state of these dtypes, of numbers that ``low`` has."""
    torch.manual_seed(0)
    name = kind.split()[-1]
    pair = module_pair(name, I, H, **options)
    x = torch.randn((B, I) if "Cell" in kind else (T, B, I)).to(low).to(dtype)
    hx = None
    if states is not None:
        given = [s.to(low).to(t) for s, t in zip(flat(state_of(pair[0], B, x.float())), states, strict=False)]
        hx = tuple(given) if len(given) > 1 else given[0]
    grads(x), grads(hx)
    return *pair, x, hx


def everything(layer, kind, x, hx, low=None):
    """Results and gradients of a call, under autocast to ``low``."""
    given = rnn.pack_padded_sequence(x, torch.tensor([T, 3, 1])) if "ragged" in kind else x
    with torch.autocast("cpu", low, enabled=low is not None):
        results = flat(layer(given, hx))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator).to(low or bf16).to(r.dtype) for r in results]
    wanted = [x, *flat(hx), *layer.parameters()]
    return [*results, *torch.autograd.grad(results, wanted, upstream, allow_unused=True)]


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize(("kind", "states"), MIXES, ids=str)
def test_mixed_dtypes(kind, dtype, states):
    """The kernels run; all dtypes are PyTorch's, and no error of a result or gradient is larger."""
    theirs, ours, x, hx = made(kind, dtype, states)
    got, expected = everything(ours, kind, x, hx, bf16), everything(theirs, kind, x, hx, bf16)
    assert ours.last_path == "fused"
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    wide = None if hx is None else hx.double() if "GRU" in kind else tuple(s.double() for s in hx)
    exact = everything(copy.deepcopy(theirs).double(), kind, x.double(), wide)
    for a, b, e in zip(got, expected, exact, strict=True):
        assert (a.double() - e).norm() <= (b.double() - e).norm()


@needs_bfloat16
@pytest.mark.parametrize("states", STATES, ids=str)
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "RNN", "RNNCell"])
def test_mixed_dtypes_that_become_bfloat16(kind, dtype, states):
    theirs, ours, x, hx = made(kind, dtype, states)
    got, expected = everything(ours, kind, x, hx, bf16), everything(theirs, kind, x, hx, bf16)
    assert ours.last_path == "fused"
    assert [t.dtype for t in got] == [t.dtype for t in expected]


@pytest.mark.parametrize("kind", KEPT)
def test_mixed_dtypes_without_kernels_for_bfloat16(kind, monkeypatch):
    """The same bits, also under autocast to float16."""
    _, ours, x, hx = made(kind, bf16, (bf16, bf16))
    expected = everything(ours, kind, x, hx, bf16)
    monkeypatch.setattr(ft.paths, "has_bfloat16", lambda key: False)
    for a, b in zip(everything(ours, kind, x, hx, bf16), expected, strict=True):
        assert torch.equal(a, b)
    _, ours, x, hx = made(kind, f16, (f16, f16), f16)
    assert {t.dtype for t in everything(ours, kind, x, hx, f16)} == {f16, f32}
    assert ours.last_path == "fused"


@pytest.mark.parametrize("kind", KEPT)
@torch.no_grad()
def test_a_frozen_layer(kind):
    _, ours, x, hx = made(kind, bf16, (bf16, bf16))
    given = rnn.pack_padded_sequence(x, torch.tensor([T, 3, 1])) if "ragged" in kind else x
    with torch.autocast("cpu", bf16):
        expected = flat(ours(given, hx))
        ft.freeze(ours.eval())
        got = flat(ours(given, hx))
    assert ours.last_path == "fused"
    assert all(a.dtype is bf16 and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=str)
def test_states_of_every_step(options):
    ours, x = ft.GRU(I, H, **options), torch.randn(T, B, I).bfloat16()
    with torch.autocast("cpu", bf16):
        y, h, states = ours(x, lengths=[T, 2, 0], return_states=True)
    assert ours.last_path == "fused"
    for got, expected in zip(
        (y, h, states), ours(x.float(), lengths=[T, 2, 0], return_states=True), strict=True
    ):
        assert torch.equal(got, expected.bfloat16())


def test_the_reason_names_the_tensor_and_both_dtypes(warned):
    cell, layer, x, h = ft.LSTMCell(I, H), ft.LSTM(I, H), torch.randn(B, I), torch.randn(B, H)
    with pytest.warns(ft.FallbackWarning, match=r": c_0 is torch\.float64, the input is torch\.float32$"):
        cell(x, (h, h.double()))  # PyTorch's cell takes it
    for message, given, state in (
        ("h_0 is torch.bfloat16, the input is torch.float32", x, (h[:1].bfloat16(), h[:1])),
        ("weight_ih is torch.float32, the input is torch.float64", x.double(), None),
    ):
        with pytest.raises(RuntimeError, match=f"^lengths needs the kernels .*: {message}$"):
            layer(given, state, lengths=B)
    cell.weight_hh = torch.nn.Parameter(cell.weight_hh.double())
    with pytest.raises(
        RuntimeError, match=r": weight_hh is torch\.float64, the first weight_ih is torch\.float32$"
    ):
        ft.freeze(cell.eval())
