"""The tape: operators, gradients of every function, cutting, and what it refuses."""

import gc
import weakref

import numpy as np
import pytest

import fusedrnn
import fusedrnn.functions as F
from fusedrnn import Function, Parameter, Variable, no_grad, using_config
from fusedrnn import optimizers as O
from fusedrnn.backends.cuda import cupy_device

pytestmark = pytest.mark.quick


def central_difference(f, arrays, dy, k, h=1e-6):
    """Gradient of sum(f * dy) in arrays[k], element by element."""
    gradient = np.zeros_like(arrays[k])
    for index in np.ndindex(gradient.shape):
        sides = []
        for sign in (1, -1):
            moved = [a.copy() for a in arrays]
            moved[k][index] += sign * h
            sides.append((f(*map(Variable, moved)).data * dy).sum())
        gradient[index] = (sides[0] - sides[1]) / (2 * h)
    return gradient


T = np.array([2, 0, 1, 1, 0])
MASK = np.arange(5)[:, None] < [5, 2, 0]  # of rows of these lengths
LABELS = np.arange(15).reshape(5, 3) % 4
FUNCTIONS = {
    "add": (lambda a, b: a + b, [(3, 4), (3, 4)]),
    "add broadcast": (lambda a, b: a + b, [(3, 4), (4,)]),
    "sub broadcast": (lambda a, b: a - b, [(3, 1), (2, 1, 4)]),
    "mul broadcast": (lambda a, b: a * b, [(3, 4), (1, 4)]),
    "div": (lambda a, b: a / (b * b + 1), [(3, 4), (3, 4)]),
    "number on the left": (lambda a: 2 - 3 / (a * a + 2), [(3, 4)]),
    "neg": (lambda a: -a, [(5,)]),
    "pow": (lambda a: a**3, [(5,)]),
    "matmul": (lambda a, b: a @ b, [(3, 4), (4, 2)]),
    "sum": (lambda a: a.sum(), [(3, 4)]),
    "sum axis": (lambda a: a.sum(axis=1), [(3, 4, 2)]),
    "sum axes kept": (lambda a: a.sum(axis=(0, 2), keepdims=True), [(3, 4, 2)]),
    "mean": (F.mean, [(3, 4)]),
    "reshape": (lambda a: a.reshape(2, 6), [(3, 4)]),
    "transpose": (lambda a: a.T, [(3, 4)]),
    "transpose axes": (lambda a: a.transpose(2, 0, 1), [(3, 4, 2)]),
    "transpose negative axes": (lambda a: a.transpose(0, -1, -2), [(2, 2, 2)]),
    "power 0": (lambda a: a**0 + a, [(3, 4)]),
    "slice": (lambda a: a[1:, ::2], [(3, 4)]),
    "index that repeats": (lambda a: a[np.array([0, 2, 0])], [(3, 4)]),
    "exp": (F.exp, [(3, 4)]),
    "log": (lambda a: F.log(a * a + 1), [(3, 4)]),
    "tanh": (F.tanh, [(3, 4)]),
    "sigmoid": (F.sigmoid, [(3, 4)]),
    "relu": (F.relu, [(3, 4)]),
    "concatenate": (lambda a, b: F.concatenate([a, b], axis=1), [(3, 4), (3, 2)]),
    "stack": (lambda a, b: F.stack([a, b], axis=1), [(3, 4), (3, 4)]),
    "where": (lambda a, b: F.where(np.arange(4) > 1, a, b), [(3, 4), (4,)]),
    "cast": (lambda a: F.cast(a, np.longdouble), [(3, 4)]),
    "linear": (F.linear, [(3, 4), (4, 2), (2,)]),
    "linear without bias": (F.linear, [(3, 4), (4, 2)]),
    "linear on a sequence": (F.linear, [(5, 3, 4), (4, 2), (2,)]),
    "mse": (F.mean_squared_error, [(3, 2), (3, 2)]),
    "mse of a sequence": (F.mean_squared_error, [(5, 3, 2), (5, 3, 2)]),
    "softmax": (F.softmax, [(5, 3)]),
    "cross entropy": (lambda a: F.softmax_cross_entropy(a, T), [(5, 3)]),
    "mse, masked": (lambda a, b: F.mean_squared_error(a, b, MASK), [(5, 3, 2), (5, 3, 2)]),
    "mse, masked by element": (lambda a, b: F.mean_squared_error(a, b, MASK), [(5, 3), (5, 3)]),
    "cross entropy of a sequence": (lambda a: F.softmax_cross_entropy(a, LABELS), [(5, 3, 4)]),
    "cross entropy, masked": (lambda a: F.softmax_cross_entropy(a, LABELS, MASK), [(5, 3, 4)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_of_every_function(name):
    f, shapes = FUNCTIONS[name]
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    variables = [Variable(a.copy()) for a in arrays]
    y = f(*variables)
    dy = rng.standard_normal(y.shape)
    y.grad = Variable(dy)
    y.backward()
    for k, x in enumerate(variables):
        expected = central_difference(f, arrays, dy, k)
        assert x.grad.shape == x.shape
        np.testing.assert_allclose(x.grad.data, expected, rtol=1e-7, atol=1e-8 * max(1, abs(expected).max()))
        np.testing.assert_array_equal(x.data, arrays[k])  # inputs stay
    for x, kept in zip(variables, [x.grad.data.copy() for x in variables], strict=True):
        np.testing.assert_array_equal(x.grad.data, kept)
        x.grad.data[...] = np.nan  # as a program may write to it, to clip it: it is of no other gradient
    assert np.isfinite(dy).all()


def test_every_function_of_the_module_is_in_the_table():
    made = set()

    class Spy:
        def __enter__(self):
            self.call = Function.__call__

            def call(function, *inputs):
                made.add(type(function).__name__)
                return self.call(function, *inputs)

            Function.__call__ = call

        def __exit__(self, *_):
            Function.__call__ = self.call

    rng = np.random.default_rng(0)
    with Spy():
        for f, shapes in FUNCTIONS.values():
            f(*(Variable(rng.standard_normal(s)) for s in shapes))
    existing = {c.__name__ for c in Function.__subclasses__() if c.__module__.startswith("fusedrnn.")}
    assert existing - made == {"Dropout", "Fused"}  # random; and tested in test_layers


def test_plain_numbers_and_arrays_on_either_side():
    x = Variable(np.array([1.0, 2.0], np.float32))
    array = np.array([3.0, 4.0], np.float32)
    for y, expected in (
        (0 + x, [1, 2]),
        (x + 1, [2, 3]),
        (array + x, [4, 6]),
        (x + array, [4, 6]),
        (1 - x, [0, -1]),
        (array - x, [2, 2]),
        (2 * x, [2, 4]),
        (array * x, [3, 8]),
        (2 / x, [2, 1]),
        (array / x, [3, 2]),
        (np.float32(2) * x, [2, 4]),
        (x**2, [1, 4]),
    ):
        assert isinstance(y, Variable)
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y.data, expected)
    assert (np.ones((1, 2)) @ Variable(np.ones((2, 1)))).shape == (1, 1)


def test_a_number_does_not_widen_and_a_gradient_has_its_variables_dtype():
    x = Variable(np.ones(3, np.float32))
    loss = F.mean_squared_error(3.0 * x.reshape(1, 3), np.zeros((1, 3)))  # float64 target
    loss.backward()
    assert x.grad.dtype == np.float32
    assert (Variable(np.arange(3)) * 0.5).dtype == np.float64


def test_a_variable_used_twice_gets_the_sum():
    x = Variable(np.array(3.0))
    y = x * x + x
    y.backward()
    assert x.grad.data == 7.0
    y2 = x + x
    y2.backward()
    assert x.grad.data == 9.0  # added to what is there
    x.cleargrad()
    assert x.grad is None


def test_gradients_in_between_are_dropped_unless_retained():
    x = Variable(np.array(3.0))
    a = x * 2
    y = a * a
    y.backward()
    assert a.grad is None
    assert y.grad is None
    y.backward(retain_grad=True)
    assert a.grad.data == 12.0


def test_newest_function_first_in_a_diamond():
    x = Variable(np.array(2.0))
    a = x**2
    y = a**2 + a**2
    y.backward()
    assert x.grad.data == 64.0


class TwoOutputs(Function):
    """A user's function, with arithmetic on variables in backward."""

    def forward(self, x):
        return 2 * x, x**2

    def backward(self, g0, g1):
        (x,) = self.inputs
        gradient = 0
        if g0 is not None:
            gradient = gradient + 2 * g0
        if g1 is not None:
            gradient = gradient + g1 * 2 * x
        return gradient


@pytest.mark.parametrize(("used", "expected"), [((0,), 2.0), ((1,), 6.0), ((0, 1), 8.0)])
def test_user_function_with_two_outputs(used, expected):
    x = Variable(np.array(3.0))
    outputs = TwoOutputs()(x)
    assert outputs[0].creator is outputs[1].creator
    assert outputs[0].creator.inputs == (x,)
    assert outputs[0].creator.outputs[1]() is outputs[1]
    loss = sum(outputs[k] for k in used)
    del outputs  # an output nobody holds has no gradient
    loss.backward()
    assert x.grad.data == expected


def test_user_function_that_gives_a_wrong_gradient_is_named():
    class Wrong(Function):
        def forward(self, x):
            return x.sum()

        def backward(self, gy):
            return gy

    class TooMany(Wrong):
        def backward(self, gy):
            return gy, gy

    for cls, message in (
        (Wrong, r"Wrong.backward.*\(\)"),
        (TooMany, "TooMany.backward.* 2"),
    ):
        y = cls()(Variable(np.ones(3)))
        with pytest.raises(ValueError, match=message):
            y.backward()


def test_no_grad_records_nothing():
    x = Variable(np.ones(3))
    with no_grad():
        y = x * 2
    assert y.creator is None
    with using_config("enable_backprop", False):
        assert (x * 2).creator is None
    assert (x * 2).creator is not None
    with pytest.raises(ValueError, match=r"name: .* 'grad'"), using_config("grad", True):
        pass


def test_no_grad_is_of_its_thread():
    import threading

    seen = []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((Variable(np.ones(1)) * 2).creator))
        thread.start()
        thread.join()
    assert seen[0] is not None


def test_no_gradient_is_made_for_constants():
    x, t = Variable(np.ones(3)), np.ones(3)
    y = x * t
    constant = y.creator.inputs[1]
    y.backward(grad=np.ones(3))
    assert constant.grad is None
    assert x.grad is not None
    frozen = Parameter(np.ones(3))
    frozen.requires_grad = False
    y = frozen * t
    assert y.creator is None
    assert not y.requires_grad
    y = (frozen * x).sum()
    y.backward()
    assert frozen.grad is None


def test_unchain_backward_cuts_every_output_of_every_function():
    x = Variable(np.array(3.0))
    double, square = TwoOutputs()(x)
    loss = double * 5
    loss.unchain_backward()
    assert square.creator is None  # not on the way from the loss, but of the same function
    assert double.creator is None
    assert loss.creator is None
    assert (loss.data, square.data) == (30.0, 9.0)
    later = square + loss
    later.backward()
    assert x.grad is None
    assert square.grad.data == 1.0


def test_unchain_cuts_one_variable():
    x = Variable(np.array(3.0))
    a = x * 2
    y = a * 3
    a.unchain()
    y.backward()
    assert a.grad.data == 3.0
    assert x.grad is None


def test_a_loss_may_accumulate_over_cuts():
    w = Parameter(np.array(2.0))
    loss = 0
    for k in (1.0, 2.0):
        loss += w * k
        w.cleargrad()
        loss.backward()
        loss.unchain_backward()
        assert w.grad.data == k  # the older term is a constant
    assert loss.data == 6.0


def test_a_graph_goes_when_nobody_looks_and_a_long_one_does_not_overflow():
    x = Variable(np.ones(1))
    y = x
    for _ in range(20_000):
        y = y + 1
    y.backward()
    assert x.grad.data == 1
    middle = weakref.ref(y.creator)
    gc.disable()
    try:
        del y
        assert middle() is None  # by reference counts alone
    finally:
        gc.enable()


def test_unchain_backward_walks_a_lattice_once():
    x = Variable(np.ones(1))
    y = x
    for _ in range(200):
        y = y + y * 2  # 2**200 paths
    y.unchain_backward()
    assert y.creator is None


def test_a_changed_input_is_an_error():
    x, w = Variable(np.ones(3)), Parameter(np.ones(3), name="w")
    for change in ("in place", "set", "optimiser"):
        y = (x * w).sum()
        if change == "in place":
            w.data += 1
        elif change == "set":
            w.data = np.ones(3)
        else:
            model = fusedrnn.Model()
            model.w = w
            w.grad = Variable(np.ones(3))
            O.SGD().setup(model).update()
        with pytest.raises(RuntimeError, match=r"Mul: input 1 \(w\) was changed after forward"):
            y.backward()


def test_a_changed_output_is_an_error():
    y = F.tanh(Variable(np.ones(3)))
    loss = y.sum()
    y.data *= 2
    with pytest.raises(RuntimeError, match="changed after forward"):
        loss.backward()


def test_second_derivatives_are_refused():
    y = Variable(np.ones(3)).sum()
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        y.backward(create_graph=True)


def test_wrong_data_is_named():
    for data in (3.0, [1.0], "x"):
        with pytest.raises(TypeError, match=f"data: .* {type(data).__name__}"):
            Variable(data)
    with pytest.raises(TypeError, match=r"exponent: .*\.Variable"):
        Variable(np.ones(2)) ** Variable(np.ones(2))
    with pytest.raises(ValueError, match="expected two matrices"):
        Variable(np.ones(2)) @ np.ones((2, 2))


@pytest.mark.parametrize(
    ("y", "t"), [((3, 1), (3,)), ((3, 2), (3, 1)), ((3, 1), (1, 3)), ((2, 3, 1), (3, 1)), ((), ())]
)
def test_mse_never_broadcasts(y, t):
    with pytest.raises(ValueError, match="t: expected the shape of y"):
        F.mean_squared_error(np.ones(y), np.ones(t))


def test_mse_of_steps_adds_up_to_that_of_the_sequence():
    rng = np.random.default_rng(0)
    y, t = rng.standard_normal((2, 5, 3, 2))
    steps = sum(F.mean_squared_error(a, b).data for a, b in zip(y, t, strict=True))
    np.testing.assert_allclose(F.mean_squared_error(y, t).data, steps, rtol=1e-14)
    assert F.mean_squared_error(np.ones((1, 1)), np.zeros(1)).data == 1.0  # a missing axis of length 1


def test_cross_entropy_checks_its_labels():
    x = np.zeros((2, 3))
    assert F.softmax_cross_entropy(x, np.array([0, 2])).data == pytest.approx(np.log(3))
    big = np.array([[1e4, -1e4, 0.0]])
    assert F.softmax_cross_entropy(big, np.array([0])).data == 0.0
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        F.softmax_cross_entropy(x, np.array([0, 3]))
    with pytest.raises(ValueError, match="of integers"):
        F.softmax_cross_entropy(x, np.array([0.0, 1.0]))


def test_a_variable_of_one_element_is_a_number():
    for data in (np.array(1.5), np.array([[1.5]], np.float32)):
        loss = Variable(data)
        assert float(loss) == loss.item() == 1.5
        assert type(loss.item()) is float
        assert f"{loss:.3f} {loss:>6.1f}" == "1.500    1.5"
    assert f"{Variable(np.array(7)):03d}" == "007"
    v = Variable(np.ones(3))
    assert f"{v}" == str(v) == "variable([1. 1. 1.])"
    for call in (lambda: float(v), v.item, lambda: f"{v:.2f}"):
        with pytest.raises(ValueError, match=r"item: expected a variable of one element, got shape \(3,\)"):
            call()
    with pytest.raises(ValueError, match=r"item: .* got none yet"):
        float(Parameter(None))


def test_a_variable_is_an_array_to_numpy():
    v = Variable(np.arange(6.0).reshape(2, 3))
    assert np.asarray(v) is v.data or np.shares_memory(np.asarray(v), v.data)
    assert np.asarray(v, np.float32).dtype == np.float32
    assert not np.shares_memory(np.array(v), v.data)
    np.testing.assert_array_equal(np.array([v.sum(), v.sum()]), [15, 15])
    np.testing.assert_array_equal(np.mean(v), 2.5)
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        assert np.shares_memory(np.array(v, copy=False), v.data)
        with pytest.raises(ValueError, match="copy"):
            np.array(v, np.float32, copy=False)
    p = Parameter(None)
    with pytest.raises(ValueError, match="no values yet"):
        np.asarray(p)
    p.assign(np.ones(2))
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(p)[0] = 2  # backward reads this memory
    assert p.private
    for y in (np.ones(3) * v, np.ones((2, 3)) - v, np.ones((2, 2)) @ v, np.float64(2) / (v + 1), 0 + v):
        assert isinstance(y, Variable)  # the operator is ours all the same
        assert y.creator is not None


def test_a_variable_can_be_plotted():
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    from matplotlib.figure import Figure

    v = Variable(np.array([3.0, -1.0, 2.0])) * 2
    for y in (v, v.reshape(3, 1)):
        for line in (*Figure().add_subplot().plot(y), *Figure().add_subplot().plot(np.arange(3), y)):
            np.testing.assert_array_equal(line.get_ydata(), [6, -2, 4])


def test_backward_where_nothing_was_recorded_says_why():
    x = Variable(np.array(2.0))
    with no_grad():
        unrecorded = x * 3
    cut = x * 3
    cut.unchain_backward()
    for y in (unrecorded, cut, x):
        with pytest.raises(RuntimeError, match=r"^backward: this variable has no graph: .* no_grad\(\)"):
            y.backward()
        assert y.grad is None
    with pytest.raises(RuntimeError, match=r"arrays and numbers only.* Variable or a Parameter"):
        F.sum(np.ones(3)).backward()


def test_backward_of_more_than_one_element_asks_for_a_gradient():
    x = Variable(np.array([1.0, -2.0, 3.0], np.float32))
    g = np.array([0.5, 2.0, -1.0])
    with pytest.raises(
        ValueError, match=r"shape \(3,\) needs an upstream gradient; pass backward\(grad="
    ) as e:
        (x * x).backward()
    assert ".grad" in str(e.value)
    for given in (g, Variable(g), None):
        x.cleargrad()
        y = x * x
        if given is None:
            y.grad = Variable(g.astype(np.float32))
        y.backward(grad=given)
        np.testing.assert_array_equal(x.grad.data, np.float32([1, -8, -6]))
        assert x.grad.dtype == np.float32
    with pytest.raises(ValueError, match=r"grad: expected shape \(3,\), got \(1, 3\)"):
        (x * x).backward(grad=g[None])
    with pytest.raises(TypeError, match=r"^retain_grad: expected True or False, got numpy\.ndarray; pass"):
        (x * x).backward(g)
    x.cleargrad()
    (x * x).sum().reshape(1, 1).backward()  # one element in any shape
    np.testing.assert_array_equal(x.grad.data, [2, -4, 6])


def test_extreme_values():
    x = np.array([-1e4, -0.0, 0.0, 1e4, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(F.sigmoid(x).data, [0, 0.5, 0.5, 1, 1, 0, np.nan])
    np.testing.assert_array_equal(F.relu(x).data, [0, 0, 0, 1e4, np.inf, 0, np.nan])
    v = Variable(np.array([np.nan, 1.0]))
    y = F.where(np.array([False, True]), v, 0.0)
    assert y.data.tolist() == [0.0, 1.0]
    y.sum().backward()
    assert v.grad.data.tolist() == [0.0, 1.0]


def test_dropout():
    np.random.seed(0)
    x = Variable(np.ones((50, 40), np.float32))
    y = F.dropout(x, 0.3)
    kept = y.data != 0
    assert y.dtype == np.float32
    assert abs(kept.mean() - 0.7) < 0.05
    np.testing.assert_array_equal(y.data[kept], np.float32(1 / 0.7))
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.data, y.data)
    with fusedrnn.test_mode():
        assert F.dropout(x, 0.3) is x
    with pytest.raises(ValueError, match=r"dropout_ratio: .* 1"):
        F.dropout(x, 1)


def test_comparisons_are_those_of_the_values():
    a, b = Variable(np.array(1.0)), Variable(np.array(2.0))
    assert a < b
    assert b > 1.5
    assert a <= 1.0
    assert b <= 2
    assert not a > b
    assert min(b, a, key=float) is a
    assert bool(Variable(np.zeros(1))) is False
    assert (Variable(np.arange(3.0)) >= 1).tolist() == [False, True, True]
    assert a != Variable(np.array(1.0))  # == compares objects
    assert len({a, a, b}) == 2
    assert not np.asarray(a).flags.writeable
    with pytest.raises(ValueError, match="one element"):
        bool(Variable(np.arange(3.0)))


def test_the_gpu_is_a_named_error(monkeypatch):
    monkeypatch.setattr(cupy_device, "unavailable", lambda: "CuPy is not installed: pip install it")
    for call in (
        lambda: fusedrnn.Model().to_gpu(),
        lambda: fusedrnn.DataLoader(fusedrnn.datasets.SinCurve(), 10, gpu=True),
        lambda: fusedrnn.DataLoader(fusedrnn.datasets.SinCurve(), 10).to_gpu(),
    ):
        with pytest.raises(RuntimeError, match=r"(to_gpu|gpu=True): CuPy is not installed"):
            call()
    assert fusedrnn.cuda.get_array_module(np.ones(1)) is np
    assert not fusedrnn.cuda.gpu_enable
    fusedrnn.Model().to_cpu()
