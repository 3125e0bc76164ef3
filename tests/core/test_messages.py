"""Wrong arguments of the native API: an error at the first place that can see them, which names them."""

from __future__ import annotations

import numpy as np
import pytest

import fusedrnn
import fusedrnn.functions as F
import fusedrnn.layers as L
import fusedrnn.optimizers as O
from fusedrnn import (
    DataLoader,
    SeqDataLoader,
    Variable,
    backends,
    checkpoint,
    gradcheck,
    multilayer,
    plot,
    threads,
)
from fusedrnn.cells import CellError, lstm
from fusedrnn.datasets import Series, SinCurve, read_csv

pytestmark = pytest.mark.quick

x = np.ones((4, 2, 3), np.float32)
v = Variable(x)
numbers = Series(np.arange(6.0), np.arange(6.0))


def layer(**options):
    return L.LSTM(5, 3, **options)


def pairs_of(samples):
    return next(DataLoader(samples, 2, shuffle=False))


CASES = [
    # layers: what is known when one is made
    (lambda: layer(backend="foo"), ValueError, r"backend: expected one of \('cpu', .*, got 'foo'"),
    (lambda: layer(backend=3), TypeError, "backend: expected a name .* got int"),
    (lambda: layer(backend="cpu", fused=False), ValueError, "backend: expected none .*fused=False, got cpu"),
    (lambda: layer(recompute=True, fused=False), ValueError, "recompute: expected none .*fused=False, got"),
    (lambda: layer(dtype="float16"), TypeError, "dtype: expected float32, float64 or bfloat16 of .* float16"),
    (lambda: layer(dtype=None), TypeError, "dtype: expected .* got None"),
    (lambda: layer(dtype=np.ones(3)), TypeError, "dtype: expected "),
    (
        lambda: lstm.with_options(layer_norm="no"),
        CellError,
        r"(.*\n)*layer_norm: expected True or False, got",
    ),
    # and what a call is given
    (
        lambda: layer(fused=False).sequence(x, return_states=1),
        TypeError,
        "return_states: expected True or Fa",
    ),
    (lambda: layer()(None), TypeError, "x: expected a Variable or numbers, got NoneType"),
    (lambda: layer()("abc"), TypeError, "x: expected a Variable or numbers, got str"),
    (lambda: layer()([["a", "b", "c"]]), TypeError, "x: expected a Variable or numbers, got list of <U1"),
    (lambda: layer()([[1, 2, 3], [4]]), ValueError, "x: expected numbers in rows of the same length"),
    (lambda: layer()(x, (None, None)), TypeError, "state: expected a Variable or numbers, got NoneType"),
    (lambda: L.Linear(3)(np.array([[1, None]])), TypeError, "x: expected .* got ndarray of object"),
    (lambda: L.Linear(3).W.shape, AttributeError, "W has no values yet: its size is known at first use"),
    (lambda: v.detach, AttributeError, "'Variable' object has no attribute 'detach'"),
    # functions and losses
    (lambda: v + None, TypeError, "operand: expected a Variable or numbers, got NoneType"),
    (lambda: v.sum() < "1", TypeError, "operand: expected a Variable or numbers, got str"),
    (lambda: v ** "2", TypeError, "exponent: expected a number, got str"),
    (lambda: F.mean_squared_error(v, None), TypeError, "MeanSquaredError: input 1: expected a Variable or"),
    (
        lambda: F.mean_squared_error(v, x, mask="no"),
        TypeError,
        "mask: expected a Variable or numbers, got str",
    ),
    (lambda: F.linear(v, np.ones((3, 2)), np.ones(3)), ValueError, r"b: expected shape \(2,\), got \(3,\)"),
    (lambda: F.concatenate([]), ValueError, "need at least one array to concatenate"),
    (lambda: F.concatenate([1.0, 2.0]), ValueError, "zero-dimensional arrays cannot be concatenated"),
    (lambda: F.where("a", v, v), TypeError, "condition: expected a Variable or numbers, got str"),
    (lambda: F.stack([]), ValueError, "need at least one array to stack"),
    (lambda: v.sum().backward(grad="1"), TypeError, "grad: expected a Variable or numbers, got str"),
    # data
    (lambda: DataLoader(None, 2), TypeError, "dataset: expected something with a length, got NoneType"),
    (lambda: DataLoader(numbers, 2, shuffle="no"), TypeError, "shuffle: expected True or False, got str"),
    (lambda: DataLoader(numbers, 2, gpu="cpu"), TypeError, "gpu: expected True or False, got str"),
    (lambda: SeqDataLoader(numbers, "4"), TypeError, "batch_size: expected a whole number, got str"),
    (lambda: pairs_of([1, 2]), ValueError, "dataset: expected pairs .* 'int' object is not subscriptable"),
    (
        lambda: pairs_of([([1], 0), ([1, 2], 0)]),
        ValueError,
        "dataset: expected pairs .*, all of the same shap",
    ),
    (lambda: Series(x, None), TypeError, "label: expected something with a length, got NoneType"),
    (lambda: read_csv("no.csv", None), TypeError, "columns: expected something with a length, got NoneType"),
    (lambda: read_csv("no.csv", []), TypeError, r"columns: expected a list of names, got \[\]"),
    (lambda: read_csv("no.csv", [1]), TypeError, r"columns: expected a list of names, got \[1\]"),
    (lambda: read_csv("no.csv", ["a"], hours="1"), TypeError, "hours: expected a number, got str"),
    (lambda: SinCurve(train="no"), TypeError, "train: expected True or False, got str"),
    # settings and tools
    (
        lambda: O.SGD().setup(L.Linear(3)).load_state({}),
        TypeError,
        r"state: expected what state\(\) returned",
    ),
    (lambda: backends.refuses("foo", lstm), ValueError, "backend: expected one of .* got 'foo'"),
    (lambda: backends.refuses("cpu", None), TypeError, "cell: expected a cell, .* got NoneType"),
    (lambda: O.Adam().state(), RuntimeError, r"state: expected a call of setup\(model\) before"),
    (lambda: O.SGD(lr=np.complex64(1)), TypeError, "lr: expected a number, got numpy.complex64"),
    (lambda: fusedrnn.using_config("train", "no").__enter__(), TypeError, "value: expected True or False"),
    (lambda: threads.set_num_threads(np.float32(2)), TypeError, "threads: expected a whole number"),
    (lambda: gradcheck(F.tanh, v, eps="small"), TypeError, "eps: expected a number, got str"),
    (lambda: gradcheck(F.tanh, v, nondet_tol=None), TypeError, "nondet_tol: expected a number, got NoneType"),
    (lambda: gradcheck(F.tanh, v, seed=-1), ValueError, "seed: expected 0 to 4294967295, got -1"),
    (lambda: gradcheck(F.tanh, v, options=3), TypeError, "options: expected a mapping .* got int"),
    (lambda: gradcheck(F.tanh, v, fast_mode="no"), TypeError, "fast_mode: expected True or False, got str"),
    (lambda: multilayer.forward_multilayer(lstm, x, [{}], masks=3), TypeError, "masks: expected something"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message[:40] for *_, message in CASES])
