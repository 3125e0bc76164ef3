"""``LSTM``, ``GRU`` and ``RNN`` for models under ``torch.compile``, which traces them without a graph break.

They have the parameters, initial values and state_dict of the layers of ``fusedrnn.torch``. But they are not
subclasses of ``torch.nn.LSTM``, ``GRU`` and ``RNN``, which the compiler does not trace unless
``torch._dynamo.config.allow_rnn`` is set.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedrnn.torch import dynamo
from fusedrnn.torch.forget_bias import ForgetBias
from fusedrnn.torch.layers import NamedLayer

__all__ = ["GRU", "LSTM", "RNN"]


class _Compilable(NamedLayer):
    """A forward that the compiler does not leave alone."""

    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        """Like ``forward`` of ``fusedrnn.torch.LSTM``, ``GRU`` and ``RNN``."""
        if torch.compiler.is_compiling():
            return dynamo.call(self, input, hx, **(dynamo.NONE | options))
        return super().forward(input, hx, **options)


class _TorchBase(torch.nn.RNNBase):
    """``RNNBase`` and what PyTorch's layer adds: its forward and the checks that this calls."""

    torch_class: type[torch.nn.RNNBase]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """PyTorch's own implementation."""
        return self.torch_class.forward(self, input, hx)


class LSTM(ForgetBias, _Compilable, _TorchBase):
    """``fusedrnn.torch.LSTM`` for compiled models. It is not an instance of ``torch.nn.LSTM``."""

    torch_class = torch.nn.LSTM
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__("LSTM", *args, **options)


class GRU(_Compilable, _TorchBase):
    """``fusedrnn.torch.GRU`` for compiled models. It is not an instance of ``torch.nn.GRU``.

    Raises:
        ValueError: There is ``proj_size``, which only an LSTM has.
    """

    torch_class = torch.nn.GRU

    def __init__(self, *args: Any, **options: Any) -> None:
        if "proj_size" in options:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **options)


class RNN(_Compilable, _TorchBase):
    """``fusedrnn.torch.RNN`` for compiled models. It is not an instance of ``torch.nn.RNN``.

    Raises:
        ValueError: There is ``proj_size``, which only an LSTM has, or ``nonlinearity`` is not tanh or relu.
    """

    torch_class = torch.nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        **options: Any,
    ) -> None:
        if "proj_size" in options:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, *args, **options)
