"""``LSTM``, ``GRU`` and ``RNN``, drop-in replacements for ``torch.nn``'s.

Each is a subclass of PyTorch's layer: parameters, initial values, state_dict, repr and errors are PyTorch's.
Formulas and their sources are in ``fusedrnn.cells.builtin``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import cells
from fusedrnn.backends.arguments import check_batch_sizes, check_regularization
from fusedrnn.backends.cpu import WEIGHTS
from fusedrnn.backends.protocol import Regularization
from fusedrnn.torch import dynamo, ops, paths
from fusedrnn.torch.base import RecurrentBase, Run
from fusedrnn.torch.forget_bias import ForgetBias
from fusedrnn.torch.frozen import Frozen, frozen
from fusedrnn.torch.ops import CELLS, NORMED, PROJECTED, Call, Weights
from fusedrnn.torch.recurrence import recurrence, steps, weights_of
from fusedrnn.torch.scripted import ALWAYS, OPTIONS, Scriptable


class NamedLayer(RecurrentBase, Scriptable, torch.nn.RNNBase):
    """What the three have in common.

    Args:
        recompute: Keep few states for backward and run forward again there, to save memory.
        recurrent_dropout: In training, the probability with which each unit of what weight_hh multiplies is
            zeroed, the others scaled by 1 / (1 - recurrent_dropout): one mask for each row, layer and
            direction, the same at every step of a call (Gal and Ghahramani 2016).
        zoneout_h, zoneout_c: In training, the probability with which a unit of h or c keeps its value at a
            step, drawn for each step; in evaluation the mean of old and new, so weighted (Krueger et al.
            2016). ``zoneout_c`` is for the LSTM.
        layer_norm: Normalise the input's and the recurrent part of the gates, and the LSTM's c on its way to
            h (Ba, Kiros and Hinton 2016; the formulas are in docs/bptt.md). More parameters: ``gain_ih_l0``
            and ``gain_hh_l0`` (G*H,), of the LSTM ``gain_c_l0`` and ``bias_c_l0`` (H,), and so on as the
            weights; gains start as 1, ``bias_c`` as 0.

    All these by keyword. Masks are drawn from PyTorch's default generator, by one seed a call.
    ``last_path`` is "fused" after a call that ran our kernels, else "fallback: " and why PyTorch's ran, or
    "steps in PyTorch: " and why the cell's steps ran in PyTorch's operations, which PyTorch's layer cannot.
    """

    last_path: str | None = None
    # As they are in a layer of torch.nn that becomes one of ours.
    recompute = layer_norm = False

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
        self.recompute, self.layer_norm = bool(recompute), bool(layer_norm)
        rates = Regularization(recurrent_dropout, zoneout_h, zoneout_c, seed=0)
        check_regularization(self.cell, rates)
        self.recurrent_dropout, self.zoneout_h, self.zoneout_c = (float(r) if r else 0 for r in rates[:3])
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
        """Draw the parameters anew."""
        super().reset_parameters()
        self._set_norms()

    def extra_repr(self) -> str:
        """PyTorch's text, and the options that are set."""
        more = [f"{name}={value}" for name in OPTIONS if (value := getattr(self, name))]
        return ", ".join([super().extra_repr(), *more])

    @property
    def kind(self) -> str:
        """The name of its cell in ``CELLS``."""
        return self.mode + (NORMED if self.layer_norm else PROJECTED if self.proj_size else "")

    @property
    def cell(self) -> cells.Cell:
        """The cell of every layer and direction."""
        return CELLS[self.kind]

    def flatten_parameters(self) -> None:
        """Nothing: it serves cuDNN alone, and its flat memory is what safetensors refuses."""

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
        """As PyTorch's, with more by keyword.

        Args:
            input: (T, B, I), with ``batch_first`` (B, T, I), unbatched (T, I), or a PackedSequence.
            hx: h_0, for the LSTM (h_0, c_0), each (L*D, B, H), unbatched (L*D, H); None is zeros. With
                ``proj_size`` h_0 has that many units.
            lengths: (B,) whole numbers from 0 to T, for padded input: a tensor, an array or a list. From its
                length on a row's state stands still and its output is 0. Not with a PackedSequence, which
                says so itself.
            reset: Of the input's shape without features, booleans or 0 and 1, as ``lengths``: true where a
                step is the first of a new segment, before which the state is cleared. Not with a
                PackedSequence.
            return_states: Also return the states of every step: h, for the LSTM (h, c), each (L*D, T, B, H),
                with ``batch_first`` (L*D, B, T, H), unbatched (L*D, T, H). Past a row's length they are held,
                and a gradient that comes in there is never read. Not with a PackedSequence.
            detach_every: Truncate back-propagation: after every so many steps, in each layer and direction
                counted as it runs, the state goes on and the gradient stops. Not with a PackedSequence.

        Returns:
            output, h_n (for the LSTM (h_n, c_n)), and with ``return_states`` the states.

        Raises:
            What ``torch.nn`` raises; TypeError, ValueError: a keyword is wrong; the message names it.
            RuntimeError: a keyword where PyTorch's own implementation has to run.
        """
        # The names and values are those of the backends' forward, which gets them all.
        options = {
            "lengths": lengths,
            "reset": reset,
            "return_states": bool(return_states),
            "detach_every": detach_every,
        }
        if torch.compiler.is_compiling():
            return dynamo.layer(self, input, hx, options)
        packed = frozen(self)
        weights = self._weights() if packed is None else packed.weights
        state0 = None if hx is None else paths.state(hx, self.mode == "LSTM")
        given_input, input, state0, weights = input, *self._lowered(input, state0, weights)
        reason, recorded = self._unsupported(input, state0, weights if packed is None else []), False
        if reason is not None:
            if paths.is_proxy(given_input):
                return paths.call_module(self, given_input, hx, **paths.all_asked_for(options))
            given = paths.asked_for(options) or self._only_ours()
            recorded = bool(given or paths.vmapped()) and self._unrecordable(input, state0, weights) is None
            if given and not recorded:
                raise RuntimeError(f"{given} needs the kernels of fusedrnn, which cannot run here: {reason}")
            if not recorded:
                return paths.fall_back(self, reason, super().forward, given_input, hx)
            paths.record(self, reason)
            packed = None
        else:
            self.__dict__["last_path"] = paths.FUSED
        if packed is not None:
            packed.check(input.data if isinstance(input, PackedSequence) else input, state0)
        if isinstance(input, PackedSequence):
            if given := paths.asked_for(options):
                raise ValueError(
                    f"{given}: expected none with a PackedSequence; pass padded input and lengths="
                )
            return self._packed_sequence(input, state0, weights, packed, recorded)
        options["regularization"] = self._regularization()
        x, state0, options = self._to_kernels(input, state0, options)
        run = self._one(weights, options, packed, recorded)
        return self._from_kernels(input, self._run_layers(x, state0, run))

    def _lowered(self, input: Any, state0: Any, weights: list[Weights]) -> tuple[Any, Any, list[Weights]]:
        """A call's tensors in the dtype of autocast, on a GPU; else as they are."""
        data = input.data if isinstance(input, PackedSequence) else input
        dtype = paths.lowered(data) if isinstance(data, Tensor) else None
        if dtype is None:
            return input, state0, weights
        data = paths.lower(data, dtype)
        return (
            input._replace(data=data) if isinstance(input, PackedSequence) else data,
            paths.lower_state(state0, dtype),
            [tuple([paths.lower(w, dtype) for w in given]) for given in weights],
        )

    def _one(
        self,
        weights: Sequence[Weights],
        options: dict[str, Any],
        packed: Frozen | None = None,
        recorded: bool = False,
    ) -> Run:
        """One layer in one direction by the kernels, in autograd; of a frozen layer without. Or ``recorded``,
        in PyTorch's operations."""
        regularization = options["regularization"]
        rates: list[float] = [] if regularization is None else list(regularization[:3])
        seed: Any = None if regularization is None else regularization.seed
        kind, states = self.kind, options["return_states"]

        def run(j: int, reverse: bool, x: Tensor, state0: Sequence[Tensor] | None) -> list[Tensor]:
            h0, c0 = (None, None) if state0 is None else (*state0, None)[:2]
            lengths, reset, every = options["lengths"], options["reset"], options["detach_every"]
            tensors = (x, h0, c0, *weights[j], lengths, reset, seed)
            call = Call._make((*tensors, kind, reverse, self.recompute, every, rates, j))
            if recorded:
                return steps(call, states)
            if packed is None:
                return recurrence(call, states)
            return ops.run(call, states, None, packed.packed[j])

        return run

    def _weights(self) -> list[Weights]:
        """Of each layer and direction."""
        if not self.layer_norm and not self.proj_size:
            return [weights_of(self, names) for names in self._all_weights]
        suffixes = [names[0].removeprefix("weight_ih") for names in self._all_weights]
        return [weights_of(self, [name + suffix for name in WEIGHTS]) for suffix in suffixes]

    _freezable_weights = _weights

    def _lacks(self, device: torch.device) -> str | None:
        return "proj_size on a GPU" if self.proj_size and device.type != "cpu" else None

    def _only_ours(self) -> str | None:
        """The name of the first option that PyTorch's own implementation would leave out."""
        names = (*ALWAYS, "recurrent_dropout") if self.training else ALWAYS
        return next((name for name in names if getattr(self, name)), None)

    def _unsupported(self, input: Any, state: tuple[Any, ...] | None, weights: list[Weights]) -> str | None:
        """Why the kernels cannot take this call, or None. What is wrong is left to PyTorch's own errors."""
        reason = paths.mode()
        if reason is not None:
            return reason
        data = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(data, Tensor):
            return f"the input is a {type(input).__name__}"
        reason = paths.unsupported(data.dtype, data.device, (data, *(state or ())))
        reason = reason or self._lacks(data.device)
        if reason is not None:
            return reason
        if self.mode != "GRU" and paths.autocast(data):  # PyTorch's GRU returns float32 all the same
            return "autocast is on"
        reason = self._misshapen(input, state)
        if reason is not None:
            return reason
        D, H, P = 2 if self.bidirectional else 1, self.hidden_size, self._widths()[0]
        for j, each in enumerate(weights):
            I = self.input_size if j < D else D * P
            reason = paths.unsupported_weights(data, each, self.cell, I, H, P)
            if reason is not None:
                return reason
        return None

    def _unrecordable(self, input: Any, state: tuple[Any, ...] | None, weights: list[Weights]) -> str | None:
        """Why PyTorch's operations cannot run this call in place of the kernels, or None."""
        data = input.data if isinstance(input, PackedSequence) else input
        tensors = [data, *(state or ()), *(w for each in weights for w in each if w is not None)]
        if not all(isinstance(t, Tensor) for t in tensors):
            return "the input or the state is not made of tensors"
        return paths.unrecordable(tensors) or self._misshapen(input, state)

    def _misshapen(self, input: Any, state: tuple[Tensor, ...] | None) -> str | None:
        """What PyTorch would complain of, or leave to itself."""
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
                    # Here PyTorch's own does not check, and reads past the end of some.
                    raise RuntimeError(f"Expected hidden size {size}, got {got}")
                return f"the state is not of shape {size}"
        return None


class LSTM(ForgetBias, NamedLayer, torch.nn.LSTM):
    """``torch.nn.LSTM`` on our kernels. See ``NamedLayer`` and ``ForgetBias`` for what is added."""

    torch_class = torch.nn.LSTM


class GRU(NamedLayer, torch.nn.GRU):
    """``torch.nn.GRU`` on our kernels. See ``NamedLayer`` for what is added."""

    torch_class = torch.nn.GRU


class RNN(NamedLayer, torch.nn.RNN):
    """``torch.nn.RNN`` on our kernels. See ``NamedLayer`` for what is added."""

    torch_class = torch.nn.RNN


# A compiler leaves PyTorch's layers and what they call alone; so it does with these. Those of ``compilable``
# have a forward of their own.
dynamo.leave_alone(NamedLayer.forward)
