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
from fusedrnn import _core, cells
from torch_pairs import every_cell, every_layer, flat, ft, gradients, state_of

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
    dtype = next(layer.parameters()).dtype
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
    """A layer in bfloat16 and the same numbers in float64. Gains are small, for the reason in ``problem``."""
    ours = getattr(ft, kind)(*sizes, **options, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.normal_(*((0.1, 0.025) if name.startswith("gain") else (0.0, ours.hidden_size**-0.5)))
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


@pytest.mark.parametrize("layer_norm", [False, True])
@every_layer
def test_a_step_is_rounded_where_the_page_says(kind, layer_norm):
    """With c, gates, norms and sums in float32, one step is right but for the rounding of its results."""
    ours, exact = low_pair(kind, I, H, layer_norm=layer_norm)
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
    "layer norm": ({"layer_norm": True, "num_layers": 2}, {"lengths": [9, 0, 1, 9, 4]}),
    "layer norm, dropout, zoneout": ({"layer_norm": True, "recurrent_dropout": 0.3, "zoneout_h": 0.2}, {}),
    "projection": ({"proj_size": 21, "num_layers": 2}, {"lengths": [9, 0, 1, 9, 4]}),
    "projection, dropout, zoneout": ({"proj_size": 21, "recurrent_dropout": 0.3, "zoneout_h": 0.2}, {}),
}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kind", "option"),
    [(k, o) for o in OPTIONS for k in ("LSTM", "GRU", "RNN") if "projection" not in o or k == "LSTM"],
)
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


FORMS = [
    *[(kind, {}) for kind in ("LSTM", "GRU", "RNN")],
    *[(kind, {"layer_norm": True}) for kind in ("LSTM", "GRU", "RNN")],
    ("LSTM", {"proj_size": 51}),
]


@pytest.mark.quick
@pytest.mark.parametrize(("kind", "made"), FORMS, ids=str)
def test_the_same_bits(kind, made, threads):
    """For any number of threads, with W x of several steps at once and without, copies or not; y also for any
    batch and, of a cell without c, any split of the sequence."""
    default = _core.info()["ordered_copies"]
    ours, _ = low_pair(kind, 21, 100, **made)
    x, hx = low((T, 7, 21)), state_of(ours, 7, low((1,)))
    results = []
    for count, copies, thresholds in ((1, "never", False), (3, "always", False), (2, "never", True)):
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


