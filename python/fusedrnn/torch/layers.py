"""``LSTM``, ``GRU`` and ``RNN``, drop-in replacements for those of ``torch.nn``.

Each is a subclass of PyTorch's layer: parameters, initial values, state_dict, repr and errors are PyTorch's.
Formulas and their sources are in ``fusedrnn.cells.builtin``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.backends import cpu
from fusedrnn.backends.arguments import check_batch_sizes, check_bool
from fusedrnn.cells.definition import PLAIN
from fusedrnn.torch import dynamo, paths
from fusedrnn.torch.base import RecurrentBase, direct, run_direct, weights_of
from fusedrnn.torch.forget_bias import ForgetBias
from fusedrnn.torch.frozen import Frozen, frozen
from fusedrnn.torch.keys import NORMED, PROJECTED
from fusedrnn.torch.ops import Weights
from fusedrnn.torch.scripted import OPTIONS, Scriptable


class NamedLayer(RecurrentBase, Scriptable, torch.nn.RNNBase):
    """The base class of ``LSTM``, ``GRU`` and ``RNN``: the arguments that they add to PyTorch's.

    Args:
        recompute: Keep few states for backward and run forward again there, to save memory.
        recurrent_dropout: In training, the probability that a unit of what weight_hh multiplies is zeroed;
            the others are scaled by 1 / (1 - recurrent_dropout). There is one mask for each row, layer and
            direction, the same at every step of a call (Gal and Ghahramani 2016).
        zoneout_h: In training, the probability that a unit of h keeps its value at a step, drawn for each
            step. In evaluation, the weighted mean of the old and the new value is used, with this weight for
            the old one (Krueger et al. 2016).
        zoneout_c: The same for c. LSTM only.
        layer_norm: Normalize the input part and the recurrent part of the gates, and in the LSTM the c from
            which h is computed (Ba, Kiros and Hinton 2016; the formulas are in docs/bptt.md). This adds the
            parameters ``gain_ih_l0`` and ``gain_hh_l0`` (G*H,), for the LSTM also ``gain_c_l0`` and
            ``bias_c_l0`` (H,), and the same for every layer and direction. Gains start at 1, ``bias_c`` at
            0.

    All these are keyword arguments. Each call with random masks draws one seed from PyTorch's default
    generator.

    ``last_path`` is "fused" after a call that ran our kernels. Otherwise it is "fallback: " and why PyTorch's
    layer ran, or "steps in PyTorch: " and why the cell's steps ran in PyTorch's operations, for calls that
    PyTorch's layer does not support.

    Raises:
        TypeError, ValueError: One of these arguments is wrong; the message names it. Other wrong arguments
            raise PyTorch's errors.
    """

    layer_norm = False  # for a layer of torch.nn that is converted to ours

    def __init__(
        self,
        *args: Any,
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        layer_norm: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.layer_norm = check_bool("layer_norm", layer_norm)
        self._set_options(recompute, recurrent_dropout, zoneout_h, zoneout_c)
        if self.layer_norm:
            if self.proj_size:
                raise ValueError(f"layer_norm: expected False with proj_size, got {layer_norm}")
            self._add_norms()

    def _add_norms(self) -> None:
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            weight_hh = getattr(self, f"weight_hh{suffix}").detach()
            rows, H = weight_hh.shape
            sizes = {"gain_ih": rows, "gain_hh": rows}
            if self.mode == "LSTM":
                sizes |= {"gain_c": H, "bias_c": H}
            for name, size in sizes.items():
                self.register_parameter(name + suffix, torch.nn.Parameter(weight_hh.new_empty(size)))
        self._set_norms()

    def _set_norms(self) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith(("gain", "bias_c")):
                torch.nn.init.constant_(parameter, 0.0 if name.startswith("bias_c") else 1.0)

    def reset_parameters(self) -> None:
        """Draw the parameters again."""
        super().reset_parameters()
        self._set_norms()

    def extra_repr(self) -> str:
        """PyTorch's text, and the options that are set."""
        more = [f"{name}={value}" for name in OPTIONS if (value := getattr(self, name))]
        return ", ".join([super().extra_repr(), *more])

    @property
    def _key(self) -> str:  # type: ignore[override]
        return self.mode + (NORMED if self.layer_norm else PROJECTED if self.proj_size else "")

    def flatten_parameters(self) -> None:
        """Do nothing: only cuDNN needs it, and safetensors does not support its flat memory."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Any = None,
        reset: Any = None,
        return_states: bool = False,
        detach_every: int | None = None,
    ) -> Any:
        """Run all layers over a sequence, as in ``torch.nn``.

        Args:
            input: (T, B, I), with ``batch_first`` (B, T, I), unbatched (T, I), or a PackedSequence.
            hx: h_0, for the LSTM (h_0, c_0), each (L*D, B, H), unbatched (L*D, H); None is zeros. With
                ``proj_size`` h_0 has ``proj_size`` units.
            lengths: (B,) integers from 0 to T, for padded input: a tensor, an array or a list. From this step
                on, the state of the row does not change and its output is 0.
            reset: (T, B), with ``batch_first`` (B, T), unbatched (T,): booleans, or 0 and 1, in a tensor, an
                array or a list. Where it is true, the step is the first of a new segment, and the state is
                cleared before it.
            return_states: Also return the states of every step: h, for the LSTM (h, c), each (L*D, T, B, H),
                with ``batch_first`` (L*D, B, T, H), unbatched (L*D, T, H). Past the end of a row the last
                state is repeated, and gradients there are ignored.
            detach_every: Truncate backpropagation: after every ``detach_every`` steps, counted in the
                direction of the run, the state is passed on and the gradient stops.

        The last four do not work with a PackedSequence.

        Returns:
            output (T, B, D*P), with ``batch_first`` (B, T, D*P), unbatched (T, D*P), or a PackedSequence;
            h_n, for the LSTM (h_n, c_n), like ``hx``; and with ``return_states`` the states of every step.

        Raises:
            TypeError, ValueError: A keyword argument is wrong; the message names it. Other wrong arguments
                raise PyTorch's errors.
            RuntimeError: A keyword argument in a call that our kernels do not support.
        """
        # The names and values are those of the forward of backends, to which all are passed.
        options = {
            "lengths": lengths,
            "reset": reset,
            "return_states": check_bool("return_states", return_states),
            "detach_every": detach_every,
        }
        if torch.compiler.is_compiling():
            return dynamo.call(self, input, hx, **options)
        packed = frozen(self)
        weights = self._weights() if packed is None else packed.weights
        state0 = None if hx is None else paths.state(hx, self.mode == "LSTM")
        if lengths is reset is detach_every is None and not return_states:
            result = self._without_graph(input, state0, weights, packed)
            if result is not None:
                return result
        given_input, c = input, state0[-1] if state0 else input
        dtype: torch.dtype | None = None
        autocast = torch._C._is_any_autocast_enabled()
        if autocast:
            key = "" if self._stays_in_autocast(input) else self._key
            if packed is not None:
                packed = packed.lowered(self, key)
                weights = packed.weights
            input, state0, weights = paths.lowered(input, state0, weights, key)
            if not key:
                input, state0, dtype = paths.widened(input, state0, weights)
        reason, recorded = self._unsupported(input, state0, weights, packed), False
        if reason is not None:
            if paths.is_proxy(given_input):
                return paths.call_module(self, given_input, hx, **paths.all_asked_for(options))
            if autocast and dtype is None:  # steps take no others than the weights' dtype
                input, state0, dtype = paths.widened(input, state0, weights)
            given = paths.asked_for(options) or self._only_ours()
            recorded = bool(given or paths.vmapped()) and self._unrecordable(input, state0, weights) is None
            if given and not recorded:
                raise RuntimeError(f"{given} needs the kernels of fusedrnn, which cannot run here: {reason}")
            if not recorded:
                return paths.fall_back(self, reason, super().forward, given_input, hx)
            packed = None
            paths.record(self, reason)
        else:
            self.__dict__["last_path"] = paths.FUSED
        if packed is not None:
            packed.check(input.data if isinstance(input, PackedSequence) else input, state0)
        result = self._run(input, state0, weights, options, packed, recorded)
        if dtype is not None:
            result = paths.rounded(result, dtype)
        if not (self.proj_size and autocast):
            return result
        y, (h, c_n), *states = result  # PyTorch's c keeps its dtype
        return (y, (h, c_n.to((c.data if isinstance(c, PackedSequence) else c).dtype)), *states)

    def _without_graph(
        self, input: Any, state0: tuple[Any, ...] | None, weights: list[Weights], packed: Frozen | None
    ) -> Any:
        """What ``forward`` returns without keywords and a graph, or None: ``forward`` decides."""
        if (
            not direct(input, state0, weights, packed)
            or self.proj_size
            or (self.dropout and self.training)  # its masks are drawn before a layer above refuses
            or self._only_ours()
            or any(t.is_nested or t.layout is not torch.strided for t in (input, *(state0 or ())))
            or self._misshapen(input, state0)
        ):
            return None
        if packed is not None:
            packed.check(input, state0)

        def run(j: int, reverse: bool, x: Tensor, state0: Sequence[Tensor]) -> list[Tensor]:
            return run_direct(self, x, state0, weights[j], packed and packed.packed[j], reverse)

        x, begin, _ = self._to_kernels(input, state0, dynamo.NONE)
        try:
            results = self._run_layers(x, begin, run)
        except cpu.REFUSED:
            return None
        self.__dict__["last_path"] = paths.FUSED
        return self._from_kernels(input, results)

    def _weights(self) -> list[Weights]:
        names, count = self._all_weights, len(PLAIN)
        if self.layer_norm or self.proj_size:
            blocks = self.cell.blocks
            count = len(blocks)
            suffixes = [each[0].removeprefix("weight_ih") for each in names]
            names = [[name + suffix for name in blocks] for suffix in suffixes]
        return [weights_of(self, each, count) for each in names]

    def _unsupported(
        self, input: Any, state: tuple[Any, ...] | None, weights: list[Weights], packed: Frozen | None
    ) -> str | None:
        """Why the kernels do not support this call, or None. Wrong arguments are left to PyTorch's errors."""
        reason = paths.mode()
        if reason is not None:
            return reason
        data = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(data, Tensor):
            return f"the input is a {type(input).__name__}"
        key = self._key if packed is None or packed.dtype is data.dtype else ""  # these are not cast
        names = "input", *paths.STATES
        reason = paths.unsupported(data.dtype, data.device, (data, *(state or ())), names, key)
        reason = reason or self._lacks(data.device)
        if reason is not None:
            return reason
        if paths.autocast(data) and not (data.dtype is torch.float32 and self._stays_in_autocast(input)):
            return "autocast is on"
        reason = self._misshapen(input, state)
        if reason is not None:
            return reason
        D, H = 2 if self.bidirectional else 1, self.hidden_size
        P, cell = self.proj_size or H, self.cell
        for j, each in enumerate(weights if packed is None else ()):
            I = self.input_size if j < D else D * P
            reason = paths.unsupported_weights(data, each, cell, I, H, P, self._key)
            if reason is not None:
                return reason
        return None

    def _stays_in_autocast(self, input: Any) -> bool:
        """Whether PyTorch's layer keeps the dtype of its state within autocast, as it does without oneDNN."""
        if self.mode != "LSTM" or self.proj_size:
            return self.mode == "GRU"
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes
            return bool(len(sizes) and sizes[0] != sizes[-1])
        return isinstance(input, Tensor) and not input.numel()

    def _unrecordable(self, input: Any, state: tuple[Any, ...] | None, weights: list[Weights]) -> str | None:
        """Why PyTorch's operations do not support this call instead of the kernels, or None."""
        data = input.data if isinstance(input, PackedSequence) else input
        tensors = [data, *(state or ()), *(w for each in weights for w in each if w is not None)]
        if not all(isinstance(t, Tensor) for t in tensors):
            return "the input or the state is not made of tensors"
        return paths.unrecordable(tensors) or self._misshapen(input, state)

    def _misshapen(self, input: Any, state: tuple[Tensor, ...] | None) -> str | None:
        """Which shape is wrong, so that PyTorch raises an error, or None."""
        if isinstance(input, PackedSequence):
            shape, rows = input.data.shape, input.batch_sizes[:1].tolist()
            if len(shape) != 2:
                return f"the data has {len(shape)} dimensions"
            check_batch_sizes(input.batch_sizes.numpy(), shape[0])
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
            sizes = [(len(self._all_weights), *rows, width) for width in self._widths()]
            got = [tuple(s.shape) for s in state if s is not None]
            if len(state) != len(sizes) or got != sizes:
                size = sizes[0] if len(set(sizes)) == 1 else sizes
                if isinstance(input, PackedSequence) and len(got) == len(sizes):
                    # Here PyTorch does not check, and may read past the end.
                    raise RuntimeError(f"Expected hidden size {size}, got {got}")
                return f"the state is not of shape {size}"
        return None


class LSTM(ForgetBias, NamedLayer, torch.nn.LSTM):
    """``torch.nn.LSTM`` with our kernels. ``NamedLayer`` and ``ForgetBias`` describe additional arguments."""

    torch_class = torch.nn.LSTM


class GRU(NamedLayer, torch.nn.GRU):
    """``torch.nn.GRU`` with our kernels. ``NamedLayer`` describes additional arguments."""

    torch_class = torch.nn.GRU


class RNN(NamedLayer, torch.nn.RNN):
    """``torch.nn.RNN`` with our kernels. ``NamedLayer`` describes additional arguments."""

    torch_class = torch.nn.RNN


# The compiler does not trace PyTorch's layers and what they call, nor these. Those of ``compilable`` have a
# forward of their own.
dynamo.leave_alone(NamedLayer.forward)
