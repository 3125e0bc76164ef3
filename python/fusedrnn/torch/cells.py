"""``LSTMCell``, ``GRUCell`` and ``RNNCell``, drop-in replacements for ``torch.nn``'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import cells
from fusedrnn.torch import dynamo, ops, paths
from fusedrnn.torch.forget_bias import ForgetBias
from fusedrnn.torch.frozen import Freezable, Frozen, frozen
from fusedrnn.torch.ops import CELLS, Call, Weights
from fusedrnn.torch.recurrence import recurrence, weights_of
from fusedrnn.torch.scripted import Scriptable

# From x (B, I) and the state before it to the state after it.
Run = Callable[[Tensor, Sequence[Tensor] | None], Sequence[Tensor]]


class CellMixin(Freezable, Scriptable, torch.nn.RNNCellBase):
    """What the three have in common. ``last_path`` is as in ``layers.NamedLayer``."""

    last_path: str | None = None
    mode: str  # the cell by PyTorch's name, as layers have it
    _bfloat16_in_autocast = False  # what PyTorch's own returns for float32

    @property
    def cell(self) -> cells.Cell:
        """The cell that a step computes."""
        return CELLS[self.mode]

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step: input (B, I) or (I,); hx as PyTorch's, (B, H) or (H,) each; None is zeros."""
        if torch.compiler.is_compiling():
            return dynamo.cell(self, input, hx)
        packed = frozen(self)
        state0 = None if hx is None else paths.state(hx, self.mode == "LSTM")
        weights = weights_of(self) if packed is None else packed.weights[0]
        given = input
        if isinstance(input, Tensor) and (dtype := paths.lowered(input)) is not None:
            input = paths.lower(input, dtype)
            state0 = paths.lower_state(state0, dtype)
            weights = tuple([paths.lower(w, dtype) for w in weights])
        reason = self._unsupported(input, state0, weights if packed is None else None)
        if reason is not None:
            if paths.is_proxy(given):
                return paths.call_module(self, given, hx)
            return paths.fall_back(self, reason, super().forward, given, hx)
        self.__dict__["last_path"] = paths.FUSED
        if packed is not None:
            packed.check(input, state0)
        return self._batched(input, state0, self._one(weights, packed))

    def _freezable_weights(self) -> list[Weights]:
        return [weights_of(self)]

    def _one(self, weights: Weights, packed: Frozen | None = None) -> Run:
        """A step of a batch by the kernels, in autograd."""
        defaults = Call._field_defaults.values()

        def run(x: Tensor, state0: Sequence[Tensor] | None) -> Sequence[Tensor]:
            h0, c0 = (None, None) if state0 is None else (*state0, None)[:2]
            call = Call._make((x, h0, c0, *weights, None, None, None, self.mode, *defaults))
            if packed is None:
                return recurrence(call)
            return ops.run(call, False, None, packed.packed[0])

        return run

    def _batched(self, input: Tensor, state0: tuple[Tensor, ...] | None, run: Run) -> Any:
        """What ``forward`` returns, of a step that knows batches alone."""
        if input.dim() == 2:
            after = run(input, state0)
        else:
            begin = None if state0 is None else tuple([s.unsqueeze(0) for s in state0])
            after = tuple([s.squeeze(0) for s in run(input.unsqueeze(0), begin)])
        return tuple(after) if self.mode == "LSTM" else after[0]

    def _unsupported(self, input: Any, state: Any, weights: Weights | None) -> str | None:
        """Why the kernels cannot take this call, or None; what is wrong raises in PyTorch's."""
        reason = paths.mode()
        if reason is not None:
            return reason
        if not isinstance(input, Tensor):
            return f"the input is a {type(input).__name__}"
        reason = paths.unsupported(input.dtype, input.device, (input, *(state or ())))
        if reason is not None:
            return reason
        if self._bfloat16_in_autocast and paths.autocast(input):
            return "autocast is on"
        reason = self._misshapen(input, state)
        if reason is not None:
            return reason
        if weights is None:
            return None
        H = self.hidden_size
        return paths.unsupported_weights(input, weights, self.cell, self.input_size, H, H)

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


class LSTMCell(ForgetBias, CellMixin, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` on our kernels. See ``ForgetBias`` for what is added."""

    mode, torch_class = "LSTM", torch.nn.LSTMCell

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

    mode, torch_class = "GRU", torch.nn.GRUCell


class RNNCell(CellMixin, torch.nn.RNNCell):
    """``torch.nn.RNNCell`` on our kernels."""

    torch_class = torch.nn.RNNCell
    _bfloat16_in_autocast = True

    @property
    def mode(self) -> str:  # type: ignore[override]
        """By the nonlinearity."""
        return "RNN_RELU" if self.nonlinearity == "relu" else "RNN_TANH"