@pytest.mark.parametrize("made", [{}, {"layer_norm": True}, {"proj_size": 1}], ids=str)
@pytest.mark.parametrize("sizes", [(45, 21, 300, 264), (1, 9001, 2, 3)], ids=str)
def test_many_panels_and_rows(sizes, made):
    """Several chunks, of an odd number of rows; one of more rows than are summed at once."""
    T, B, I, H = sizes
    ours, exact = low_pair(
        "LSTM", I, H, **{name: H // 3 if name == "proj_size" else value for name, value in made.items()}
    )
    x, hx = low((T, B, I)), state_of(ours, B, low((1,)))
    assert errors(everything(ours, x, hx), everything(exact, x, hx)).max() < 3


@pytest.mark.parametrize("made", [{}, {"layer_norm": True}, {"proj_size": 21}], ids=str)
def test_autocast_gives_gradients_of_the_parameters_dtype(made):
    layer = ft.LSTM(I, H, **made)
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
    assert (layer.last_path, result[0].dtype) == ("fused", torch.bfloat16)
    used = (0, 1) if "proj_size" in made else None  # c is float32 then, and so are its gradients
    found = gradients(layer, result, x, used)
    assert {g.dtype for g in found.values()} == {torch.float32}
    ours = copy.deepcopy(layer).bfloat16()
    y = x.detach().bfloat16().requires_grad_()
    for a, b in zip(found.values(), gradients(ours, ours(y), y, used).values(), strict=True):
        assert torch.equal(a, b.float())


@pytest.mark.quick
@every_cell
def test_cells(kind):
    """One step has the bits of a layer's, and its gradients."""
    cell, exact = low_pair(kind, I, H)
    layer = getattr(ft, kind.removesuffix("Cell"))(I, H, dtype=torch.bfloat16)
    layer.load_state_dict({f"{name}_l0": p for name, p in cell.named_parameters()})
    x, hx = low((B, I)), state_of(cell, B, low((1,)))
    got = everything(cell, x, hx)
    assert cell.last_path == "fused"
    assert errors(got, everything(exact, x, hx)).max() < 2.5
    n = len(flat(hx))
    x, *state = (t.requires_grad_() for t in (x, *flat(hx)))
    _, *final = flat(layer(x[None], tuple(s[None] for s in state) if n > 1 else state[0][None]))
    assert all(torch.equal(a, b[0]) for a, b in zip(got, final, strict=False))
    upstream = [torch.randn(1, B, H, generator=torch.Generator().manual_seed(k)) for k in range(n)]
    wanted = [x, *state, *layer.parameters()]
    for a, b in zip(
        got[n:], torch.autograd.grad(final, wanted, [u.bfloat16() for u in upstream]), strict=True
    ):
        assert torch.equal(a, b)
    with torch.no_grad():
        alone = flat(cell(x[2], tuple(s[2] for s in state) if n > 1 else state[0][2]))
    assert all(torch.equal(a[2], b) for a, b in zip(got, alone, strict=False))


def test_rnn_cell_in_autocast():
    """Of the cells it alone returns bfloat16 for float32, as PyTorch's does; a frozen one too."""
    cell = ft.RNNCell(I, H)
    x, h = torch.randn(B, I), torch.randn(B, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cell(x, h)
    assert (cell.last_path, got.dtype) == ("fused", torch.bfloat16)
    assert torch.equal(got, copy.deepcopy(cell).bfloat16()(x.bfloat16(), h.bfloat16()))
    ft.freeze(cell.eval())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cell(x, h), got)


@pytest.mark.quick
@pytest.mark.parametrize("options", [{}, {"reset_after": False}], ids=str)
def test_layers_of_a_built_in_cell(options):
    """``Recurrent`` and ``RecurrentCell``, of one step the same bits."""
    of = cells.gru.with_options(**options)
    layer, exact = low_pair("Recurrent", of, I, H)
    x, h = low((T, B, I)), low((1, B, H))
    got = everything(layer, x, h)
    assert layer.last_path == "fused"
    assert errors(got, everything(exact, x, h)).max() < 2.5
    cell = ft.RecurrentCell(of, I, H, dtype=torch.bfloat16)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.named_parameters()})
    x, state = x[:1], h[0].clone().requires_grad_()
    results = [layer(x, state[None])[0][0], cell(x[0], state)]
    assert cell.last_path == "fused"
    u = low((B, H))
    for a, b in zip(
        (results[0], *torch.autograd.grad(results[0], [state, *layer.parameters()], u)),
        (results[1], *torch.autograd.grad(results[1], [state, *cell.parameters()], u)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.quick
def test_what_the_module_refuses():
    lstm, normed = (_core.Cell(_core.CELLS.index(name)) for name in ("lstm", "lstm_layer_norm"))
    with pytest.raises(ValueError, match="bfloat16: expected False with float64"):
        _core.tape_shape(lstm, T, B, I, H, H, False, False, True, True)
    x, w = np.zeros((1, 1, 1), np.int16), np.zeros((4, 1), np.int16)
    weights = (w, w, w[:, 0].copy(), None)
    given = [x, x[0], x[0]]
    into = [x.copy(), x[0].copy(), x[0].copy()]
    packed = _core.pack(lstm, weights, True)
    of_float32 = _core.pack(lstm, tuple(a if a is None else a.astype(np.float32) for a in weights))

    def call(given=given, into=into, weights=weights, cell=lstm, low=True):
        options = None, None, False, 0, None, False
        state0, y, stateT = tuple(given[1:]), into[0], into[1:]
        _core.run_forward(cell, weights, given[0], state0, (), *options, y, stateT, (), None, low)

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
    with pytest.raises(_core.RefusedType, match="gain_ih: expected int16"):
        call(weights=(*weights, *[None] * 4), cell=normed)
    for steps in (2**61, 2**62):  # with little memory: all strides are 0
        with pytest.raises(OverflowError, match="size too large: 4"):
            call([torch.zeros((1, 1, 1), dtype=torch.int16).expand(steps, 1, 1), *given[1:]])
    with pytest.raises(_core.RefusedType, match="dtype of the weights"):
        _core.testing.repeat_forward(1, packed, floats[0][0], tuple(floats[0][1:]), False)
