"""Layers that have parameters, and dropout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Never

import numpy as np
import numpy.typing as npt

from fusedrnn import cells
from fusedrnn import functions as F
from fusedrnn.autograd import Array, Parameter, Variable, as_variable
from fusedrnn.backends.arguments import check_bool, check_bools, check_number, check_rate, check_whole
from fusedrnn.layer import Layer, checked_dtype, drawn
from fusedrnn.recurrent import Recurrent

__all__ = ["GRU", "LSTM", "RNN", "Dropout", "Layer", "Linear", "Recurrent"]


class RNN(Recurrent):
    """Elman network (Elman 1990): ``h = tanh(x W + h U + b)``.

    Args:
        hidden_size, in_size: As in ``Recurrent``.
        relu: Use relu instead of tanh.
        layer_norm: Normalize the input part and the recurrent part (Ba, Kiros and Hinton 2016), with the
            gains ``gain_ih`` and ``gain_hh`` (H,).
        options: As in ``Recurrent``.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Without ``in_size``, the hidden matrix is drawn when it first multiplies a state, at the second step.
    """

    dezero_names = ("h",)
    draws_hidden_late = True

    def __init__(
        self,
        hidden_size: int,
        in_size: int | None = None,
        *,
        relu: bool = False,
        layer_norm: bool = False,
        **options: Any,
    ) -> None:
        cell = cells.rnn.with_options(**check_bools(relu=relu, layer_norm=layer_norm))
        super().__init__(cell, hidden_size, in_size, **options)


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate by Gers et al. 2000).

    ``i, f, o = sigmoid(x W + h U + b)`` and ``g = tanh(x W + h U + b)``, each with its own W, U and b; ``c =
    f*c + i*g``, ``h = o*tanh(c)``. The gates are stored in the order i f g o and drawn in the order f i o g.

    Args:
        hidden_size, in_size: As in ``Recurrent``.
        forget_bias: The initial bias of the forget gate. 1 keeps more of c at the start of training
            (Jozefowicz et al. 2015).
        layer_norm: Normalize the input part and the recurrent part of the gates, and the c from which h is
            computed (Ba, Kiros and Hinton 2016). This adds ``gain_ih`` and ``gain_hh`` (4*H,), ``gain_c`` and
            ``bias_c`` (H,).
        proj_size: P: ``h = weight_hr (o*tanh(c))`` has P units, from 1 to H (Sak et al. 2014). 0: no
            projection.
        options: As in ``Recurrent``.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """

    draws = (1, 0, 3, 2)
    dezero_names = ("i", "f", "u", "o")

    def __init__(
        self,
        hidden_size: int,
        in_size: int | None = None,
        *,
        forget_bias: float = 0.0,
        layer_norm: bool = False,
        proj_size: int = 0,
        **options: Any,
    ) -> None:
        cell = cells.lstm.with_options(
            layer_norm=check_bool("layer_norm", layer_norm), project=proj_size != 0
        )
        forget_bias = check_number("forget_bias", forget_bias)
        if not math.isfinite(forget_bias):
            raise ValueError(f"forget_bias: expected a finite number, got {forget_bias}")
        super().__init__(cell, hidden_size, in_size, proj_size=proj_size, **options)
        for suffix in self.suffixes:
            bias = vars(self)["bias_ih" + suffix]
            if bias is not None:
                bias._data[hidden_size : 2 * hidden_size] = forget_bias
            elif forget_bias:
                raise ValueError(f"forget_bias: expected 0 in a layer with bias=False, got {forget_bias}")


class GRU(Recurrent):
    """Gated recurrent unit (Cho et al. 2014).

    ``r, z = sigmoid(x W + h U + b)``, each with its own W, U and b; ``h = (1 - z) * n + z * h``. The gates
    are stored and drawn in the order r z n.

    Args:
        hidden_size, in_size: As in ``Recurrent``.
        reset_after: True: ``n = tanh(x W + b + r * (h U + b'))``, as in PyTorch and cuDNN. False: ``n =
            tanh(x W + (r * h) U + b)``, as in Cho et al. 2014.
        layer_norm: Normalize the input part and the recurrent part, r and z together and n by itself (Ba,
            Kiros and Hinton 2016). This adds ``gain_ih`` and ``gain_hh`` (3*H,).
        options: As in ``Recurrent``.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        in_size: int | None = None,
        *,
        reset_after: bool = True,
        layer_norm: bool = False,
        **options: Any,
    ) -> None:
        cell = cells.gru.with_options(**check_bools(reset_after=reset_after, layer_norm=layer_norm))
        super().__init__(cell, hidden_size, in_size, **options)


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
        return super().weight_shapes() | {"W": (self.in_size, self.out_size)}

    def dtype_of(self, name: str, array: Array) -> np.dtype[Any]:
        return self.dtype

    def take_sizes(self, arrays: Mapping[str, Array]) -> None:
        self.in_size = arrays["W"].shape[0]


class Dropout(Layer):
    """In training, set elements to zero with probability ``dropout_ratio``; see ``functions.dropout``.

    Raises:
        TypeError, ValueError: ``dropout_ratio`` is not a number of at least 0 and below 1.
    """

    def __init__(self, dropout_ratio: float = 0.5, **unknown: Never) -> None:
        super().__init__(**unknown)
        self.dropout_ratio = check_rate("dropout_ratio", dropout_ratio, below_one=True)

    def forward(self, x: Any) -> Variable:
        """x of any shape, with dropout while training."""
        return F.dropout(x, self.dropout_ratio)
