"""``LSTMCell``, ``GRUCell`` and ``RNNCell`` in the place of ``torch.nn``'s: one step of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import backends, cells
from fusedrnn.torch import compiled, paths
from fusedrnn.torch.recurrence import Call, PackedWeights, recurrence


class CellMixin(torch.nn.RNNCellBase):
    """What the three have in common. ``last_path`` and ``refresh()`` are as in ``layers.Recurrent``."""

    last_path: str | None = None
    cell: cells.Cell

    def refresh(self) -> None:
        """Forget packed weights: needed after a write through a parameter's ``.data`` alone."""
        self.__dict__.pop("_fusedrnn_packed", None)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step: input (B, I) or (I,); hx as PyTorch's, (B, H) or (H,) each; None is zeros."""
        if torch.compiler.is_compiling():
            return compiled.cell(self, input, hx)
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        reason = self._why_not(input, hx, weights)
        if reason is not None:
            output = super().forward(input, hx)  # its twin's; raises where something is wrong
            self.__dict__["last_path"] = f"fallback: {reason}"
            if not paths.forced():
                paths.tell(type(self).__name__, reason)
            return output
        self.__dict__["last_path"] = paths.FUSED
        packed = self.__dict__.get("_fusedrnn_packed")
        if packed is None:
            packed = self.__dict__["_fusedrnn_packed"] = PackedWeights()
        state0 = None if hx is None else hx if isinstance(hx, tuple) else tuple(hx) if self._pair else (hx,)
        if input.dim() == 1:
            x = input[None, None]
            state0 = None if state0 is None else tuple(s[None] for s in state0)
        else:
            x = input[None]
        _, *after = recurrence(Call(backends.usable(None), self.cell, packed), x, state0, weights)
        if input.dim() == 1:
            after = [s[0] for s in after]
        return tuple(after) if self._pair else after[0]

    @property
    def _pair(self) -> bool:
        return len(self.cell.states) == 2

    def _why_not(self, input: Any, hx: Any, weights: tuple[Tensor | None, ...]) -> str | None:
        """Why our kernels cannot take this call, or None. What is wrong is left to PyTorch's own errors."""
        if paths.forced():
            return "fusedrnn.torch.fallback()"
        if not isinstance(input, Tensor):
            return f"the input is a {type(input).__name__}"
        state = () if hx is None else tuple(hx) if self._pair else (hx,)
        if not all(isinstance(s, Tensor) for s in state):
            return "the state is not made of tensors"
        reason = paths.unsupported((input, *state, *weights))
        if reason is not None:
            return reason
        if any(t is not None and t.dtype is not input.dtype for t in (*state, *weights)):
            return "dtypes differ"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        return self._misshapen(input, state)

    def _misshapen(self, input: Tensor, state: tuple[Tensor, ...]) -> str | None:
        """What PyTorch would complain of, or leave to itself."""
        if input.dim() not in (1, 2) or input.size(-1) != self.input_size or input.numel() == 0:
            return f"the input is of shape {tuple(input.shape)}"
        size = (*input.shape[:-1], self.hidden_size)
        if self.hidden_size == 0 or (state and len(state) != len(self.cell.states)):
            return "there is no state"
        if any(s.shape != size for s in state):
            return f"the state is not of shape {size}"
        return None


class LSTMCell(CellMixin, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` on our kernels."""

    cell = cells.LSTM()


class GRUCell(CellMixin, torch.nn.GRUCell):
    """``torch.nn.GRUCell`` on our kernels."""

    cell = cells.GRU()


class RNNCell(CellMixin, torch.nn.RNNCell):
    """``torch.nn.RNNCell`` on our kernels."""

    @property
    def cell(self) -> cells.Cell:  # type: ignore[override]
        """By the nonlinearity."""
        return cells.RNN(relu=self.nonlinearity == "relu")
