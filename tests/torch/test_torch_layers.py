"""``fusedrnn.torch.LSTM``, ``GRU`` and ``RNN`` against ``torch.nn``'s: values, gradients, use as modules."""

from __future__ import annotations

import copy
import io
import pickle
import re
import threading
import warnings

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parametrizations, rnn

from torch_pairs import (
    DTYPES,
    LAYERS,
    assert_close,
    assert_same,
    every_dtype,
    every_layer,
    flat,
    ft,
    gradients,
    module_pair,
    state_of,
)

pytestmark = pytest.mark.usefixtures("no_fallback")

T, B, I, H = 5, 3, 4, 7


def grads(tensors, on=True):
    for t in flat(tensors):
        t.requires_grad_(on)
    return tensors


def inputs(layer, dtype=torch.float32, shape=(T, B, I)):
    """x and a state that want a gradient."""
    x = torch.randn(shape, dtype=dtype)
    batch = None if x.dim() == 2 else x.size(0 if layer.batch_first else 1)
    return grads(x), grads(state_of(layer, batch, x))


# --- the same values and gradients ----------------------------------------------------------------------


@every_dtype
@every_layer
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3},
        {"bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False},
        {"num_layers": 2, "bias": False, "batch_first": True},
        {"num_layers": 3, "dropout": 0.4, "bidirectional": True},
    ],
    ids=str,
)
def test_options(kind, options, dtype):
    theirs, ours = module_pair(kind, I, H, **options, dtype=dtype)
    x, hx = inputs(ours, dtype)
    for state in (hx, None):
        torch.manual_seed(3)
        expected = theirs(x, state)
        torch.manual_seed(3)  # the masks of dropout are the same
        got = ours(x, state)
        assert ours.last_path == "fused"
        for a, b in zip(flat(got), flat(expected), strict=True):
            assert_close(a, b)
        wanted, found = gradients(theirs, expected, (x, state)), gradients(ours, got, (x, state))
        for name, g in wanted.items():
            assert_close(found[name], g, name)
    theirs.eval(), ours.eval()
    assert_same(theirs, ours, x, hx)


@every_layer
@pytest.mark.parametrize("hidden", [1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 65])
def test_sizes(kind, hidden):
    theirs, ours = module_pair(kind, 3, hidden, num_layers=2, dtype=torch.float64)
    x, hx = inputs(ours, torch.float64, (4, 5, 3))
    assert_same(theirs, ours, x, hx)


@every_dtype
def test_relu(dtype):
    theirs, ours = module_pair("RNN", I, H, 2, "relu", dtype=dtype)  # the fourth is the nonlinearity
    assert_same(theirs, ours, *inputs(ours, dtype))


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(kind, batch_first):
    theirs, ours = module_pair(kind, I, H, num_layers=2, bidirectional=True, batch_first=batch_first)
    x, hx = inputs(ours, shape=(T, I))
    assert_same(theirs, ours, x, hx)
    assert_same(theirs, ours, x)


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_other_memory_layouts(kind, batch_first):
    theirs, ours = module_pair(kind, I, H, batch_first=batch_first, dtype=torch.float64)
    first, second = (B, T) if batch_first else (T, B)
    wide = torch.randn(first * 2, second + 3, I + 2, dtype=torch.float64)
    for x in (
        wide[::2, 1:-2, 1:-1],  # the features are not contiguous
        wide[::2, 1:-2, :I],
        wide[:first, :second, : 2 * I : 1].flip(0)[..., :I],
        torch.randn(second, first, I, dtype=torch.float64).transpose(0, 1),
        torch.randn(I, first, second, dtype=torch.float64).permute(1, 2, 0),
        torch.randn(1, second, I, dtype=torch.float64).expand(first, second, I),
        torch.randn(first, 1, I, dtype=torch.float64).expand(first, second, I),
        torch.randn(first, second, 1, dtype=torch.float64).expand(first, second, I),
        torch.randn(T * B * I + 1, dtype=torch.float64)[1:].view(first, second, I),
    ):
        hx = state_of(ours, B, x)
        assert_same(theirs, ours, x.detach().requires_grad_(), grads(hx))
        sliced = [torch.randn(1, B, 2 * H, dtype=torch.float64)[..., ::2] for _ in flat(hx)]
        sliced[0] = torch.randn(1, 1, H, dtype=torch.float64).expand(1, B, H)
        assert_same(theirs, ours, x, tuple(sliced) if kind == "LSTM" else sliced[0])


