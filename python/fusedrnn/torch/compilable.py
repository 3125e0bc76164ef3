"""``LSTM``, ``GRU`` and ``RNN`` for models under ``torch.compile``, which traces them without a graph break.

The layers of ``fusedrnn.torch``, eager or compiled, with the same parameters, initial values and state_dict,
but no subclasses of ``torch.nn.LSTM``, ``GRU`` and ``RNN``: the compiler refuses to trace those unless
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
        """As ``fusedrnn.torch.LSTM``'s, ``GRU``'s and ``RNN``'s."""
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
    """``fusedrnn.torch.LSTM`` for compiled models: no ``isinstance`` of ``torch.nn.LSTM``, else the same."""

    torch_class = torch.nn.LSTM
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__("LSTM", *args, **options)


class GRU(_Compilable, _TorchBase):
    """``fusedrnn.torch.GRU`` for compiled models: no ``isinstance`` of ``torch.nn.GRU``, else the same."""

    torch_class = torch.nn.GRU

    def __init__(self, *args: Any, **options: Any) -> None:
        if "proj_size" in options:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **options)


class RNN(_Compilable, _TorchBase):
    """``fusedrnn.torch.RNN`` for compiled models: no ``isinstance`` of ``torch.nn.RNN``, else the same."""

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
