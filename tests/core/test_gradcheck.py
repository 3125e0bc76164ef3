"""The gradient check itself: what is right passes, and nothing wrong does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fusedrnn import functions as F
from fusedrnn import kernels, layers
from fusedrnn import test_mode as evaluation
from fusedrnn.autograd import Function, Variable
from fusedrnn.cells import gru, lstm
from fusedrnn.gradcheck import GradcheckError, gradcheck

CELLS = {
    "rnn": (layers.RNN, {}),
    "rnn relu": (layers.RNN, {"relu": True}),
    "lstm": (layers.LSTM, {}),
    "gru": (layers.GRU, {}),
    "gru before": (layers.GRU, {"reset_after": False}),
}
T, B, I, H = 5, 3, 2, 7
LENGTHS = np.array([5, 0, 3])
RESET = np.zeros((T, B), bool)
RESET[[0, 2, 3], [0, 1, 2]] = True
BOTH = pytest.mark.parametrize("fast_mode", [False, True], ids=["full", "fast"])


@pytest.fixture
def rng():
    np.random.seed(0)  # the layers' weights
    return np.random.default_rng(0)


def make(name, dtype="float64", **options):
    cls, more = CELLS[name]
    return cls(H, dtype=dtype, **more, **options)


def inputs(rng, layer, dtype="float64", state=True):
    many = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = (B, H) if many == 1 else (many, B, H)
    x = rng.standard_normal((T, B, I)).astype(dtype)
    return (x, tuple(rng.standard_normal(shape).astype(dtype) for _ in layer.cell.states)) if state else (x,)


# --- what is right passes -----------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", CELLS)
def test_layers_agree_with_the_oracle(rng, name, fused, dtype):
    layer = make(name, dtype, fused=fused)
    assert gradcheck(layer, inputs(rng, layer, dtype), options={"lengths": LENGTHS, "reset": RESET})
    assert gradcheck(layer, inputs(rng, layer, dtype, state=False))
    x, state = inputs(rng, layer, dtype)
    assert gradcheck(layer, (x[0], state))  # one step


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", CELLS)
def test_several_layers_with_dropout_agree_with_the_oracle(rng, name, fused):
    layer = make(name, num_layers=2, bidirectional=True, dropout=0.4, fused=fused)
    assert gradcheck(layer, inputs(rng, layer), options={"lengths": LENGTHS, "reset": RESET})
    with evaluation():
        assert gradcheck(layer, inputs(rng, layer))
    one = make(name, num_layers=2, dropout=0.4, fused=fused)
    x, state = inputs(rng, one)
    assert gradcheck(one, (x[0], state))


@pytest.mark.parametrize("name", CELLS)
def test_layers_agree_with_central_differences(rng, name):
    layer = make(name)
    options = {"lengths": LENGTHS, "reset": RESET}
    assert gradcheck(layer, inputs(rng, layer), method="central", fast_mode=True, options=options)
    cls, more = CELLS[name]
    small = cls(2, 2, dtype="float64", num_layers=2, bidirectional=True, dropout=0.4, **more)
    for n, p in small.named_params():
        if n.startswith("bias"):  # relu has a kink where all of its inputs are dropped and the bias is zero
            p.data = rng.standard_normal(p.shape)
    x = rng.standard_normal((3, 2, 2))
    assert gradcheck(small, x, method="central", options={"lengths": np.array([3, 2])})


def test_float32_passes_central_at_its_own_tolerance(rng):
    layer = make("lstm", "float32")
    assert gradcheck(layer, inputs(rng, layer, "float32"), method="central", fast_mode=True)


@BOTH
def test_functions_of_variables(rng, fast_mode):
    x, w = rng.standard_normal((4, 3)), Variable(rng.standard_normal((3, 5)))
    assert gradcheck(lambda x, w: F.tanh(F.linear(x, w)), (x, w), fast_mode=fast_mode)
    assert gradcheck(F.sigmoid, x, fast_mode=fast_mode)  # an array in, a Variable out
    t = rng.standard_normal((4, 3))
    constant = Variable(t)
    constant.requires_grad = False
    assert gradcheck(F.mean_squared_error, (Variable(x), constant), fast_mode=fast_mode)
    assert gradcheck(lambda x: F.dropout(x, 0.5), x, fast_mode=fast_mode)  # one mask for all evaluations


@BOTH
def test_models_with_state_and_lazy_sizes(rng, fast_mode):
    class Model(layers.Layer):
        def __init__(self):
            self.rnn = layers.LSTM(3, dtype="float64")
            self.fc = layers.Linear(2, dtype="float64")

        def forward(self, x):
            return self.fc(self.rnn(x))

    model = Model()
    x = rng.standard_normal((2, 2))
    assert gradcheck(model, x, fast_mode=fast_mode)  # a state carried on would differ from call to call
    assert model.rnn.state is None


@pytest.mark.quick
@BOTH
@pytest.mark.parametrize("cell", [lstm, gru.with_options(reset_after=False)], ids=repr)
def test_functions_of_arrays(rng, cell, fast_mode):
    rows = cell.blocks["weight_ih"] * 3
    shapes = {"weight_ih": (rows, 2), "weight_hh": (rows, 3), "bias_ih": rows}
    weights = {n: rng.standard_normal(shape) for n, shape in shapes.items()}
    state0 = tuple(rng.standard_normal((2, 3)) for _ in cell.states)

    def run(x, weights, state0):
        out = kernels.forward(cell, x, weights, state0)
        n = len(cell.states)
        return (out.y, out.stateT), lambda dy, *dT: kernels.backward(out.tape, dy, dT[:n])

    assert gradcheck(run, (rng.standard_normal((4, 2, 2)), weights, state0), fast_mode=fast_mode)


def test_everything_is_as_before(rng):
    layer = make("lstm", num_layers=2, dropout=0.5)
    x, state = inputs(rng, layer)
    y = layer(x, state)
    layer.weight_ih_l0.grad = grad = Variable(np.ones_like(layer.weight_ih_l0.data))
    kept = {n: (p._data, p.version, p.private, p._data.copy()) for n, p in layer.named_params()}
    carried = layer.h, layer.c
    numpy_state = np.random.get_state()[1].copy()
    for method in ("oracle", "central"):
        gradcheck(layer, (x, state), method=method, fast_mode=method == "central")
        for n, p in layer.named_params():
            assert p._data is kept[n][0]
            assert (p.version, p.private) == kept[n][1:3]
            assert p._data.tobytes() == kept[n][3].tobytes()
    assert layer.weight_ih_l0.grad is grad
    assert layer.h is carried[0]
    assert layer.c is carried[1]
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    y.sum().backward()  # a graph from before still works


def test_the_oracle_begins_with_the_carried_state(rng):
    layer = make("gru")
    (x,) = inputs(rng, layer, state=False)
    layer(x)
    assert gradcheck(layer, x)
    assert gradcheck(layer, x, method="central", fast_mode=True)


# --- nothing wrong does: functions of arrays ----------------------------------------------------------------


class Product:
    """``tanh(x w)`` and, where an option says so, an error in it."""

    def __init__(self, wrong=""):
        self.wrong = wrong
        self.calls = 0
        self.mask = None

    def __call__(self, x, w):
        wrong = self.wrong
        self.calls += 1
        y = np.tanh(x @ w)
        if wrong == "nan output":
            y[1, 2] = np.nan
        if wrong == "infinite output":
            y[0, 1] = np.inf
        if wrong == "nondeterministic output":
            y[1, 0] += 1e-15 * self.calls
        if wrong == "changes its input":
            w[2, 1] += 1
        if wrong == "stale dropout mask":
            mask = np.random.rand(*y.shape) < 0.5
            stale, self.mask = self.mask, mask
            if stale is None:
                stale = mask
        elif wrong == "dropout mask drawn again":
            mask = np.random.rand(*y.shape) < 0.5
        else:
            mask = np.ones(y.shape, bool)
        result = np.where(mask, y, 0)

        def backward(dy):
            used = mask
            if wrong == "stale dropout mask":
                used = ~mask
            if wrong == "dropout mask drawn again":
                used = np.random.rand(*y.shape) < 0.5
            da = np.where(used, dy * (1 - y * y), 0)
            dx, dw = da @ w.T, x.T @ da
            if wrong == "one element":
                dw[2, 1] += 1e-6 * dy[1, 1]
            if wrong == "factor":
                dx *= 1 + 1e-6
            if wrong == "nan gradient":
                dw[0, 0] = np.nan
            if wrong == "shape":
                dw = dw[:-1]
            if wrong == "transposed":
                dx = dx.T
            if wrong == "dtype":
                dw = dw.astype(np.float32)
            if wrong == "missing gradient":
                dw = None
            if wrong == "too few gradients":
                return dx
            if wrong == "nondeterministic gradient":
                dx[0, 0] += 1e-15 * self.calls
            if wrong == "changes its input in backward":
                x[0, 0] = 0
            if wrong == "changes dy":
                dy *= 2
            if wrong == "raises":
                raise ValueError("shapes do not fit")
            return dx, dw

        return result, backward


WRONG = {
    "nan output": r"output 0\[1, 2\]: got nan",
    "infinite output": r"output 0\[0, 1\]: got inf",
    "nondeterministic output": r"output 0\[1, 0\]: nondeterministic, \S+ and then \S+",
    "changes its input": r"inputs\[1\]\[2, 1\]: modified",
    "stale dropout mask": r"inputs\[[01]\]",
    "dropout mask drawn again": r"inputs\[[01]\]",
    "one element": r"inputs\[1\]",
    "factor": r"inputs\[0\]",
    "nan gradient": r"gradient of inputs\[1\]\[0, 0\]: got nan",
    "shape": r"gradient of inputs\[1\]: expected shape \(3, 5\), got \(2, 5\)",
    "transposed": r"gradient of inputs\[0\]: expected shape \(4, 3\), got \(3, 4\)",
    "dtype": r"gradient of inputs\[1\]: expected dtype float64, got float32",
    "missing gradient": r"inputs\[1\].*no gradient was returned",
    "too few gradients": "expected 2 gradients, got 1",
    "nondeterministic gradient": r"gradient of inputs\[0\]\[0, 0\]: nondeterministic",
    "changes its input in backward": r"inputs\[0\]\[0, 0\]: modified",
    "changes dy": r"doutputs\[0\]\[0, 0\]: modified",
    "raises": "backward raised ValueError: shapes do not fit",
}


@BOTH
def test_the_product_is_right_without_an_error(rng, fast_mode):
    assert gradcheck(
        Product(), (rng.standard_normal((4, 3)), rng.standard_normal((3, 5))), fast_mode=fast_mode
    )


@pytest.mark.quick
@BOTH
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_functions_fail(rng, wrong, fast_mode):
    arguments = rng.standard_normal((4, 3)), rng.standard_normal((3, 5))
    with pytest.raises(GradcheckError, match=WRONG[wrong]):
        gradcheck(Product(wrong), arguments, fast_mode=fast_mode)
    assert gradcheck(Product(wrong), arguments, fast_mode=fast_mode, raise_exception=False) is False


def test_the_message_names_tensor_index_and_both_values(rng):
    x, w = rng.standard_normal((4, 3)), rng.standard_normal((3, 5))
    with pytest.raises(GradcheckError) as caught:
        gradcheck(Product("one element"), (x, w))
    found = re.match(
        r"d output 0\[(\d), 1\] / d inputs\[1\]\[2, 1\]: got (\S+), expected (\S+), ", str(caught.value)
    )
    assert found, str(caught.value)
    row, got, expected = int(found[1]), float(found[2]), float(found[3])
    right = (1 - np.tanh(x @ w)[row, 1] ** 2) * x[row, 2]
    assert got == pytest.approx(right + 1e-6, abs=1e-12)
    assert expected == pytest.approx(right, abs=1e-9)


def test_an_error_that_only_one_output_has(rng):
    """A gradient that is right for each output alone and wrong for both at once."""

    def f(x):
        def backward(dy, dz):
            return 2 * dy + 3 * dz if not (dy.any() and dz.any()) else 2 * dy

        return (2 * x, 3 * x), backward

    with pytest.raises(GradcheckError, match=r"inputs\[0\] from all outputs at once"):
        gradcheck(f, rng.standard_normal(4))
    with pytest.raises(GradcheckError, match=r"inputs\[0\]"):
        gradcheck(f, rng.standard_normal(4), fast_mode=True)


def test_nondet_tol_allows_what_it_says(rng):
    arguments = rng.standard_normal((4, 3)), rng.standard_normal((3, 5))
    assert gradcheck(Product("nondeterministic output"), arguments, nondet_tol=1e-12)


def test_tolerances_are_pytorchs(rng):
    """``abs(a - n) <= atol + rtol * abs(n)``."""
    x = rng.standard_normal(5) + 3

    def scaled(factor, offset=0.0):
        return lambda x: (x * x, lambda dy: 2 * x * dy * factor + offset * dy)

    assert gradcheck(scaled(1 + 1e-4), x, rtol=1.1e-4, atol=0)
    assert not gradcheck(scaled(1 + 1e-4), x, rtol=0.9e-4, atol=0, raise_exception=False)
    assert gradcheck(scaled(1, 1e-4), x, rtol=1e-9, atol=1.1e-4)
    assert not gradcheck(scaled(1, 1e-4), x, rtol=1e-9, atol=0.9e-4, raise_exception=False)


def test_eps_is_the_step(rng):
    steps = []

    def f(x):
        steps.append(x.copy())
        return x * x, lambda dy: 2 * x * dy

    x = rng.standard_normal(1)
    gradcheck(f, x, eps=1e-3)
    assert max(abs(s - x).max() for s in steps) == pytest.approx(1e-3)


# --- nothing wrong does: our variables ----------------------------------------------------------------------


class Square(Function):
    wrong = ""

    def forward(self, x):
        return x * x

    def backward(self, gy):
        x = self.inputs[0].data
        gradient = 2 * x * gy.data
        if self.wrong == "factor":
            gradient *= 1.001
        if self.wrong == "one element":
            gradient[1, 2] += 1e-3 * (gy.data != 0).any()
        if self.wrong == "nan":
            gradient[0, 0] = np.nan
        if self.wrong == "shape":
            gradient = gradient[1:]
        if self.wrong == "missing":
            return None
        return gradient


@BOTH
@pytest.mark.parametrize("wrong", ["factor", "one element", "nan", "shape", "missing"])
def test_wrong_variable_functions_fail(rng, wrong, fast_mode):
    def f(x):
        node = Square()
        node.wrong = wrong
        return node(x)

    with pytest.raises(GradcheckError):
        gradcheck(f, Variable(rng.standard_normal((2, 3))), fast_mode=fast_mode)


# --- nothing wrong does: the oracle -------------------------------------------------------------------------


def last(array):
    """The index of the last element, and a change just above what may be: 1e-12 of the largest entry."""
    return tuple(n - 1 for n in array.shape), 1e-12 * np.abs(array).max()


def break_backward(monkeypatch, change):
    right = F.Fused.backward

    def backward(self, *gys):
        return change(self, list(right(self, *gys)))

    monkeypatch.setattr(F.Fused, "backward", backward)


# Inputs of the fused node: x, weight_ih, weight_hh, bias_ih, (bias_hh,) h(, c).
@pytest.mark.quick
@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("wrong", ["one element", "factor", "nan", "missing", "shape", "zero"])
def test_the_oracle_finds_a_wrong_gradient(rng, monkeypatch, k, wrong):
    layer = make("lstm")
    arguments = inputs(rng, layer)
    names = ["x", "weight_ih", "weight_hh", "bias_ih", "h", "c"]

    def change(node, gradients):
        g = gradients[k]
        if wrong == "one element":
            index, delta = last(g)
            g[index] += delta
        elif wrong == "factor":
            g *= 1 + 1e-12
        elif wrong == "nan":
            g[last(g)[0]] = np.nan
        elif wrong == "missing":
            gradients[k] = None
        elif wrong == "shape":
            gradients[k] = g[..., :-1]
        else:
            g[...] = 0
        return tuple(gradients)

    assert gradcheck(layer, arguments)
    break_backward(monkeypatch, change)
    expected = "backward raised" if wrong == "shape" else rf"gradient of {names[k]}\b"
    with pytest.raises(GradcheckError, match=expected):
        gradcheck(layer, arguments)
    assert gradcheck(layer, arguments, raise_exception=False) is False


@pytest.mark.parametrize("k", range(5))  # y, final h, final c, h and c of every step
@pytest.mark.parametrize("wrong", ["one element", "nan"])
def test_the_oracle_finds_a_wrong_output(rng, monkeypatch, k, wrong):
    layer = make("lstm")
    arguments = inputs(rng, layer)
    right = F.Fused.forward

    def forward(self, *arrays):
        outputs = [np.array(a) for a in right(self, *arrays)]
        index, delta = last(outputs[k])
        outputs[k][index] = outputs[k][index] + delta if wrong == "one element" else np.nan
        return tuple(outputs)

    monkeypatch.setattr(F.Fused, "forward", forward)
    name = ["y", "final h", "final c", "h of every step", "c of every step"][k]
    with pytest.raises(GradcheckError, match=rf"output {name}\["):
        gradcheck(layer, arguments)


def test_the_oracle_finds_nondeterminism(rng, monkeypatch):
    layer = make("lstm")
    calls = []

    def change(node, gradients):
        calls.append(1)
        gradients[2][0, 0] = np.nextafter(gradients[2][0, 0], np.inf if len(calls) % 2 else -np.inf)
        return tuple(gradients)

    break_backward(monkeypatch, change)
    with pytest.raises(GradcheckError, match=r"weight_hh.*\[0, 0\]: nondeterministic"):
        gradcheck(layer, inputs(rng, layer))
    assert gradcheck(layer, inputs(rng, layer), nondet_tol=1e-12)


@pytest.mark.parametrize("method", ["oracle", "central"])
def test_a_stale_dropout_mask_is_found(rng, monkeypatch, method):
    layer = make("gru", num_layers=2, dropout=0.5)
    arguments = inputs(rng, layer)
    right = F.Fused.backward

    def backward(self, *gys):
        masks = [np.roll(m, 1, axis=0) for m in self.tape.masks]
        self.tape = self.tape._replace(masks=masks)
        return right(self, *gys)

    monkeypatch.setattr(F.Fused, "backward", backward)
    with pytest.raises(GradcheckError, match=r"x|inputs|l0"):
        gradcheck(layer, arguments, method=method, fast_mode=method == "central")


def test_the_oracle_finds_a_written_input(rng, monkeypatch):
    layer = make("lstm")

    def change(node, gradients):
        node.inputs[2]._data[1, 1] = 0
        return tuple(gradients)

    break_backward(monkeypatch, change)
    with pytest.raises(GradcheckError, match=r"weight_hh\[1, 1\]: modified"):
        gradcheck(layer, inputs(rng, layer))


def test_an_explicit_rtol_is_what_counts(rng, monkeypatch):
    layer = make("lstm")
    break_backward(monkeypatch, lambda node, g: (g[0], g[1] * (1 + 1e-6), *g[2:]))
    assert gradcheck(layer, inputs(rng, layer), rtol=1e-5)
    assert not gradcheck(layer, inputs(rng, layer), rtol=1e-7, raise_exception=False)


# --- the page -----------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run():
    page = (Path(__file__).parents[2] / "docs" / "gradcheck.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    np.random.seed(0)
    names = {}
    for block in blocks:
        exec(block, names)


# --- arguments ----------------------------------------------------------------------------------------------


def test_bad_arguments_are_named(rng):
    layer = make("lstm")
    x = inputs(rng, layer, state=False)
    for error, match, call in (
        (ValueError, "method", lambda: gradcheck(layer, x, method="exact")),
        (TypeError, "method", lambda: gradcheck(F.tanh, x, method="oracle")),
        (ValueError, "eps, fast_mode", lambda: gradcheck(layer, x, fast_mode=True, method="oracle")),
        (ValueError, "eps, fast_mode", lambda: gradcheck(layer, x, eps=1e-6)),
        (ValueError, "eps: expected a positive", lambda: gradcheck(F.tanh, x, eps=0.0)),
        (ValueError, "rtol", lambda: gradcheck(F.tanh, x, rtol=-1.0)),
        (TypeError, "func_or_layer", lambda: gradcheck(3, x)),
        (TypeError, r"\(outputs, backward\)", lambda: gradcheck(np.tanh, x)),
        (ValueError, "inputs: expected at least one", lambda: gradcheck(F.tanh, (Variable(np.arange(3)),))),
        (ValueError, "options", lambda: gradcheck(layer, x, options={"return_states": True})),
        (ValueError, "inputs: expected x, or x and a state", lambda: gradcheck(layer, (*x, *x))),
    ):
        with pytest.raises(error, match=match):
            call()


def test_a_failed_check_is_an_assertion_error():
    assert issubclass(GradcheckError, AssertionError)