@every_layer
def test_a_view_in_a_graph(kind):
    """Gradients reach what a sliced, transposed or expanded input was made of."""
    theirs, ours = module_pair(kind, I, H, dtype=torch.float64)
    base = torch.randn(B, 2 * T, I, dtype=torch.float64, requires_grad=True)
    row = torch.randn(I, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (theirs, ours):
        y, _ = layer(base.transpose(0, 1)[::2] + row.expand(T, B, I))
        upstream = (
            torch.linspace(-1, 1, 2 * y.numel(), dtype=torch.float64).view(B, H, 2 * T).permute(2, 0, 1)[::2]
        )
        found.append(torch.autograd.grad([y], [base, row], [upstream]))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@every_layer
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_each_subset_of_upstream_gradients(kind, used):
    if kind != "LSTM" and 2 in used:
        return
    theirs, ours = module_pair(kind, I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    assert_same(theirs, ours, *inputs(ours, torch.float64), used=used)


@every_layer
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("hx_given", [True, False])
def test_packed_sequences(kind, enforce_sorted, hx_given):
    theirs, ours = module_pair(kind, I, H, num_layers=2, bidirectional=True, dropout=0.3, dtype=torch.float64)
    x, hx = inputs(ours, torch.float64)
    lengths = torch.tensor([5, 4, 2] if enforce_sorted else [2, 5, 4])
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(3)
        packed = rnn.pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        results.append(layer(packed, hx if hx_given else None))
    expected, got = results
    assert ours.last_path == "fused"
    for a, b in zip(got[0], expected[0], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a.double(), b.double())
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert_close(a, b)
    wanted, found = gradients(theirs, expected, (x, hx)), gradients(ours, got, (x, hx))
    for name, g in wanted.items():
        assert_close(found[name], g, name)


# --- every argument at random ---------------------------------------------------------------------------


def whether():
    return st.booleans()


configurations = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(LAYERS),
        "dtype": st.sampled_from(DTYPES),
        "relu": whether(),
        "layers": st.integers(1, 3),
        "bidirectional": whether(),
        "batch_first": whether(),
        "bias": whether(),
        "dropout": st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        "recompute": whether(),
        "training": whether(),
        "form": st.sampled_from(["batched", "batched", "unbatched", "packed", "packed, unsorted"]),
        "sizes": st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9)),
        "layout": st.sampled_from(["contiguous", "transposed", "sliced", "features sliced", "expanded"]),
        "hx": whether(),
        "x wants": whether(),
        "hx wants": whether(),
        "frozen": st.integers(0, 15),
        "used": st.sets(st.integers(0, 2), min_size=1),
        "mode": st.sampled_from(["grad"] * 4 + ["no_grad", "inference_mode"]),
        "seed": st.integers(0, 2**31),
    }
)


def laid_out(x, layout):
    """The values of x, for an expanded one of its first row, in other memory."""
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return torch.stack([x, x + 1], 1)[:, 0]
    if layout == "features sliced":
        return torch.stack([x, x + 1], -1)[..., 0]
    return x[:1].expand(x.shape) if layout == "expanded" else x


def check_configuration(c):
    torch.manual_seed(c["seed"])
    (steps, batch, features, hidden), dtype = c["sizes"], c["dtype"]
    options = {k: c[k] for k in ("bidirectional", "batch_first", "bias")} | {"num_layers": c["layers"]}
    options["dropout"] = c["dropout"] if c["layers"] > 1 else 0.0
    if c["kind"] == "RNN":
        options["nonlinearity"] = "relu" if c["relu"] else "tanh"
    theirs, ours = module_pair(c["kind"], features, hidden, **options, dtype=dtype)
    ours.recompute = c["recompute"]
    theirs.train(c["training"]), ours.train(c["training"])
    for i, (p, q) in enumerate(zip(theirs.parameters(), ours.parameters(), strict=True)):
        p.requires_grad_(not c["frozen"] >> i % 4 & 1)
        q.requires_grad_(p.requires_grad)
    unbatched = c["form"] == "unbatched"
    shape = (steps,) if unbatched else (batch, steps) if c["batch_first"] else (steps, batch)
    x = laid_out(torch.randn(*shape, features, dtype=dtype), c["layout"]).requires_grad_(c["x wants"])
    hx = grads(state_of(ours, None if unbatched else batch, x.detach()), c["hx wants"]) if c["hx"] else None
    lengths = torch.randint(1, steps + 1, (batch,))
    in_order = c["form"] == "packed"
    if in_order:
        lengths = lengths.sort(descending=True).values

    def given():
        return (
            rnn.pack_padded_sequence(x, lengths, c["batch_first"], in_order)
            if c["form"].startswith("packed")
            else x
        )

    mode = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[
        c["mode"]
    ]
    with mode():
        torch.manual_seed(c["seed"])
        expected = theirs(given(), hx)
        after = torch.get_rng_state()
        torch.manual_seed(c["seed"])
        got = ours(given(), hx)
        assert torch.equal(torch.get_rng_state(), after)
        assert ours.last_path == "fused"
        for a, b in zip(flat(got), flat(expected), strict=True):
            assert_close(a, b)
            assert a.requires_grad == b.requires_grad
            assert a.is_inference() == b.is_inference()
    if c["mode"] == "grad":
        used = {i for i in c["used"] if i < len(flat(got))} or {0}
        wanted = gradients(theirs, expected, (x, hx), used)
        found = gradients(ours, got, (x, hx), used)
        assert wanted.keys() == found.keys()
        for name, g in wanted.items():
            assert_close(found[name], g, name)


