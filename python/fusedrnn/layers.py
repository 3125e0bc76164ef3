"""Layers that have parameters, and dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Never

import numpy as np
import numpy.typing as npt

from fusedrnn import functions as F
from fusedrnn.autograd import Array, Parameter, Variable, as_variable
from fusedrnn.backends.arguments import check_bool, check_whole
from fusedrnn.layer import Layer, checked_dtype, drawn
from fusedrnn.recurrent import GRU, LSTM, RNN, Recurrent

__all__ = ["GRU", "LSTM", "RNN", "Dropout", "Layer", "Linear", "Recurrent"]


class Linear(Layer):
    """``x W + b`` on the last axis: W ``(I, O)``, b ``(O,)``.

    The initial W is ``randn(I, O) * sqrt(1 / I)``, drawn from NumPy's global generator. The initial b is 0.

    Args:
        out_size: The size of the output, O.
        nobias: True: no b.
        dtype: float32 or float64. Inputs are cast to it.
        in_size: The size of the input, I. None: it is taken from the first call, which then draws W.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """

    def __init__(
        self,
        out_size: int,
        nobias: bool = False,
        dtype: npt.DTypeLike = np.float32,
        in_size: int | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__(**unknown)
        hint = "; pass the number of inputs as in_size=, or leave it to the first call"
        nobias = check_bool("nobias", nobias, hint)
        self.out_size = check_whole("out_size", out_size)
        self.in_size = None if in_size is None else check_whole("in_size", in_size)
        self.dtype = checked_dtype(dtype)
        self.W = Parameter(None, name="W")
        self.b = None if nobias else Parameter(None, name="b")
        if self.b is not None:
            self.b.assign(np.zeros(out_size, self.dtype))
        if self.in_size is not None:
            self.W.assign(drawn(self.in_size, out_size, self.dtype))

    def forward(self, x: Any) -> Variable:
        """x ``(..., I)`` to ``(..., O)``, in the layer's dtype.

        Raises:
            ValueError: The last axis of x does not match W.
        """
        x = as_variable(x)
        if self.W._data is None:
            self.in_size = check_whole("the last axis of x", x.shape[-1] if x.ndim else 0)
            self.W.assign(self.to_device(drawn(self.in_size, self.out_size, self.dtype)))
        return F.linear(x, self.W, self.b)

    def weight_shapes(self) -> dict[str, tuple[int | None, ...] | None]:
        shapes: dict[str, tuple[int | None, ...] | None] = {"W": (self.in_size, self.out_size)}
        return shapes if self.b is None else shapes | {"b": (self.out_size,)}

    def dtype_of(self, name: str, array: Array) -> np.dtype[Any]:
        return self.dtype

    def take_sizes(self, arrays: Mapping[str, Array]) -> None:
        self.in_size = arrays["W"].shape[0]


class Dropout(Layer):
    """In training, set elements to zero with probability ``dropout_ratio``; see ``functions.dropout``."""

    def __init__(self, dropout_ratio: float = 0.5, **unknown: Never) -> None:
        super().__init__(**unknown)
        self.dropout_ratio = dropout_ratio

    def forward(self, x: Any) -> Variable:
        """x of any shape, with dropout while training."""
        return F.dropout(x, self.dropout_ratio)
