"""Layers: the fused node against one node per operation, state, draws, options, refusals."""

import itertools

import numpy as np
import pytest

import fusedrnn
import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import Parameter, Variable, backends, cells, multilayer, no_grad

KINDS = {
    "rnn": lambda *a, **k: L.RNN(*a, **k),
    "rnn relu": lambda *a, **k: L.RNN(*a, relu=True, **k),
    "lstm": lambda *a, **k: L.LSTM(*a, **k),
    "lstm projected": lambda *a, **k: L.LSTM(*a, **{"proj_size": 11} | k),
    "gru": lambda *a, **k: L.GRU(*a, **k),
    "gru before": lambda *a, **k: L.GRU(*a, reset_after=False, **k),
}
T, B, I, H = 7, 5, 3, 13
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind, rng, **options):
    """A float64 layer with random biases too."""
    np.random.seed(7)
    layer = KINDS[kind](H, I, **{"dtype": np.float64} | options)
    for p in layer.params():
        if p.ndim == 1:
            p.data = rng.standard_normal(p.shape)
    return layer


def copy_weights(source, target):
    for p, q in zip(source.params(), target.params(), strict=True):
        q.data = p.data.copy()


def states(layer, rng, rows=()):
    widths = layer.cell.widths(H, layer.out_size)
    return tuple(rng.standard_normal((*rows, B, width)) for width in widths)


def close(a, b, tolerance=2e-13):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max(initial=0)))


def gradients_of(layer, x, state0, upstream, call):
    """Gradients of every output times a random upstream gradient, for the outputs named in ``upstream``."""
    xv, sv = Variable(x.copy()), tuple(Variable(s.copy()) for s in state0)
    layer.cleargrads()
    layer.reset_state()
    y, steps = call(layer, xv, sv)
    final = layer.state
    outputs = {"y": (y,), "final": final, "steps": steps}
    rng = np.random.default_rng(11)
    weights = {name: [rng.standard_normal(v.shape) for v in vs] for name, vs in outputs.items()}
    loss = sum((v * w).sum() for name in upstream for v, w in zip(outputs[name], weights[name], strict=True))
    loss.backward()
    found = {f"d{name}": p.grad.data for name, p in layer.named_params() if p.grad is not None}
    found |= {"dx": xv.grad.data} | {
        f"dstate{k}": s.grad.data for k, s in enumerate(sv) if s.grad is not None
    }
    values = {"y": y.data} | {f"final {k}": s.data for k, s in enumerate(final)}
    return values | {f"step {k}": s.data for k, s in enumerate(steps)}, found


UPSTREAM = [c for n in (1, 2, 3) for c in itertools.combinations(("y", "final", "steps"), n)]


@pytest.mark.quick
@kinds
@pytest.mark.parametrize("options", ["plain", "lengths", "reset", "both"])
def test_fused_is_unfused(kind, options):
    rng = np.random.default_rng(5)
    layer = build(kind, rng, backend="reference")
    plain = build(kind, rng, fused=False)
    copy_weights(layer, plain)
    x, state0 = rng.standard_normal((T, B, I)), states(layer, rng)
    extra = {}
    if options in ("lengths", "both"):
        extra["lengths"] = np.array([T, 0, 3, 1, 6])
    if options in ("reset", "both"):
        extra["reset"] = rng.random((T, B)) < 0.4

    def call(layer, x, state):
        return layer.sequence(x, state, return_states=True, **extra)

    for upstream in UPSTREAM:
        values, grads = gradients_of(layer, x, state0, upstream, call)
        values2, grads2 = gradients_of(plain, x, state0, upstream, call)
        assert grads.keys() == grads2.keys()
        for name in values:
            close(values[name], values2[name])
        for name in grads:
            close(grads[name], grads2[name])


