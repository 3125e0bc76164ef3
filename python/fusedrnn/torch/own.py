"""``Recurrent`` and ``RecurrentCell``: layers of any cell, built-in or your own (docs/cells.md)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.backends.arguments import (
    check_batch_sizes,
    check_bool,
    check_cell,
    check_dropout,
    check_proj_size,
    check_shape,
    check_whole,
)
from fusedrnn.cells import Cell, order
from fusedrnn.cells.definition import OF_PRODUCTS
from fusedrnn.torch import dynamo, ops, paths
from fusedrnn.torch.base import RecurrentBase, StepBase, weights_of
from fusedrnn.torch.frozen import Freezable, Frozen, frozen
from fusedrnn.torch.keys import CELLS, key_of
from fusedrnn.torch.ops import Weights
from fusedrnn.torch.scripted import OPTIONS

BIASES = ("bias_ih", "bias_hh")


class CellModule(Freezable):
    """The base class of ``Recurrent`` and ``RecurrentCell``: a cell and its parameters."""

    input_size: int
    hidden_size: int
    _all_weights: list[list[Any]]

    @property
    def cell(self) -> Cell:
        """The cell that a step computes."""
        return self._cell

    def _set_cell(self, cell: Any, input_size: Any, hidden_size: Any, proj_size: Any = 0) -> None:
        self._cell = check_cell(cell)
        self.input_size = check_whole("input_size", input_size)
        self.hidden_size = check_whole("hidden_size", hidden_size)
        self.proj_size = check_proj_size(cell, proj_size, self.hidden_size)
        for name in cell.scalars:
            if name in inspect.signature(self.forward).parameters:
                raise ValueError(f"cell: expected other names than those of forward's arguments, got {name}")
        self._key = key_of(cell)

    def _add_parameters(self, sizes: Mapping[str, int], bias: bool, device: Any, dtype: Any) -> None:
        """Register the parameters of each layer and direction. ``sizes``: its input size, by name suffix."""
        self.bias = check_bool("bias", bias)
        P = self.proj_size or self.hidden_size
        shapes = [self.cell.shapes(I, self.hidden_size, P) for I in sizes.values()]
        self._all_weights = [[name + suffix for name in self.cell.blocks] for suffix in sizes]
        self._shapes = [list(each.values()) for each in shapes]
        for suffix, each in zip(sizes, shapes, strict=True):
            for name, shape in each.items():
                if hasattr(self, name + suffix):
                    raise ValueError(
                        "cell: expected other names of parameters than those of a layer's attributes, got "
                        f"{name + suffix}"
                    )
                if self.bias or name not in BIASES:
                    values = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(name + suffix, torch.nn.Parameter(values))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again.

        Weights and biases are uniform in ±1 / sqrt(H), as in PyTorch. The cell defines the initial values of
        all others.
        """
        bound = 1 / math.sqrt(self.hidden_size)
        for names in self._all_weights:
            for name, full in zip(self.cell.blocks, names, strict=True):
                p = self._parameters.get(full)
                begin = (-bound, bound) if name in OF_PRODUCTS else self.cell.trace.begin.get(name, 0.0)
                if p is None:
                    continue
                if isinstance(begin, tuple):
                    p.uniform_(*begin)
                elif callable(begin):
                    drawn = np.asarray(begin(tuple(p.shape)))
                    check_shape(f"what init of {name} gives", drawn.shape, tuple(p.shape))
                    p.copy_(torch.as_tensor(drawn, device="cpu"))
                else:
                    p.fill_(begin)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._key = key_of(self.cell)  # another process may have another

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.cell.is_builtin and hasattr(destination, "_metadata"):  # beside PyTorch's version
            destination._metadata[prefix[:-1]]["cell"] = order.describe(self.cell)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if wrong := order.difference(self.cell, local_metadata.get("cell", {})):
            args[-1].append(f"{prefix[:-1] or type(self).__name__}: {wrong}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __prepare_scriptable__(self) -> Any:
        name = type(self).__name__
        raise RuntimeError(
            f"TorchScript cannot take {name}, whose cell is a Python function; torch.compile can"
        )

    def _weights(self) -> list[Weights]:
        """The weights of each layer and direction."""
        return [weights_of(self, names, len(names)) for names in self._all_weights]

    def _acts(self) -> bool:
        """Whether a call uses recurrent dropout or zoneout."""
        return False

    def _lacks(self, device: torch.device) -> str | None:
        return self._refused(device, self._weights()[0][0].dtype, False)

    def _refused(self, device: torch.device, dtype: torch.dtype, detached: bool) -> str | None:
        """What the kernels do not support of this cell, or None."""
        if self._key in CELLS:
            return super()._lacks(device)
        return ops.refused(self._key, device.type, str(dtype), self._acts(), detached)

    def _packed(self) -> Frozen | None:
        """The packed weights of a frozen layer, or None; an error if the call is traced."""
        tracing = torch._C._get_tracing_state() is not None
        if tracing or torch.compiler.is_compiling():
            ops.refuse_onnx(type(self).__name__)
        if torch.compiler.is_compiling():
            return None
        if tracing:
            raise RuntimeError(f"torch.jit cannot trace {type(self).__name__}; torch.export can")
        return frozen(self)

    def _state(self, hx: Any) -> tuple[Any, ...] | None:
        """The tensors of a state."""
        if hx is None:
            return None
        names = self.cell.states
        state0 = paths.state(hx, len(names) > 1)
        if len(state0) != len(names) or not all(isinstance(s, Tensor) for s in state0):
            expected = f"a tuple of tensors ({', '.join(names)})" if len(names) > 1 else "a tensor"
            raise TypeError(f"hx: expected {expected} for the cell {self.cell.name}, got {_kinds(hx)}")
        return state0

    def _cast(self, data: Tensor, state0: Any, weights: list[Weights]) -> tuple[Tensor, Any]:
        """Input and state, under autocast cast to the dtype of the weights."""
        kind, dtype = data.device.type, weights[0][0].dtype
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return data, state0
        return data.to(dtype), None if state0 is None else tuple([s.to(dtype) for s in state0])

    def _check(self, data: Tensor, state0: Any, sizes: Any, weights: list[Weights]) -> None:
        """Raise an error unless the tensors match the cell; ``sizes`` are those of the states."""
        first = weights[0][0]
        if data.dtype != first.dtype or data.device != first.device:
            raise TypeError(
                f"input: expected {first.dtype} on {first.device}, as the weights are, got {data.dtype} on "
                f"{data.device}"
            )
        for name, s, size in zip(self.cell.states, state0 or (), sizes, strict=state0 is not None):
            check_shape(f"hx {name}" if len(sizes) > 1 else "hx", s.shape, size)
            _check_kind("hx", s, data)
        for names, each, shapes in zip(self._all_weights, weights, self._shapes, strict=True):
            for name, w, shape in zip(names, each, shapes, strict=True):
                if w is None and not name.startswith(BIASES):
                    raise RuntimeError(f"{name}: expected a tensor of shape {shape}, got none")
                if w is not None:
                    _check_kind(name, w, data)
                    if w.shape != shape:
                        raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(w.shape)}")

    def _scalars(
        self, given: Mapping[str, Any], data: Tensor, shape: tuple[Any, ...], of: str
    ) -> list[Tensor]:
        """The row scalars in the cell's order, in the input's dtype."""
        for name in given:
            if name not in self.cell.scalars:
                known = ", ".join(self.cell.scalars) or "none"
                raise TypeError(
                    f"{name}: no argument of this layer; its cell's numbers of each row and step: {known}"
                )
        found = []
        for name in self.cell.scalars:
            value = given.get(name)
            if isinstance(value, PackedSequence):
                value = value.data
            if value is None:
                raise TypeError(f"{name}: expected numbers of shape {shape}, which the cell takes, got none")
            if not isinstance(value, Tensor):
                try:
                    value = torch.as_tensor(value, dtype=data.dtype, device=data.device)
                except (TypeError, ValueError, RuntimeError) as error:
                    raise TypeError(
                        f"{name}: expected a tensor or numbers, got {type(value).__name__}"
                    ) from error
            check_shape(name, value.shape, shape, of)
            found.append(value.to(data))
        return found

    def _reason(self, data: Tensor, state0: Any, weights: list[Weights], detached: bool) -> str | None:
        """Why the kernels do not support this call, or None."""
        if torch.compiler.is_compiling():
            if self._key in CELLS:
                return dynamo.unsupported(data, state0, weights, self._key)
            return self._refused(data.device, data.dtype, detached)
        reason = paths.mode() or self._refused(data.device, data.dtype, detached)
        tensors = [data, *(state0 or ()), *[w for each in weights for w in each]]
        names = chain(["input"], self.cell.states, *self._all_weights)
        return reason or paths.unsupported(data.dtype, data.device, tensors, names, self._key)

    def _how(
        self, packed: Frozen | None, reason: str | None, data: Tensor, state0: Any
    ) -> tuple[Frozen | None, bool]:
        """What a call runs: packed weights or None, and whether it runs step by step."""
        if packed is not None and reason is None:
            packed.check(data, state0)
            return packed, False
        return None, reason is not None and not torch.compiler.is_compiling()


