"""``freeze``: weights that do not change are packed once, and not again at each call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fusedrnn import backends
from fusedrnn.cells import Cell
from fusedrnn.torch import gpu, paths
from fusedrnn.torch.keys import CELLS
from fusedrnn.torch.memory import array, bits, contiguous
from fusedrnn.torch.ops import Weights

M = TypeVar("M", bound=torch.nn.Module)
UNFREEZE = "the layer is frozen; fusedrnn.torch.unfreeze(model) first"


# Of all layers that are frozen now, by id; its list of references is made at once, whatever other threads do.
_there: weakref.WeakValueDictionary[int, Frozen] = weakref.WeakValueDictionary()


class Frozen:
    """The packed weights of a layer or cell, and its parameters at that time. A copy of it is not frozen."""

    def __init__(self, module: Any, weights: list[Weights]) -> None:
        first = weights[0][0]
        self.dtype, self.device, self.weights = first.dtype, first.device, weights
        backend: Any = backends.usable(None) if first.is_cpu else gpu.backend()
        with gpu.on(first.device):  # for each layer and direction, as ``ops.run`` takes them
            names = module.cell.blocks
            low = first.is_cpu and first.dtype is torch.bfloat16
            arrays = [
                dict(zip(names, [array(bits(contiguous(w)) if low else w) for w in each], strict=True))
                for each in weights
            ]
            pack = backend.pack_bits if low else backend.pack
            self.packed = [(backend, pack(module.cell, each)) for each in arrays]
        self._low: Frozen | None = None
        # Where each parameter is, and its state.
        self.parameters = [
            (owner._parameters, name, p, p._version, p.data_ptr())
            for owner in module.modules()
            for name, p in owner._parameters.items()
            if p is not None
        ]

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def lowered(self, module: Any, key: str) -> Frozen:
        """These weights, or in bfloat16 where autocast to it has a call of the cell ``key`` run so."""
        if self.dtype is not torch.float32 or self.device.type != "cpu" or not paths.lowers(key):
            return self
        if self._low is None:
            low = [
                tuple([None if w is None else w.detach().bfloat16() for w in each]) for each in self.weights
            ]
            self._low = Frozen(module, low)
            self._low.parameters = self.parameters
        return self._low

    def check(self, x: Tensor, state0: Sequence[Tensor] | None) -> None:
        """Raise RuntimeError if the packed weights do not match the call, or the layer any more."""
        if x.dtype is not self.dtype or x.device != self.device:
            raise RuntimeError(
                f"input: expected {self.dtype} on {self.device}, as the frozen weights are, got {x.dtype} on "
                f"{x.device}"
            )
        wanted = x.requires_grad or any(s.requires_grad for s in state0 or ())
        for owner, name, p, version, address in self.parameters:
            if owner.get(name) is not p or p.data_ptr() != address or p._version != version:
                raise RuntimeError(f"{name} was changed: {UNFREEZE}")
            wanted = wanted or p.requires_grad
        if wanted and torch.is_grad_enabled():
            raise RuntimeError(f"a gradient could be asked for, outside torch.no_grad(): {UNFREEZE}")


@functools.cache
def _watch_optimizers() -> None:
    """Raise an error for a step on a frozen layer, since fused optimizers do not change versions."""
    register_optimizer_step_pre_hook(_refuse_step)


def _refuse_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    there = [each for reference in _there.valuerefs() if (each := reference()) is not None]
    names = {id(p): name for each in there for _, name, p, *_ in each.parameters}
    for group in optimizer.param_groups if names else ():
        for p in group["params"]:
            if id(p) in names and p.grad is not None:
                raise RuntimeError(f"{names[id(p)]}: {UNFREEZE}")


def frozen(module: torch.nn.Module) -> Frozen | None:
    """What a call of a frozen layer runs, or None. With a dispatch mode that sees operators, they run."""
    found: Frozen | None = module.__dict__.get("_fusedrnn_frozen")
    return None if found is None or torch._C._len_torch_dispatch_stack() else found


class Freezable(torch.nn.Module):
    """The base class of layers and cells; some methods raise an error while it is frozen."""

    last_path: str | None = None
    _key: str  # the key of its cell in CELLS, unless the layer has a cell of its own
    proj_size: int = 0

    @property
    def cell(self) -> Cell:
        """What a step computes."""
        return CELLS[self._key]

    def _weights(self) -> list[Weights]:
        """The weights of each layer and direction."""
        raise NotImplementedError

    def _lacks(self, device: torch.device) -> str | None:
        """What the kernels of a device do not support of this layer, or None."""
        return "proj_size on a GPU" if self.proj_size and device.type != "cpu" else None

    def train(self, mode: bool = True) -> Any:
        """Like ``train`` of PyTorch; raises a RuntimeError for a frozen layer."""
        if mode and self.__dict__.get("_fusedrnn_frozen") is not None:
            raise RuntimeError(f"train: {UNFREEZE}")
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> Any:
        if self.__dict__.get("_fusedrnn_frozen") is not None:
            raise RuntimeError(f"to another dtype, device or memory: {UNFREEZE}")
        return super()._apply(*args, **options)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.__dict__.get("_fusedrnn_frozen") is not None:
            args[-1].append(UNFREEZE)
            return
        super()._load_from_state_dict(*args)


def layers_of(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Our layers and cells in a model, each with its path."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return ((path or "the model", m) for path, m in model.named_modules() if isinstance(m, Freezable))


def freeze(model: M) -> M:
    """Pack the weights of all our layers in a model once, for faster inference. The model changes in place.

    Until ``unfreeze``, these raise an error: training such a layer, loading a state_dict into it, moving it,
    a step of an optimizer with gradients for it, a call after an operation of PyTorch has written to a
    parameter or replaced it, and a call whose gradient may be needed. Writes that PyTorch does not count,
    through ``.data``, a NumPy view or functions such as ``torch._fused_sgd_``, are not detected.

    Returns:
        The model.

    Raises:
        RuntimeError: The kernels do not support a layer, it is in training mode, a hook computes one of its
            weights, as with ``torch.nn.utils.weight_norm`` and pruning, or its parameters were made in
            inference mode. Nothing has changed.
        TypeError: ``model`` is not a module.
        ValueError: The model has none of our layers.
    """
    made: list[tuple[Any, Frozen]] = []
    for path, layer in layers_of(model):
        if layer.training:
            raise RuntimeError(f"{path}: expected a layer in evaluation; call eval() before freeze")
        if layer.__dict__.get("_fusedrnn_frozen") is None:
            weights = layer._weights()
            first = weights[0][0]
            tensors = [w for each in weights for w in each]
            names = [*layer.cell.blocks] * len(weights)
            reason = paths.unsupported(
                first.dtype, first.device, tensors, names, layer._key, "the first weight_ih"
            )
            reason = reason or layer._lacks(first.device)
            if reason is not None:
                raise RuntimeError(f"{path}: the kernels cannot run it: {reason}")
            for name, value in vars(layer).items():
                if isinstance(value, Tensor) and name.startswith((*layer.cell.blocks,)):
                    raise RuntimeError(
                        f"{path}: {name} is not a parameter, but computed by a hook in each call; use "
                        "torch.nn.utils.parametrizations, or make it permanent, as prune.remove does"
                    )
            for name, p in layer.named_parameters():
                if p.is_inference():
                    raise RuntimeError(
                        f"{path}: {name} was made in torch.inference_mode(), of whose tensors PyTorch counts "
                        "no changes; make the layer outside of it"
                    )
            made.append((layer, Frozen(layer, weights)))
    if not any(True for _ in layers_of(model)):
        raise ValueError("model: it has no layer of fusedrnn.torch; fusedrnn.torch.convert makes some")
    for layer, found in made:
        layer.__dict__["_fusedrnn_frozen"] = found
        _there[id(found)] = found
    _watch_optimizers()
    return model


def unfreeze(model: M) -> M:
    """Undo ``freeze``: the layers read their parameters again in every call.

    Returns:
        The model.
    """
    for _, layer in layers_of(model):
        found = layer.__dict__.pop("_fusedrnn_frozen", None)
        if found is not None:
            _there.pop(id(found), None)
    return model