@kinds
@pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=[pytest.mark.slow] if b == "numba" else []) for b in backends.FOR_NUMPY],
)
def test_every_backend_serves_the_layers(kind, backend):
    """Step and sequence, against the unfused layer; what the kernels promise in full is tested with them."""
    if (reason := backends.get(backend).unavailable()) is not None:
        pytest.skip(reason)
    rng = np.random.default_rng(5)
    layer, plain = build(kind, rng, backend=backend), build(kind, rng, fused=False)
    if backend == "numba" and layer.proj_size:
        pytest.skip("numba has no projection")
    copy_weights(layer, plain)
    x, state0 = rng.standard_normal((T, B, I)), states(layer, rng)

    def sequence(layer, x, state):
        return layer.sequence(x, state, return_states=True)

    def steps(layer, x, state):
        layer.state = state
        every = []
        for t in range(T):
            layer(x[t])
            every.append(layer.state)
        whole = tuple(F.stack([s[k] for s in every]) for k in range(len(state)))
        return whole[0], whole

    expected, dexpected = gradients_of(plain, x, state0, ("y", "final", "steps"), sequence)
    for call in (sequence, steps):
        values, grads = gradients_of(layer, x, state0, ("y", "final", "steps"), call)
        assert (values | grads).keys() == (expected | dexpected).keys()
        for name, value in (values | grads).items():
            close(value, (expected | dexpected)[name])


@pytest.mark.quick
@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_layers_and_directions(kind, bidirectional, dropout):
    rng = np.random.default_rng(6)
    options = {"num_layers": 3, "bidirectional": bidirectional, "dropout": dropout}
    layer, plain = build(kind, rng, **options), build(kind, rng, fused=False, **options)
    copy_weights(layer, plain)
    D, rows = 1 + bidirectional, layer.cell.blocks["weight_ih"] * H
    assert layer.weight_ih_l0.shape == (rows, I)
    assert getattr(layer, "weight_ih_l1" + "_reverse" * bidirectional).shape == (rows, D * layer.out_size)
    x, state0 = rng.standard_normal((T, B, I)), states(layer, rng, (3 * D,))
    extra = {"lengths": np.array([T, 0, 3, 1, 6]), "reset": rng.random((T, B)) < 0.3}

    def call(layer, x, state):
        np.random.seed(3)  # the same masks
        return layer.sequence(x, state, return_states=True, **extra)

    for upstream in UPSTREAM:
        values, grads = gradients_of(layer, x, state0, upstream, call)
        values2, grads2 = gradients_of(plain, x, state0, upstream, call)
        assert values["y"].shape == (T, B, D * layer.out_size)
        assert values["final 0"].shape == (3 * D, B, layer.out_size)
        assert grads.keys() == grads2.keys()
        for name in values:
            close(values[name], values2[name])
        for name in grads:
            close(grads[name], grads2[name])


def test_dropout_between_layers_acts_in_training_only():
    rng = np.random.default_rng(6)
    layer = build("lstm", rng, num_layers=2, dropout=0.5)
    x = rng.standard_normal((T, B, I))

    def y():
        layer.reset_state()
        return layer(x).data

    assert np.abs(y() - y()).max() > 1e-3
    with fusedrnn.test_mode():
        np.testing.assert_array_equal(y(), y())
    np.random.seed(0)
    first = y()
    np.random.seed(0)
    np.testing.assert_array_equal(y(), first)


@pytest.mark.quick
@kinds
def test_state_is_carried_and_cut(kind):
    rng = np.random.default_rng(8)
    layer = build(kind, rng)
    x = rng.standard_normal((T, B, I))
    whole = layer(x).data
    ended = [s.data for s in layer.state]
    layer.reset_state()
    assert layer.state is None
    first = layer(x[:3])
    h = layer.h
    assert h.creator is not None
    second = layer.sequence(x[3:5])
    steps = [layer.step(x[t]) for t in (5, 6)]
    assert steps[1] is layer.h
    joined = np.concatenate([first.data, second.data, [s.data for s in steps]])
    close(joined, whole)
    for a, b in zip(layer.state, ended, strict=True):
        close(a.data, b)
    loss = F.mean_squared_error(steps[1], np.zeros((B, layer.out_size)))
    loss.backward()
    loss.unchain_backward()
    assert all(s.creator is None for s in layer.state)
    assert h.creator is None


