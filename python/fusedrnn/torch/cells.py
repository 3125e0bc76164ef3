"""``LSTMCell``, ``GRUCell`` and ``RNNCell`` in the place of ``torch.nn``'s: one step of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import cells
from fusedrnn.torch import compiled, paths
from fusedrnn.torch.recurrence import Call, Packed, PackedWeights, recurrence

TANH, RELU = cells.RNN(), cells.RNN(relu=True)


class CellMixin(torch.nn.RNNCellBase):
    """What the three have in common. ``last_path`` and ``refresh()`` are as in ``layers.Recurrent``."""

    last_path: str | None = None
    cell: cells.Cell
    _bfloat16_in_autocast = False  # what PyTorch's own returns for float32

    def refresh(self) -> None:
        """Forget packed weights: needed after a write to a few elements through a parameter's ``.data``."""
        self.__dict__.pop("_fusedrnn_packed", None)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step: input (B, I) or (I,); hx as PyTorch's, (B, H) or (H,) each; None is zeros."""
        if torch.compiler.is_compiling():
            return compiled.cell(self, input, hx)
        state0 = None if hx is None else paths.state(hx, self._pair)
        weights = self._weights()
        packed = self._ready(input, state0, weights)
        if isinstance(packed, str):
            output = super().forward(input, hx)  # its twin's; raises where something is wrong
            self.__dict__["last_path"] = f"fallback: {packed}"
            if not paths.forced():
                paths.tell(type(self).__name__, packed)
            return output
        self.__dict__["last_path"] = paths.FUSED
        if input.dim() == 2:
            after = recurrence(Call(packed, step=True), input, state0, weights)
        else:
            state0 = None if state0 is None else tuple([s.unsqueeze(0) for s in state0])
            after = recurrence(Call(packed, step=True), input.unsqueeze(0), state0, weights)
            after = tuple([s.squeeze(0) for s in after])
        return after if self._pair else after[0]

    @property
    def _pair(self) -> bool:
        return len(self.cell.states) == 2

    def _weights(self) -> list[Tensor | None]:
        """As they are now; see ``layers.Recurrent._weights``."""
        own = self._parameters
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [own[name] if name in own else getattr(self, name) for name in names]

    def _ready(self, input: Any, state: Any, weights: list[Tensor | None]) -> Packed | str:
        """The packed weights, or why the kernels cannot take this call; what is wrong raises in PyTorch's."""
        reason = paths.mode()
        if reason is not None:
            return reason
        if not isinstance(input, Tensor):
            return f"the input is a {type(input).__name__}"
        dtype = input.dtype
        reason = paths.unsupported(dtype, (input, *(state or ())))
        if reason is not None:
            return reason
        if self._bfloat16_in_autocast and paths.autocast(dtype):
            return "autocast is on"
        reason = self._misshapen(input, state)
        if reason is not None:
            return reason
        packed = self.__dict__.get("_fusedrnn_packed")
        if packed is None:
            packed = self.__dict__["_fusedrnn_packed"] = PackedWeights()
        return packed.of(self.cell, dtype, weights, self.input_size, self.hidden_size)

    def _misshapen(self, input: Tensor, state: tuple[Any, ...] | None) -> str | None:
        """What PyTorch would complain of, or leave to itself."""
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


class LSTMCell(CellMixin, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` on our kernels."""

    cell = cells.LSTM()


class GRUCell(CellMixin, torch.nn.GRUCell):
    """``torch.nn.GRUCell`` on our kernels."""

    cell = cells.GRU()


class RNNCell(CellMixin, torch.nn.RNNCell):
    """``torch.nn.RNNCell`` on our kernels."""

    _bfloat16_in_autocast = True

    @property
    def cell(self) -> cells.Cell:  # type: ignore[override]
        """By the nonlinearity."""
        return RELU if self.nonlinearity == "relu" else TANH