def _kinds(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


def _check_kind(name: str, t: Tensor, data: Tensor) -> None:
    if t.dtype != data.dtype or t.device != data.device:
        raise TypeError(
            f"{name}: expected {data.dtype} on {data.device}, as the input is, got {t.dtype} on {t.device}"
        )


class Recurrent(CellModule, RecurrentBase):
    """Layers of any cell, with the arguments, parameter names and results of ``torch.nn.LSTM``.

    Args:
        cell: What a step computes, such as ``fusedrnn.cells.lstm`` or a cell of your own.
        input_size: The size of the input, I.
        hidden_size: The number of units, H.
        num_layers: The number of layers, L.
        bias: False: no ``bias_ih`` and ``bias_hh``.
        batch_first: True: sequences are (B, T, ·).
        dropout: The probability of zeros between layers, in training. With one layer, a warning says that it
            has no effect.
        bidirectional: True: a second set of weights runs backward in time, and D is 2.
        proj_size: P, from 1 to H, for a cell that projects its first state (``p.project``); else 0.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        recurrent_dropout, recompute: As in ``fusedrnn.torch.LSTM``.
        zoneout_h, zoneout_c: As in ``fusedrnn.torch.LSTM``, for a cell with a state of this name.

    Parameters: those of the cell, ``cell.blocks``. Their names end in ``_l0``, ``_l0_reverse``, ``_l1`` and
    so on: ``weight_ih_l0`` (G*H, I), ``weight_hh_l0`` (G*H, P), ``bias_ih_l0`` and ``bias_hh_l0`` (G*H,),
    ``weight_hr_l0`` (P, H), and vectors (H,). G is the number of gates in that parameter. Initial weights
    and biases are uniform in ±1 / sqrt(H), as in ``torch.nn``. The cell defines the initial values of all
    others.

    ``last_path`` is "fused" after a call that ran our kernels. Otherwise it is "steps in PyTorch: " and why
    the cell's steps ran in PyTorch's operations.

    Raises:
        TypeError, ValueError: An argument is wrong, or the layer already has a name that the cell uses.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self._set_cell(cell, input_size, hidden_size, proj_size)
        self.num_layers = check_whole("num_layers", num_layers)
        self.batch_first = check_bool("batch_first", batch_first)
        self.bidirectional = check_bool("bidirectional", bidirectional)
        self.dropout = check_dropout(dropout, self.num_layers, 3)
        self._set_options(recompute, recurrent_dropout, zoneout_h, zoneout_c)
        ends = ("", "_reverse") if self.bidirectional else ("",)
        above = (self.proj_size or self.hidden_size) * len(ends)
        sizes = {
            f"_l{k}{end}": above if k else self.input_size for k in range(self.num_layers) for end in ends
        }
        self._add_parameters(sizes, bias, device, dtype)

    def extra_repr(self) -> str:
        """The arguments for ``repr``."""
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
        }
        defaults |= dict.fromkeys(("proj_size", *OPTIONS), 0)
        values = {name: getattr(self, name, default) for name, default in defaults.items()}
        more = [f"{name}={value}" for name, value in values.items() if value != defaults[name]]
        return ", ".join([repr(self.cell), str(self.input_size), str(self.hidden_size), *more])

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *by_position: Any,
        lengths: Any = None,
        reset: Any = None,
        return_states: bool = False,
        detach_every: int | None = None,
        **scalars: Any,
    ) -> Any:
        """Run all layers over a sequence, like ``fusedrnn.torch.LSTM``.

        Args:
            input: (T, B, I), with ``batch_first`` (B, T, I), unbatched (T, I), or a PackedSequence.
            hx: The initial state: a tensor if the cell has one state, else a tuple. Each is (L*D, B, H),
                unbatched (L*D, H); with ``proj_size`` the first has P units. None: the initial values of the
                cell.
            lengths, return_states, detach_every: As in ``fusedrnn.torch.LSTM``.
            reset: As in ``fusedrnn.torch.LSTM``. After a reset, the state has the cell's initial values.
            scalars: The cell's row scalars by name, such as ``dt=``, of the input's shape without features;
                with a PackedSequence (sum of lengths,). ``dt[t]`` belongs to step t in both directions, and
                all layers get the same values. They have gradients.

        Returns:
            output, the final state like ``hx``, and with ``return_states`` the states of every step.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.
        """
        if by_position:  # also from ONNX's older exporter, which gives defaults as they stand
            self._packed()
            raise TypeError(
                f"{type(self).__name__}: expected lengths, reset and others by keyword, got "
                f"{2 + len(by_position)} arguments by position"
            )
        options: dict[str, Any] = {
            "lengths": lengths,
            "reset": reset,
            "return_states": check_bool("return_states", return_states),
            "detach_every": detach_every,
        }
        if paths.is_proxy(input):
            return paths.call_module(self, input, hx, **paths.all_asked_for(options), **scalars)
        is_packed = isinstance(input, PackedSequence)
        if is_packed and torch.compiler.is_compiling():
            why = "a PackedSequence; pass padded input and lengths="
            return dynamo.leave_graph(self, why, input, hx, **options, **scalars)
        packed = self._packed()
        weights = self._weights() if packed is None else packed.weights
        data, rows = self._check_input(input)
        state0 = self._state(hx)
        data, state0 = self._cast(data, state0, weights)
        self._check(data, state0, [(len(self._all_weights), *rows, n) for n in self._widths()], weights)
        hint = "of a PackedSequence its data" if is_packed else ""
        numbers = self._scalars(scalars, data, tuple(data.shape[:-1]), hint)
        reason = self._reason(data, state0, weights, detach_every is not None)
        paths.record(self, reason)
        packed, recorded = self._how(packed, reason, data, state0)
        x = input._replace(data=data) if isinstance(input, PackedSequence) else data
        return self._run(x, state0, weights, options, packed, recorded, numbers)

    def _check_input(self, input: Any) -> tuple[Tensor, list[Any]]:
        """The tensor of the input, and its batch size in a list, which is empty without a batch axis."""
        I, data = self.input_size, input.data if isinstance(input, PackedSequence) else input
        if not isinstance(data, Tensor):
            raise TypeError(f"input: expected a tensor or a PackedSequence, got {type(input).__name__}")
        if isinstance(input, PackedSequence):
            check_shape("input", data.shape, (data.size(0), I))
            check_batch_sizes(input.batch_sizes.numpy(), data.size(0))
            return data, input.batch_sizes[:1].tolist()
        sizes = f"(B, T, {I})" if self.batch_first else f"(T, B, {I})"
        if data.dim() not in (2, 3) or data.size(-1) != I:
            raise ValueError(f"input: expected shape {sizes} or (T, {I}), got {tuple(data.shape)}")
        if data.dim() == 2:
            T, rows = data.size(0), []
        else:
            T, rows = data.size(int(self.batch_first)), [data.size(1 - int(self.batch_first))]
        if not T:
            raise ValueError(f"input: expected at least one step, got shape {tuple(data.shape)}")
        return data, rows

    def _acts(self) -> bool:
        return bool((self.training and self.recurrent_dropout) or self.zoneout_h or self.zoneout_c)


class RecurrentCell(CellModule, StepBase):
    """One step of any cell, with the arguments of ``torch.nn.LSTMCell``.

    Parameters and ``last_path`` are as in ``Recurrent``, but the names do not end in ``_l0``.

    Raises:
        TypeError, ValueError: An argument is wrong, the cell has a projection, or the layer already has a
            name that the cell uses.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(cell, Cell) and cell.projects:
            raise ValueError(f"cell: expected one without a projection, got {cell!r}; Recurrent takes it")
        self._set_cell(cell, input_size, hidden_size)
        self._add_parameters({"": self.input_size}, bias, device, dtype)

    def extra_repr(self) -> str:
        """The arguments for ``repr``."""
        sizes = f"{self.cell!r}, {self.input_size}, {self.hidden_size}"
        return sizes if self.bias else f"{sizes}, bias=False"

    def forward(self, input: Tensor, hx: Any = None, **scalars: Any) -> Any:
        """One step.

        Args:
            input: (B, I) or (I,).
            hx: The state, (B, H) or (H,): a tensor if the cell has one state, else a tuple. None: the initial
                values of the cell.
            scalars: The cell's row scalars by name, (B,) or a number each.

        Returns:
            The new state, like ``hx``.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.
        """
        if paths.is_proxy(input):
            return paths.call_module(self, input, hx, **scalars)
        packed = self._packed()
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2) or input.size(-1) != self.input_size:
            I = self.input_size
            raise ValueError(f"input: expected shape (B, {I}) or ({I},), got {tuple(input.shape)}")
        weights = self._weights() if packed is None else packed.weights
        state0 = self._state(hx)
        input, state0 = self._cast(input, state0, weights)
        sizes = [(*input.shape[:-1], self.hidden_size) for _ in self.cell.states]
        self._check(input, state0, sizes, weights)
        numbers = self._scalars(scalars, input, tuple(input.shape[:-1]), "")
        reason = self._reason(input, state0, weights, False)
        paths.record(self, reason)
        packed, recorded = self._how(packed, reason, input, state0)
        return self._run(input, state0, weights, packed, recorded, numbers)
