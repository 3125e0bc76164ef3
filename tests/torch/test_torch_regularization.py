"""Recurrent dropout, zoneout and layer norm of the PyTorch layers, against a loop of PyTorch's operations."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from torch.nn.functional import layer_norm
from torch.nn.utils import rnn

from fusedrnn import masks
from fusedrnn.torch import compilable
from torch_pairs import LAYERS, assert_close, every_layer, flat, ft, gradients, state_of

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("no_fallback", "openmp_pool"),
    # What the compiler itself warns of when it meets a Function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

T, B, I, H = 6, 4, 3, 5
RATES = {
    "recurrent dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout_h": 0.3},
    "both": {"recurrent_dropout": 0.2, "zoneout_h": 0.4},
}
OPTIONS = {
    **RATES,
    "layer norm": {"layer_norm": True},
    "all": {"recurrent_dropout": 0.2, "zoneout_h": 0.4, "layer_norm": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_rate = pytest.mark.parametrize("options", RATES.values(), ids=RATES)


@pytest.fixture
def fresh_compiler():
    """Every test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(kind, options, source=ft, dtype=torch.float64, **more):
    """A layer; of an LSTM also c is zoned."""
    if kind == "LSTM" and "zoneout_h" in options:
        options = {**options, "zoneout_c": 0.25}
    layer = getattr(source, kind)(I, H, dtype=dtype, **options, **more)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("gain"):
                p.normal_(
                    0.2, 0.1
                )  # about 1, rounding errors would grow from step to step: tests/support/problems.py
            else:
                p.normal_(0.0, 0.4)
    return layer


def drawn_seed(state):
    """The seed that a call draws from this state of PyTorch's generator."""
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    seed = int(torch.randint(2**63 - 1, ()))
    torch.set_rng_state(after)
    return seed


def keep(layer, kind, rate, seed, stream, t):
    """What zoneout keeps of the new state."""
    if not layer.training:
        return torch.full((B, H), 1 - rate, dtype=torch.float64)
    return torch.from_numpy(masks.keep(rate, kind, seed, stream, t, np.arange(B), H).astype(float))


