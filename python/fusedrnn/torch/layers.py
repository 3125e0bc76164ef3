"""``LSTM``, ``GRU`` and ``RNN`` in the place of ``torch.nn``'s.

Each is a subclass of its twin: parameters, initial values, state_dict, repr and errors are PyTorch's.
Formulas and their sources are in ``fusedrnn.cells``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import backends, cells
from fusedrnn.backends.protocol import Array
from fusedrnn.torch import compiled, paths
from fusedrnn.torch.recurrence import Call, PackedWeights, recurrence


class Recurrent(torch.nn.RNNBase):
    """What the three have in common.

    Args:
        recompute: Keep few states for backward and run forward again there, to save memory (by keyword).

    ``last_path`` is "fused" after a call that ran our kernels, else "fallback: " and why PyTorch's ran.
    """

    last_path: str | None = None
    recompute = False

    def __init__(self, *args: Any, recompute: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recompute = bool(recompute)

    @property
    def cell(self) -> cells.Cell:
        return _CELLS[self.mode]

    def flatten_parameters(self) -> None:
        """Nothing: it serves cuDNN alone, and its flat memory is what safetensors refuses."""

    def refresh(self) -> None:
        """Forget packed weights: needed after a write through a parameter's ``.data`` alone."""
        self.__dict__.pop("_fusedrnn_packed", None)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Any = None,
        reset: Any = None,
        return_states: bool = False,
    ) -> Any:
        """As PyTorch's, with more by keyword.

        Args:
            input: (T, B, I), with ``batch_first`` (B, T, I), unbatched (T, I), or a PackedSequence.
            hx: h_0, for the LSTM (h_0, c_0), each (L*D, B, H), unbatched (L*D, H); None is zeros.
            lengths: (B,) whole numbers from 0 to T, for padded input: from its length on a row's state stands
                still and its output is 0. Not with a PackedSequence, which says so itself.
            reset: Of the input's shape without features, booleans or 0 and 1: true where a step is the first
                of a new segment, before which the state is cleared. Not with a PackedSequence.
            return_states: Also return the states of every step, 0 at padding: h, for the LSTM (h, c), each
                (L*D, T, B, H), with ``batch_first`` (L*D, B, T, H), unbatched (L*D, T, H). Not with a
                PackedSequence.

        Returns:
            output, h_n (for the LSTM (h_n, c_n)), and with ``return_states`` the states.

        Raises:
            What ``torch.nn`` raises; TypeError, ValueError: lengths, reset or return_states is wrong; the
            message names it.
            RuntimeError: lengths, reset or return_states where PyTorch's own implementation has to run.
        """
        if torch.compiler.is_compiling():
            return compiled.layer(self, input, hx, lengths, reset, return_states)
        weights = self._weights()
        reason = self._why_not(input, hx, weights)
        if reason is not None:
            if lengths is not None or reset is not None or return_states:
                what = "lengths" if lengths is not None else "reset" if reset is not None else "return_states"
                raise RuntimeError(f"{what}: only our kernels have it, and they cannot run: {reason}")
            output = super().forward(input, hx)  # its twin's; raises where input is wrong
            self.__dict__["last_path"] = f"fallback: {reason}"
            if not paths.forced():
                paths.tell(type(self).__name__, reason)
            return output
        self.__dict__["last_path"] = paths.FUSED
        if isinstance(input, PackedSequence):
            if lengths is not None or reset is not None or return_states:
                what = "lengths" if lengths is not None else "reset" if reset is not None else "return_states"
                raise ValueError(
                    f"{what}: expected none with a PackedSequence; pass padded input and lengths="
                )
            return self._packed_sequence(input, hx, weights)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        state0 = None if hx is None else hx if isinstance(hx, tuple) else (hx,)
        if state0 is not None and not batched:
            state0 = tuple(s.unsqueeze(1) for s in state0)
        T, B, _ = x.shape
        lengths = _lengths(lengths, T, B, batched)
        reset = _reset(reset, T, B, batched, self.batch_first)
        y, final, states = self._stack(x, state0, weights, lengths, reset, bool(return_states))
        if lengths is not None and return_states:  # the kernels hold them there, and take no gradient of that
            padding = torch.arange(T)[:, None] >= torch.from_numpy(lengths)
            states = tuple(s.masked_fill(padding[:, :, None], 0) for s in states)
        if not batched:
            y, final = y.squeeze(1), tuple(s.squeeze(1) for s in final)
            states = tuple(s.squeeze(2) for s in states)
        elif self.batch_first:
            y, states = y.transpose(0, 1), tuple(s.transpose(1, 2) for s in states)
        lstm = len(final) == 2
        if return_states:
            return y, final if lstm else final[0], states if lstm else states[0]
        return y, final if lstm else final[0]

    def _weights(self) -> list[Tensor | None]:
        """Four for each layer and direction, None where there is none, as they are now: a parametrization, a
        functional call or a tied weight may have put others in place of the parameters."""
        own = self._parameters
        found: list[Tensor | None] = []
        for names in self._all_weights:
            for name in names:
                w = own.get(name)
                found.append(getattr(self, name, None) if w is None else w)
            found += [None] * (4 - len(names))
        return found

    def _why_not(self, input: Any, hx: Any, weights: list[Tensor | None]) -> str | None:
        """Why our kernels cannot take this call, or None. What is wrong is left to PyTorch's own errors."""
        if paths.forced():
            return "fusedrnn.torch.fallback()"
        if self.proj_size:
            return "proj_size"
        data = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(data, Tensor):
            return f"the input is a {type(input).__name__}"
        state = () if hx is None else tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        if not all(isinstance(s, Tensor) for s in state):
            return "the state is not made of tensors"
        reason = paths.unsupported((data, *state, *weights))
        if reason is not None:
            return reason
        if any(t is not None and t.dtype is not data.dtype for t in (*state, *weights)):
            return "dtypes differ"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        return self._misshapen(input, state)

    def _misshapen(self, input: Any, state: tuple[Tensor, ...]) -> str | None:
        """What PyTorch would complain of, or leave to itself."""
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        if data.dim() != 2 and (packed or data.dim() != 3):
            return f"the input has {data.dim()} dimensions"
        if data.size(-1) != self.input_size:
            return f"the input's last size is {data.size(-1)}"
        if packed:
            B = int(input.batch_sizes[0])
        elif data.dim() == 2:
            B = None
        else:
            B = data.size(0 if self.batch_first else 1)
        if data.numel() == 0:
            return "the input is empty"
        if state:
            rows = len(self._all_weights)
            size = (rows, self.hidden_size) if B is None else (rows, B, self.hidden_size)
            if len(state) != len(self.cell.states) or any(s.shape != size for s in state):
                return f"the state is not of shape {size}"
        return None

    def _packed_sequence(self, input: PackedSequence, hx: Any, weights: list[Tensor | None]) -> Any:
        """Rows of different lengths, longest first: padded for the kernel, whose results are packed again."""
        sizes = input.batch_sizes
        B, T = int(sizes[0]), len(sizes)
        valid = torch.arange(B) < sizes[:, None]  # (T, B)
        state0 = None if hx is None else hx if isinstance(hx, tuple) else (hx,)
        if state0 is not None and input.sorted_indices is not None:
            state0 = tuple(s.index_select(1, input.sorted_indices) for s in state0)
        x = input.data.new_zeros(T, B, input.data.size(-1)).masked_scatter(valid[:, :, None], input.data)
        y, final, _ = self._stack(x, state0, weights, valid.sum(0).numpy(), None, False)
        if input.unsorted_indices is not None:
            final = tuple(s.index_select(1, input.unsorted_indices) for s in final)
        output = PackedSequence(y[valid], sizes, input.sorted_indices, input.unsorted_indices)
        return output, final if len(final) == 2 else final[0]

    def _stack(
        self,
        x: Tensor,
        state0: tuple[Tensor, ...] | None,
        weights: list[Tensor | None],
        lengths: Array | None,
        reset: Array | None,
        return_states: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Layers and directions: y (T, B, D*H); the final states (L*D, B, H); those of every step."""
        packs = self.__dict__.setdefault("_fusedrnn_packed", [PackedWeights() for _ in self._all_weights])
        D, n = 2 if self.bidirectional else 1, len(self.cell.states)
        backend = backends.usable(None)
        ends: list[tuple[Tensor, ...]] = []
        for k in range(0, len(packs), D):
            if k and self.dropout:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
            halves = []
            for j in range(k, k + D):
                call = Call(
                    backend, self.cell, packs[j], lengths, reset, j > k, return_states, self.recompute
                )
                begin = None if state0 is None else tuple(s[j] for s in state0)
                y, *rest = recurrence(call, x, begin, tuple(weights[4 * j : 4 * j + 4]))
                halves.append(y)
                ends.append(tuple(rest))
            x = halves[0] if D == 1 else torch.cat(halves, 2)
        gathered = (
            [s.unsqueeze(0) for s in ends[0]] if len(ends) == 1 else map(torch.stack, zip(*ends, strict=True))
        )
        all_states = tuple(gathered)
        return x, all_states[:n], all_states[n:]


def _lengths(value: Any, T: int, B: int, batched: bool) -> Array | None:
    if value is None:
        return None
    lengths = torch.as_tensor(value, device="cpu")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
        raise TypeError(f"lengths: expected whole numbers, got {lengths.dtype}")
    expected = (B,) if batched else ()
    if lengths.shape != expected:
        raise ValueError(f"lengths: expected shape {expected}, got {tuple(lengths.shape)}")
    lengths = lengths.reshape(B).to(torch.int64)
    if int(lengths.min()) < 0 or int(lengths.max()) > T:
        raise ValueError(f"lengths: expected 0 to T = {T}, got {int(lengths.min())} to {int(lengths.max())}")
    found: Array = lengths.numpy()
    return found


def _reset(value: Any, T: int, B: int, batched: bool, batch_first: bool) -> Array | None:
    if value is None:
        return None
    reset = torch.as_tensor(value, device="cpu").detach()
    expected = (T,) if not batched else (B, T) if batch_first else (T, B)
    if reset.shape != expected:
        raise ValueError(f"reset: expected shape {expected}, got {tuple(reset.shape)}")
    if reset.dtype is not torch.bool:
        if not bool(((reset == 0) | (reset == 1)).all()):
            raise ValueError("reset: expected booleans, or 0 and 1 alone, got other values")
        reset = reset != 0
    reset = reset.reshape(T, 1) if not batched else reset.transpose(0, 1) if batch_first else reset
    found: Array = reset.contiguous().numpy()
    return found


class LSTM(Recurrent, torch.nn.LSTM):
    """``torch.nn.LSTM`` on our kernels. See ``Recurrent`` for what is added."""


class GRU(Recurrent, torch.nn.GRU):
    """``torch.nn.GRU`` on our kernels. See ``Recurrent`` for what is added."""


class RNN(Recurrent, torch.nn.RNN):
    """``torch.nn.RNN`` on our kernels. See ``Recurrent`` for what is added."""


_CELLS: dict[str, cells.Cell] = {
    "LSTM": cells.LSTM(),
    "GRU": cells.GRU(),
    "RNN_TANH": cells.RNN(),
    "RNN_RELU": cells.RNN(relu=True),
}
