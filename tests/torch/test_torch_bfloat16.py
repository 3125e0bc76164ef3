"""Layers in bfloat16 on a CPU: beside float64 and PyTorch's own, every option, and the same bits.

Errors are in units of 2**-8 of a tensor's largest entry, as much as one rounding may change a number.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch

from bfloat16 import needs_bfloat16
from fusedrnn import _core
from torch_pairs import every_layer, flat, ft, gradients, module_pair, state_of

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("no_fallback", "openmp_pool", "poison"),
    needs_bfloat16,
]

T, B, I, H = 9, 5, 11, 37


def low(shape, scale=1.0):
    return (scale * torch.randn(shape)).bfloat16()


def everything(layer, x, hx, seed=1, **options):
    """Outputs and gradients of a call in the layer's dtype, of random upstream gradients in bfloat16."""
    dtype = layer.weight_ih_l0.dtype
    x, *state = (t.to(dtype).requires_grad_() for t in (x, *flat(hx)))
    torch.manual_seed(seed)
    result = layer(x, tuple(state) if len(state) > 1 else state[0], **options)
    upstream = [
        torch.randn(o.shape, generator=torch.Generator().manual_seed(k)) for k, o in enumerate(flat(result))
    ]
    wanted = [x, *state, *layer.parameters()]
    found = torch.autograd.grad(flat(result), wanted, [u.bfloat16().to(dtype) for u in upstream])
    assert all(t.dtype is dtype for t in (*flat(result), *found))
    return [t.detach() for t in (*flat(result), *found)]


def errors(got, exact):
    units = [
        float((a.double() - b).abs().max() / b.abs().max()) * 2**8 for a, b in zip(got, exact, strict=True)
    ]
    return np.array(units)


def low_pair(kind, *sizes, **options):
    """A layer in bfloat16 and the same numbers in float64."""
    ours = getattr(ft, kind)(*sizes, **options, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0.0, ours.hidden_size**-0.5)
    return ours, copy.deepcopy(ours).double()


@pytest.mark.quick
@pytest.mark.parametrize("sizes", [(T, B, I, H), (3, 17, 16, 16), (20, 1, 40, 70)], ids=str)
@every_layer
def test_errors_beside_pytorchs(kind, sizes):
    T, B, I, H = sizes
    ours, exact = low_pair(kind, I, H)
    theirs = getattr(torch.nn, kind)(I, H, dtype=torch.bfloat16)
    theirs.load_state_dict(ours.state_dict())
    x, hx = low((T, B, I)), state_of(ours, B, low((1,)))
    want = everything(exact, x, hx)
    mine, pytorchs = (errors(everything(layer, x, hx), want) for layer in (ours, theirs))
    assert ours.last_path == "fused"
    assert mine.max() < 2.5
    assert mine.mean() < 1.05 * pytorchs.mean()


@every_layer
def test_a_step_is_rounded_where_the_page_says(kind):
    """With c, gates and sums in float32, one step is right but for the rounding of its results."""
    ours, exact = low_pair(kind, I, H)
    x, hx = low((1, B, I)), state_of(ours, B, low((1,)))
    with torch.no_grad():
        got = flat(ours(x, hx))
        want = flat(exact(x.double(), hx.double() if kind != "LSTM" else tuple(s.double() for s in hx)))
    for a, b in zip(got, want, strict=True):
        neighbours = torch.nextafter(a.float(), a.float() * 2) - a.float()  # of float32: 2**-16 of bfloat16's
        assert float(((a.double() - b).abs() - neighbours.abs().double() * 2**15).max()) < 1e-5


OPTIONS = {
    "two layers, both directions": ({"num_layers": 2, "bidirectional": True, "batch_first": True}, {}),
    "lengths and states": ({"bidirectional": True}, {"lengths": [9, 0, 1, 9, 4], "return_states": True}),
    "resets, truncated": ({}, {"reset": torch.arange(T * B).reshape(T, B) % 4 == 1, "detach_every": 4}),
    "dropout, zoneout": ({"recurrent_dropout": 0.3, "zoneout_h": 0.2}, {}),
    "no biases": ({"bias": False}, {}),
}


@pytest.mark.quick
@pytest.mark.parametrize("option", OPTIONS)
@every_layer
def test_options(kind, option):
    """As the float64 kernels; recompute gives the same bits."""
    made, given = OPTIONS[option]
    if "zoneout_h" in made and kind == "LSTM":
        made = {**made, "zoneout_c": 0.1}
    ours, exact = low_pair(kind, I, H, **made)
    x = low((B, T, I) if ours.batch_first else (T, B, I))
    hx = state_of(ours, B, low((1,)))
    got = everything(ours, x, hx, **given)
    assert errors(got, everything(exact, x, hx, **given)).max() < 3.5
    ours.recompute = True
    assert all(map(torch.equal, got, everything(ours, x, hx, **given)))


