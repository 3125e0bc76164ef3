"""Checkpoints: everything that training needs to continue with the same bits, in one file.

::

    checkpoint.save("run.ckpt", model, optimizer, loader, epoch=7, losses=losses)
    progress = checkpoint.load("run.ckpt", model, optimizer, loader)

The file has the weights, the states of the optimizer and of the layers, the states of NumPy's global random
generator and of those that you pass, the position in the data, and your own values by name. It is an ``.npz``
file without pickle. It is written under another name, flushed to the disk and renamed, so it is never
incomplete. The previous checkpoint is kept as ``run.ckpt.previous``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn import cuda, npz
from fusedrnn.autograd import Array, Parameter, Variable
from fusedrnn.dataloaders import DataLoader, SeqDataLoader
from fusedrnn.layer import Layer, values
from fusedrnn.optimizers import Optimizer

FORMAT = 1
ARRAY = ({"array", "dtype", "shape"}, {"array", "dtype"})  # keys that mean an array; old files have no shape


class CheckpointError(ValueError):
    """The file is damaged, or does not match the model, the optimizer, the loader or the generators."""


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
        path: The file.
        model: Its parameters and states (h, c) are saved.
        optimizer: Its state is saved.
        loader: Its position and order are saved.
        generators: Random generators in use besides NumPy's global one.
        progress: Your own values, which ``load`` returns: numbers, text, arrays, lists and dicts of them.

    Raises:
        TypeError: An argument is of another type, ``progress`` has something else, or a dict in it has a key
            that is not text. The message names it.
        ValueError: The state of a layer still has a graph, which cannot be saved.
    """
    _check_types(model, optimizer, loader, generators)
    arrays = {f"weight/{name}": array for name, array in values(model).items()}
    arrays |= {f"state/{name}": array for name, array in _carried(model).items()}
    if optimizer is not None:
        arrays |= {f"optimizer/{name}": array for name, array in optimizer.state().items()}
    if loader is not None:
        arrays["loader/index"] = loader.index
    arrays |= {f"progress/{k}": _array(k, v) for k, v in progress.items() if cuda.is_array(v)}
    plain = {
        "format": FORMAT,
        "random": _random_state(),
        "generators": [_plain("generators", g.bit_generator.state) for g in generators],
        "iteration": None if loader is None else loader.iteration,
        "batches": None if loader is None else _batches(loader),
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "progress": {k: _plain(k, v) for k, v in progress.items() if not cuda.is_array(v)},
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
    """Load a checkpoint: set everything that ``save`` wrote.

    Args:
        path: The file.
        model, optimizer, loader, generators: As in ``save``.

    Returns:
        The ``progress`` that ``save`` got, by name.

    Raises:
        TypeError: An argument is of another type; the message names it.
        FileNotFoundError: The file does not exist.
        CheckpointError: It is truncated or damaged, or does not match the arguments. Then nothing has
            changed, except perhaps the model's weights.
    """
    _check_types(model, optimizer, loader, generators)
    try:
        arrays = npz.read(path)
        if "plain" not in arrays:
            raise CheckpointError("expected a checkpoint, got another file, such as one of save_weights")
        plain = json.loads(arrays.pop("plain").tobytes())
        if plain["format"] != FORMAT:
            raise CheckpointError(f"format: expected {FORMAT}, got {plain['format']}")
        name = None if optimizer is None else type(optimizer).__name__
        if plain["optimizer"] != name:
            raise CheckpointError(f"optimizer: expected the saved {plain['optimizer']}, got {name}")
        if (plain["iteration"] is None) != (loader is None):
            raise CheckpointError("loader: expected one if and only if one was saved")
        if len(plain["generators"]) != len(generators):
            raise CheckpointError(
                f"generators: expected the {len(plain['generators'])} saved, got {len(generators)}"
            )
        for generator, state in zip(generators, plain["generators"], strict=True):
            kind = generator.bit_generator.state["bit_generator"]
            if kind != state["bit_generator"]:
                raise CheckpointError(f"generators: expected {state['bit_generator']}, as saved, got {kind}")
        parts: dict[str, dict[str, Array]]
        parts = {k: {} for k in ("weight", "state", "optimizer", "loader", "progress")}
        for key, array in arrays.items():
            part, _, rest = key.partition("/")
            parts[part][rest] = array
        layers = {where for where, _ in model.walk()}
        for key in parts["state"]:
            if key.rpartition("/")[0] not in layers:
                raise CheckpointError(f"state {key}: the model does not have this layer")
        if loader is not None and len(parts["loader"]["index"]) != loader.data_size:
            saved = len(parts["loader"]["index"])
            raise CheckpointError(f"loader: expected {saved} samples, as saved, got {loader.data_size}")
        batches = plain.get("batches")  # older files have none
        if loader is not None and batches is not None and batches != _batches(loader):
            raise CheckpointError(f"loader: expected {batches}, as saved, got {_batches(loader)}")
        model.assign_weights(parts["weight"], "weights")
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
        hint = f"; the previous checkpoint is {previous(path)}" if previous(path).exists() else ""
        raise CheckpointError(f"{path} cannot be loaded: {what}{hint}") from error
    progress: dict[str, Any] = _arrays(plain["progress"])
    return progress | parts["progress"]


def previous(path: npz.PathLike) -> Path:
    """The path of the previous checkpoint."""
    return Path(f"{Path(path)}.previous")


def _check_types(model: Any, optimizer: Any, loader: Any, generators: Any) -> None:
    """Raise a TypeError that names the first argument of another type."""
    expected: tuple[tuple[str, Any, Any, str], ...] = (
        ("model", model, Layer, "a Model or a Layer"),
        ("optimizer", optimizer, Optimizer | None, "an Optimizer or None"),
        ("loader", loader, DataLoader | None, "a DataLoader or None"),
        ("generators", generators, list | tuple, "a list of NumPy's generators"),
    )
    for name, value, kind, words in expected:
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {words}, got {type(value).__name__}")
    for g in generators:
        if not isinstance(g, np.random.Generator):
            raise TypeError(f"generators: expected NumPy's generators, got {type(g).__name__}")


def _batches(loader: DataLoader) -> str:
    """What the batches of an epoch depend on."""
    steps = f", steps={loader.steps}" if isinstance(loader, SeqDataLoader) else ""
    return f"{type(loader).__name__} with batch_size={loader.batch_size}, shuffle={loader.shuffle}{steps}"


def _carried(model: Layer) -> dict[str, Array]:
    """Every variable of a layer that is not a parameter, by its path."""
    found = {}
    for path, layer in model.walk():
        for name, value in vars(layer).items():
            if isinstance(value, Variable) and not isinstance(value, Parameter):
                key = f"{path}/{name}" if path else name
                if value.creator is not None:
                    raise ValueError(
                        f"{key}: expected a state without a graph, since it cannot be saved; call "
                        "unchain_backward() or reset_state() before"
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


def _array(name: str, value: Any) -> Array:
    array = cuda.as_numpy(value)
    if array.dtype.hasobject:
        raise TypeError(f"{name}: expected an array of numbers or text, got {array.dtype}")
    return array


def _plain(name: str, value: Any) -> Any:
    """Numbers, text and arrays, in lists and dicts, for JSON."""
    if isinstance(value, dict):
        if wrong := [k for k in value if not isinstance(k, str)]:
            raise TypeError(f"{name}: expected dicts with keys of type str, got the key {wrong[0]!r}")
        if set(value) in ARRAY:
            raise TypeError(
                f"{name}: expected dicts with other keys than {', '.join(value)}, which mean an array"
            )
        return {k: _plain(name, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, v) for v in value]
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufUS":
            raise TypeError(f"{name}: expected arrays of numbers or text, got {value.dtype}")
        return {"array": value.ravel().tolist(), "dtype": str(value.dtype), "shape": list(value.shape)}
    value = value.item() if isinstance(value, np.generic) else value
    if value is not None and not isinstance(value, str | bool | int | float):
        raise TypeError(
            f"{name}: expected numbers, text, arrays, or lists and dicts of them, got {type(value).__name__}"
        )
    return value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) in ARRAY:
            array = np.array(value["array"], value["dtype"])
            return array.reshape(value.get("shape", array.shape))
        return {k: _arrays(v) for k, v in value.items()}
    return [_arrays(v) for v in value] if isinstance(value, list) else value