@given(configurations)
@settings(max_examples=100)
def test_random_configurations(c):
    check_configuration(c)


@pytest.mark.slow
@given(configurations)
@settings(max_examples=2000)
def test_2000_random_configurations(c):
    check_configuration(c)


# --- what only ours have: lengths, reset, return_states -------------------------------------------------


def stepwise(layer, x, hx, lengths, reset, detach_every=None):
    """The layer as a plain loop over PyTorch's cells: output, final states, states of every step."""
    L, D = layer.num_layers, 1 + layer.bidirectional
    steps = len(x)
    valid = torch.arange(steps)[:, None] < lengths
    x = torch.where(valid[:, :, None], x, 0)
    pair = isinstance(layer, torch.nn.LSTM)
    hx = hx if pair else (hx,)
    final, every = [], []
    for k in range(L):
        outputs = []
        for d in range(D):
            suffix = f"_l{k}" + ("_reverse" if d else "")
            extra = {"nonlinearity": layer.nonlinearity} if isinstance(layer, torch.nn.RNN) else {}
            cell_class = getattr(torch.nn, layer.mode.split("_")[0] + "Cell")
            cell = cell_class(x.size(2), layer.hidden_size, bias=layer.bias, dtype=x.dtype, **extra)
            for name, _ in list(cell.named_parameters()):
                setattr(cell, name, getattr(layer, name + suffix))
            state = tuple(s[k * D + d] for s in hx)
            seen = [None] * steps
            for k_run, t in enumerate(reversed(range(steps)) if d else range(steps)):
                there, cut = valid[t, :, None], (reset[t] & valid[t])[:, None]
                if detach_every and k_run and k_run % detach_every == 0:
                    begins = (t == lengths - 1)[:, None] & bool(d)  # the initial state is not cut off
                    state = tuple(torch.where(there & ~begins, s.detach(), s) for s in state)
                if not d:
                    state = tuple(torch.where(cut, 0, s) for s in state)
                new = cell(x[t], state if pair else state[0])
                new = new if pair else (new,)
                # held in padding, where no gradient of it is read
                seen[t] = tuple(torch.where(there, n, s.detach()) for n, s in zip(new, state, strict=True))
                state = tuple(torch.where(there, n, s) for n, s in zip(new, state, strict=True))
                if d and t:
                    state = tuple(torch.where(cut, 0, s) for s in state)
            final.append(state)
            every.append([torch.stack(s) for s in zip(*seen, strict=True)])
            outputs.append(torch.where(valid[:, :, None], every[-1][0], 0))
        x = torch.cat(outputs, 2)
    final, every = ([torch.stack(s) for s in zip(*e, strict=True)] for e in (final, every))
    return x, tuple(final), tuple(every)


