"""LSTM with ``proj_size`` against ``torch.nn``'s, and its operators as PyTorch checks them."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from torch.nn.utils import rnn

from fusedrnn.torch import compilable
from fusedrnn.torch.ops import Call
from fusedrnn.torch.recurrence import recurrence
from torch_pairs import DTYPES, assert_close, assert_same, every_dtype, flat, ft, module_pair, state_of

pytestmark = [
    pytest.mark.usefixtures("no_fallback"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

T, B, I, H, P = 5, 3, 4, 19, 17  # two blocks of units of each
LENGTHS = [5, 2, 4]


def inputs(layer, dtype=torch.float32, shape=(T, B, I), grad=True):
    x = torch.randn(shape, dtype=dtype)
    batch = None if x.dim() == 2 else x.size(0 if layer.batch_first else 1)
    hx = state_of(layer, batch, x)
    for t in (x, *hx):
        t.requires_grad_(grad)
    return x, hx


def pair(dtype=torch.float32, **options):
    theirs, ours = module_pair("LSTM", I, H, proj_size=P, **options)
    return theirs.to(dtype), ours.to(dtype)


@pytest.mark.quick
@every_dtype
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"batch_first": True},
        {"num_layers": 3, "bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_torch_nn(options, dtype):
    theirs, ours = pair(dtype, **options)
    x, hx = inputs(ours, dtype)
    assert_same(theirs, ours, x, hx)
    assert_same(theirs, ours, x, None)
    with torch.no_grad():
        assert_same(theirs, ours, x, hx)


@pytest.mark.parametrize("sizes", [(2, 8, 1), (3, 33, 32), (16, 40, 16), (1, 64, 20)], ids=str)
def test_other_sizes(sizes):
    I, H, P = sizes
    theirs, ours = module_pair("LSTM", I, H, proj_size=P, bidirectional=True)
    x, hx = inputs(ours, shape=(T, B, I))
    assert_same(theirs, ours, x, hx)


def test_unbatched_and_one_step():
    theirs, ours = pair()
    for shape in ((T, I), (1, I), (1, B, I), (1, 1, I)):
        x, hx = inputs(ours, shape=shape)
        assert_same(theirs, ours, x, hx)


@every_dtype
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences(bidirectional, dtype):
    theirs, ours = pair(dtype, num_layers=2, bidirectional=bidirectional)
    x, hx = inputs(ours, dtype)
    packed = rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    assert_same(theirs, ours, packed, hx)
    y, states = ours(packed, hx)
    padded, _ = rnn.pad_packed_sequence(y)
    again, states2 = ours(x, hx, lengths=LENGTHS)
    assert_close(again, padded)
    for a, b in zip(states, states2, strict=True):
        assert_close(a[:, 1], b[:, 1])  # the states of a PackedSequence are those of each row's end
    assert [s.shape[-1] for s in states] == [P, H]


def test_few_gradients_are_wanted():
    """Each alone: of x, the states, each weight."""
    theirs, ours = pair()
    x, hx = inputs(ours, grad=False)
    names = ["input", *dict(ours.named_parameters())]
    for wanted in names:
        for layer in (theirs, ours):
            for name, p in layer.named_parameters():
                p.requires_grad_(name == wanted)
        x.requires_grad_(wanted == "input")
        assert_same(theirs, ours, x, hx)


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": True},
        {"recurrent_dropout": 0.3},
        {"zoneout_h": 0.3, "zoneout_c": 0.2, "recompute": True},
    ],
    ids=str,
)
def test_options_are_those_of_the_reference(options, monkeypatch):
    """Values and gradients; the masks are of one seed."""
    layer = ft.LSTM(I, H, 2, proj_size=P, bidirectional=True, **options).double()
    x, hx = inputs(layer, torch.float64)
    more = {"lengths": LENGTHS, "reset": torch.rand(T, B) < 0.3, "return_states": True, "detach_every": 2}
    found = []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("FUSEDRNN_BACKEND", backend)
        torch.manual_seed(1)
        out = flat(layer(x, hx, **more))
        wanted = [x, *hx, *layer.parameters()]
        found.append([*out, *torch.autograd.grad([t.sin().sum() for t in out], wanted)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_shapes_that_are_wrong_are_pytorchs_errors():
    theirs, ours = pair()
    x = torch.randn(T, B, I)
    for h, c in ((H, H), (P, P)):
        hx = torch.zeros(1, B, h), torch.zeros(1, B, c)
        with pytest.raises(RuntimeError) as expected:
            theirs(x, hx)
        with ft.fallback(), pytest.raises(RuntimeError) as got:
            ours(x, hx)
        assert str(got.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        ours(rnn.pack_sequence([torch.randn(T, I)]), (torch.zeros(1, 1, H), torch.zeros(1, 1, H)))
    with pytest.raises(ValueError, match="proj_size"):
        ft.LSTM(I, H, proj_size=H)
    with pytest.raises(ValueError, match="layer_norm"):
        ft.LSTM(I, H, proj_size=P, layer_norm=True)


def test_frozen_copied_converted_and_saved():
    theirs, ours = pair(num_layers=2)
    x, hx = inputs(ours, grad=False)
    with torch.no_grad():
        want = flat(ours(x, hx))
        ft.freeze(ours.eval())
        for a, b in zip(flat(ours(x, hx)), want, strict=True):
            assert torch.equal(a, b)
        ft.unfreeze(ours)
        for other in (copy.deepcopy(ours), ft.convert(copy.deepcopy(theirs)).model):
            for a, b in zip(flat(other(x, hx)), want, strict=True):
                assert torch.equal(a, b)


def test_second_derivatives_are_those_of_torch_nn():
    theirs, ours = pair(torch.float64)
    x, hx = inputs(ours, torch.float64)
    found = []
    for layer in (theirs, ours):
        wanted = [x, *hx, *layer.parameters()]
        first = torch.autograd.grad(sum(t.sin().sum() for t in flat(layer(x, hx))), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_operations_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    _, ours = pair()
    x, hx = inputs(ours)
    with FlopCounterMode(display=False) as counter:
        y, _ = ours(x, hx)
        y.sum().backward()
    products = 2 * T * B * (4 * H * (I + P) + P * H)
    assert counter.get_total_flops() == 3 * products


# --- the operators ------------------------------------------------------------------------------------------


def call_of(dtype=torch.float64, *, grad=True, ragged=False, rates=(), **options):
    def draw(*size):
        return torch.randn(*size, dtype=dtype).mul_(0.5).requires_grad_(grad)

    G = 4 * H
    weights = [draw(G, I), draw(G, P), draw(G), draw(G), draw(P, H)]
    rows = (torch.tensor(LENGTHS), torch.rand(T, B) < 0.3) if ragged else (None, None)
    seed = torch.tensor(7) if rates else None
    names = {"reverse": False, "recompute": False, "detach_every": None} | options
    state = [draw(B, P), draw(B, H)]
    return Call(draw(T, B, I), state, weights, [], *rows, seed, "LSTM_PROJECTED", **names, rates=rates)


CALLS = {
    "all": {},
    "ragged": {"ragged": True, "reverse": True},
    "regularized": {"rates": [0.25, 0.2, 0.1], "ragged": True},
    "again": {"recompute": True, "rates": [0.0, 0.2, 0.1]},
}
calls = pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param(
            options,
            dtype,
            id=f"{name}-{str(dtype)[6:]}",
            marks=[] if (k % 2 == 0) == (dtype is torch.float32) else pytest.mark.slow,
        )
        for k, (name, options) in enumerate(CALLS.items())
        for dtype in DTYPES
    ],
)
def test_opcheck(options, dtype):
    torch.manual_seed(0)
    call = call_of(dtype, grad=False, **options)
    arguments = (*call, True, call.tape_rows())
    torch.library.opcheck(torch.ops.fusedrnn.recurrence.default, arguments)
    y, hT, cT, hs, cs, tape = torch.ops.fusedrnn.recurrence(*arguments)
    upstream, need = [t.clone() for t in (y, hT, cT, hs, cs)], [True] * len(call.learned())
    arguments = (*call, y, [tape], upstream, need)
    torch.library.opcheck(torch.ops.fusedrnn.recurrence_backward.default, arguments)


@calls
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives_of_the_node(check, options):
    torch.manual_seed(0)
    call = call_of(**options)

    def run(*given):
        found = recurrence(call.with_learned(given), True)
        if call.lengths is not None:  # the kernels take no gradient of held states
            valid = (torch.arange(T)[:, None] < call.lengths)[:, :, None]
            found = [t * valid if t.dim() == 3 else t for t in found]
        return tuple(found)

    assert check(run, call.learned(), fast_mode=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break(recompute):
    torch._dynamo.reset()
    layer = compilable.LSTM(I, H, 2, proj_size=P, bidirectional=True, recompute=recompute)
    x, *hx = (torch.randn(size, requires_grad=True) for size in ((T, B, I), (4, B, P), (4, B, H)))
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = flat(run(x, tuple(hx)))
        found.append([*out, *torch.autograd.grad([t.sum() for t in out], [x, *hx, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)