@pytest.mark.quick
def test_truncation_leaves_the_older_chunk_alone():
    rng = np.random.default_rng(8)
    layer = build("lstm", rng)
    x = Variable(rng.standard_normal((T, B, I)))
    y = layer(x)
    y.sum().unchain_backward()
    x2 = Variable(rng.standard_normal((T, B, I)))
    layer(x2).sum().backward()
    assert x.grad is None
    assert x2.grad is not None


def test_state_can_be_read_set_and_passed():
    rng = np.random.default_rng(9)
    layer = build("lstm", rng)
    x, state0 = rng.standard_normal((T, B, I)), states(layer, rng)
    y = layer(x, state0).data
    layer.state = state0
    np.testing.assert_array_equal(layer(x).data, y)
    layer.h, layer.c = map(Variable, state0)
    np.testing.assert_array_equal(layer(x).data, y)
    layer.state = (state0[0], np.zeros((B, H)))
    a = layer(x).data
    layer.state = None
    layer.h = Variable(state0[0])  # c is then zero
    np.testing.assert_array_equal(layer(x).data, a)
    with pytest.raises(TypeError, match=r"expected a tuple \(h, c\)"):
        layer.state = state0[0]
    with pytest.raises(ValueError, match=r"^state h: expected shape \(5, 13\), got \(2, 13\)"):
        layer(x, (np.zeros((2, H)), np.zeros((2, H))))


@pytest.mark.parametrize("shape", [(4, I), (T, 4, I)])
def test_another_batch_size_names_reset_state(shape):
    layer = build("gru", np.random.default_rng(9))
    layer(np.zeros((T, B, I)))
    with pytest.raises(ValueError, match=r"state h: expected shape .* call reset_state\(\)"):
        layer(np.zeros(shape))
    layer.reset_state()
    layer(np.zeros(shape))


def test_bidirectional_layers_take_whole_sequences_and_carry_nothing():
    rng = np.random.default_rng(9)
    layer = build("lstm", rng, bidirectional=True)
    x = rng.standard_normal((T, B, I))
    y = layer(x).data
    np.testing.assert_array_equal(layer(x).data, y)
    layer(rng.standard_normal((T, 2, I)))  # another batch size is no error here
    assert layer.h.shape == (2, 2, H)
    with pytest.raises(ValueError, match="a bidirectional layer needs the whole sequence"):
        layer(x[0])
    with pytest.raises(ValueError, match="state: a bidirectional layer"):
        layer.state = states(layer, rng, (2,))


@pytest.mark.quick
@pytest.mark.parametrize("fused", [True, False])
def test_wrong_arguments_are_named(fused):
    layer = build("lstm", np.random.default_rng(9), fused=fused)
    x = np.zeros((T, B, I))
    for call, error, message in (
        (
            lambda: layer(np.zeros((T, B, I, 1))),
            ValueError,
            r"x: expected shape \(B, I\), one step, or",
        ),
        (lambda: layer(np.zeros((B, 4))), ValueError, r"x: expected shape \(B, 3\), got \(5, 4\)"),
        (lambda: layer.sequence(np.zeros((B, I))), ValueError, r"x: expected shape \(T, B, 3\)"),
        (lambda: layer.step(x), ValueError, r"x: expected shape \(B, 3\)"),
        (lambda: layer(x.astype(complex)), TypeError, "x: expected real numbers, got complex128"),
        (lambda: layer(x, lengths=[1, 2]), ValueError, r"lengths: expected shape \(5,\), got \(2,\)"),
        (lambda: layer(x[0], lengths=[1] * B), ValueError, "lengths: expected None for one step"),
        (lambda: layer(x[0], reset=np.zeros((1, B), bool)), ValueError, "reset: expected None for one step"),
    ):
        with pytest.raises(error, match=message):
            call()
    for options, error, message in (
        ({"hidden_size": 0}, ValueError, "hidden_size: expected at least 1, got 0"),
        ({"hidden_size": 2.0}, TypeError, "hidden_size: expected a whole number, got float"),
        ({"hidden_size": 2, "in_size": -1}, ValueError, "in_size: expected at least 1, got -1"),
        ({"hidden_size": 2, "num_layers": 0}, ValueError, "num_layers: expected at least 1, got 0"),
        ({"hidden_size": 2, "dropout": 1.0}, ValueError, "dropout: .*1.0"),
        ({"hidden_size": 2, "dropout": "x"}, TypeError, "dropout: expected a number, got str"),
        ({"hidden_size": 2, "forget_bias": "x"}, TypeError, "forget_bias: expected a number, got str"),
        ({"hidden_size": 2, "forget_bias": np.nan}, ValueError, "forget_bias: expected a finite .* got nan"),
        ({"hidden_size": 2, "forget_bias": -np.inf}, ValueError, "forget_bias: expected a .* got -inf"),
        ({"hidden_size": 2, "dtype": np.float16}, TypeError, "dtype: .*float16"),
        ({"hidden_size": 2, "no_such": 1}, TypeError, "no_such"),
    ):
        with pytest.raises(error, match=message):
            L.LSTM(**options)


