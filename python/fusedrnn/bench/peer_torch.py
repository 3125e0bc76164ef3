"""PyTorch, in the variants in which people run recurrent layers, and our modules in their place."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.bench.libraries import Results, named, not_installed
from fusedrnn.problems import Case, Data

PLAIN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # the parameters in its order
FUSED = "oneDNN's fused layer"
PROJECTED = (*PLAIN, "weight_hr")

# What the results of PyTorch's products in bfloat16 may be off by, of each tensor's largest entry. A product
# is rounded by 2**-9; the loss after sums over 4196 inputs and a sequence of 20 steps was off by 0.08.
BFLOAT16 = 0.1


class Place(NamedTuple):
    """Where a library's tensors are, and of what dtype."""

    device: str = "cpu"
    dtype: str | None = None  # None: that of the numbers as they were drawn


CPU = Place()


class Torch:
    """``torch.nn.LSTM``, ``GRU`` or ``RNN`` on whole sequences; the base of the other variants.

    Its second bias is zero for LSTM and RNN. Without a gradient it runs under ``no_grad``.
    """

    modules = "torch.nn"  # where they come from

    def __init__(self, data: Data, threads: int, place: Place = CPU) -> None:
        import torch

        self.torch = torch
        self.data = data
        self.place = place
        self.dtype = getattr(torch, place.dtype or str(data.x.dtype))
        case = data.case
        self.module = self.build()
        names = PROJECTED if case.proj_size else PLAIN
        values = [weights.get(name) for weights in data.weights for name in names]
        with torch.no_grad():
            for parameter, value in zip(self.module.parameters(), values, strict=True):
                if value is None:
                    parameter.zero_()
                else:
                    parameter.copy_(torch.from_numpy(value))
        self.training = case.kind in ("training", "update")
        of_x = self.training and (case.kind == "training" or case.encoder)
        self.x = self.tensor(data.x).requires_grad_(of_x)
        self.inputs = [self.x, *self.module.parameters()]
        self.upstream = [self.tensor(d) for d in (data.dy, *data.dstateT)]
        self.state0 = None if data.state0 is None else tuple(map(self.tensor, data.state0))
        if data.reset is not None:  # as replay buffers keep it
            self.starts = self.tensor(data.reset.astype(data.x.dtype))
        if data.lengths is not None:  # on the CPU, where PyTorch wants them
            self.lengths = torch.from_numpy(data.lengths)
        self.more: dict[str, Any] = {}  # what a call takes besides
        self.update = Update(self) if case.kind == "update" else None

    @classmethod
    def missing(cls) -> str | None:
        return not_installed("PyTorch", "torch", extra="torch")

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        if case.ragged or case.resets:
            return "the layer by itself knows no lengths and no resets"
        return None

    def tensor(self, array: Any) -> Any:
        """An array's numbers at the place."""
        return self.torch.from_numpy(array).to(self.place.device, self.dtype)

    def build(self) -> Any:
        """The module, its parameters in the order of ``data.weights``."""
        case = self.data.case
        layer = getattr(importlib.import_module(self.modules), case.cell.name.upper())
        return layer(
            case.shape.I,
            case.shape.H,
            num_layers=case.layers,
            bidirectional=case.bidirectional,
            **({"proj_size": case.proj_size} if case.proj_size else {}),
            **self.options(),
        )

    def options(self) -> dict[str, Any]:
        """What layers and cells take alike."""
        found: dict[str, Any] = {"dtype": self.dtype, "device": self.place.device}
        if "relu" in self.data.case.cell.options:
            found["nonlinearity"] = "relu" if self.data.case.cell.options["relu"] else "tanh"
        return found

    def pair(self, state: Any) -> Any:
        """States as PyTorch wants them: a pair for the LSTM, else a tensor."""
        return state if state is None or len(state) > 1 else state[0]

    def outputs(self) -> list[Any]:
        """Forward: y and the final states."""
        y, state = self.module(self.x, self.pair(self.state0), **self.more)
        return [y, *state] if isinstance(state, tuple) else [y, state]

    def __call__(self) -> Any:
        if not self.training:
            with self.torch.no_grad():
                return self.outputs(), None
        if self.update is not None:
            return self.update()
        outputs = self.outputs()
        return outputs, self.torch.autograd.grad(outputs, self.inputs, self.upstream)

    def results(self) -> Results:
        if self.update is not None:
            first, parameters = self.update(), self.module.parameters()
            gradients = {f"gradient {k}": self.array(p.grad) for k, p in enumerate(parameters)}
            return {"losses": np.array([first, *(self.update() for _ in range(4))])} | gradients
        outputs, gradients = self()
        y, *stateT = map(self.array, outputs)
        if gradients is None:
            return named(self.data, y, stateT)
        dx, *rest = map(self.array, gradients)
        dweights = [dict(zip(PLAIN, rest[k : k + 4], strict=True)) for k in range(0, len(rest), 4)]
        return named(self.data, y, stateT, dx, dweights)

    def array(self, tensor: Any) -> Any:
        """A result as an array; NumPy has no bfloat16."""
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype is self.torch.bfloat16 else tensor).numpy()

    @cached_property
    def path(self) -> str:
        """Which implementation PyTorch took: oneDNN's fused layer, or one operation after another."""
        dispatch: Any = importlib.import_module("torch.utils._python_dispatch")
        found = set()

        def note(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.add(func.name())
            return func(*args, **(kwargs or {}))

        with type("Names", (dispatch.TorchDispatchMode,), {"__torch_dispatch__": note})():
            self()
        fused = any("mkldnn_rnn_layer" in name for name in found)
        return FUSED if fused else "one operation after another"

    def saved(self) -> dict[str, int]:
        """Bytes kept for backward, by the saved-tensor hooks: each storage once, y's own apart (borrowed),
        inputs and parameters not at all.
        """
        torch = self.torch
        kept: dict[int, int] = {}
        alive = []  # so that no address is used twice

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self.outputs()
        for tensor in self.inputs:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        borrowed = kept.pop(outputs[0].untyped_storage().data_ptr(), 0)
        return {"own": sum(kept.values()), "borrowed": borrowed}


class Update:
    """What stands around the module of a library in a training step; a call makes one, -> the loss."""

    def __init__(self, library: Torch) -> None:
        torch, case = library.torch, library.data.case
        self.x = library.x
        self.loss = torch.nn.functional.mse_loss
        self.outputs = library.outputs
        self.target = library.upstream[0][:, :, :1]
        with torch.random.fork_rng([]):
            torch.manual_seed(0)  # float32 and float64 draw different numbers
            outputs = case.directions * (case.proj_size or case.shape.H)
            self.head = torch.nn.Linear(outputs, 1, dtype=torch.float64)
        self.head.to(library.x)  # its device and dtype
        parameters = [*library.module.parameters(), *self.head.parameters()]
        # Small, so that roundings do not grow from step to step where x is wide.
        self.optimizer = torch.optim.Adam(parameters, lr=1e-4)

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        self.x.grad = None
        loss = self.loss(self.head(self.outputs()[0]), self.target)
        loss.backward()
        self.optimizer.step()
        return loss.item()


class TorchCell(Torch):
    """A loop over time that calls ``LSTMCell``, ``GRUCell`` or ``RNNCell``; states times a mask at resets."""

    def __init__(self, data: Data, threads: int, place: Place = CPU) -> None:
        super().__init__(data, threads, place)
        self.upstream[1:] = [d[0] for d in self.upstream[1:]]
        self.state0 = None if self.state0 is None else tuple(s[0] for s in self.state0)

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        if case.layers > 1 or case.bidirectional or case.ragged:
            return "a loop of one cell serves one layer and direction of equal lengths"
        return "a cell has no projection" if case.proj_size else None

    def build(self) -> Any:
        case = self.data.case
        cell = getattr(importlib.import_module(self.modules), case.cell.name.upper() + "Cell")
        return cell(case.shape.I, case.shape.H, **self.options())

    def outputs(self) -> list[Any]:
        state = self.state0
        masks = None if self.data.reset is None else (1 - self.starts).unsqueeze(2).unbind(0)
        ys = []
        for t, x in enumerate(self.x.unbind(0)):
            if masks is not None and state is not None:
                state = tuple(masks[t] * s for s in state)
            out = self.module(x, self.pair(state))
            state = out if isinstance(out, tuple) else (out,)
            ys.append(state[0])
        return [self.torch.stack(ys), *(state or ())]


class TorchPacked(Torch):
    """The layer between ``pack_padded_sequence`` and ``pad_packed_sequence``."""

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        if not case.ragged or case.resets:
            return "packed sequences are for ragged cases without resets"
        return None

    def outputs(self) -> list[Any]:
        rnn = self.torch.nn.utils.rnn
        packed = rnn.pack_padded_sequence(self.x, self.lengths, enforce_sorted=False)
        y, state = self.module(packed, self.pair(self.state0))
        y, _ = rnn.pad_packed_sequence(y, total_length=self.data.case.shape.T)
        return [y, *state] if isinstance(state, tuple) else [y, state]


class TorchMasked(Torch):
    """The loop of RL libraries: the layer called for one step at a time, states times a mask before it."""

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        if not case.resets or case.ragged or case.bidirectional or case.state:
            return "a loop with masks is for resets, in one direction"
        return None

    def outputs(self) -> list[Any]:
        case = self.data.case
        zeros = self.x.new_zeros(case.layers, case.shape.B, case.shape.H)
        state = tuple(zeros for _ in case.cell.states)
        ys = []
        begin = 0
        for x in self.x.split(self.spans()):
            keep = (1.0 - self.starts[begin]).view(1, -1, 1)
            y, after = self.module(x, self.pair(tuple(keep * s for s in state)))
            state = after if isinstance(after, tuple) else (after,)
            ys.append(y)
            begin += len(x)
        return [self.torch.cat(ys), *state]

    def spans(self) -> list[int]:
        """How many steps each call takes."""
        return [1] * self.data.case.shape.T


class TorchSegments(TorchMasked):
    """The same with a call for all steps up to the next at which any row is reset, as skrl's examples do."""

    def spans(self) -> list[int]:
        T = self.data.case.shape.T
        resets = self.starts[1:].any(1).nonzero().squeeze(1).tolist()
        begins = [0, *(t + 1 for t in resets), T]
        return [end - begin for begin, end in pairwise(begins)]


class TorchSplit(Torch):
    """The layer called once on all segments between resets as rows of their own, padded to the longest, as
    TorchRL's and rsl_rl's modules do. Their last states are not those of the rows, so for updates only.
    """

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        if not case.resets or case.ragged or case.bidirectional or case.state or case.kind != "update":
            return "rows split at resets are for updates with resets, in one direction"
        return None

    def outputs(self) -> list[Any]:
        torch, (T, B, I, _) = self.torch, self.data.case.shape
        starts = self.starts.bool()
        starts[0] = True
        begins = starts.T.flatten().nonzero().squeeze(1)
        lengths = begins.diff(append=begins.new_tensor([T * B]))
        mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(1)
        padded = self.x.new_zeros(*mask.shape, I)
        padded[mask] = self.x.transpose(0, 1).flatten(0, 1)
        y, _ = self.module(padded.transpose(0, 1))
        return [y.transpose(0, 1)[mask].view(B, T, -1).transpose(0, 1)]


class Medium:
    """A variant of PyTorch's with products in bfloat16, ``set_float32_matmul_precision("medium")``."""

    def __init__(self, library: Torch) -> None:
        self.library = library
        self.path = f"{library.path}, products in bfloat16"

    def __call__(self) -> Any:
        with medium():
            return self.library()

    def results(self) -> Results:
        """Of whole training steps the losses alone: gradients were seen to be off by a fifth of their largest
        entry, which users of this setting accept.
        """
        with medium():
            found = self.library.results()
        return {"losses": found["losses"]} if "losses" in found else found

    def saved(self) -> dict[str, int]:
        """As without the setting."""
        return self.library.saved()


@contextmanager
def medium() -> Iterator[None]:
    """That setting, and afterwards as before."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FusedModule(Torch):
    """Our modules in place of PyTorch's; the path says whether our kernels ran, or why PyTorch's did."""

    modules = "fusedrnn.torch"

    @property
    def path(self) -> str:
        return str(self.module.last_path)


class FusedLayer(FusedModule):
    """The layers of ``fusedrnn.torch``, with its lengths and resets."""

    def __init__(self, data: Data, threads: int, place: Place = CPU) -> None:
        super().__init__(data, threads, place)
        reset = None if data.reset is None else self.torch.from_numpy(data.reset).to(place.device)
        lengths = None if data.lengths is None else self.lengths
        self.more = {"lengths": lengths, "reset": reset}

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        return None


class FusedCell(FusedModule, TorchCell):
    """The cells of ``fusedrnn.torch``, one call a step."""