@every_layer
def test_a_packed_sequence_is_as_lengths(kind):
    ours, _ = low_pair(kind, I, H)
    x, lengths = low((T, B, I)), [9, 7, 7, 2, 1]
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    (y, *_), (z, *_) = flat(ours(packed)), flat(ours(x, lengths=lengths))
    assert torch.equal(y, torch.nn.utils.rnn.pack_padded_sequence(z, lengths).data)


@pytest.mark.quick
@every_layer
def test_the_same_bits(kind, threads):
    """For any number of threads, with W x of several steps at once and without, copies or not; y also for any
    batch and, of a cell without c, any split of the sequence."""
    default = _core.info()["ordered_copies"]
    ours, _ = low_pair(kind, 21, 100)
    x, hx = low((T, 7, 21)), state_of(ours, 7, low((1,)))
    results = []
    for count, copies, thresholds in ((1, False, False), (3, True, False), (2, False, True)):
        threads(count)
        _core.testing.ordered_copies(copies)
        _core.testing.thresholds(thresholds)
        results.append(everything(ours, x, hx))
    _core.testing.ordered_copies(default)
    _core.testing.thresholds(False)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    with torch.no_grad():
        state = [s[:, 2:3] for s in flat(hx)]
        one = flat(ours(x[:, 2:3], tuple(state) if len(state) > 1 else state[0]))
        assert torch.equal(one[0], results[0][0][:, 2:3])
        if kind != "LSTM":
            y, h = ours(x[:1], hx)
            assert torch.equal(torch.cat([y, ours(x[1:], h)[0]]), results[0][0])


@pytest.mark.parametrize("sizes", [(45, 21, 300, 264), (1, 9001, 2, 3)], ids=str)
def test_many_panels_and_rows(sizes):
    """Several chunks, of an odd number of rows; one of more rows than are summed at once."""
    T, B, I, H = sizes
    ours, exact = low_pair("LSTM", I, H)
    x, hx = low((T, B, I)), state_of(ours, B, low((1,)))
    assert errors(everything(ours, x, hx), everything(exact, x, hx)).max() < 3


def test_autocast_gives_gradients_of_the_parameters_dtype():
    _, layer = module_pair("LSTM", I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
    assert (layer.last_path, result[0].dtype) == ("fused", torch.bfloat16)
    found = gradients(layer, result, x)
    assert {g.dtype for g in found.values()} == {torch.float32}
    ours = copy.deepcopy(layer).bfloat16()
    y = x.detach().bfloat16().requires_grad_()
    for a, b in zip(found.values(), gradients(ours, ours(y), y).values(), strict=True):
        assert torch.equal(a, b.float())


@pytest.mark.quick
def test_what_the_module_refuses():
    lstm, normed = _core.CELLS.index("lstm"), _core.CELLS.index("lstm_layer_norm")
    sizes = (T, B, I, H, H)
    with pytest.raises(ValueError, match="bfloat16"):
        _core.tape_shape(normed, *sizes, False, False, False, True)
    x, w = np.zeros((1, 1, 1), np.int16), np.zeros((4, 1), np.int16)
    weights = (w, w, w[:, 0].copy(), None, *[None] * 5)
    given = [x, x[0], x[0]]
    into = [x.copy(), x[0].copy(), x[0].copy()]
    packed = _core.pack(lstm, *weights, bfloat16=True)
    of_float32 = _core.pack(lstm, *[a if a is None else a.astype(np.float32) for a in weights])

    def call(given=given, into=into, weights=weights, cell=lstm, low=True):
        options = None, None, False, False, 0, None
        _core.run_forward(cell, weights, *given, *options, *into, None, None, None, low)

    call()
    call(weights=packed)
    for k in range(3):
        for dtype in (np.float32, np.float16, np.uint16):
            for name, arrays in (("given", given), ("into", into), ("weights", weights)):
                wrong = [a.astype(dtype) if i == k else a for i, a in enumerate(arrays)]
                with pytest.raises(_core.RefusedType, match="expected int16"):
                    call(**{name: tuple(wrong) if name == "weights" else wrong})
    with pytest.raises(_core.RefusedType, match="dtype of the weights"):
        call(weights=of_float32)
    floats = [[a.astype(np.float32) for a in arrays] for arrays in (given, into)]
    with pytest.raises(_core.RefusedType, match="dtype of the weights"):
        call(*floats, packed, low=False)
    with pytest.raises(_core.RefusedValue, match="this cell"):
        call(cell=normed)
    for steps in (2**61, 2**62):  # with little memory: all strides are 0
        with pytest.raises(OverflowError, match="size too large: 4"):
            call([torch.zeros((1, 1, 1), dtype=torch.int16).expand(steps, 1, 1), *given[1:]])
    with pytest.raises(_core.RefusedType, match="dtype of the weights"):
        _core.testing.repeat_forward(1, packed, *floats[0], False)