def test_dropout_with_one_layer_is_a_warning_at_the_users_line():
    for make in (lambda: L.LSTM(H, dropout=0.5), lambda: L.Recurrent(cells.gru, H, dropout=0.5)):
        with pytest.warns(UserWarning, match="^dropout: expected 0 with num_layers=1, got 0.5") as caught:
            make()
        assert [warning.filename for warning in caught] == [__file__]


def test_inputs_are_cast_to_the_layers_dtype_and_stay():
    layer = L.LSTM(H, I)
    x = np.random.default_rng(0).standard_normal((T, B, I))
    keep = x.copy()
    v = Variable(x)
    y = layer(v)
    assert y.dtype == np.float32
    y.sum().backward()
    assert v.grad.dtype == np.float64
    assert layer.weight_hh.grad.dtype == np.float32
    np.testing.assert_array_equal(x, keep)
    layer.reset_state()
    assert layer(np.ones((B, I), int)).dtype == np.float32


def test_nothing_is_kept_under_no_grad(monkeypatch):
    saves = []
    backend = type(F.kernels.backends.get("reference"))
    real = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *a, **k: (saves.append(k["save"]), real(*a, **k))[1])
    layer = L.LSTM(H, I, recompute=True, backend="reference")
    x = np.zeros((T, B, I))
    with no_grad():
        y = layer(x)
        layer(x[0])
    assert y.creator is None
    layer.reset_state()
    layer(x)
    assert saves == [None, None, "boundary_states"]


def test_only_wanted_gradients_are_computed(monkeypatch):
    needs = []
    backend = type(backends.get())
    real = backend.backward
    monkeypatch.setattr(backend, "backward", lambda *a, need: (needs.append(need), real(*a, need=need))[1])
    layer = L.LSTM(H, I)
    layer.weight_ih.requires_grad = False
    layer(np.zeros((T, B, I))).sum().backward()
    layer.reset_state()
    layer(Variable(np.zeros((T, B, I))), (np.zeros((B, H)), np.zeros((B, H)))).sum().backward()
    layer(np.zeros((T, B, I)), (Variable(np.zeros((B, H))), np.zeros((B, H)))).sum().backward()
    weights = {"weight_hh", "bias_ih"}
    assert needs == [weights, weights | {"x"}, weights | {"state0"}]
    assert layer.weight_ih.grad is None


@pytest.mark.parametrize("step", [True, False])
def test_weights_changed_before_backward_are_an_error(step):
    layer = L.LSTM(H, I)
    y = layer(np.ones((B, I) if step else (T, B, I)))
    loss = y.sum()
    layer.weight_hh.data = layer.weight_hh.data * 2
    with pytest.raises(RuntimeError, match=r"Fused: input 2 \(weight_hh\) was changed after forward"):
        loss.backward()


def test_second_derivatives_through_a_fused_node_are_refused():
    with pytest.raises(NotImplementedError, match=r"create_graph=True: second derivatives"):
        L.LSTM(H, I)(np.ones((B, I))).sum().backward(create_graph=True)


