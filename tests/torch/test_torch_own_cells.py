"""Layers of any cell in PyTorch: ``Recurrent`` and ``RecurrentCell``."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402
from fusedrnn import kernels  # noqa: E402
from fusedrnn.cells import cell, gru, lstm, maximum, minimum, rnn, tanh, where  # noqa: E402
from fusedrnn.torch import keys, paths  # noqa: E402
from own_layers import (  # noqa: E402
    LENGTHS,
    OWN,
    RESET,
    B,
    H,
    I,
    T,
    assert_same,
    by_steps,
    flat,
    hx_of,
    ind_rnn,
    large,
    made,
    own,
    scalars,
    states,
    three,
    without_scalars,
)
from published import gru_d, lstmp, mgu  # noqa: E402

# What PyTorch itself warns of while it compiles is no concern of these tests.
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("quiet_fallbacks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


# --- values and gradients -----------------------------------------------------------------------------------


PADDED = {"lengths": LENGTHS, "return_states": True}
CUT = {"reset": RESET, "lengths": LENGTHS, "detach_every": 2}


@pytest.mark.parametrize("options", [{}, PADDED, CUT], ids=["plain", "padded", "cut"])
@pytest.mark.parametrize("cell", [*OWN, lstmp], ids=lambda c: c.name)
def test_values_and_gradients_are_those_of_the_steps(cell, options):
    layer, x = made(cell, num_layers=2, bidirectional=True)
    state0, given = states(layer), scalars(cell)
    found = flat(layer(x, hx_of(state0), **options, **given))
    rows = {name: np.asarray(options[name]) for name in ("lengths", "reset") if name in options}
    expected = by_steps(layer, x, state0, given, **options | rows)
    assert_same(found, expected, [x, *state0, *given.values(), *layer.parameters()])
    assert layer.last_path == paths.FUSED


@without_scalars
def test_values_and_gradients_are_the_reference_s(cell):
    layer, x = made(cell)
    weights = {name: getattr(layer, f"{name}_l0").detach().numpy() for name in cell.blocks}
    e = kernels.forward(cell, x.detach().numpy(), weights, lengths=LENGTHS, reset=RESET, backend="reference")
    y, final = layer(x, lengths=LENGTHS, reset=torch.as_tensor(RESET).bool())
    dy = torch.randn_like(y)
    y.backward(dy)
    back = kernels.backward(e.tape, dy.numpy())
    for f, expected in zip([y, *flat((final,))], [e.y, *(s[None] for s in e.stateT)], strict=True):
        np.testing.assert_allclose(f.detach(), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(x.grad, back.dx, rtol=0, atol=1e-12)
    for name in cell.blocks:
        np.testing.assert_allclose(getattr(layer, f"{name}_l0").grad, back.dweights[name], rtol=0, atol=1e-12)


@without_scalars
def test_float32_and_no_grad_are_the_same_kernels(cell):
    layer, x = made(cell, dtype=torch.float32)
    y, final = layer(x, lengths=LENGTHS)
    with torch.no_grad():
        found = flat(layer(x, lengths=LENGTHS))
    assert all(torch.equal(a, b) for a, b in zip(found, flat((y, final)), strict=True))
    expected = by_steps(copy.deepcopy(layer).double(), x.double(), None, {}, lengths=np.array(LENGTHS))
    torch.testing.assert_close(y.double(), expected[0], rtol=0, atol=1e-5)


def test_recompute_keeps_the_states_between_chunks_alone():
    """The sequence has two chunks."""
    found, shapes = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer, _ = made(three, 2, 19, recompute=recompute)
        x = torch.randn(90, 9, 2, dtype=torch.float64, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y, _ = layer(x)
        y.sum().backward()
        found.append([y, x.grad, *[p.grad for p in layer.parameters()]])
        shapes.append({tuple(t.shape) for t in kept})
    assert all(map(torch.equal, *found))
    (tape,), (boundary,) = shapes[0] - shapes[1], shapes[1] - shapes[0]
    assert tape[0] == 90 * 9
    assert boundary == (2 * 9, 19)  # the second chunk begins with two states beside y


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recompute", [False, True], ids=["tape", "again"])
@pytest.mark.parametrize("cell", [mgu, three, gru_d, lstmp], ids=lambda c: c.name)
def test_masks_and_recompute(cell, recompute, train):
    rates = {"recurrent_dropout": 0.5, "zoneout_h": 0.25, "zoneout_c": 0.5 * ("c" in cell.states)}
    layer, x = made(cell, num_layers=2, bidirectional=True, recompute=recompute, **rates)
    layer.train(train)
    given, options = scalars(cell), {"lengths": np.array(LENGTHS), "reset": RESET}
    torch.manual_seed(1)
    found = flat(layer(x, **options, **given))
    assert layer.last_path == paths.FUSED
    torch.manual_seed(1)
    masks = layer._regularization()
    masks = masks._replace(seed=int(masks.seed) if train else None)
    expected = by_steps(layer, x, None, given, masks, **options)
    assert_same(found, expected, [x, *given.values(), *layer.parameters()])


def test_a_cell_with_time_gaps_against_a_loop():
    layer, x = made(gru_d, bidirectional=True)
    dt = torch.rand(T, B, dtype=torch.float64)
    y, _ = layer(x, dt=dt)
    h, W, U = torch.zeros(B, H, dtype=torch.float64), layer.weight_ih_l0_reverse, layer.weight_hh_l0_reverse
    for t in reversed(range(T)):  # number t belongs to step t in both directions
        h = torch.exp(-torch.relu(layer.w_l0_reverse * dt[t, :, None] + layer.b_l0_reverse)) * h
        gates = (x[t] @ W.T + layer.bias_ih_l0_reverse).chunk(3, 1)
        u, b = U.chunk(3), layer.bias_hh_l0_reverse.chunk(3)
        r, z = (torch.sigmoid(gates[k] + h @ u[k].T + b[k]) for k in (0, 1))
        n = torch.tanh(gates[2] + (r * h) @ u[2].T + b[2])
        h = h + z * (n - h)
        torch.testing.assert_close(y[t, :, H:], h, rtol=0, atol=1e-13)
    with torch.device("meta"):  # lists keep their precision, and do not depend on the default device
        assert torch.equal(layer(x, dt=dt.tolist())[0], y)


@own
def test_derivatives_and_derivatives_of_these(cell):
    layer, _ = made(cell, 2, 2)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    given, state0 = list(scalars(cell, (3, 2)).values()), states(layer, (2,))
    options = {"lengths": [3, 1]}

    def run(x, *rest):
        numbers = dict(zip(cell.scalars, rest, strict=False))
        state = hx_of(rest[len(given) : len(given) + len(state0)])
        return tuple(flat(layer(x, state, **options, **numbers)))

    leaves = (x, *given, *state0, *layer.parameters())
    if cell is ind_rnn:  # away from the kink of relu
        layer.bias_ih_l0.data += 5
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


# --- shapes of input, scalars and states --------------------------------------------------------------------


@own
def test_batch_first_unbatched_and_a_tuple_of_states(cell):
    layer, x = made(cell, num_layers=2)
    given, state0 = scalars(cell), states(layer)
    y, final, every = layer(x, hx_of(state0), reset=RESET, return_states=True, **given)
    layer.batch_first = True
    turned = {name: s.T for name, s in given.items()}
    found = layer(x.transpose(0, 1), hx_of(state0), reset=RESET.T, return_states=True, **turned)
    assert torch.equal(found[0], y.transpose(0, 1))
    for f, e in zip(flat((found[1], found[2])), flat((final, every)), strict=True):
        assert torch.equal(f, e if e.dim() == 3 else e.transpose(1, 2))
    one = {name: s[:, 1] for name, s in given.items()}
    alone = layer(x[:, 1], hx_of([s[:, 1] for s in state0]), reset=RESET[:, 1], return_states=True, **one)
    expected = [y[:, 1], *(s[:, 1] for s in flat((final,))), *(s[:, :, 1] for s in flat((every,)))]
    for f, e in zip(flat(alone), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=1e-14)


@own
def test_packed_sequences_are_padded_ones(cell):
    layer, x = made(cell, num_layers=2, bidirectional=True)
    given, state0 = scalars(cell), states(layer)
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    numbers = {
        name: pack_padded_sequence(s, torch.tensor(LENGTHS), enforce_sorted=False).data
        for name, s in given.items()
    }
    y, final = layer(packed, hx_of(state0), **numbers)
    found = [pad_packed_sequence(y)[0], *flat((final,))]
    nan = {name: s.detach().clone() for name, s in given.items()}  # padding is not read
    for s in nan.values():
        s[np.arange(T)[:, None] >= np.array(LENGTHS)] = np.nan
    expected = flat(layer(x, hx_of(state0), lengths=LENGTHS, **given))
    assert_same(found, expected, [x, *state0, *given.values(), *layer.parameters()])
    assert torch.equal(layer(x, hx_of(state0), lengths=LENGTHS, **nan)[0], expected[0])


def test_a_state_starts_from_its_default_and_again_after_a_reset():
    layer, x = made(three)
    starts = tuple(torch.full((1, B, H), float(n), dtype=torch.float64) for n in (0, 0, 1))
    y, _ = layer(x)
    assert torch.equal(y, layer(x, starts)[0])
    cut = np.zeros((T, B), bool)
    cut[2] = True
    assert torch.equal(layer(x, reset=cut)[0][2:], layer(x[2:])[0])


@own
def test_one_step_is_a_sequence_of_one(cell):
    layer, x = made(cell)
    step = ft.RecurrentCell(cell, I, H, dtype=torch.float64)
    step.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.state_dict().items()})
    given, state = scalars(cell), None
    y, final = layer(x, **given)
    for t in range(T):
        state = step(x[t], state, **{name: s[t] for name, s in given.items()})
    for s, e in zip(flat((state,)), flat((final,)), strict=True):
        torch.testing.assert_close(s, e[0], rtol=0, atol=1e-14)
    leaves = [x, *given.values()]
    assert_same(flat((state,)), [s[0] for s in flat((final,))], leaves)
    row = step(x[0, 1], **{name: s[0, 1] for name, s in given.items()})
    torch.testing.assert_close(flat((row,))[0], y[0, 1], rtol=0, atol=1e-14)
    assert step.last_path == layer.last_path


# --- parameters ---------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_cell_with_pytorch_s_names():
    layer = ft.Recurrent(three, I, H, num_layers=2, bidirectional=True)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters() if n.endswith("_l1_reverse")} == {
        "weight_ih_l1_reverse": (3 * H, 2 * H),
        "weight_hh_l1_reverse": (4 * H, H),
        "bias_ih_l1_reverse": (3 * H,),
        "bias_hh_l1_reverse": (4 * H,),
        "decay_l1_reverse": (H,),
    }
    assert layer.decay_l0.tolist() == [1] * H
    assert sorted(dict(ft.Recurrent(ind_rnn, I, H, bias=False).named_parameters())) == [
        "u_l0",
        "weight_ih_l0",
    ]
    wide = ft.Recurrent(ind_rnn, I, 1000)
    assert 0 <= wide.u_l0.min() < 0.1 < 0.9 < wide.u_l0.max() <= 1
    bound = 1000**-0.5
    assert bound * 0.9 < wide.weight_ih_l0.abs().max() <= bound
    before = wide.u_l0.detach().clone()
    wide.reset_parameters()
    assert not torch.equal(wide.u_l0, before)
    assert repr(ft.Recurrent(mgu, I, H, num_layers=2, zoneout_h=0.1)) == (
        "Recurrent(mgu(), 4, 5, num_layers=2, zoneout_h=0.1)"
    )


@pytest.mark.parametrize(
    ("cell", "kind", "options"),
    [
        (lstm, "LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "recurrent_dropout": 0.25}),
        (gru, "GRU", {"zoneout_h": 0.25, "recompute": True}),
        (rnn, "RNN", {"bias": False}),
        (lstm.with_options(project=True), "LSTM", {"proj_size": 3}),
    ],
    ids=["lstm", "gru", "rnn", "projected"],
)
def test_built_in_cells_are_the_named_layers(cell, kind, options):
    layers, x = [], torch.randn(T, B, I)
    for which in (getattr(ft, kind), ft.Recurrent):
        torch.manual_seed(1)
        layers.append(which(*([cell] if which is ft.Recurrent else []), I, H, **options))
    theirs, ours = layers
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    found = []
    for layer in layers:
        torch.manual_seed(2)
        results = flat(layer(x, lengths=LENGTHS, return_states=True))
        sum(r.sum() for r in results).backward()
        assert layer.last_path == paths.FUSED
        found.append([*results, *layer.state_dict().values(), *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_with_one_layer_is_a_warning_at_the_users_line():
    with pytest.warns(UserWarning, match="^dropout: expected 0 with num_layers=1, got 0.5") as caught:
        ft.Recurrent(mgu, I, H, dropout=0.5)
    assert [warning.filename for warning in caught] == [__file__]


def test_weights_that_are_not_parameters():
    layer, x = made(mgu, num_layers=2)
    expected = layer(x)[0]
    other = made(mgu, num_layers=2)[0]
    found = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))[0]
    assert torch.equal(found, other(x)[0])
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    torch.testing.assert_close(layer(x)[0], expected)
    layer.weight_hh_l1 = layer.bias_hh_l1 = None
    with pytest.raises(TypeError, match="weight_hh_l1: expected a tensor, got None"):
        layer(x)


@cell
def bounded(p, x, h):
    a = minimum(maximum(p.dense("a", x, h), -0.5), 0.5)
    return tanh(p.dense("b", x, h * where(a > 0, 0.1, 0.3))) * where(a > 0.2, 1.0, -1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_numbers_in_pytorchs_operations(dtype):
    """They have the dtype of the layer, whatever the default one is."""
    layer, x = ft.Recurrent(bounded, I, H, dtype=dtype), torch.randn(2, T, B, I, dtype=dtype)
    torch.set_default_dtype(torch.float64 if dtype is torch.float32 else torch.float32)
    try:
        found = torch.func.vmap(lambda x: layer(x)[0])(x)
        want = torch.stack([layer(each)[0] for each in x])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is dtype
    limit = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(found, want, rtol=limit, atol=limit)


@pytest.mark.parametrize("low", ["input", "state", "both"])
def test_either_may_be_of_the_dtype_of_autocast(low):
    layer = ft.Recurrent(three, I, H)
    x = torch.randn(T, B, I).bfloat16().float()
    hx = tuple(torch.randn(1, B, H).bfloat16().float() for _ in three.states)
    hx = hx if len(hx) > 1 else hx[0]
    expected = layer(x, hx)[0]
    as_low = lambda t: tuple(map(torch.Tensor.bfloat16, t)) if isinstance(t, tuple) else t.bfloat16()  # noqa: E731
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x if low == "state" else as_low(x), hx if low == "input" else as_low(hx))[0]
    assert torch.equal(y, expected)


def test_pickle_copies_and_state_dicts(tmp_path):
    layer, x = made(three, num_layers=2)
    y = layer(x)[0]
    for other in (
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer),
        ft.Recurrent(three, I, H, 2).double(),
    ):
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x)[0], y)

    @cell
    def local(p, x, h):
        return tanh(p.dense("n", x, h))

    hidden = ft.Recurrent(local, I, H, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(hidden)(x)[0], hidden(x)[0])
    with pytest.raises(pickle.PicklingError, match="defined inside a function"):
        pickle.dumps(hidden)


def test_keys_find_cells_by_name(monkeypatch):
    before = gru.with_options(reset_after=False, layer_norm=True)
    key = keys.key_of(before)
    monkeypatch.setattr(keys, "_known", {})
    assert keys.cell_of(key) is before
    for bad in ("nowhere:at:all", "mgu:0", "fusedrnn.cells.builtin:COMPILED:0"):
        with pytest.raises(RuntimeError, match=f"cell: '{bad}' is not found in this process"):
            keys.cell_of(bad)
    with pytest.raises(RuntimeError, match="it computes something else than it did"):
        keys.cell_of(key.replace(key.split(":")[2], "00000000"))


# --- what no kernel runs ------------------------------------------------------------------------------------


def test_what_the_machine_lacks_runs_as_steps(monkeypatch):
    reason = f"cell: {large!r} is too large for the cpu backend (gates: expected at most 64, got 65)"
    monkeypatch.setattr(paths, "_told", set())
    layer, x = made(large, num_layers=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = flat(layer(x, lengths=LENGTHS))
        layer(x, lengths=LENGTHS)
    assert [w.category for w in told] == [ft.FallbackWarning]
    assert reason in str(told[0].message)
    assert told[0].filename == __file__
    assert reason in layer.last_path
    expected = by_steps(layer, x, None, {}, lengths=np.array(LENGTHS))
    assert_same(found, expected, [x, *layer.parameters()])
    torch._dynamo.reset()  # compiled, the operator runs the same steps
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_same(flat(compiled(x, lengths=torch.tensor(LENGTHS))), expected, [x, *layer.parameters()])
    monkeypatch.setattr(paths, "_errors", True)  # set_fallback_errors
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        layer(x)


@own
def test_transforms_and_other_dtypes(cell):
    layer, x = made(cell)
    given = {name: s.detach() for name, s in scalars(cell).items()}
    x = x.detach()
    y = layer(x, lengths=LENGTHS, **given)[0]
    dx = torch.func.grad(lambda x: layer(x, lengths=LENGTHS, **given)[0].sum())(x)
    both = torch.func.vmap(lambda x: layer(x, lengths=LENGTHS, **given)[0])(torch.stack([x, 2 * x]))
    torch.testing.assert_close(both[0], y, rtol=0, atol=1e-13)
    _, tangent = torch.func.jvp(lambda x: layer(x, lengths=LENGTHS, **given)[0], (x,), (x,))
    torch.testing.assert_close((dx * x).sum(), tangent.sum())
    assert layer.last_path == "steps in PyTorch: a transform of torch.func is at work"
    with ft.fallback():
        torch.testing.assert_close(layer(x, lengths=LENGTHS, **given)[0], y, rtol=0, atol=1e-13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16(), **given)[0].dtype == torch.float64
    low = layer.bfloat16()(x.bfloat16(), lengths=LENGTHS, **given)[0]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), y, rtol=0, atol=0.2)


@pytest.mark.parametrize("backend", ["reference", pytest.param("numba", marks=pytest.mark.slow)])
def test_other_backends(backend, monkeypatch):
    if backend == "numba":
        pytest.importorskip("numba")
    layer, x = made(mgu, bidirectional=True)
    hx = states(layer)
    expected = layer(x, hx_of(hx), lengths=LENGTHS, return_states=True)
    monkeypatch.setenv("FUSEDRNN_BACKEND", backend)
    found = layer(x, hx_of(hx), lengths=LENGTHS, return_states=True)
    assert layer.last_path == paths.FUSED
    assert_same(flat(found), [t.clone() for t in flat(expected)], [x, *hx, *layer.parameters()])
    layer(x, detach_every=2)
    steps = "steps in PyTorch: detach_every: is not supported by the numba backend"
    assert layer.last_path == (steps if backend == "numba" else paths.FUSED)


# --- errors -------------------------------------------------------------------------------------------------


@cell
def named_badly(p, x, h, *, reset):
    return tanh(p.dense("n", x, h)) * reset


@cell
def collides(p, x, h):
    return tanh(p.dense("n", x)) + p.vector("training") * h


ZEROS, UNITS = torch.zeros(T, B, I), torch.zeros(1, B, H)
BAD = [
    ("Recurrent(tanh, I, H)", TypeError, "cell: expected a cell"),
    ("Recurrent(mgu, 0, H)", ValueError, "input_size: expected at least 1, got 0"),
    ("Recurrent(mgu, I, H, proj_size=3)", ValueError, "proj_size: expected 0, as mgu() does not project"),
    ("Recurrent(mgu, I, H, zoneout_c=0.1)", ValueError, "zoneout_c: expected 0 for the cell mgu"),
    ('Recurrent(mgu, I, H, bidirectional="no")', TypeError, "bidirectional: expected True or False, got str"),
    ("RecurrentCell(mgu, I, H, bias=1)", TypeError, "bias: expected True or False, got int"),
    ("Recurrent(named_badly, I, H)", ValueError, "than those of forward's arguments, got reset"),
    ("RecurrentCell(collides, I, H)", ValueError, "than those of a layer's attributes, got training"),
    ("RecurrentCell(lstmp, I, H)", ValueError, "cell: expected one without a projection"),
    ("torch.jit.script(Recurrent(mgu, I, H))", RuntimeError, "TorchScript cannot take Recurrent"),
    ("torch.jit.trace(Recurrent(mgu, I, H), ZEROS)", RuntimeError, "torch.jit cannot trace Recurrent"),
    ("Recurrent(mgu, I, H)('x')", TypeError, "input: expected a tensor or a PackedSequence, got str"),
    ("Recurrent(mgu, 3, H)(ZEROS)", ValueError, "input: expected shape (T, B, 3) or (T, 3), got (6, 3, 4)"),
    ("Recurrent(mgu, I, H)(ZEROS[:0])", ValueError, "expected at least one step, got shape (0, 3, 4)"),
    (
        "Recurrent(mgu, I, H)(ZEROS.double())",
        TypeError,
        "input: expected torch.float32 on cpu, as the",
    ),
    ("Recurrent(mgu, I, 4)(ZEROS, UNITS)", ValueError, "hx: expected shape (1, 3, 4), got (1, 3, 5)"),
    ("Recurrent(three, I, H)(ZEROS, UNITS)", TypeError, "hx: expected a tuple of tensors (h, c, n)"),
    ("Recurrent(mgu, I, H)(ZEROS, dt=1)", TypeError, "dt: no argument of this layer"),
    (
        "Recurrent(ind_rnn, I, H, recurrent_dropout=0.1)",
        ValueError,
        "whose p.dense multiplies x alone, got 0.1",
    ),
    ("Recurrent(mgu, I, H)(ZEROS, lengths=[9, 1, 1])", ValueError, "lengths: expected 0 to T = 6, got 1"),
    (
        "Recurrent(mgu, I, H)(ZEROS, reset=object())",
        TypeError,
        "reset: expected a tensor, an array or a list",
    ),
    ("Recurrent(mgu, I, H)(ZEROS, detach_every=0)", ValueError, "detach_every: expected at least 1, got 0"),
    ("Recurrent(mgu, I, H)(PACKED, lengths=LENGTHS)", ValueError, "lengths: expected none with a Packed"),
    ("Recurrent(gru_d, I, H)(ZEROS)", TypeError, "dt: expected numbers of shape (6, 3), which the cell"),
    ("Recurrent(gru_d, I, H)(ZEROS, dt='a')", TypeError, "dt: expected a tensor or numbers, got str"),
    ("Recurrent(gru_d, I, H)(ZEROS, dt=[1.0])", ValueError, "dt: expected shape (6, 3), got (1,)"),
    (
        "Recurrent(gru_d, I, H)(PACKED, dt=ZEROS[..., 0])",
        ValueError,
        "(12,), got (6, 3); of a PackedSequence",
    ),
    ("Recurrent(mgu, I, H)(ZEROS, None, LENGTHS)", TypeError, "lengths, reset and others by keyword, got 3"),
    ("RecurrentCell(mgu, I, H)(ZEROS)", ValueError, "input: expected shape (B, 4) or (4,), got (6, 3, 4)"),
]
PACKED = pack_padded_sequence(ZEROS, LENGTHS, enforce_sorted=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_errors_name_what_was_wrong():
    for call, error, message in BAD:
        with pytest.raises(error, match=re.escape(message)):
            eval(call, vars(ft) | globals())


def test_an_output_that_was_changed_in_place():
    layer, x = made(mgu)
    y, _ = layer(x)
    torch.relu_(y)
    with pytest.raises(RuntimeError, match="fusedrnn: backward needs the inputs, the weights and the output"):
        y.sum().backward()
