"""Our layers in models that were built with ``torch.nn``'s, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fusedrnn.torch import compilable as _compilable
from fusedrnn.torch.cells import GRUCell, LSTMCell, RNNCell
from fusedrnn.torch.frozen import Freezable
from fusedrnn.torch.layers import GRU, LSTM, RNN
from fusedrnn.torch.scripted import OWN, check_torch_has

REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.RNN: RNN,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
    torch.nn.RNNCell: RNNCell,
}
COMPILABLE: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LSTM: _compilable.LSTM,
    torch.nn.GRU: _compilable.GRU,
    torch.nn.RNN: _compilable.RNN,
}
OURS = {ours: theirs for each in (REPLACEMENTS, COMPILABLE) for theirs, ours in each.items()}


class Converted(NamedTuple):
    """What ``convert`` and ``to_torch`` return.

    ``model`` is the model. ``converted`` has the class before of each layer that changed, by its path.
    ``left`` has the reason for each recurrent layer that did not change, by its path. The path of the model
    itself is empty.
    """

    model: torch.nn.Module
    converted: dict[str, str]  # path of each swapped layer, "" is the model itself: its class
    left: dict[str, str]  # path of each recurrent layer that stays as it is: why

    def __str__(self) -> str:
        lines = [f"{path or 'the model'}: {kind}" for path, kind in self.converted.items()]
        lines += [f"{path or 'the model'}: left as it is, {why}" for path, why in self.left.items()]
        return "\n".join(lines) or "no recurrent layer"


def convert(model: torch.nn.Module, *, compilable: bool = False) -> Converted:
    """Make every layer of ``torch.nn`` that is recurrent in a model one of ours, in place.

    The layer object stays the same and gets our class: parameters, hooks, names, optimisers that hold the
    parameters, and references to the layer elsewhere are untouched.

    Args:
        model: Any module; also such a layer itself.
        compilable: Layers become those of ``fusedrnn.torch.compilable``, also where they are ours already.

    Returns:
        The model, what was converted, and what was not and why.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
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
    return Converted(model, converted, left)


def _class(layer: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a layer, apart from parametrizations, for which PyTorch makes each layer a class."""
    found: type[torch.nn.Module] = torch.nn.utils.parametrize.type_before_parametrizations(layer)  # type: ignore[no-untyped-call]
    return found


def _become(layer: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    if torch.nn.utils.parametrize.is_parametrized(layer):
        type(layer).__bases__ = (kind,)
    else:
        layer.__class__ = kind


def to_torch(model: torch.nn.Module) -> Converted:
    """Make each of our layers in a model ``torch.nn``'s again, in place: for tools that look for those.

    Recurrent dropout, which is for training, is left behind.

    Returns:
        The model, what was converted, and what was not and why. Not converted are classes derived from ours,
        since ``torch.nn`` has no class that computes the same.

    Raises:
        ValueError: A layer has zoneout or layer norm, which ``torch.nn`` lacks; the message names both, and
            nothing was changed.
        RuntimeError: A layer is frozen; nothing was changed.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for path, layer in model.named_modules():
        if isinstance(layer, Freezable):
            check_torch_has(layer, path or "the model")
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
    """Within the block the recurrent layers of ``torch.nn`` are ours, for code that builds its own.

    What is built within stays ours after the block. Names that a module has imported before, as by ``from
    torch.nn import LSTM``, are not changed: there ``convert`` helps. Not for several threads at a time.
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
