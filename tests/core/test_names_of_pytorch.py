"""Names of ``torch.nn`` that the native layers do not have: the error says what to write instead."""

from __future__ import annotations

import numpy as np
import pytest

import fusedrnn.layers as L
from fusedrnn import Model
from fusedrnn.cells import gru
from fusedrnn.models import Sequential
from fusedrnn.optimizers import SGD, Adam

pytestmark = pytest.mark.quick

RECURRENT = "num_layers, bidirectional, dropout, recurrent_dropout"


@pytest.mark.parametrize(
    ("layer", "arguments", "words"),
    [
        (L.LSTM, {"batch_first": True}, r".* LSTM's arguments, hidden_size, in_size, forget_bias, layer_norm,"
         rf" proj_size, {RECURRENT}.*; inputs are \(T, B, I\), so pass np.swapaxes\(x, 0, 1\)$"),
        (L.GRU, {"batch_first": False}, ".* GRU's arguments, hidden_size, in_size, reset_after, .*swapaxes"),
        (L.RNN, {"nonlinearity": "relu"}, ".* RNN's arguments, hidden_size, in_size, relu, .*relu=True"),
        (L.LSTM, {"input_size": 3}, ".*; write in_size, which comes after hidden_size$"),
        (L.LSTM, {"device": "cuda"}, r".*; call to_gpu\(\) of the layer$"),
        (L.LSTM, {"hiden_size": 3}, ".*, recompute$"),
        (L.Linear, {"bias": False}, ".* Linear's arguments, out_size, nobias, dtype, in_size; .*nobias=True"),
        (L.Linear, {"in_features": 3}, ".*; write in_size$"),
        (L.Dropout, {"inplace": True}, ".* Dropout's arguments, dropout_ratio$"),
        (Model, {"hidden_size": 3}, ".* Model's arguments, none$"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or ("" if isinstance(value, str) else str(value)),
)  # fmt: skip
def test_an_argument_that_a_layer_does_not_have(layer, arguments, words):
    (name,) = arguments
    with pytest.raises(TypeError, match=rf"^{name}: expected one of{words}"):
        layer(*([] if layer is Model else [4]), **arguments)


def test_layers_of_a_cell_and_of_a_class_above():
    with pytest.raises(TypeError, match=r"^batch_first: .* Recurrent's arguments, cell, hidden_size"):
        L.Recurrent(gru, 4, batch_first=True)

    class Own(L.LSTM):
        def __init__(self, hidden_size, *, scale=1.0, **options):
            super().__init__(hidden_size, **options)

    with pytest.raises(TypeError, match=r"^batch_first: .* Own's arguments, hidden_size, scale, forget_bias"):
        Own(4, batch_first=True)
    assert Own(4, scale=2, num_layers=2).num_layers == 2


def test_what_torch_has_under_the_same_name():
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.1, "bias": False, "proj_size": 2}
    net = L.LSTM(6, 3, dtype=np.float64, **options)
    assert net(np.ones((5, 2, 3))).shape == (5, 2, 4)
    with pytest.raises(TypeError, match=r"^dtype: expected float32, float64 or .*, got torch\.float32"):
        L.LSTM(6, dtype="torch.float32")


@pytest.mark.parametrize(
    ("name", "instead"),
    [("parameters", "params()"), ("zero_grad", "cleargrads()"), ("eval", "`with fusedrnn.test_mode():`")],
)
def test_a_method_that_a_model_does_not_have(name, instead):
    with pytest.raises(AttributeError) as error:
        getattr(Sequential(L.Linear(1)), name)()
    assert str(error.value) == f"'Sequential' object has no attribute {name!r}; write {instead}"
    assert not hasattr(L.Linear(1), name)


def test_what_an_optimizer_does_not_have():
    with pytest.raises(AttributeError, match=r"^'Adam' object has no attribute 'step'; write update\(\)$"):
        Adam().step()
    with pytest.raises(AttributeError, match=r"^'SGD' object has no attribute 'momentum'$"):
        SGD().momentum  # noqa: B018
    layer = L.Linear(1, in_size=1)
    for wrong in (lambda: Adam(layer.params(), lr=0.1), lambda: Adam(layer)):
        with pytest.raises(TypeError, match=r"^alpha: expected a number, .*; a model is passed to setup$"):
            wrong()


def test_an_error_in_a_property_is_not_hidden():
    class Own(Model):
        @property
        def size(self):
            return self.hidden_size

    with pytest.raises(AttributeError, match=r"^'Own' object has no attribute 'hidden_size'$"):
        Own().size  # noqa: B018


def test_layers_in_a_list_are_no_sequential():
    with pytest.raises(TypeError, match=r"^Sequential: expected each .*, got the class LSTM$"):
        Sequential(L.LSTM)
    with pytest.raises(TypeError, match=r"^Sequential: expected each layer as an argument of its own"):
        Sequential([L.LSTM(3), L.Linear(1)])


def test_sizes_in_the_order_of_torch():
    with pytest.raises(ValueError, match=r"got \(5, 2, 3\); hidden_size comes before in_size$"):
        L.LSTM(3, 6)(np.ones((5, 2, 3)))
    with pytest.raises(ValueError, match=r"got \(5, 2, 4\)$"):
        L.LSTM(3, 6)(np.ones((5, 2, 4)))


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (L.LSTM, ("bidirectional", "bias", "fused", "recompute", "layer_norm")),
        (L.GRU, ("reset_after", "layer_norm")),
        (L.RNN, ("relu", "layer_norm")),
        (L.Linear, ("nobias",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_switch_is_true_or_false(layer, names):
    for name in names:
        for wrong in ("no", 1, None):
            with pytest.raises(
                TypeError, match=rf"^{name}: expected True or False, got {type(wrong).__name__}"
            ):
                layer(3, **{name: wrong})
        for right in (np.True_, np.False_):
            layer(3, **{name: right})
