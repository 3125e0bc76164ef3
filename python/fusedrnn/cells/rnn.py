"""The Elman cell, forward and backward side by side.

    h = tanh(a) or relu(a),  a = weight_ih x + bias_ih + weight_hh h_prev + bias_hh

One gate; saves nothing but h of every step.

Source: Elman, "Finding structure in time", 1990; layout and relu as in ``torch.nn.RNN``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fusedrnn.cells import builtin
from fusedrnn.cells.activations import ONE, relu, relu_backward, tanh
from fusedrnn.cells.definition import Definition


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

    @property
    def definition(self) -> Definition:
        """The cell as one function."""
        return builtin.rnn.with_options(relu=self.relu, layer_norm=self.layer_norm)
