"""``LSTMCell``, ``GRUCell`` and ``RNNCell``, drop-in replacements for those of ``torch.nn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn.backends import cpu
from fusedrnn.cells.definition import PLAIN
from fusedrnn.torch import dynamo, paths
from fusedrnn.torch.base import StepBase, direct, run_direct, weights_of
from fusedrnn.torch.forget_bias import ForgetBias
from fusedrnn.torch.frozen import Frozen, frozen
from fusedrnn.torch.ops import Weights
from fusedrnn.torch.scripted import Scriptable


class CellMixin(StepBase, Scriptable, torch.nn.RNNCellBase):
    """The base class of the three cells. ``last_path`` is as in ``layers.NamedLayer``."""

    mode: str  # PyTorch's name of the cell, as in layers, and its key
    _bfloat16_in_autocast = False  # what PyTorch's cell returns there, whatever the dtype of the state

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step: input (B, I) or (I,); hx as in PyTorch, (B, H) or (H,) each; None is zeros."""
        if torch.compiler.is_compiling():
            return dynamo.call(self, input, hx)
        packed = frozen(self)
        state0 = None if hx is None else paths.state(hx, self.mode == "LSTM")
        weights = self._weights() if packed is None else packed.weights
        if (after := self._without_graph(input, state0, weights, packed)) is not None:
            return after
        given = input
        dtype: torch.dtype | None = None
        if torch._C._is_any_autocast_enabled():
            key = self._key if self._bfloat16_in_autocast else ""
            if packed is not None:
                packed = packed.lowered(self, key)
                weights = packed.weights
            input, state0, weights = paths.lowered(input, state0, weights, key)
            if not key:
                input, state0, dtype = paths.widened(input, state0, weights)
        reason = self._unsupported(input, state0, weights, packed)
        if reason is not None:
            if paths.is_proxy(given):
                return paths.call_module(self, given, hx)
            return paths.fall_back(self, reason, super().forward, given, hx)
        self.__dict__["last_path"] = paths.FUSED
        if packed is not None:
            packed.check(input, state0)
        return paths.rounded(self._run(input, state0, weights, packed), dtype)

    def _without_graph(
        self, x: Any, state0: tuple[Any, ...] | None, weights: list[Weights], packed: Frozen | None
    ) -> Any:
        """What ``forward`` returns for a batch without a graph, or None: ``forward`` decides."""
        if (
            not direct(x, state0, weights, packed)
            or x.dim() != 2
            or x.is_nested
            or (state0 is not None and len(state0) != len(self.cell.states))
        ):
            return None
        if packed is not None:
            packed.check(x, state0)
        try:
            after = run_direct(self, x, state0 or (), weights[0], packed and packed.packed[0])
        except cpu.REFUSED:
            return None
        self.__dict__["last_path"] = paths.FUSED
        return tuple(after) if len(after) > 1 else after[0]

    def _weights(self) -> list[Weights]:
        return [weights_of(self, PLAIN, len(PLAIN))]

    def _unsupported(
        self, input: Any, state: Any, weights: list[Weights], packed: Frozen | None
    ) -> str | None:
        """Why the kernels do not support this call, or None. Wrong arguments are left to PyTorch's errors."""
        reason = paths.mode()
        if reason is not None:
            return reason
        if not isinstance(input, Tensor):
            return f"the input is a {type(input).__name__}"
        key = self._key if packed is None or packed.dtype is input.dtype else ""  # packed ones are not cast
        names = "input", *paths.STATES
        reason = paths.unsupported(input.dtype, input.device, (input, *(state or ())), names, key)
        if reason is not None:
            return reason
        if self._bfloat16_in_autocast and paths.autocast(input):
            return "autocast is on"
        reason = self._misshapen(input, state)
        if reason is not None:
            return reason
        I, H = self.input_size, self.hidden_size
        for each in weights if packed is None else ():
            reason = paths.unsupported_weights(input, each, self.cell, I, H, H, key)
        return reason

    def _misshapen(self, input: Tensor, state: tuple[Any, ...] | None) -> str | None:
        """Which shape is wrong, so that PyTorch raises an error, or None."""
        shape = input.shape
        if len(shape) not in (1, 2) or shape[-1] != self.input_size or not self.input_size:
            return f"the input is of shape {tuple(shape)}"
        if not self.hidden_size:
            return "there are no units"
        if state is not None:
            size = (*shape[:-1], self.hidden_size)
            if len(state) != len(self.cell.states) or any(s is None or s.shape != size for s in state):
                return f"the state is not of shape {size}"
        return None


class LSTMCell(ForgetBias, CellMixin, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` on our kernels. ``ForgetBias`` describes an additional argument."""

    mode = _key = "LSTM"
    torch_class = torch.nn.LSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        forget_bias: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, forget_bias=forget_bias)


class GRUCell(CellMixin, torch.nn.GRUCell):
    """``torch.nn.GRUCell`` on our kernels."""

    mode = _key = "GRU"
    torch_class = torch.nn.GRUCell


class RNNCell(CellMixin, torch.nn.RNNCell):
    """``torch.nn.RNNCell`` on our kernels."""

    torch_class = torch.nn.RNNCell
    _bfloat16_in_autocast = True

    @property
    def mode(self) -> str:  # type: ignore[override]
        """The mode for the nonlinearity."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"RNN_{self.nonlinearity.upper()}"

    _key = mode
