"""The built-in cells.

Their weights have the names, the order and the layout of PyTorch's. ``print(lstm)`` shows forward and
backward as derived from the function; docs/bptt.md has them next to a derivation by hand.
"""

from __future__ import annotations

from typing import Any

from fusedrnn.cells.definition import cell
from fusedrnn.cells.symbols import relu as relu_of
from fusedrnn.cells.symbols import sigmoid, tanh


@cell
def rnn(p: Any, x: Any, h: Any, *, relu: bool = False, layer_norm: bool = False) -> Any:
    """Elman, "Finding structure in time", 1990; layout and relu as in ``torch.nn.RNN``."""
    a = p.dense("a", x, h, layer_norm=layer_norm)
    return relu_of(a) if relu else tanh(a)


@cell
def lstm(p: Any, x: Any, h: Any, c: Any, *, layer_norm: bool = False, project: bool = False) -> Any:
    """Hochreiter and Schmidhuber 1997, forget gate by Gers et al. 2000; layout as in ``torch.nn.LSTM``.

    The projection is that of Sak et al. 2014; without it h has as many units as c.
    """
    i, f, g, o = p.dense("i f g o", x, h, layer_norm=layer_norm)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    m = p.layer_norm("c", c) if layer_norm else c
    h = sigmoid(o) * tanh(m)
    return p.project(h) if project else h, c


@cell
def gru(p: Any, x: Any, h: Any, *, reset_after: bool = True, layer_norm: bool = False) -> Any:
    """Reset after the product as in ``torch.nn.GRU`` and cuDNN, or before it as in Cho et al. 2014.

    Chung et al. 2014 write z for our 1 - z.
    """
    r, z = sigmoid(p.dense("r z", x, h, layer_norm=layer_norm))
    if reset_after:
        n = tanh(p.dense("n", x, layer_norm=layer_norm) + r * p.dense("n", h, layer_norm=layer_norm))
    else:
        n = tanh(p.dense("n", x, r * h, layer_norm=layer_norm))
    return n + z * (h - n)


# The cells with loops in csrc, by their names in csrc/cells/cells.def.
COMPILED = {
    "rnn_tanh": rnn,
    "rnn_relu": rnn.with_options(relu=True),
    "lstm": lstm,
    "gru_reset_after": gru,
    "gru_reset_before": gru.with_options(reset_after=False),
    "rnn_tanh_layer_norm": rnn.with_options(layer_norm=True),
    "rnn_relu_layer_norm": rnn.with_options(relu=True, layer_norm=True),
    "lstm_layer_norm": lstm.with_options(layer_norm=True),
    "gru_reset_after_layer_norm": gru.with_options(layer_norm=True),
    "lstm_projected": lstm.with_options(project=True),
}
