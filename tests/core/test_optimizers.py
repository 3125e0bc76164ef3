"""The optimisers: their formulas, and what they refuse."""

import numpy as np
import pytest

import fusedrnn
from fusedrnn import Parameter, Variable
from fusedrnn import optimizers as O

pytestmark = pytest.mark.quick


def test_adam_is_the_formula():
    rng = np.random.default_rng(1)
    model = fusedrnn.Model()
    model.w = Parameter(rng.standard_normal(5))
    p, m, v = model.w.data.copy(), np.zeros(5), np.zeros(5)
    adam = O.Adam(alpha=0.1).setup(model)
    for t in range(1, 6):
        g = rng.standard_normal(5)
        model.w.grad = Variable(g.copy())
        adam.update()
        m += (1 - 0.9) * (g - m)
        v += (1 - 0.999) * (g * g - v)
        p -= 0.1 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
        np.testing.assert_allclose(model.w.data, p, rtol=1e-14)
        np.testing.assert_array_equal(model.w.grad.data, g)


def test_lr_is_alpha():
    assert O.Adam().alpha == O.Adam().lr == 0.001
    assert O.Adam(lr=0.1).alpha == O.Adam(alpha=0.1).lr == O.Adam(0.1).lr == O.SGD(lr=0.1).lr == 0.1
    adam = O.Adam()
    adam.lr = 0.5
    assert adam.alpha == 0.5
    with pytest.raises(TypeError, match=r"alpha, lr: expected one .* got 0\.1 and 0\.2"):
        O.Adam(0.1, lr=0.2)


def test_setup_refuses_what_has_nothing_to_move():
    model = fusedrnn.Model()
    model.layers = [fusedrnn.layers.Linear(1)]  # a list is not looked into
    for target, error, words in (
        (model, ValueError, "Adam.setup: the layers or parameters in layers would not be trained"),
        (fusedrnn.Model(), ValueError, "Adam.setup: Model has no parameters"),
        ([Parameter(np.ones(1))], TypeError, "Adam.setup: expected a Model or a Layer, got list"),
        (None, TypeError, "got NoneType"),
        (fusedrnn.Model, TypeError, "got type"),
    ):
        with pytest.raises(error, match=words):
            O.Adam().setup(target)
    model.hidden = model.layers[0]  # any name
    assert O.Adam().setup(model).target is model  # its size is still open


@pytest.mark.parametrize("rate", [-1, float("nan"), float("inf"), "a", None, True])
def test_a_rate_is_a_number_of_at_least_0(rate):
    for optimizer in (O.SGD, O.Adam):
        if rate is None and optimizer is O.Adam:
            continue  # its default
        with pytest.raises((TypeError, ValueError), match=r"^lr: expected a (finite )?number"):
            optimizer(lr=rate)
    with pytest.raises(ValueError, match=r"^beta1: expected at least 0 and below 1, got 2"):
        O.Adam(beta1=2)
    for name in ("weight_decay", "max_norm", "beta1", "beta2", "eps"):
        if not (name == "max_norm" and rate in (None, float("inf"))):
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a (finite )?number"):
                O.Adam(**{name: rate})


def test_sgd_clipping_and_weight_decay():
    model = fusedrnn.Model()
    model.a, model.b, model.c = (Parameter(np.array([1.0, 2.0])) for _ in range(3))
    model.a.grad, model.b.grad = Variable(np.array([3.0, 0.0])), Variable(np.array([0.0, 4.0]))
    O.SGD(lr=1.0, max_norm=1.0, weight_decay=0.5).setup(model).update()
    np.testing.assert_allclose(model.a.data, [1 - 0.6 - 0.5, 2 - 1.0])
    np.testing.assert_allclose(model.b.data, [1 - 0.5, 2 - 0.8 - 1.0])
    np.testing.assert_array_equal(model.c.data, [1, 2])  # no gradient, no decay
    model.cleargrads()
    model.a.grad = Variable(np.array([0.3, 0.4]))
    before = model.a.data.copy()
    O.SGD(lr=1.0, max_norm=1.0).setup(model).update()
    np.testing.assert_allclose(model.a.data, before - [0.3, 0.4])  # below the norm: as it is
    for options in ({"weight_decay": -1}, {"max_norm": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            O.SGD(**options)
    with pytest.raises(RuntimeError, match="setup"):
        O.SGD().update()


def test_without_a_gradient_nothing_changes():
    """And nothing is said, as in PyTorch."""
    model = fusedrnn.layers.Linear(2, in_size=3)
    before = {name: p.data.copy() for name, p in model.named_params()}
    for optimizer in (O.SGD(0.1, weight_decay=0.1), O.Adam(max_norm=1.0)):
        optimizer.setup(model).update()
    for name, p in model.named_params():
        np.testing.assert_array_equal(p.data, before[name])


def test_what_is_refused_is_named_by_its_path():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the package of bfloat16")
    model = fusedrnn.Model()
    model.inner = fusedrnn.Model()
    model.inner.w = Parameter(np.ones(2, ml_dtypes.bfloat16), name="w")
    model.inner.w.grad = Variable(np.ones(2, ml_dtypes.bfloat16))
    with pytest.raises(TypeError, match=r"^inner/w: expected float32 or float64, got bfloat16"):
        O.SGD().setup(model).update()
    model.inner.w = Parameter(np.ones(2), name="w")
    model.inner.w.grad = Variable(np.array([1, np.nan]))
    with pytest.raises(
        FloatingPointError, match=r"^update: expected a finite gradient of inner/w, got 1 of 2"
    ):
        O.SGD().setup(model).update()