@pytest.mark.quick
@every_dtype
@every_layer
@pytest.mark.parametrize(
    "used",
    [("lengths",), ("reset",), ("lengths", "reset"), ("detach_every",), ("lengths", "reset", "detach_every")],
    ids="+".join,
)
@pytest.mark.parametrize("form", ["time first", "batch first", "unbatched"])
@pytest.mark.parametrize("recompute", [False, True])
def test_lengths_reset_and_states_against_a_loop(kind, dtype, used, form, recompute):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": form == "batch first"}
    _, ours = module_pair(kind, I, H, **options, dtype=dtype)
    ours.recompute = recompute
    batch = 1 if form == "unbatched" else 4
    x = torch.randn(T, batch, I, dtype=dtype)
    lengths, reset = torch.tensor([3, 5, 0, 1][:batch]), torch.rand(T, batch) < 0.4
    lengths = lengths if "lengths" in used else torch.full((batch,), T)
    reset = reset if "reset" in used else torch.zeros_like(reset)
    reset[0, 0] = "reset" in used
    x[torch.arange(T)[:, None] >= lengths] = torch.nan  # never read
    grads(x)
    hx = grads(state_of(ours, batch, x.detach()))

    def forward():
        take = {
            "time first": lambda a: a,
            "batch first": lambda a: a.transpose(0, 1),
            "unbatched": lambda a: a[:, 0],
        }
        drop = (lambda s: s[:, 0]) if form == "unbatched" else lambda s: s
        more = {
            "lengths": lengths if batch > 1 else int(lengths),
            "reset": take[form](reset),
            "detach_every": 2,
        }
        state = tuple(map(drop, hx)) if kind == "LSTM" else drop(hx)
        y, final, every = ours(take[form](x), state, **{k: more[k] for k in used}, return_states=True)
        assert ours.last_path == "fused"
        every = flat(every)
        if form == "batch first":
            return y.transpose(0, 1), flat(final), [s.transpose(1, 2) for s in every]
        if form == "unbatched":
            return y[:, None], [s[:, None] for s in flat(final)], [s[:, :, None] for s in every]
        return y, flat(final), every

    every = 2 if "detach_every" in used else None
    expected, got = stepwise(ours, x, hx, lengths, reset, every), forward()
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert_close(a, b)
    n = len(flat(got))
    for chosen in (
        {0},
        set(range(1, n)),
        set(range((n + 1) // 2, n)),
        set(range(n)),
    ):  # y, states, every step's
        wanted = gradients(ours, expected, (x, hx), chosen)
        found = gradients(ours, forward(), (x, hx), chosen)
        for name, g in wanted.items():
            assert_close(found[name], g, f"{name} from {chosen}")


@every_dtype
@every_layer
@pytest.mark.parametrize("every", [1, 2, 4, 5, 9])
def test_detach_every_is_cutting_by_hand(kind, dtype, every):
    """PyTorch's layer, called with one chunk after another, the state detached between."""
    theirs, ours = module_pair(kind, I, H, num_layers=2, dtype=dtype)
    x, hx = inputs(ours, dtype)
    state, outputs = hx, []
    for chunk in x.split(every):
        y, state = theirs(chunk, state)
        outputs.append(y)
        last, state = state, tuple(s.detach() for s in state) if kind == "LSTM" else state.detach()
    expected, got = (torch.cat(outputs), last), ours(x, hx, detach_every=every)
    assert ours.last_path == "fused"
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert_close(a, b)
    wanted, found = gradients(theirs, expected, (x, hx)), gradients(ours, got, (x, hx))
    whole = gradients(ours, ours(x, hx), (x, hx))
    for name, g in wanted.items():
        assert_close(found[name], g, name)
    assert torch.equal(found["weight_hh_l0"], whole["weight_hh_l0"]) == (every >= T)


@every_layer
def test_kinds_of_lengths_and_resets(kind):
    _, ours = module_pair(kind, I, H)
    x = torch.randn(T, B, I)
    lengths, reset = torch.tensor([5, 1, 0]), torch.rand(T, B) < 0.5
    expected = ours(x, lengths=lengths, reset=reset)
    for a in (lengths.int(), lengths.tolist(), lengths.numpy(), tuple(lengths), torch.arange(6)[[5, 1, 0]]):
        for b in (reset.float(), reset.byte(), reset.numpy(), reset.tolist(), reset.t().contiguous().t()):
            for s, t in zip(flat(ours(x, lengths=a, reset=b)), flat(expected), strict=True):
                assert torch.equal(s, t)


@every_layer
def test_wrong_lengths_and_resets(kind):
    _, ours = module_pair(kind, I, H)
    x, packed = torch.randn(T, B, I), rnn.pack_padded_sequence(torch.randn(T, B, I), torch.tensor([5, 4, 2]))
    for error, words, more in (
        (ValueError, "lengths: expected 0 to T = 5, got 1 to 6", {"lengths": [6, 1, 1]}),
        (ValueError, "lengths: expected 0 to T = 5, got -1 to 1", {"lengths": [1, -1, 1]}),
        (ValueError, r"lengths: expected shape \(3,\), got \(2,\)", {"lengths": [1, 1]}),
        (ValueError, r"lengths: expected shape \(3,\), got \(\)", {"lengths": 3}),
        (TypeError, "lengths: expected whole numbers, got float64", {"lengths": [1.0, 1.0, 1.0]}),
        (TypeError, "lengths: expected whole numbers, got bool", {"lengths": [True, True, False]}),
        (ValueError, r"reset: expected shape \(5, 3\), got \(3, 5\)", {"reset": torch.zeros(B, T)}),
        (ValueError, "reset: expected booleans, or 0 and 1", {"reset": torch.full((T, B), 2)}),
        (ValueError, "reset: expected booleans, or 0 and 1", {"reset": torch.full((T, B), torch.nan)}),
        (NotImplementedError, "meta", {"lengths": torch.zeros(B, dtype=torch.int64, device="meta")}),
        (NotImplementedError, "meta", {"reset": torch.zeros(T, B, device="meta")}),
        (ValueError, "detach_every: expected at least 1, got 0", {"detach_every": 0}),
        (TypeError, "detach_every: expected a whole number, got float", {"detach_every": 2.0}),
        (TypeError, "detach_every: expected a whole number, got bool", {"detach_every": True}),
    ):
        with pytest.raises(error, match=words):
            ours(x, **more)
    for more in (
        {"lengths": [1, 1, 1]},
        {"reset": torch.zeros(T, B)},
        {"return_states": True},
        {"detach_every": 2},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(more))}: expected none with a PackedSequence"):
            ours(packed, **more)
        with (
            ft.fallback(),
            pytest.raises(RuntimeError, match=f"{next(iter(more))} needs the kernels"),
        ):
            ours(x, **more)


@pytest.mark.quick
@every_layer
@pytest.mark.parametrize("more", [{}, {"lengths": True}, {"reset": True}, {"return_states": True},
    {"lengths": True, "reset": True, "return_states": True}, {"packed": True}, {"detach_every": True}],
    ids=str)  # fmt: skip
@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": True}, pytest.param({"bidirectional": True, "num_layers": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_gradcheck(kind, more, options):
    options = dict(options)
    recompute = options.pop("recompute", False)
    _, ours = module_pair(kind, 2, 3, **options, dtype=torch.float64)
    ours.recompute = recompute
    x, hx = inputs(ours, torch.float64, (4, 3, 2))
    names, weights = zip(*ours.named_parameters(), strict=True)
    values = {"lengths": torch.tensor([4, 0, 2]), "reset": torch.rand(4, 3) < 0.4, "return_states": True}
    values["detach_every"] = 4  # of 4 steps: no cut, else it were no derivative
    call = {name: values[name] for name in more if name in values}

    def f(x, *rest):
        state, w = rest[: len(flat(hx))], dict(zip(names, rest[len(flat(hx)) :], strict=True))
        if "packed" in more:
            x = rnn.pack_padded_sequence(x, torch.tensor([2, 4, 1]), enforce_sorted=False)
        state = state if kind == "LSTM" else state[0]
        found = flat(torch.func.functional_call(ours, w, (x, state), call))
        if "lengths" in more:  # of states held past a row's length no gradient is read
            valid = (torch.arange(4)[:, None] < values["lengths"])[:, :, None]
            found = [torch.where(valid, s, 0) if s.dim() == 4 else s for s in found]
        return tuple(found)

    everything = (x, *flat(hx), *weights)
    assert torch.autograd.gradcheck(f, everything)
    assert torch.autograd.gradcheck(f, everything, atol=1e-9)
    assert ours.last_path == "fused"


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


def test_wrong_forget_biases():
    for kind in (ft.LSTM, ft.compilable.LSTM, ft.LSTMCell):
        for wrong in ("1", True, torch.ones(H), [1.0]):
            with pytest.raises(TypeError, match="forget_bias: expected a number or None, got "):
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


# --- autograd -------------------------------------------------------------------------------------------


@every_layer
def test_backward_twice(kind):
    _, ours = module_pair(kind, I, H)
    x, hx = inputs(ours)
    result = ours(x, hx)
    loss = sum(o.square().sum() for o in flat(result))
    first = torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *ours.parameters()])
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_layer
def test_the_tape_goes_with_the_graph(kind):
    """What backward needs is freed by backward, though the results live on."""
    import gc
    import weakref

    _, ours = module_pair(kind, I, H)
    y, _ = ours(torch.randn(T, B, I))
    tape = weakref.ref(y.grad_fn.saved_tensors[0])
    y.sum().backward()
    gc.collect()
    assert tape() is None
    assert y.grad_fn is not None


