"""``LSTM``, ``GRU`` and ``RNN`` in the place of ``torch.nn``'s.

Each is a subclass of its twin: parameters, initial values, state_dict, repr and errors are PyTorch's.
Formulas and their sources are in ``fusedrnn.cells``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import cells
from fusedrnn.backends.protocol import Array
from fusedrnn.torch import compiled, paths
from fusedrnn.torch.recurrence import Call, Packed, PackedWeights, recurrence


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
        """Forget packed weights: needed after a write to a few elements through a parameter's ``.data``."""
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
        state0 = None if hx is None else paths.state(hx, self.mode == "LSTM")
        packed = self._ready(input, state0, weights)
        what = "lengths" if lengths is not None else "reset" if reset is not None else "return_states"
        more = lengths is not None or reset is not None or return_states
        if isinstance(packed, str):
            if more:
                raise RuntimeError(f"{what}: only our kernels have it, and they cannot run: {packed}")
            output = super().forward(input, hx)  # its twin's; raises where input is wrong
            self.__dict__["last_path"] = f"fallback: {packed}"
            if not paths.forced():
                paths.tell(type(self).__name__, packed)
            return output
        self.__dict__["last_path"] = paths.FUSED
        if isinstance(input, PackedSequence):
            if more:
                raise ValueError(
                    f"{what}: expected none with a PackedSequence; pass padded input and lengths="
                )
            return self._packed_sequence(input, state0, packed, weights)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if state0 is not None and not batched:
            state0 = tuple(s.unsqueeze(1) for s in state0)
        T, B, _ = x.shape
        lengths = _lengths(lengths, T, B, batched)
        reset = _reset(reset, T, B, batched, self.batch_first)
        y, final, states = self._stack(x, state0, packed, weights, lengths, reset, bool(return_states))
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

    def _ready(
        self, input: Any, state: tuple[Any, ...] | None, weights: list[Tensor | None]
    ) -> list[Packed] | str:
        """The packed weights of each layer and direction, or why the kernels cannot take this call.

        What is wrong is left to PyTorch's own errors.
        """
        reason = paths.mode()
        if reason is not None:
            return reason
        if self.proj_size:
            return "proj_size"
        data = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(data, Tensor):
            return f"the input is a {type(input).__name__}"
        dtype = data.dtype
        reason = paths.unsupported(dtype, (data, *(state or ())))
        if reason is not None:
            return reason
        if self.mode != "GRU" and paths.autocast(dtype):  # PyTorch's GRU returns float32 all the same
            return "autocast is on"
        reason = self._misshapen(input, state)
        if reason is not None:
            return reason
        packs = self.__dict__.get("_fusedrnn_packed")
        if packs is None:
            packs = self.__dict__["_fusedrnn_packed"] = [PackedWeights() for _ in self._all_weights]
        found: list[Packed] = []
        D, H = 2 if self.bidirectional else 1, self.hidden_size
        for j, pack in enumerate(packs):
            I = self.input_size if j < D else D * H
            packed = pack.of(self.cell, dtype, weights[4 * j : 4 * j + 4], I, H)
            if isinstance(packed, str):
                return packed
            found.append(packed)
        return found

    def _misshapen(self, input: Any, state: tuple[Tensor, ...] | None) -> str | None:
        """What PyTorch would complain of, or leave to itself."""
        if isinstance(input, PackedSequence):
            shape, rows = input.data.shape, input.batch_sizes[:1].tolist()
            if len(shape) != 2:
                return f"the data has {len(shape)} dimensions"
            sizes = input.batch_sizes.tolist()
            if sum(sizes) != shape[0] or min(sizes) < 1 or sizes != sorted(sizes, reverse=True):
                raise ValueError(
                    f"batch_sizes: expected falling sizes of {shape[0]} rows in all, got {sizes}"
                )
        else:
            shape = input.shape
            if len(shape) not in (2, 3):
                return f"the input has {len(shape)} dimensions"
            time_second = self.batch_first and len(shape) == 3
            rows = [] if len(shape) == 2 else [shape[0 if time_second else 1]]
            if not shape[1 if time_second else 0]:
                return "there is no time step"
        if shape[-1] != self.input_size or not self.input_size:
            return f"the input is of shape {tuple(shape)}"
        if state is not None:
            size = (len(self._all_weights), *rows, self.hidden_size)
            if len(state) != len(self.cell.states) or any(s is None or s.shape != size for s in state):
                got = [tuple(s.shape) for s in state if s is not None]
                if isinstance(input, PackedSequence) and len(got) == len(self.cell.states):
                    # Here PyTorch's own does not check, and reads past the end of some.
                    raise RuntimeError(f"Expected hidden size {size}, got {got}")
                return f"the state is not of shape {size}"
        return None

    def _packed_sequence(
        self,
        input: PackedSequence,
        state0: tuple[Tensor, ...] | None,
        packed: list[Packed],
        weights: list[Tensor | None],
    ) -> Any:
        """Rows of different lengths, longest first: padded for the kernel, whose results are packed again."""
        sizes = input.batch_sizes
        B, T = int(sizes[0]), len(sizes)
        valid = torch.arange(B) < sizes[:, None]  # (T, B)
        if state0 is not None and input.sorted_indices is not None:
            state0 = tuple(s.index_select(1, input.sorted_indices) for s in state0)
        x = input.data.new_zeros(T, B, input.data.size(-1)).masked_scatter(valid[:, :, None], input.data)
        y, final, _ = self._stack(x, state0, packed, weights, valid.sum(0).numpy(), None, False, valid)
        if input.unsorted_indices is not None:
            final = tuple(s.index_select(1, input.unsorted_indices) for s in final)
        output = PackedSequence(y[valid], sizes, input.sorted_indices, input.unsorted_indices)
        return output, final if len(final) == 2 else final[0]

    def _stack(
        self,
        x: Tensor,
        state0: tuple[Tensor, ...] | None,
        packed: list[Packed],
        weights: list[Tensor | None],
        lengths: Array | None,
        reset: Array | None,
        return_states: bool,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Layers and directions: y (T, B, D*H); the final states (L*D, B, H); those of every step.

        With ``valid`` (T, B) dropout draws for those steps alone, as PyTorch's does for a PackedSequence.
        """
        D, n = 2 if self.bidirectional else 1, len(self.cell.states)
        ends: list[tuple[Tensor, ...]] = []
        for k in range(0, len(packed), D):
            if k and self.dropout:
                if valid is None:
                    x = torch.nn.functional.dropout(x, self.dropout, self.training)
                else:
                    kept = torch.nn.functional.dropout(x[valid], self.dropout, self.training)
                    x = x.masked_scatter(valid[:, :, None], kept)
            halves = []
            for j in range(k, k + D):
                call = Call(packed[j], False, lengths, reset, j > k, return_states, self.recompute)
                begin = None if state0 is None else tuple(s[j] for s in state0)
                y, *rest = recurrence(call, x, begin, weights[4 * j : 4 * j + 4])
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
    if not lengths.numel():  # an empty list has no dtype
        lengths = lengths.to(torch.int64)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
        raise TypeError(f"lengths: expected whole numbers, got {lengths.dtype}")
    expected = (B,) if batched else ()
    if lengths.shape != expected:
        raise ValueError(f"lengths: expected shape {expected}, got {tuple(lengths.shape)}")
    lengths = lengths.reshape(B).to(torch.int64)
    if B and (int(lengths.min()) < 0 or int(lengths.max()) > T):
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
