"""Convert the recurrent layers of a model from ``torch.nn`` to ours, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fusedrnn.backends.arguments import check_bool
from fusedrnn.torch import compilable as _compilable
from fusedrnn.torch.cells import GRUCell, LSTMCell, RNNCell
from fusedrnn.torch.frozen import Freezable, layers_of
from fusedrnn.torch.layers import GRU, LSTM, RNN
from fusedrnn.torch.scripted import OWN, check_torch_has

Classes = dict[type[torch.nn.Module], type[torch.nn.Module]]
REPLACEMENTS: Classes = {ours.torch_class: ours for ours in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)}
COMPILABLE: Classes = {
    ours.torch_class: ours for ours in (_compilable.LSTM, _compilable.GRU, _compilable.RNN)
}
OURS = {ours: theirs for each in (REPLACEMENTS, COMPILABLE) for theirs, ours in each.items()}
NAMES = {theirs.__name__ for theirs in REPLACEMENTS}


class Converted(NamedTuple):
    """What ``convert`` and ``to_torch`` return.

    ``model`` is the model. ``converted`` has the previous class of each converted layer, by its path.
    ``left`` has the reason for each recurrent layer that was not converted, by its path. The path of the
    model itself is empty.
    """

    model: torch.nn.Module
    converted: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{path or 'the model'}: {kind}" for path, kind in self.converted.items()]
        lines += [f"{path or 'the model'}: left as it is, {why}" for path, why in self.left.items()]
        return "\n".join(lines) or "no recurrent layer"


def convert(model: torch.nn.Module, *, compilable: bool = False) -> Converted:
    """Convert all recurrent layers of ``torch.nn`` in a model to ours, in place.

    The layer stays the same object and gets our class. Parameters, hooks, names, optimizers that have the
    parameters, and references to the layer do not change.

    Args:
        model: Any module, which may itself be such a layer.
        compilable: Convert to the layers of ``fusedrnn.torch.compilable``, also from our other layers.

    Returns:
        The model, what was converted, and what was not and why.

    Raises:
        TypeError: ``model`` is not a module, or ``compilable`` not True or False.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_bool("compilable", compilable)
    converted, left = {}, {}
    for path, layer in model.named_modules():
        kind = _class(layer)
        theirs = OURS.get(kind, kind) if compilable else kind
        to = COMPILABLE.get(theirs) if compilable else None
        to = REPLACEMENTS.get(theirs) if to is None else to
        if to is not None and kind is not to:
            _become(layer, to)
            converted[path] = kind.__name__
        elif isinstance(layer, (torch.nn.RNNBase, torch.nn.RNNCellBase)) and kind not in OURS:
            left[path] = f"its class {kind.__name__} is not torch.nn's own"
        elif isinstance(layer, torch.jit.ScriptModule) and layer.original_name in NAMES:
            left[path] = "it is a TorchScript module"
    return Converted(model, converted, left)


def _class(layer: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a layer without parametrizations, for which PyTorch creates a class for each layer."""
    return torch.nn.utils.parametrize.type_before_parametrizations(layer)  # type: ignore[no-untyped-call]


def _become(layer: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    if torch.nn.utils.parametrize.is_parametrized(layer):
        # a new class, since copies of the layer have this one too
        kind = type(type(layer).__name__, (kind,), dict(vars(type(layer))))
    layer.__class__ = kind


def to_torch(model: torch.nn.Module) -> Converted:
    """Convert all of our layers in a model back to those of ``torch.nn``, in place, for tools that need them.

    The options ``recurrent_dropout``, ``recompute`` and ``forget_bias`` are lost.

    Returns:
        The model, what was converted, and what was not and why. Classes derived from ours are not converted,
        since ``torch.nn`` has no class that computes the same.

    Raises:
        ValueError: A layer has zoneout or layer norm, which ``torch.nn`` does not have. The message names
            both, and nothing has changed.
        RuntimeError: A layer is frozen; nothing has changed.
    """
    for path, layer in layers_of(model):
        check_torch_has(layer, path)
    converted, left = {}, {}
    for path, layer in model.named_modules():
        kind = _class(layer)
        if kind in OURS:
            for name in OWN:
                layer.__dict__.pop(name, None)
            _become(layer, OURS[kind])
            converted[path] = kind.__name__
        elif isinstance(layer, Freezable):
            left[path] = f"its class {kind.__name__} is derived from fusedrnn.torch's"
    return Converted(model, converted, left)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Within the block, ``torch.nn.LSTM``, ``GRU``, ``RNN`` and their cells are ours.

    This is for code that builds its own layers. They stay ours after the block. Names that a module has
    imported before, for example with ``from torch.nn import LSTM``, do not change: use ``convert`` there. It
    applies to the whole process, and is not thread-safe.
    """
    places = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
    try:
        for place in places:
            for theirs, ours in REPLACEMENTS.items():
                setattr(place, theirs.__name__, ours)
        yield
    finally:
        for place in places:
            for theirs in REPLACEMENTS:
                setattr(place, theirs.__name__, theirs)
