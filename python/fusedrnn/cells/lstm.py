"""The LSTM cell, forward and backward side by side.

    i = sigmoid(ai)  f = sigmoid(af)  g = tanh(ag)  o = sigmoid(ao)
    c = f * c_prev + i * g
    h = o * tanh(c)

where each ``a`` is ``weight_ih x + bias_ih + weight_hh h_prev + bias_hh`` of its gate. Saves i f g o, and
c of every step. With layer norm ``h = o * tanh(m)``, ``m = LN(c; gain_c) + bias_c``, which needs c of all
units: two phases.

Source: Hochreiter and Schmidhuber 1997, forget gate by Gers et al. 2000; layout as in ``torch.nn.LSTM``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fusedrnn.cells import builtin
from fusedrnn.cells.activations import ONE, sigmoid, tanh
from fusedrnn.cells.definition import Definition


def forward(ai: Any, af: Any, ag: Any, ao: Any, c_prev: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
    """-> h, c, i, f, g, o"""
    i = sigmoid(ai)
    f = sigmoid(af)
    g = tanh(ag)
    o = sigmoid(ao)
    c = f * c_prev + i * g
    h = o * tanh(c)
    return h, c, i, f, g, o


def backward(
    dh: Any, dc: Any, i: Any, f: Any, g: Any, o: Any, c_prev: Any, c: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """-> dai, daf, dag, dao, dc_prev"""
    u = tanh(c)
    dc = dc + dh * o * (ONE - u * u)
    dai = dc * g * i * (ONE - i)
    daf = dc * c_prev * f * (ONE - f)
    dag = dc * i * (ONE - g * g)
    dao = dh * u * o * (ONE - o)
    return dai, daf, dag, dao, dc * f


def forward_state(ai: Any, af: Any, ag: Any, c_prev: Any) -> tuple[Any, Any, Any, Any]:
    """First phase with layer norm -> c, i, f, g"""
    i = sigmoid(ai)
    f = sigmoid(af)
    g = tanh(ag)
    return f * c_prev + i * g, i, f, g


def forward_output(ao: Any, m: Any) -> tuple[Any, Any, Any]:
    """Second phase, from the normalised state -> h, o, tanh(m)"""
    o = sigmoid(ao)
    u = tanh(m)
    return o * u, o, u


def backward_output(dh: Any, o: Any, u: Any) -> tuple[Any, Any]:
    """Second phase back -> dao, dm"""
    return dh * u * o * (ONE - o), dh * o * (ONE - u * u)


def backward_state(dc: Any, i: Any, f: Any, g: Any, c_prev: Any) -> tuple[Any, Any, Any, Any]:
    """First phase back, from the whole gradient of c -> dai, daf, dag, dc_prev"""
    return dc * g * i * (ONE - i), dc * c_prev * f * (ONE - f), dc * i * (ONE - g * g), dc * f


@dataclass(frozen=True)
class LSTM:
    """LSTM cell with input, forget and output gate; ``layer_norm``: see ``layer_norm.py``."""

    layer_norm: bool = False

    name: ClassVar[str] = "lstm"
    gates: ClassVar[int] = 4
    norms: ClassVar[tuple[tuple[int, int], ...]] = ((0, 4),)
    states: ClassVar[tuple[str, ...]] = ("h", "c")

    @property
    def saves(self) -> tuple[str, ...]:
        """What a step saves for backward beside its states."""
        return ("i", "f", "g", "o", "tanh(m)") if self.layer_norm else ("i", "f", "g", "o")

    @property
    def definition(self) -> Definition:
        """The cell as one function."""
        return builtin.lstm.with_options(layer_norm=self.layer_norm)
