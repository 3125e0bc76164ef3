"""``forget_bias`` of the LSTMs: the initial bias of the forget gate."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch


class ForgetBias:
    """The argument ``forget_bias`` of ``LSTM`` and ``LSTMCell``.

    Args:
        forget_bias: The initial sum of the two biases of the forget gate, also after ``reset_parameters``. 1
            keeps more of c at the start of training (Jozefowicz et al. 2015). None: both biases as PyTorch
            draws them. All other initial values are the same in both cases.

    Raises:
        TypeError, ValueError: forget_bias is not a finite number, or there are no biases.
    """

    forget_bias: float | None = None
    bias: bool
    hidden_size: int

    def __init__(self, *args: Any, forget_bias: float | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        if forget_bias is None:
            return
        if isinstance(forget_bias, bool) or not isinstance(forget_bias, numbers.Real):
            raise TypeError(f"forget_bias: expected a number or None, got {type(forget_bias).__name__}")
        if not math.isfinite(forget_bias):
            raise ValueError(f"forget_bias: expected a finite number, got {forget_bias}")
        if not self.bias:
            raise ValueError(f"forget_bias: expected None in a layer with bias=False, got {forget_bias}")
        self.forget_bias = float(forget_bias)
        self._set_forget_bias()

    def reset_parameters(self) -> None:
        """Draw the parameters again."""
        super().reset_parameters()  # type: ignore[misc]
        if self.forget_bias is not None:
            self._set_forget_bias()

    @torch.no_grad()
    def _set_forget_bias(self) -> None:
        H = self.hidden_size
        for name, p in self.named_parameters():  # type: ignore[attr-defined]
            if name.startswith("bias"):  # gates i f g o
                p[H : 2 * H] = self.forget_bias if name.startswith("bias_ih") else 0

    def extra_repr(self) -> str:
        """PyTorch's text, and ``forget_bias`` if it is set."""
        text: str = super().extra_repr()  # type: ignore[misc]
        return text if self.forget_bias is None else f"{text}, forget_bias={self.forget_bias:g}"
