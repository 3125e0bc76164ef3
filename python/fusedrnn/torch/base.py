"""The base classes of the layers and cells in ``layers``, ``cells`` and ``own``.

They convert input, state and options for the kernels, run layers and directions, and convert the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import backends
from fusedrnn.backends import cpu
from fusedrnn.backends.arguments import check_bool, check_regularization, check_shape, check_whole, listed
from fusedrnn.backends.protocol import Regularization
from fusedrnn.torch import memory, ops, paths
from fusedrnn.torch.frozen import Freezable, Frozen
from fusedrnn.torch.ops import Call, Weights
from fusedrnn.torch.recurrence import recurrence

# One layer in one direction, of index j: from (j, reverse, x, initial state) to y, the final state, and with
# return_states the states of every step, as ``recurrence`` returns them.
Run = Callable[[int, bool, Tensor, Sequence[Tensor]], list[Tensor]]
# y (T, B, D*P), the final states (L*D, B, ·), those of every step (L*D, T, B, ·)
Results = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]


def weights_of(module: torch.nn.Module, names: Sequence[str], count: int) -> Weights:
    """The current weights of one layer and direction; a missing bias is None.

    A parametrization, a functional call or a tied weight may have replaced the parameters.

    Raises:
        TypeError: ``weight_ih`` or ``weight_hh`` was deleted or is None.
    """
    own = module._parameters
    found = [own[name] if name in own else getattr(module, name, None) for name in names]
    for name, weight in zip(names[:2], found, strict=False):  # not over all, which would make calls slower
        if weight is None and name.startswith("weight_"):
            raise TypeError(f"{name}: expected a tensor, got None")
    return (*found, *[None] * (count - len(found)))


def direct(x: Any, state0: Sequence[Any] | None, weights: Sequence[Weights], packed: Frozen | None) -> bool:
    """Whether a call can go straight to the compiled module: plain tensors, no graph, and nobody watches.

    The module checks dtypes, shapes and memory, and refuses what it cannot read as it is. In Python the same
    checks take as long as the kernel of a small layer.
    """
    if torch.is_grad_enabled() or not isinstance(x, Tensor) or x.dtype not in ops.FLOATS:
        return False
    for t in (x, *(state0 or ()), *[w for each in weights for w in each if w is not None]):
        if (type(t) is not Tensor and type(t) is not Parameter) or t.is_neg():
            return False
    backend = backends.usable(None) if packed is None else packed.packed[0][0]
    return (
        memory.DIRECT
        and isinstance(backend, cpu.CpuBackend)
        and x.is_cpu
        and not ops.watched(x)
        and paths.mode() is None
        and not torch.is_autocast_enabled("cpu")
    )


def run_direct(
    module: Any, x: Tensor, state0: Sequence[Tensor], weights: Weights, packed: Any, reverse: bool = False
) -> list[Tensor]:
    """What ``recurrence`` returns of such a call; refusals are exceptions in ``cpu.REFUSED``."""
    cell, H, (*steps, B, _) = module.cell, module.hidden_size, x.shape
    y = x.new_empty(*steps, B, H) if steps else None
    after = [x.new_empty(B, H) for _ in cell.states]
    ops.CPU.run_forward(
        cell,
        weights if packed is None else packed[1].core,
        *(x, tuple(state0), (), None, None),  # no row scalars, lengths, resets
        *(reverse, 0, None, False),  # never detached, no regularization
        *(y, after, (), None),  # no states of every step, no tape
    )
    return after if y is None else [y, *after]


class StepBase(Freezable):
    """The base class of modules that compute one step."""

    def _run(
        self,
        input: Tensor,
        state0: Sequence[Tensor] | None,
        weights: list[Weights],
        packed: Frozen | None = None,
        recorded: bool = False,
        scalars: Sequence[Tensor] = (),
    ) -> Any:
        """Return what ``forward`` returns. Scalars have the shape of the input without features."""
        begin, batched = state0 or (), input.dim() == 2
        if not batched:
            input, begin = input.unsqueeze(0), [s.unsqueeze(0) for s in begin]
        if scalars:
            scalars = [s.reshape(1, -1) for s in scalars]
        call = Call(input, begin, weights[0], scalars, None, None, None, self._key)
        after = recurrence(call, False, None if packed is None else packed.packed[0], recorded)
        if not batched:
            after = [s.squeeze(0) for s in after]
        return tuple(after) if len(after) > 1 else after[0]


class RecurrentBase(Freezable):
    """The base class of recurrent layers."""

    input_size: int
    hidden_size: int
    batch_first: bool
    bidirectional: bool
    dropout: float
    _all_weights: list[list[Any]]  # names, of each layer and direction
    # For a layer of torch.nn that is converted to ours. 0, not 0.0: a compiler would make a float an input
    # of its graph, and compile again.
    recurrent_dropout: float = 0
    zoneout_h: float = 0
    zoneout_c: float = 0
    recompute: bool = False

    def _set_options(self, recompute: bool, *rates: float) -> None:
        """Set the options of a layer whose cell is set."""
        self.recompute = check_bool("recompute", recompute)
        check_regularization(self.cell, Regularization._make((*rates, 0, 0)))
        self.recurrent_dropout, self.zoneout_h, self.zoneout_c = (float(r) if r else 0 for r in rates)

    def _regularization(self) -> Regularization | None:
        """The rates and the seed of one call.

        The seed is a tensor, so that it can be drawn in compiled code. It is on the CPU for every default
        device.
        """
        rates = self.recurrent_dropout, self.zoneout_h, self.zoneout_c
        if not any(rates if self.training else rates[1:]):
            return None
        seed: Any = torch.randint(2**63 - 1, (), device="cpu") if self.training else None
        return Regularization(*rates, seed)

    def _widths(self) -> tuple[int, ...]:
        """The number of units of each state."""
        return self.cell.widths(self.hidden_size, self.proj_size or self.hidden_size)

    def _run(
        self,
        input: Tensor | PackedSequence,
        state0: tuple[Tensor, ...] | None,
        weights: list[Weights],
        options: dict[str, Any],
        packed: Frozen | None = None,
        recorded: bool = False,
        scalars: Sequence[Tensor] = (),
    ) -> Any:
        """Return what ``forward`` returns.

        ``options`` are its keyword arguments. Scalars have the shape of the input without features.
        """
        if isinstance(input, PackedSequence):
            if given := paths.asked_for(options):
                raise ValueError(
                    f"{given}: expected none with a PackedSequence; pass padded input and lengths="
                )
            return self._packed_sequence(input, state0, weights, packed, recorded, scalars)
        options["regularization"] = self._regularization()
        x, state0, options = self._to_kernels(input, state0, options)
        if input.dim() == 2:
            scalars = [s.unsqueeze(1) for s in scalars]
        elif self.batch_first:
            scalars = [s.transpose(0, 1) for s in scalars]
        run = self._one(weights, options, packed, recorded, scalars)
        return self._from_kernels(input, self._run_layers(x, state0, run))

    def _one(
        self,
        weights: Sequence[Weights],
        options: dict[str, Any],
        packed: Frozen | None,
        recorded: bool,
        scalars: Sequence[Tensor],
    ) -> Run:
        regularization, states = options["regularization"], options["return_states"]
        rates: list[float] = [] if regularization is None else list(regularization[:3])
        seed: Any = None if regularization is None else regularization.seed
        lengths, reset, every = options["lengths"], options["reset"], options["detach_every"]
        key, recompute = self._key, self.recompute

        def run(j: int, reverse: bool, x: Tensor, state0: Sequence[Tensor]) -> list[Tensor]:
            tensors = x, state0, weights[j], scalars, lengths, reset, seed
            call = Call(*tensors, key, reverse, recompute, every, rates, j)
            return recurrence(call, states, None if packed is None else packed.packed[j], recorded)

        return run

    def _packed_sequence(
        self,
        input: PackedSequence,
        state0: tuple[Tensor, ...] | None,
        weights: list[Weights],
        packed: Frozen | None,
        recorded: bool,
        scalars: Sequence[Tensor],
    ) -> Any:
        """Pad rows of different lengths, longest first, run the kernels and pack the results."""
        sizes = input.batch_sizes
        B, T = int(sizes[0]), len(sizes)
        equal = int(sizes[-1]) == B  # all rows have T steps: there is no padding
        running = torch.arange(B, device="cpu") < sizes[:, None]  # (T, B), where PyTorch's batch sizes are
        valid = running.to(input.data.device)
        if state0 is not None and input.sorted_indices is not None:
            state0 = tuple(s.index_select(1, input.sorted_indices) for s in state0)
        shape = T, B, input.data.size(-1)
        if equal:
            x, padded = input.data.reshape(shape), [s.reshape(T, B) for s in scalars]
        else:
            x = input.data.new_zeros(shape).masked_scatter(valid[:, :, None], input.data)
            padded = [s.new_zeros(T, B).masked_scatter(valid, s) for s in scalars]
        options = {
            "lengths": None if equal else running.sum(0),
            "reset": None,
            "return_states": False,
            "detach_every": None,
            "regularization": self._regularization(),
        }
        run = self._one(weights, options, packed, recorded, padded)
        meta = x.is_meta  # masks there have no values, but shapes depend on them
        y, final, _ = self._run_layers(x, state0, run, None if meta else valid)
        if input.unsorted_indices is not None:
            final = tuple(s.index_select(1, input.unsorted_indices) for s in final)
        data = y.reshape(T * B, -1) if equal else y[running if meta else valid]
        output = PackedSequence(data, sizes, input.sorted_indices, input.unsorted_indices)
        return output, final if len(final) > 1 else final[0]

    def _to_kernels(
        self, input: Tensor, state0: tuple[Tensor, ...] | None, options: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, dict[str, Any]]:
        """A call's input, time first and batched: x (T, B, I), the state (L*D, B, H) each, and the options.

        ``lengths`` (B,) and ``reset`` (T, B) become tensors. Their values are not read, because a compiler
        that traces does not know them.
        """
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if state0 is not None and not batched:
            state0 = tuple([s.unsqueeze(1) for s in state0])
        if options["lengths"] is not None:
            lengths = _tensor("lengths", options["lengths"])
            lengths = lengths if input.is_meta else lengths.cpu()
            check_shape("lengths", lengths.shape, (x.size(1),) if batched else ())
            options = {**options, "lengths": lengths if batched else lengths.unsqueeze(0)}
        if options["reset"] is not None:
            reset = _tensor("reset", options["reset"])
            if reset.device != input.device:
                reset = reset.cpu()
            check_shape("reset", reset.shape, tuple(input.shape[:-1]))
            if not batched:
                reset = reset.unsqueeze(1)
            elif self.batch_first:
                reset = reset.transpose(0, 1)
            options = {**options, "reset": reset}
        if options["detach_every"] is not None:
            options = {**options, "detach_every": check_whole("detach_every", options["detach_every"])}
        return x, state0, options

    def _from_kernels(self, input: Tensor, results: Results) -> Any:
        """Return what ``forward`` returns."""
        y, final, states = results
        if input.dim() == 2:
            y, final = y.squeeze(1), tuple([s.squeeze(1) for s in final])
            states = tuple([s.squeeze(2) for s in states])
        elif self.batch_first:
            y, states = y.transpose(0, 1), tuple([s.transpose(1, 2) for s in states])
        if len(final) > 1:
            return (y, final, states) if states else (y, final)
        return (y, final[0], states[0]) if states else (y, final[0])

    def _run_layers(
        self, x: Tensor, state0: tuple[Tensor, ...] | None, run: Run, valid: Tensor | None = None
    ) -> Results:
        """Run layers and directions.

        With ``valid`` (T, B) dropout draws only for these steps, as PyTorch does for a PackedSequence.
        """
        D, n = 2 if self.bidirectional else 1, len(self.cell.states)
        ends: list[list[Tensor]] = []
        for k in range(0, len(self._all_weights), D):
            if k and self.dropout and self.training:
                if valid is None:
                    x = torch.nn.functional.dropout(x, self.dropout)
                else:
                    kept = torch.nn.functional.dropout(x[valid], self.dropout)
                    x = x.masked_scatter(valid[:, :, None], kept)
            halves = []
            for j in range(k, k + D):
                begin = [s[j] for s in state0 or ()]
                y, *rest = run(j, j > k, x, begin)
                halves.append(y)
                ends.append(rest)
            x = halves[0] if D == 1 else torch.cat(halves, 2)
        one = len(ends) == 1
        gathered = tuple([s[0].unsqueeze(0) if one else torch.stack(s) for s in zip(*ends, strict=True)])
        return x, gathered[:n], gathered[n:]


def _tensor(name: str, value: Any) -> Tensor:
    """A copy of lengths or resets, since the caller may write to them before backward.

    A tensor stays on its device. Lists, and NumPy arrays of any integers, become tensors on the CPU.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if not torch.compiler.is_compiling():
        value = listed(name, value)
        if isinstance(value, np.ndarray):  # a copy, since a tensor of a read-only array warns
            value = np.array(value, np.int64 if value.dtype.kind in "iu" else value.dtype)
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a tensor, an array or a list, got {type(value).__name__}"
        ) from error