@every_layer
@pytest.mark.parametrize("what", ["x", "hx", "weight", "y"])
def test_a_change_in_place_before_backward_is_noticed(kind, what):
    _, ours = module_pair(kind, I, H)
    x, hx = torch.randn(T, B, I), state_of(ours, B, torch.ones(()))
    y, _ = ours(x, hx)
    {"x": x, "hx": flat(hx)[0], "weight": ours.weight_hh_l0.detach(), "y": y.detach()}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_layer
def test_second_derivatives(kind):
    theirs, ours = module_pair(kind, I, H, dtype=torch.float64)
    x, hx = inputs(ours, torch.float64)
    found = []
    for layer in (ours, theirs):
        wanted = [x, *flat(hx), *layer.parameters()]
        first = torch.autograd.grad(layer(x, hx)[0].square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), wanted, create_graph=True)
        found.append([*first, *second, *torch.autograd.grad(sum(d.sum() for d in second), wanted)])
    assert ours.last_path == "fused"
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@every_layer
def test_second_derivatives_of_a_batch_of_gradients(kind):
    """As ``hessian(vectorize=True)`` and ``is_grads_batched`` ask for them."""
    found = []
    for layer in module_pair(kind, I, H, dtype=torch.float64):
        x = torch.linspace(-1, 1, T * B * I, dtype=torch.float64).reshape(T, B, I)
        wanted = [p for p in layer.parameters() if p.requires_grad]
        for vectorize in (False, True):
            rows = torch.autograd.functional.jacobian(
                lambda x, layer=layer: layer(x)[0].sin().sum(-1), x, create_graph=True, vectorize=vectorize
            )
            found.append(torch.autograd.grad(rows.square().sum(), wanted))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_close(a, b)