@pytest.mark.quick
@pytest.mark.parametrize("how", ["elements", "kept reference", "set", "optimiser"])
@pytest.mark.parametrize("num_layers", [None, 1, 2])  # None: one step
def test_a_call_never_uses_stale_packed_weights(how, num_layers):
    rng = np.random.default_rng(4)
    layer = L.LSTM(H, I, num_layers=num_layers or 1)
    last = vars(layer)["weight_hh" + layer.suffixes[-1]]
    kept = last.data if how == "kept reference" else None
    x = rng.standard_normal((T, B, I)).astype(np.float32)[: None if num_layers else 1]
    state = tuple(rng.standard_normal((2, num_layers or 1, B, H)).astype(np.float32))

    def call():
        given = state if num_layers == 2 else tuple(s[0] for s in state)
        return layer(x if num_layers else x[0], given)

    call()
    y = call()
    if how == "elements":
        last.data[:] = 0
    elif how == "kept reference":
        kept[:] = 0
    elif how == "set":
        last.data = np.zeros_like(last.data)
    else:
        model = fusedrnn.Model()
        model.rnn = layer
        y.sum().backward()
        fusedrnn.optimizers.SGD(lr=1.0).setup(model).update()
    after = call().data
    weights = [{n: p.data for n, p in layer.weights_of(suffix).items()} for suffix in layer.suffixes]
    right = multilayer.forward_multilayer(layer.cell, x, weights, state).y
    np.testing.assert_array_equal(after, right if num_layers else right[0])
    assert np.abs(after - y.data).max() > 1e-3


@pytest.mark.quick
@pytest.mark.parametrize("x", [np.ones((B, I)), np.ones((T, B, I))], ids=["step", "sequence"])
def test_weights_are_packed_again_only_after_a_change(x, monkeypatch):
    packed = []
    real = F.kernels.pack
    monkeypatch.setattr(F.kernels, "pack", lambda *a: (packed.append(1), real(*a))[1])

    def packs(layer):
        packed.clear()
        ys = [layer(x) for _ in range(3)]
        assert all(y.creator.packed == () for y in ys)  # a long graph has no copies of the weights
        return len(packed)

    layer = L.GRU(H, I)
    assert packs(layer) == 1
    assert packs(layer) == 0
    layer.bias_ih.assign(np.ones(3 * H, np.float32))
    assert packs(layer) == 1
    layer.bias_ih.data[:] = 2  # from now on it may change unseen
    assert packs(layer) == 3


def matrix(in_size, out_size):
    return np.random.randn(in_size, out_size).astype(np.float32) * float(np.sqrt(1 / in_size))


ORDERS = {"rnn": [0], "lstm": [1, 0, 3, 2], "gru": [0, 1, 2]}


@pytest.mark.quick
@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("chunk", [True, False])
def test_order_of_the_draws(kind, known, chunk):
    """Of the documents: see the class docstrings. A drawn Linear stands between, as in a model."""
    np.random.seed(1)
    layer = KINDS[kind](H, I if known else None)
    x = np.zeros((T, B, I) if chunk else (B, I))
    layer(x)
    between = L.Linear(2, in_size=3)
    layer(x)
    np.random.seed(1)
    W_ih, W_hh = (np.zeros((layer.cell.blocks["weight_ih"] * H, n), np.float32) for n in (I, H))

    def fill(W):
        for gate in ORDERS[kind]:
            W[gate * H : (gate + 1) * H] = matrix(W.shape[1], H).T

    if known:
        fill(W_ih)
        fill(W_hh)
        Wb = matrix(3, 2)
    elif kind == "rnn":
        fill(W_ih)
        if chunk:
            fill(W_hh)
        Wb = matrix(3, 2)
        if not chunk:
            fill(W_hh)
    else:
        fill(W_hh)
        fill(W_ih)
        Wb = matrix(3, 2)
    np.testing.assert_array_equal(layer.weight_ih.data, W_ih)
    np.testing.assert_array_equal(layer.weight_hh.data, W_hh)
    np.testing.assert_array_equal(between.W.data, Wb)
    assert not any(p.data.any() for p in layer.params() if p.ndim == 1)


def test_biases_of_each_cell():
    def names(layer):
        return [name for name, _ in layer.named_params()]

    one = ["weight_ih", "weight_hh", "bias_ih"]
    assert names(L.LSTM(2, 3)) == names(L.RNN(2, 3)) == names(L.GRU(2, 3, reset_after=False)) == one
    assert names(L.GRU(2, 3)) == [*one, "bias_hh"]
    assert names(L.GRU(2, 3, bias=False)) == names(L.LSTM(2, 3, bias=False)) == one[:2]


