"""Checkpoints: all that training needs to go on to the same bits, in one file, written whole or not at all.

::

    checkpoint.save("run.ckpt", model, optimizer, loader, epoch=7, losses=losses)
    progress = checkpoint.load("run.ckpt", model, optimizer, loader)

The file holds the weights, the optimiser's state, the state of NumPy's global random generator and of those
given, the position in the data, the carried hidden states, and whatever is passed by name. It is an ``.npz``
without pickle; it is written under another name, flushed to the disk and renamed, and the one before it
stays as ``run.ckpt.previous``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn import cuda, npz
from fusedrnn.autograd import Array, Parameter, Variable
from fusedrnn.dataloaders import DataLoader
from fusedrnn.layers import Layer
from fusedrnn.optimizers import Optimizer

FORMAT = 1


class CheckpointError(ValueError):
    """The file is damaged, or is not one of this training."""


def save(
    path: npz.PathLike,
    model: Layer,
    optimizer: Optimizer | None = None,
    loader: DataLoader | None = None,
    generators: Sequence[np.random.Generator] = (),
    **progress: Any,
) -> None:
    """Write a checkpoint.

    Args:
        path: where to.
        model: its parameters and every variable that a layer carries (h, c).
        optimizer: its state.
        loader: its position and order.
        generators: random generators in use beside NumPy's global one.
        progress: what ``load`` gives back: numbers, text, lists and dicts of them; arrays.

    Raises:
        ValueError: a carried state still leads back into a graph, which a file cannot hold.
    """
    arrays = {f"weight/{name}": _values(name, p) for name, p in model.named_params()}
    arrays |= {f"state/{name}": array for name, array in _carried(model).items()}
    if optimizer is not None:
        arrays |= {f"optimizer/{name}": array for name, array in optimizer.state().items()}
    if loader is not None:
        arrays["loader/index"] = loader.index
    arrays |= {f"progress/{k}": cuda.as_numpy(v) for k, v in progress.items() if cuda.is_array(v)}
    plain = {
        "format": FORMAT,
        "random": _random_state(),
        "generators": [_plain(g.bit_generator.state) for g in generators],
        "iteration": None if loader is None else loader.iteration,
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "progress": {k: v for k, v in progress.items() if not cuda.is_array(v)},
    }
    arrays["plain"] = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    npz.write(path, arrays, previous=previous(path))


def load(
    path: npz.PathLike,
    model: Layer,
    optimizer: Optimizer | None = None,
    loader: DataLoader | None = None,
    generators: Sequence[np.random.Generator] = (),
) -> dict[str, Any]:
    """Take up a checkpoint: set everything that ``save`` wrote, and return its ``progress``.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is truncated, damaged, or holds something else than what is asked of it; nothing
            has been changed then, except perhaps the model's weights.
    """
    try:
        arrays = npz.read(path)
        plain = json.loads(arrays.pop("plain").tobytes())
        if plain["format"] != FORMAT:
            raise CheckpointError(f"format {plain['format']}, expected {FORMAT}")
        name = None if optimizer is None else type(optimizer).__name__
        if plain["optimizer"] != name:
            raise CheckpointError(f"saved with optimizer {plain['optimizer']}, expected {name}")
        if (plain["iteration"] is None) != (loader is None):
            raise CheckpointError("saved with a loader and loaded without one, or the other way round")
        if len(plain["generators"]) != len(generators):
            raise CheckpointError(f"{len(plain['generators'])} generators, expected {len(generators)}")
        parts: dict[str, dict[str, Array]]
        parts = {k: {} for k in ("weight", "state", "optimizer", "loader", "progress")}
        for key, array in arrays.items():
            part, _, rest = key.partition("/")
            parts[part][rest] = array
        model.assign_weights(parts["weight"], str(path))
        if optimizer is not None:
            optimizer.load_state(parts["optimizer"])
        if loader is not None:
            loader.index, loader.iteration = parts["loader"]["index"], plain["iteration"]
        _set_carried(model, parts["state"])
        _set_random_state(plain["random"])
        for generator, state in zip(generators, plain["generators"], strict=True):
            generator.bit_generator.state = _arrays(state)
    except (ValueError, KeyError, TypeError) as error:
        what = f"entry {error} is missing" if isinstance(error, KeyError) else str(error)
        hint = f"; the checkpoint before it is {previous(path)}" if previous(path).exists() else ""
        raise CheckpointError(f"{path} cannot be taken up: {what}{hint}") from error
    progress: dict[str, Any] = plain["progress"]
    return progress | parts["progress"]


def previous(path: npz.PathLike) -> Path:
    """Where the checkpoint before the last one is kept."""
    return Path(f"{Path(path)}.previous")


def _values(name: str, p: Parameter) -> Array:
    if p._data is None:
        raise ValueError(f"{name} has no values yet: its size is known at the first call")
    return cuda.as_numpy(p._data)


def _carried(model: Layer) -> dict[str, Array]:
    """Every variable that a layer holds beside its parameters, by its path."""
    found = {}
    for path, layer in model.walk():
        for name, value in vars(layer).items():
            if isinstance(value, Variable) and not isinstance(value, Parameter):
                key = f"{path}/{name}" if path else name
                if value.creator is not None:
                    raise ValueError(
                        f"the state {key} still leads back into a graph, which a checkpoint cannot hold: "
                        "save after unchain_backward() or reset_state()"
                    )
                found[key] = cuda.as_numpy(value._data)
    return found


def _set_carried(model: Layer, states: dict[str, Array]) -> None:
    layers = dict(model.walk())
    for layer in layers.values():
        for name, value in list(vars(layer).items()):
            if isinstance(value, Variable) and not isinstance(value, Parameter):
                setattr(layer, name, None)
    for key, array in states.items():
        path, _, name = key.rpartition("/")
        setattr(layers[path], name, Variable(layers[path].to_device(array)))


def _random_state() -> list[Any]:
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return [name, np.asarray(key).tolist(), int(position), int(has_gauss), float(cached)]


def _set_random_state(state: list[Any]) -> None:
    name, key, position, has_gauss, cached = state
    np.random.set_state((name, np.array(key, np.uint32), position, has_gauss, cached))


def _plain(value: Any) -> Any:
    """A bit generator's state for JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"array", "dtype"}:
            return np.array(value["array"], value["dtype"])
        return {k: _arrays(v) for k, v in value.items()}
    return value
