"""Models: layers that are trained, saved and loaded as a whole."""

from __future__ import annotations

from typing import Any

from fusedrnn.layers import Layer


class Model(Layer):
    """A layer made of layers; give ``__init__`` and ``forward``."""


class Sequential(Model):
    """Layers one after another, named ``l0``, ``l1``, ..."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = layers
        for k, layer in enumerate(layers):
            setattr(self, f"l{k}", layer)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x
