"""The LSTM cell, forward and backward side by side.

    i = sigmoid(ai)  f = sigmoid(af)  g = tanh(ag)  o = sigmoid(ao)
    c = f * c_prev + i * g
    h = o * tanh(c)

where each ``a`` is ``weight_ih x + bias_ih + weight_hh h_prev + bias_hh`` of its gate. Saves i f g o, and
c of every step.

Source: Hochreiter and Schmidhuber 1997, forget gate by Gers et al. 2000; layout as in ``torch.nn.LSTM``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fusedrnn.cells.activations import ONE, sigmoid, tanh


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


@dataclass(frozen=True)
class LSTM:
    """LSTM cell with input, forget and output gate."""

    name: ClassVar[str] = "lstm"
    gates: ClassVar[int] = 4
    states: ClassVar[tuple[str, ...]] = ("h", "c")

    @property
    def saves(self) -> tuple[str, ...]:
        """What a step saves for backward beside its states."""
        return ("i", "f", "g", "o")

    def step(
        self, ax: Sequence[Any], state: tuple[Any, ...], hidden: Callable[[Any, int, int], list[Any]]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """One step on whole gates; see ``fusedrnn.cells``."""
        h_prev, c_prev = state
        ai, af, ag, ao = (p + q for p, q in zip(ax, hidden(h_prev, 0, 4), strict=True))
        h, c, *saved = forward(ai, af, ag, ao, c_prev)
        return (h, c), tuple(saved)

    def step_backward(
        self,
        dstate: tuple[Any, ...],
        saved: tuple[Any, ...],
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        product: Callable[[Sequence[Any], int, int], Any],
    ) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """One step back on whole gates; see ``fusedrnn.cells``."""
        dh, dc = dstate
        i, f, g, o = saved
        *gates, dc_prev = backward(dh, dc, i, f, g, o, before[1], after[1])
        da = tuple(gates)
        return (product(da, 0, 4), dc_prev), da, da

    def operands(self, saved: tuple[Any, ...], h_prev: Any) -> list[tuple[int, int, Any]]:
        """What each run of gates multiplied with weight_hh; see ``fusedrnn.cells``."""
        return [(0, 4, h_prev)]