@every_layer
def test_a_bias_changed_before_second_derivatives_is_noticed(kind):
    """First derivatives do not need it."""
    _, ours = module_pair(kind, I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    y = ours(x)[0].square().sum()
    with torch.no_grad():
        ours.bias_ih_l0.add_(1)
    torch.autograd.grad(y, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="a bias has been modified by an inplace operation"):
        torch.autograd.grad(y, x, create_graph=True)


@every_layer
@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_on_saved_tensors(kind, recompute):
    theirs, ours = module_pair(kind, I, H, num_layers=2, dtype=torch.float64)
    ours.recompute = recompute
    x, hx = inputs(ours, torch.float64)
    with torch.autograd.graph.save_on_cpu():
        assert_same(theirs, ours, x, hx)
    kept = []

    def pack(t):
        kept.append(t)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i].clone()):
        result = ours(x, hx)
    found, wanted = gradients(ours, result, (x, hx)), gradients(theirs, theirs(x, hx), (x, hx))
    for name, g in wanted.items():
        assert_close(found[name], g, name)


@pytest.mark.quick
@every_layer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(kind, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    theirs, ours = module_pair(kind, I, H, num_layers=2, dropout=0.5, dtype=torch.float64)
    x, _ = inputs(ours, torch.float64)
    found = []
    for layer in (theirs, ours):
        torch.manual_seed(2)
        y = checkpoint(lambda x, layer=layer: layer(x)[0].tanh(), x, use_reentrant=use_reentrant)
        found.append(
            (y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
            if not use_reentrant
            else (y,)
        )
        if use_reentrant:
            y.square().sum().backward()
            found[-1] += (x.grad, *(p.grad for p in layer.parameters()))
            x.grad = None
    for a, b in zip(*found, strict=True):
        assert_close(b, a)
    assert ours.last_path == "fused"


@every_layer
def test_anomaly_mode(kind):
    theirs, ours = module_pair(kind, I, H)
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
        assert_same(theirs, ours, *inputs(ours))
        x = torch.full((T, B, I), torch.nan, requires_grad=True)
        with pytest.raises(RuntimeError, match="returned nan values"):
            ours(x)[0].sum().backward()


@every_layer
def test_module_hooks(kind):
    found = []
    for layer in module_pair(kind, I, H):
        seen = []
        layer.register_forward_pre_hook(lambda m, args, s=seen: s.append("before"))
        layer.register_forward_hook(lambda m, args, out, s=seen: s.append("after"))
        layer.register_full_backward_hook(lambda m, gi, go, s=seen: s.append((*gi, *go)))
        layer.weight_hh_l0.register_hook(lambda g: 2 * g)
        torch.manual_seed(1)
        y, _ = layer(torch.randn(T, B, I, requires_grad=True))
        y.square().sum().backward()
        found.append((seen, layer.weight_hh_l0.grad))
    (seen, g), (our_seen, our_g) = found
    assert_close(our_g, g)
    assert seen[:2] == our_seen[:2] == ["before", "after"]
    assert len(seen) == len(our_seen) == 3
    for a, b in zip(our_seen[2], seen[2], strict=True):
        assert_close(a, b)


@every_layer
def test_several_threads_in_one_layer(kind):
    theirs, ours = module_pair(kind, I, 33, num_layers=2)
    xs = [torch.randn(T, B, I, requires_grad=True) for _ in range(6)]
    expected = [theirs(x)[0].detach() for x in xs]
    wrong = []

    def work(x, y):
        try:
            for _ in range(30):
                got = ours(x)[0]
                assert_close(got.detach(), y)
                torch.autograd.grad(got.sum(), x)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# --- fallbacks ------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_falls_back(kind, dtype, warned, monkeypatch):
    monkeypatch.setattr(ft.paths, "has_bfloat16", lambda key: False)  # as where the processor has none
    theirs, ours = module_pair(kind, I, H, dtype=dtype)
    x, hx = inputs(ours, dtype)
    with pytest.warns(
        ft.FallbackWarning, match=f"{kind} runs PyTorch's own implementation: the dtype is {dtype}"
    ) as found:
        got = ours(x, hx)
    assert found[0].filename == __file__
    assert ours.last_path == f"fallback: the dtype is {dtype}"
    for a, b in zip(flat(got), flat(theirs(x, hx)), strict=True):
        assert torch.equal(a, b)
    ours(x)  # no second warning
    ft.set_fallback_errors(True)
    with pytest.raises(RuntimeError, match="runs PyTorch's own implementation"):
        ours(x)
    with ft.fallback():  # asked for
        ours(x)
    ours.float()(x.float())
    assert ours.last_path == "fused"


@every_layer
def test_the_meta_device_falls_back(kind, warned):
    ours = getattr(ft, kind)(I, H, device="meta")
    with pytest.warns(ft.FallbackWarning, match="the device is meta"):
        y, _ = ours(torch.zeros(T, B, I, device="meta"))
    assert y.shape == (T, B, H)
    assert y.is_meta
    ours.to_empty(device="cpu")
    torch.nn.init.ones_(ours.weight_hh_l0)
    ours(torch.zeros(T, B, I))
    assert ours.last_path == "fused"


@pytest.mark.quick
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(kind, dtype, warned):
    wide = torch.promote_types(dtype, torch.float32)
    theirs, ours = module_pair(kind, I, H, num_layers=2, bidirectional=True, dtype=wide)
    x = torch.randn(T, B, I, dtype=dtype)
    low = ft.paths.has_bfloat16(ours._key)  # where PyTorch's GRU stays as it is
    fused = dtype is torch.float64 or (dtype is torch.float32 if kind == "GRU" else low)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", ft.FallbackWarning)
        try:
            expected = theirs(x)
        except RuntimeError as error:  # oneDNN has no bfloat16 LSTM for processors without AVX-512
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                ours(x)
            return
        got = ours(x)
    assert (ours.last_path == "fused") == fused
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)  # bfloat16 has 8 bits
    if fused:
        lowered = got[0].dtype is not wide
        same = copy.deepcopy(ours).bfloat16() if lowered else ours
        assert torch.equal(got[0], same(x.to(got[0].dtype))[0])


@every_layer
def test_tracing_falls_back(kind, warned):
    _, ours = module_pair(kind, I, H)
    x = torch.randn(T, B, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, x, check_trace=False)
    assert ours.last_path == "fallback: torch.jit traces"
    assert_close(traced(x + 1)[0], ours(x + 1)[0])


@every_layer
def test_transforms_fall_back(kind, warned):
    theirs, ours = module_pair(kind, I, H, dtype=torch.float64)
    x, v = torch.randn(2, T, B, I, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)

    def f(layer):
        return lambda x: layer(x)[0].square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for use in (
            lambda layer: torch.func.grad(f(layer))(x[0]),
            lambda layer: torch.func.jvp(f(layer), (x[0],), (v,))[1],
        ):
            with ft.fallback():
                expected = use(ours)
            assert_close(use(theirs), expected)
            assert_close(use(ours), expected)
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.func.vmap(f(theirs))(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x[0], v)
            pairs = [torch.autograd.forward_ad.unpack_dual(layer(dual)[0]) for layer in (theirs, ours)]
            assert_close(pairs[1].tangent, pairs[0].tangent)
    assert ours.last_path.startswith("fallback: forward-mode")


# --- wrong use ------------------------------------------------------------------------------------------


def fails_alike(theirs, ours, *args):
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs(*args)
    with pytest.raises(type(expected.value)) as got:
        ours(*args)
    assert str(got.value) == str(expected.value)


@pytest.mark.quick
@every_layer
@pytest.mark.parametrize("packed", [False, True])
def test_wrong_calls_fail_as_pytorchs(kind, packed):
    theirs, ours = module_pair(kind, I, H, num_layers=2)
    x = torch.randn(T, B, I)

    def state(*shape, dtype=torch.float32):
        h = torch.zeros(shape, dtype=dtype)
        return (h, h) if kind == "LSTM" else h

    def given(x):
        return rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2])) if packed else x

    for wrong in (torch.randn(T, B, I + 1), x.double(), x.long()):
        fails_alike(theirs, ours, given(wrong))
    for wrong in (
        state(2, B + 1, H), state(1, B, H), state(2, B, H + 1), state(2, H), state(2, B, H, 1), "state", 5,
    ):  # fmt: skip
        if packed and not isinstance(wrong, (str, int)):  # some crash PyTorch's
            with pytest.raises(RuntimeError, match=r"Expected hidden size \(2, 3, 7\), got "):
                ours(given(x), wrong)
        else:
            fails_alike(theirs, ours, given(x), wrong)
    fails_alike(theirs, ours, given(x), torch.zeros(2, B, H) if kind == "LSTM" else (torch.zeros(2, B, H),))
    if kind == "LSTM":
        h = torch.zeros(2, B, H)
        for wrong in ((h,), (h, h, h), (h, None), (h, h.double())):
            fails_alike(theirs, ours, given(x), wrong)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            ours(given(x), (h, h[:1]))
    if packed:
        return
    for wrong in (torch.zeros(I), torch.zeros(1, T, B, I), torch.zeros(0, B, I), "x", None, x.numpy(), [x]):
        fails_alike(theirs, ours, wrong)
    fails_alike(theirs, ours, x[:, 0], state(2, B, H))
    fails_alike(theirs, ours, x.to("meta"))


