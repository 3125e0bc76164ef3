"""``fusedrnn.torch.LSTM``, ``GRU`` and ``RNN`` against ``torch.nn``'s: values and gradients."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import rnn

from torch_pairs import (
    DTYPES,
    LAYERS,
    B,
    H,
    I,
    T,
    assert_close,
    assert_same,
    every_dtype,
    every_layer,
    flat,
    ft,
    gradients,
    grads,
    inputs,
    module_pair,
    state_of,
)

pytestmark = pytest.mark.usefixtures("no_fallback")


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
        (ValueError, "lengths: expected 0 to T = 5, got -1 to -1", {"lengths": [-1] * B}),
        (ValueError, "lengths: expected 0 to T = 5, got 1000000000000 to", {"lengths": [10**12] * B}),
        (ValueError, r"lengths: expected shape \(3,\), got \(2,\)", {"lengths": [1, 1]}),
        (ValueError, r"lengths: expected shape \(3,\), got \(\)", {"lengths": 3}),
        (TypeError, "lengths: expected whole numbers, got float64", {"lengths": [1.0, 1.0, 1.0]}),
        *(
            (
                TypeError,
                "lengths: expected whole numbers, got float32",
                {"lengths": torch.tensor([1.0, v, 3])},
            )
            for v in (2.0, torch.nan, torch.inf)
        ),
        (TypeError, "lengths: expected whole numbers, got complex64", {"lengths": torch.ones(B) * 1j}),
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
    assert torch.autograd.gradcheck(f, everything, atol=1e-9)
    assert ours.last_path == "fused"