@pytest.mark.quick
def test_linear_is_lazy_and_acts_on_the_last_axis():
    np.random.seed(2)
    fc = L.Linear(4)
    assert fc.W.data is None
    x = np.random.default_rng(0).standard_normal((T, B, I))
    y = fc(x)
    assert fc.in_size == I
    np.random.seed(2)
    np.testing.assert_array_equal(fc.W.data, matrix(I, 4))
    assert y.shape == (T, B, 4)
    np.testing.assert_allclose(y.data[2], fc(x[2]).data, rtol=1e-6)
    assert [n for n, _ in L.Linear(2, nobias=True, in_size=3).named_params()] == ["W"]
    with pytest.raises(ValueError, match=r"linear: .* x \(2, 4\)"):
        fc(np.zeros((2, 4)))


def test_a_layer_owns_its_attributes_in_order_and_once():
    class Net(fusedrnn.Model):
        def __init__(self):
            super().__init__()
            self.b = L.Linear(2, in_size=3)
            self.a = L.Linear(2, in_size=3, nobias=True)
            self.again = self.b
            self.scale = Parameter(np.ones(1))
            self.h = Variable(np.zeros(1))

    net = Net()
    assert [name for name, _ in net.named_params()] == ["scale", "b/W", "b/b", "a/W"]
    assert len(list(net.params())) == 4
    net.b.W.grad = Variable(np.zeros((3, 2)))
    net.cleargrads()
    assert net.b.W.grad is None


@pytest.mark.quick
def test_sequential_and_dropout_layers():
    np.random.seed(0)
    model = fusedrnn.models.Sequential(L.GRU(H), L.Dropout(0.5), L.Linear(1))
    x = np.ones((T, B, I))
    assert model(x).shape == (T, B, 1)
    assert next(name for name, _ in model.named_params()) == "l0/weight_ih"
    with pytest.raises(ValueError, match="dropout_ratio: expected at least 0 and below 1, got 2"):
        L.Dropout(2)


@pytest.mark.quick
def test_a_sequence_truncates_back_propagation_as_detached_chunks_do():
    np.random.seed(0)
    layer = L.LSTM(7, in_size=3, dtype=np.float64)
    x = Variable(np.random.randn(9, 2, 3))
    layer.sequence(x, detach_every=4).sum().backward()
    whole, whole_x = [p.grad.data for p in layer.params()], x.grad.data
    layer.cleargrads()
    layer.reset_state()
    parts = [Variable(x.data[t : t + 4]) for t in range(0, 9, 4)]
    for part in parts:
        y = layer.sequence(part).sum()
        y.backward()
        y.unchain_backward()
        layer.state = tuple(Variable(s.data) for s in layer.state)
    assert np.array_equal(whole_x, np.concatenate([part.grad.data for part in parts]))
    for got, p in zip(whole, layer.params(), strict=True):
        np.testing.assert_allclose(got, p.grad.data, rtol=1e-12, atol=1e-14)
    layer.fused = False
    with pytest.raises(ValueError, match="detach_every: expected None in a layer with fused=False"):
        layer.sequence(x, detach_every=4)


def test_the_forget_gate_may_start_open():
    layer = L.LSTM(5, in_size=3, num_layers=2, bidirectional=True, forget_bias=1.5)
    for suffix in layer.suffixes:
        bias = getattr(layer, "bias_ih" + suffix).data
        assert (bias[5:10] == 1.5).all()
        assert not bias[:5].any()
        assert not bias[10:].any()
    assert not L.LSTM(5, in_size=3).bias_ih.data.any()
    with pytest.raises(ValueError, match=r"forget_bias: .*bias=False.* 1\.0"):
        L.LSTM(5, bias=False, forget_bias=1.0)


def test_linear_says_that_its_second_argument_is_not_a_size():
    with pytest.raises(TypeError, match=r"^nobias: expected True or False, got int; .* in_size="):
        L.Linear(32, 1)