@every_layer
def test_wrong_constructions_fail_as_pytorchs(kind):
    for args, options in (
        ((I,), {}), ((I, 0), {}), ((I, 2.0), {}), ((I, H), {"num_layers": 0}), ((I, H), {"dropout": 2}),
        ((I, H), {"dropout": True, "num_layers": 2}), ((I, H), {"proj_size": H}), ((I, H), {"units": 3}),
    ):  # fmt: skip
        messages = []
        for module in (torch.nn, ft):
            with pytest.raises((TypeError, ValueError)) as error:
                getattr(module, kind)(*args, **options)
            messages.append((type(error.value), str(error.value)))
        assert messages[0] == messages[1]


@every_layer
def test_weights_of_another_size_fail(kind):
    x = torch.randn(T, B, I)
    for name, shape in (("weight_ih_l0", (3, I)), ("weight_hh_l0", (3, 3)), ("bias_ih_l0", (2,))):
        ours = getattr(ft, kind)(I, H)
        setattr(ours, name, torch.nn.Parameter(torch.zeros(shape)))
        with pytest.raises(RuntimeError, match=f"{name[:-3]}: expected shape"):
            ours(x)


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch(kind, batch_first):
    theirs, ours = module_pair(kind, I, H, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.zeros((0, T, I) if batch_first else (T, 0, I), requires_grad=True)
    assert_same(theirs, ours, x)
    y, _, states = ours(x, lengths=[], reset=torch.zeros(x.shape[:2]), return_states=True)
    assert y.shape == (*x.shape[:2], 2 * H)
    assert flat(states)[0].shape == (4, *x.shape[:2], H)


def test_lengths_of_another_type_are_named():
    with pytest.raises(TypeError, match=r"^lengths: expected a tensor, an array or a list, got str$"):
        ft.LSTM(2, 3)(torch.randn(4, 1, 2), lengths="abc")
