"""Models: what Sequential passes on to its layers, and states that are forgotten."""

import numpy as np
import pytest

import fusedrnn
import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import Variable
from fusedrnn.cells import cell, tanh

T, B, I, H = 7, 5, 3, 13


def passing_on(cell, **options):
    """A model in which layers that take lengths and resets stand everywhere; and its recurrent layers."""

    class Inner(fusedrnn.Model):
        def __init__(self):
            self.rnn = cell(4, dtype=np.float64, **options)

        def forward(self, x, *, reset=None, lengths=None):
            return self.rnn(x, lengths=lengths, reset=reset)

    first, inner, last = cell(3, dtype=np.float64, **options), Inner(), cell(H, dtype=np.float64, **options)
    nested = fusedrnn.models.Sequential(L.Linear(5, dtype=np.float64), inner, F.tanh)
    return fusedrnn.models.Sequential(nested, first, L.Dropout(0.0), last), (inner.rnn, first, last)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("cell", [L.LSTM, L.GRU])
def test_sequential_passes_lengths_and_resets_on(cell, fused):
    rng = np.random.default_rng(12)
    model, rnns = passing_on(cell, fused=fused)
    x, lengths, reset = rng.standard_normal((T, B, I)), [T, 0, 3, 1, T - 1], rng.random((T, B)) < 0.3
    model(x[:1])
    for rnn in rnns:
        assert rnn.h is not None
    model.reset_state()
    for rnn in rnns:
        assert rnn.h is None
        assert rnn.c is None
    for given in ({"lengths": lengths}, {"reset": reset}, {"lengths": lengths, "reset": reset.tolist()}):
        model.reset_state()
        (inner, first, last), (nested, *_) = rnns, model.layers
        y = inner(nested.layers[0](x), **given)
        expected = last(first(F.tanh(y), **given), **given).data
        model.reset_state()
        got = model(x, **given)
        np.testing.assert_array_equal(got.data, expected)
        if "lengths" in given:
            assert not got.data[3:, 2].any()
        got.sum().backward()
        assert all(p.grad is not None for p in model.params())


def test_sequential_passes_numbers_of_each_row_on():
    @cell
    def decays(p, x, h, *, dt):
        return tanh(p.dense("a", x, h)) / (1 + dt)

    class Passing(fusedrnn.Model):
        def __init__(self):
            self.rnn = L.Recurrent(decays, 3, dtype=np.float64)

        def forward(self, x, **options):
            return self.rnn(x, **options)

    x, dt = np.random.randn(T, B, I), Variable(np.random.rand(T, B))
    first, second, third = L.Recurrent(decays, 4, dtype=np.float64), L.GRU(2, dtype=np.float64), Passing()
    model = fusedrnn.models.Sequential(fusedrnn.models.Sequential(first, F.tanh), second, third)
    got = model(x, dt=dt)
    model.reset_state()
    np.testing.assert_array_equal(got.data, third(second(F.tanh(first(x, dt=dt))), dt=dt).data)
    got.sum().backward()
    assert dt.grad is not None
    with pytest.raises(TypeError, match=r"^dt: expected the row scalars of decays"):
        model(x)
    with pytest.raises(TypeError, match=r"^state: no layer in this Sequential accepts it"):
        fusedrnn.models.Sequential(first)(x, state=(np.zeros((B, 4)),), dt=dt)


def test_sequential_says_which_option_nobody_takes():
    model = fusedrnn.models.Sequential(L.Linear(2), F.tanh)
    with pytest.raises(TypeError, match="lengths, reset: no layer in this Sequential accepts it"):
        model(np.ones((T, B, I)), lengths=[1] * B, reset=np.zeros((T, B)))


def test_a_model_forgets_the_state_of_every_layer_in_it():
    class Net(fusedrnn.Model):
        def __init__(self):
            super().__init__()
            self.a, self.inner = L.LSTM(4), fusedrnn.models.Sequential(L.GRU(3), L.Linear(1))

        def forward(self, x):
            return self.inner(self.a(x))

    net = Net()
    net(np.ones((5, 2, 3)))
    assert net.a.state is not None
    net.reset_state()
    assert net.a.state is None
    assert net.inner.l0.state is None


def test_a_model_also_resets_layers_of_the_users_own():
    class Counter(fusedrnn.Layer):
        state = 0

        def forward(self, x):
            self.state += 1
            return x

        def reset_state(self):
            self.state = 0

    net = fusedrnn.models.Sequential(Counter(), fusedrnn.models.Sequential(Counter()))
    net(np.ones((2, 3)))
    assert (net.l0.state, net.l1.l0.state) == (1, 1)
    net.reset_state()
    assert (net.l0.state, net.l1.l0.state) == (0, 0)
