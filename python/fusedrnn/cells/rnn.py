"""The Elman cell, forward and backward side by side.

    h = tanh(a) or relu(a),  a = weight_ih x + bias_ih + weight_hh h_prev + bias_hh

One gate; saves nothing but h of every step.

Source: Elman, "Finding structure in time", 1990; layout and relu as in ``torch.nn.RNN``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fusedrnn.cells.activations import ONE, relu, relu_backward, tanh


def forward_tanh(a: Any) -> Any:
    """The new h from the sum ``a`` of input part and recurrent part."""
    return tanh(a)


def backward_tanh(dh: Any, h: Any) -> Any:
    """da from the gradient of the new h, and that h."""
    return dh * (ONE - h * h)


def forward_relu(a: Any) -> Any:
    """The new h from the sum ``a`` of input part and recurrent part."""
    return relu(a)


def backward_relu(dh: Any, h: Any) -> Any:
    """da from the gradient of the new h, and that h."""
    return relu_backward(dh, h)


@dataclass(frozen=True)
class RNN:
    """Elman cell: ``h = tanh(a)``, or ``relu(a)`` with ``relu=True``.

    ``layer_norm``: see ``layer_norm.py``.
    """

    relu: bool = False
    layer_norm: bool = False

    name: ClassVar[str] = "rnn"
    gates: ClassVar[int] = 1
    norms: ClassVar[tuple[tuple[int, int], ...]] = ((0, 1),)
    states: ClassVar[tuple[str, ...]] = ("h",)

    @property
    def saves(self) -> tuple[str, ...]:
        """What a step saves for backward beside its states."""
        return ()

    def step(
        self,
        ax: Sequence[Any],
        state: tuple[Any, ...],
        hidden: Callable[[Any, int, int], list[Any]],
        norm: Callable[[Any], Any],
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """One step on whole gates; see ``fusedrnn.cells``."""
        (ah,) = hidden(state[0], 0, 1)
        forward = forward_relu if self.relu else forward_tanh
        return (forward(ax[0] + ah),), ()

    def step_backward(
        self,
        dstate: tuple[Any, ...],
        saved: tuple[Any, ...],
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        product: Callable[[Sequence[Any], int, int], Any],
        norm: Callable[[Any], Any],
    ) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """One step back on whole gates; see ``fusedrnn.cells``."""
        backward = backward_relu if self.relu else backward_tanh
        da = (backward(dstate[0], after[0]),)
        return (product(da, 0, 1),), da, da

    def operands(self, saved: tuple[Any, ...], h_prev: Any) -> list[tuple[int, int, Any]]:
        """What each run of gates multiplied with weight_hh; see ``fusedrnn.cells``."""
        return [(0, 1, h_prev)]