def test_a_wrong_argument_is_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_gradient_of_ones_own_is_checked_before_anything_changes():
    model = L.Linear(2, in_size=3)
    optimizer = O.SGD().setup(model)
    before = model.W.data.copy()
    model.W.grad = Variable(np.ones((3, 2)))
    for wrong, error, message in (
        (Variable(np.ones(3)), ValueError, r"gradient of b: expected shape \(2,\), got \(3,\)"),
        ("b", TypeError, "gradient of b: expected a Variable or numbers, got str"),
    ):
        model.b.grad = wrong
        with pytest.raises(error, match=message):
            optimizer.update()
        np.testing.assert_array_equal(model.W.data, before)
    model.b.grad = np.ones(2)  # an array will do
    optimizer.update()
    assert not np.array_equal(model.W.data, before)


def test_numpy_numbers_will_do():
    before = threads.get_num_threads()
    threads.set_num_threads(np.int64(1))
    assert threads.get_num_threads() == 1
    threads.set_num_threads(before)
    assert (v ** np.float32(2)).shape == x.shape


def test_a_checkpoint_names_what_it_cannot_keep(tmp_path):
    path, model = tmp_path / "c", L.Linear(2, in_size=3)
    for call, message in (
        (lambda: checkpoint.save(path, None), "model: expected a Model or a Layer, got NoneType"),
        (lambda: checkpoint.load(path, O.Adam()), "model: expected a Model or a Layer, got Adam"),
        (
            lambda: checkpoint.save(path, model, numbers),
            "optimizer: expected an Optimizer or None, got Series",
        ),
        (lambda: checkpoint.save(path, model, None, 3), "loader: expected a DataLoader or None, got int"),
        (
            lambda: checkpoint.save(path, model, generators=np.random.default_rng()),
            "generators: expected a list of NumPy's generators, got Generator",
        ),
        (
            lambda: checkpoint.load(path, model, generators=[1]),
            "generators: expected NumPy's generators, got",
        ),
        (
            lambda: checkpoint.save(path, model, loss=v.sum()),
            "loss: expected numbers, text, .*, got Variable",
        ),
        (lambda: checkpoint.save(path, model, a={"b": [1j]}), "a: expected numbers, text, .*, got complex"),
        (
            lambda: checkpoint.save(path, model, a={1: 2}),
            "a: expected dicts with keys of type str, got the key 1",
        ),
        (lambda: checkpoint.save(path, model, a=np.array([None])), "a: expected an array of numbers or text"),
    ):
        with pytest.raises(TypeError, match=f"^{message}"):
            call()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_drawn():
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    with pytest.raises(
        TypeError, match=r"^layer: expected a recurrent layer of fusedrnn\.layers, got Linear"
    ):
        plot.gates(L.Linear(3), x[:, 0])
    with pytest.raises(ValueError, match="weight_ih has no values yet"):
        plot.gates(L.LSTM(5), x[:, 0])
    for call, name in (
        (lambda: plot.losses({"a": None}), "history"),
        (lambda: plot.forecast(None, [1]), "truth"),
        (lambda: plot.forecast([1, 2], "a"), "predictions"),
        (lambda: plot.gradient_flow(["a"]), "gradients"),
        (lambda: plot.forecast([1, 2], [1], test="a"), "test"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            call()
