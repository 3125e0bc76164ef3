"""Models: layers that are trained, saved and loaded as a whole."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from fusedrnn import terminal
from fusedrnn.layers import Layer, Recurrent


class Model(Layer):
    """The base class of models. Assign each layer to an attribute in ``__init__``, and define ``forward``."""

    def reset_state(self) -> None:
        """Forget the states of all layers in this model."""
        for _, layer in self.walk():
            if layer is not self and hasattr(layer, "reset_state"):  # layers of your own too
                layer.reset_state()

    def summary(self) -> str:
        """A table with the shape and the number of values of each parameter, and the total."""
        rows: list[tuple[str, str, str]] = []
        total = 0
        for name, p in self.named_params():
            known = p._data is not None
            total += p.size if known else 0
            rows.append((name, str(p.shape), str(p.size)) if known else (name, "at the first call", "?"))
        rows.append(("in all", "", str(total)))
        return terminal.plain_table("", ("parameter", "shape", "values"), rows, left=2)


class Sequential(Model):
    """Layers that run one after another, named ``l0``, ``l1``, ...

    Keyword arguments, such as ``lengths``, ``reset`` and a cell's row scalars, are passed to every layer that
    takes them by name: recurrent layers, a Sequential inside, or your own models. ``state`` is not passed,
    because each layer has its own.

    Raises:
        TypeError: An argument is not a layer or a function, for example a list of layers.
    """

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        for layer in layers:
            if not callable(layer) or isinstance(layer, type):
                kind = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
                raise TypeError(f"Sequential: expected each layer as an argument of its own, got {kind}")
        self.layers = layers
        for k, layer in enumerate(layers):
            setattr(self, f"l{k}", layer)

    def forward(self, x: Any, **options: Any) -> Any:
        """The result of the last layer. Each layer gets the result of the one before it.

        Args:
            x: The input of the first layer.
            options: ``lengths``, ``reset`` and row scalars such as ``dt``, for the layers that take them, as
                in ``Recurrent.sequence``.

        Raises:
            TypeError: No layer takes an argument that was given.
        """
        given = {name: value for name, value in options.items() if value is not None}
        taken: set[str] = set()
        for layer in self.layers:
            own = {name: given[name] for name in _taken(layer, given)} if given else {}
            taken |= own.keys()
            x = layer(x, **own)
        if given.keys() - taken:
            raise TypeError(
                f"{', '.join(sorted(given.keys() - taken))}: no layer in this Sequential accepts it"
            )
        return x


def _taken(layer: Any, names: Iterable[str]) -> list[str]:
    """The names that a layer takes as arguments."""
    if isinstance(layer, Sequential):
        inside = [_taken(each, names) for each in layer.layers]
        return [name for name in names if any(name in taken for taken in inside)]
    if not isinstance(layer, Layer):  # a function such as functions.tanh
        return []
    parameters = inspect.signature(layer.forward).parameters
    known = parameters.keys() - {"state"}  # which is each layer's own
    if isinstance(layer, Recurrent):
        known |= set(layer.cell.scalars)
    elif any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        known |= set(names)
    return [name for name in names if name in known]