def step(layer, suffix, x, h, c, mask):
    """One step of one cell: h and c."""
    w = {n: getattr(layer, n + suffix, None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    parts = []
    for part, v in (("ih", x), ("hh", h * mask)):
        a = v @ w[f"weight_{part}"].T
        if layer.layer_norm:
            gain = getattr(layer, f"gain_{part}{suffix}")
            groups = (2 * H, H) if layer.mode == "GRU" else (len(gain),)
            pairs = zip(a.split(groups, 1), gain.split(groups), strict=True)
            a = torch.cat([layer_norm(v, (len(g),), g) for v, g in pairs], 1)
        parts.append(a if w[f"bias_{part}"] is None else a + w[f"bias_{part}"])
    ax, ah = parts
    if layer.mode == "GRU":
        r, z = (ax + ah)[:, : 2 * H].sigmoid().chunk(2, 1)
        n = torch.tanh(ax[:, 2 * H :] + r * ah[:, 2 * H :])
        return (1 - z) * n + z * h, c
    if layer.mode != "LSTM":
        return (ax + ah).tanh(), c
    i, f, g, o = (ax + ah).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    m = c
    if layer.layer_norm:
        m = layer_norm(c, (H,), getattr(layer, f"gain_c{suffix}"), getattr(layer, f"bias_c{suffix}"))
    return o.sigmoid() * m.tanh(), c


def loop(layer, x, hx, seed, lengths=None, reset=None):
    """What the layer computes, x (T, B, I), step by step."""
    D = 2 if layer.bidirectional else 1
    states = hx if isinstance(hx, tuple) else (hx, torch.zeros_like(hx))
    lengths = torch.full((B,), T) if lengths is None else lengths
    reset = torch.zeros(T, B, dtype=torch.bool) if reset is None else reset
    final = []
    for k in range(layer.num_layers):
        halves = []
        for d in range(D):
            j = k * D + d
            suffix = f"_l{k}" + ("_reverse" if d else "")
            h, c = states[0][j], states[1][j]
            mask = torch.ones(B, H, dtype=torch.float64)
            if layer.training and (rate := layer.recurrent_dropout):
                mask = keep(layer, "recurrent_dropout", rate, seed, j, 0) / (1 - rate)
            ys = [None] * T
            for t in reversed(range(T)) if d else range(T):
                valid = (t < lengths)[:, None]
                if d:
                    cut = reset[t + 1] & (t + 1 < lengths) if t + 1 < T else torch.zeros(B, dtype=torch.bool)
                else:
                    cut = reset[t]
                h_in, c_in = (torch.where(cut[:, None], 0.0, s) for s in (h, c))
                h_new, c_new = step(layer, suffix, x[t], h_in, c_in, mask)
                if layer.zoneout_h:
                    kept = keep(layer, "zoneout_h", layer.zoneout_h, seed, j, t)
                    h_new = kept * h_new + (1 - kept) * h_in
                if layer.zoneout_c:
                    kept = keep(layer, "zoneout_c", layer.zoneout_c, seed, j, t)
                    c_new = kept * c_new + (1 - kept) * c_in
                h, c = torch.where(valid, h_new, h), torch.where(valid, c_new, c)
                ys[t] = torch.where(valid, h_new, 0.0)
            halves.append(torch.stack(ys))
            final.append((h, c))
        x = torch.cat(halves, 2)
    ends = [torch.stack(s) for s in zip(*final, strict=True)]
    return x, tuple(ends) if layer.mode == "LSTM" else ends[0]


def assert_as_by_steps(layer, x, hx, call, seed_state, **more):
    """Outputs and gradients of ``call`` are those of the loop with the same masks."""
    seed = drawn_seed(seed_state)
    got = call(x, hx, **more)
    expected = loop(layer, x, hx, seed, **more)
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert_close(a, b, "output")
    for (name, a), b in zip(
        gradients(layer, got, (x, hx)).items(), gradients(layer, expected, (x, hx)).values(), strict=True
    ):
        assert_close(a, b, name)


@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "lengths and reset"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_option
@every_layer
def test_against_a_loop_of_operations(kind, options, training, ragged):
    for recompute, (layers, both) in itertools.product((False, True), ((1, False), (2, True))):
        layer = build(kind, options, num_layers=layers, bidirectional=both, recompute=recompute)
        layer.train(training)
        x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
        hx = state_of(layer, B, x.detach())
        for s in flat(hx):
            s.requires_grad_()
        more = {"lengths": torch.tensor([6, 3, 0, 5]), "reset": torch.rand(T, B) < 0.3} if ragged else {}
        assert_as_by_steps(layer, x, hx, layer, torch.get_rng_state(), **more)
        assert layer.last_path == "fused"


@every_option
@every_layer
def test_gradcheck(kind, options):
    for training in (True, False):
        layer = build(kind, options).train(training)
        x = torch.randn(4, 2, I, dtype=torch.float64, requires_grad=True)
        hx = state_of(layer, 2, x.detach())
        parameters = dict(layer.named_parameters())
        tensors = [x, *[s.requires_grad_() for s in flat(hx)], *parameters.values()]

        def f(x, *rest, layer=layer, parameters=parameters):
            state = rest[: len(layer.cell.states)]
            given = dict(zip(parameters, rest[len(state) :], strict=True))
            torch.manual_seed(3)  # the same masks each time
            arguments = (x, state if len(state) == 2 else state[0])
            return tuple(flat(torch.func.functional_call(layer, given, arguments, {"return_states": True})))

        assert torch.autograd.gradcheck(f, tensors, atol=1e-9, fast_mode=True)


# Each compiles for seconds: every option, and every layer with two.
COMPILED = [("LSTM", "all"), ("LSTM", "both"), ("GRU", "zoneout"), ("GRU", "layer norm"), ("RNN", "all")]
COMPILED += [("RNN", "recurrent dropout")]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(
            kind, OPTIONS[o], id=f"{kind}-{o}", marks=[pytest.mark.slow] * ((kind, o) not in COMPILED)
        )
        for kind in LAYERS
        for o in OPTIONS
    ],
)
def test_compiled_equals_eager(kind, options):
    layer = build(kind, options, compilable, num_layers=2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (layer, compiled):
        torch.manual_seed(5)
        results.append(call(x))
    for a, b in zip(map(flat, results), reversed(list(map(flat, results))), strict=True):
        for s, t in zip(a, b, strict=True):
            assert_close(s, t)
    found = [gradients(layer, r, x) for r in results]
    for name, g in found[0].items():
        assert_close(found[1][name], g, name)


@every_rate
@every_layer
def test_draws_in_training_alone_and_from_the_default_generator(kind, options):
    layer = build(kind, options)
    x = torch.randn(T, B, I, dtype=torch.float64)

    def y(seed):
        torch.manual_seed(seed)
        return layer(x)[0]

    assert torch.equal(y(1), y(1))
    assert not torch.equal(y(1), y(2))
    layer.eval()
    before = torch.get_rng_state()
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(torch.get_rng_state(), before)
    plain = getattr(torch.nn, kind)(I, H, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    assert torch.allclose(plain(x)[0], layer(x)[0]) == ("zoneout_h" not in options)


@every_layer
def test_a_layer_without_them_draws_nothing(kind):
    layer = getattr(ft, kind)(I, H)
    before = torch.get_rng_state()
    layer(torch.randn(0 + T, B, I, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


@every_option
@every_layer
def test_a_packed_sequence_is_as_lengths(kind, options):
    layer = build(kind, options)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([6, 5, 5, 2])
    torch.manual_seed(0)
    expected = layer(x, lengths=lengths)
    torch.manual_seed(0)
    packed, state = layer(rnn.pack_padded_sequence(x, lengths))
    y, _ = rnn.pad_packed_sequence(packed)
    for a, b in zip(flat((y, state)), flat(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("source", [ft, compilable], ids=["layers", "compilable"])
@every_layer
def test_parameters_of_layer_norm(kind, source, bias):
    torch.manual_seed(0)
    layer = getattr(source, kind)(
        I, H, 2, bidirectional=True, layer_norm=True, bias=bias, dtype=torch.float64
    )
    torch.manual_seed(0)
    plain = getattr(torch.nn, kind)(I, H, 2, bidirectional=True, bias=bias, dtype=torch.float64)
    own = dict(layer.named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(own.pop(name), p), name  # the same seed, the same weights
    names = ("gain_ih", "gain_hh", *(("gain_c", "bias_c") if kind == "LSTM" else ()))
    ends = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    assert set(own) == {name + end for name in names for end in ends}
    for _ in range(2):
        for name, p in own.items():
            assert p.dtype is torch.float64
            assert (p == (0 if name.startswith("bias_c") else 1)).all()
            torch.nn.init.normal_(p)
        layer.reset_parameters()
    x = torch.randn(T, B, I, dtype=torch.float64)
    other = getattr(source, kind)(
        I, H, 2, bidirectional=True, layer_norm=True, bias=bias, dtype=torch.float64
    )
    other.load_state_dict(layer.state_dict())
    for clone in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for a, b in zip(flat(clone(x)), flat(layer(x)), strict=True):
            assert torch.equal(a, b)
    assert "layer_norm=True" in repr(layer)
    with torch.no_grad():
        layer.gain_hh_l0.mul_(2)  # the packed weights notice
    assert not torch.equal(layer(x)[0], other(x)[0])


def test_repr_and_copies_of_rates():
    layer = build("LSTM", RATES["both"])
    assert repr(layer) == "LSTM(3, 5, recurrent_dropout=0.2, zoneout_h=0.4, zoneout_c=0.25)"
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (clone.recurrent_dropout, clone.zoneout_h, clone.zoneout_c) == (0.2, 0.4, 0.25)
    assert repr(ft.GRU(3, 5)) == "GRU(3, 5)"


@every_layer
def test_torch_nn_would_leave_them_out(kind):
    x = torch.randn(T, B, I, dtype=torch.float64)
    for options in OPTIONS.values():
        layer = build(kind, options)
        name = next(n for n in ("layer_norm", "zoneout_h", "recurrent_dropout") if n in options)
        with ft.fallback(), pytest.raises(RuntimeError, match=f"{name} needs the kernels"):
            layer(x)
        model = torch.nn.Sequential(layer)
        if name == "recurrent_dropout":
            layer.eval()
            expected = layer(x)[0]
            with ft.fallback():
                assert_close(layer(x)[0], expected)
            assert_close(ft.to_torch(model).model(x)[0], expected)
            assert "dropout" not in repr(model)
        else:
            with pytest.raises(ValueError, match=f"0: torch.nn has no {name}"):
                ft.to_torch(model)
            assert type(model[0]) is getattr(ft, kind)


def test_wrong_rates():
    for error, words, options in (
        (ValueError, "recurrent_dropout: expected a number from 0 to 1, got 1.5", {"recurrent_dropout": 1.5}),
        (ValueError, "zoneout_h: expected a number from 0 to 1, got -0.1", {"zoneout_h": -0.1}),
        (TypeError, "zoneout_h: expected a number, got str", {"zoneout_h": "0.1"}),
        (TypeError, "layer_norm: expected True or False, got str", {"layer_norm": "no"}),
        (TypeError, "recompute: expected True or False, got int", {"recompute": 1}),
        (ValueError, "layer_norm: expected False with proj_size", {"layer_norm": True, "proj_size": 2}),
    ):
        with pytest.raises(error, match=words):
            ft.LSTM(I, H, **options)
    with pytest.raises(TypeError, match="return_states: expected True or False, got str"):
        ft.LSTM(I, H)(torch.ones(T, B, I), return_states="no")
    assert ft.LSTM(I, H, layer_norm=np.True_).layer_norm is True
    for kind in LAYERS:
        if kind != "LSTM":
            with pytest.raises(ValueError, match="zoneout_c: expected 0 for the cell"):
                getattr(ft, kind)(I, H, zoneout_c=0.1)


@pytest.mark.usefixtures("fresh_compiler")
@every_rate
def test_trains_with_dynamic_shapes(options):
    layer = build("LSTM", options, compilable)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (5, 9):
        x = torch.randn(t, B, I, dtype=torch.float64, requires_grad=True)
        found = []
        for call in (layer, compiled):
            torch.manual_seed(t)
            found.append(torch.autograd.grad(call(x)[0].sum(), [x, *layer.parameters()]))
        for a, b in zip(*found, strict=True):
            assert_close(a, b)
