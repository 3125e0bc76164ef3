"""The base class of all layers: parameters by name, their device, how they are saved."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Never, NoReturn

import numpy as np

from fusedrnn import cuda, npz
from fusedrnn.autograd import Array, Parameter, Variable
from fusedrnn.backends.arguments import FLOATS, bfloat16
from fusedrnn.cells import Cell, order

# What to write in place of arguments that torch.nn has.
INSTEAD = {
    "batch_first": "inputs are (T, B, I), so pass np.swapaxes(x, 0, 1)",
    "bias": "write nobias=True for bias=False",
    "device": "call to_gpu() of the layer",
    "in_features": "write in_size",
    "input_size": "write in_size, which comes after hidden_size",
    "nonlinearity": "write relu=True for the nonlinearity 'relu'",
}


class Missing:
    """An attribute that a class does not have; the AttributeError says what to write instead.

    With a method ``__getattr__`` instead, Python would find every attribute of the class more slowly.
    """

    def __init__(self, instead: str) -> None:
        self.instead = instead

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: object, kind: type) -> NoReturn:
        text = f"{kind.__name__!r} object has no attribute {self.name!r}; write {self.instead}"
        raise AttributeError(text, name=self.name, obj=owner)


class Layer:
    """The base class of layers. Its attributes that are a ``Parameter`` or a ``Layer`` belong to it.

    Raises:
        TypeError: The constructor was given an argument that it does not have, such as one of ``torch.nn``.
            The message says what to write instead.
    """

    gpu = False  # whether the parameters and the initial states are on a GPU

    if not TYPE_CHECKING:  # methods of torch.nn
        cpu = Missing("to_cpu()")
        cuda = Missing("to_gpu()")
        eval = Missing("`with fusedrnn.test_mode():`")
        load_state_dict = Missing("load_weights(path)")
        named_parameters = Missing("named_params()")
        parameters = Missing("params()")
        state_dict = Missing("save_weights(path)")
        to = Missing("to_gpu() or to_cpu()")
        train = Missing("nothing: a layer is in training outside of `with fusedrnn.test_mode():`")
        zero_grad = Missing("cleargrads()")

    def __init__(self, **unknown: Never) -> None:
        super().__init__()
        for name in unknown:
            instead = f"; {INSTEAD[name]}" if name in INSTEAD else ""
            raise TypeError(
                f"{name}: expected one of {type(self).__name__}'s arguments, "
                f"{', '.join(_arguments(type(self))) or 'none'}{instead}"
            )

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.forward(*inputs, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Compute what a call returns. Subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def walk(self, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Layer]]:
        """Yield this layer and all layers in it, each once, with its path of attributes."""
        seen = set() if seen is None else seen
        if id(self) not in seen:
            seen.add(id(self))
            yield path, self
            for name, value in list(vars(self).items()):
                if isinstance(value, Layer):
                    yield from value.walk(f"{path}/{name}" if path else name, seen)

    def named_params(self) -> Iterator[tuple[str, Parameter]]:
        """Yield every parameter once, with its path, such as ``rnn/weight_ih``."""
        seen = set()
        for path, layer in self.walk():
            for name, value in vars(layer).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}/{name}" if path else name, value

    def params(self) -> Iterator[Parameter]:
        """Yield every parameter once."""
        return (p for _, p in self.named_params())

    def cleargrads(self) -> None:
        """Set the gradient of every parameter to None."""
        for p in self.params():
            p.cleargrad()

    def save_weights(self, path: npz.PathLike) -> None:
        """Write all parameters to one ``.npz`` file, by their paths, such as ``rnn/weight_ih``.

        A layer of a cell of your own also has an entry such as ``rnn/cell``: the order of its gates, and a
        digest of what a step computes.
        """
        npz.write(path, values(self))

    def load_weights(self, path: npz.PathLike) -> None:
        """Read a file that ``save_weights`` or DeZero wrote.

        Parameters are cast to each layer's dtype. Sizes that a layer does not know yet are taken from the
        file.

        Raises:
            OSError: The file cannot be read.
            ValueError: An entry is missing, extra, pickled or of another shape, or a cell of your own had
                other gates or states when its weights were saved. The message names it, and no parameter has
                changed. If such a cell only computes something else now, there is a warning.
        """
        arrays = npz.read(path)
        if "plain" in arrays and any(key.startswith("weight/") for key in arrays):
            raise ValueError(
                f"{path}: expected weights, got a checkpoint, which fusedrnn.checkpoint.load reads"
            )
        self.assign_weights(arrays, str(path))

    def assign_weights(self, arrays: Mapping[str, Array], source: str) -> None:
        """Set every parameter from its array. All are checked before the first is set."""
        left = dict(arrays)
        done: dict[int, Array] = {}
        moves: list[tuple[Layer, Parameter, Array]] = []
        sized: list[tuple[Layer, dict[str, Array]]] = []
        for path, layer in self.walk():
            prefix = f"{path}/" if path else ""
            cell = vars(layer).get("cell")
            if isinstance(cell, Cell) and prefix + "cell" in left:
                saved = dict(left.pop(prefix + "cell").astype(str).reshape(-1, 2).tolist())
                if wrong := order.difference(cell, saved):
                    raise ValueError(f"{source}: entry {prefix + 'cell'!r}: {wrong}")
            taken = layer.from_dezero_layout(prefix, left, source)
            for name, shape in layer.weight_shapes().items():
                parameter = vars(layer)[name]
                if id(parameter) in done:  # shared by two layers: saved once
                    taken[name] = done[id(parameter)]
                    continue
                if name not in taken:
                    key = prefix + name
                    if key not in left:
                        raise ValueError(f"{source}: entry {key!r} is missing")
                    taken[name] = npz.checked(left.pop(key), shape, key, source)
                done[id(parameter)] = taken[name]
                values = taken[name].astype(layer.dtype_of(name, taken[name]), order="C")
                moves.append((layer, parameter, values))
            sized.append((layer, taken))
        if left:
            extra = ", ".join(map(repr, sorted(left)))
            raise ValueError(f"{source}: extra entries that the model does not have: {extra}")
        for layer, taken in sized:
            layer.check_sizes(taken, source)
        for layer, parameter, array in moves:
            parameter.assign(layer.to_device(array))
        for layer, taken in sized:
            layer.take_sizes(taken)

    def to_cpu(self) -> None:
        """Move parameters, their gradients and states to the CPU, as NumPy arrays."""
        self._move(False)

    def to_gpu(self) -> None:
        """Move parameters, their gradients and states to the current GPU, as CuPy arrays.

        Parameters whose sizes are not known yet are drawn as on the CPU and then moved too. A state that the
        layer keeps is detached from its graph.

        Raises:
            RuntimeError: There is no GPU, or something is missing; the message says what.
        """
        cuda.require_gpu(f"{type(self).__name__}.to_gpu")
        self._move(True)

    def _move(self, gpu: bool) -> None:
        for _, layer in self.walk():
            layer.gpu = gpu
            for name, value in list(vars(layer).items()):
                if (
                    isinstance(value, Variable)
                    and value._data is not None
                    and cuda.on_gpu(value._data) != gpu
                ):
                    moved = layer.to_device(value._data)
                    if not isinstance(value, Parameter):
                        setattr(layer, name, Variable(moved))
                        continue
                    value.assign(moved)
                    if value.grad is not None:
                        value.grad = Variable(layer.to_device(value.grad._data))

    @property
    def xp(self) -> Any:
        """The array module of the parameters."""
        return importlib.import_module("cupy") if self.gpu else np

    def to_device(self, array: Array) -> Array:
        """The array on the device of the parameters."""
        return cuda.as_cupy(array) if self.gpu else cuda.as_numpy(array)

    # For load_weights; overridden by layers whose sizes may be unknown, or that can read another layout.

    def weight_shapes(self) -> dict[str, tuple[int | None, ...] | None]:
        """Shape of each parameter of this layer itself; a length or shape that is not known yet is None."""
        found = {name: value._data for name, value in vars(self).items() if isinstance(value, Parameter)}
        return {name: None if data is None else data.shape for name, data in found.items()}

    def dtype_of(self, name: str, array: Array) -> np.dtype[Any]:
        """The dtype that a loaded parameter is cast to."""
        data = vars(self)[name]._data
        return array.dtype if data is None else data.dtype

    def from_dezero_layout(self, prefix: str, arrays: dict[str, Array], source: str) -> dict[str, Array]:
        """Take this layer's parameters out of ``arrays`` if they are in DeZero's layout."""
        return {}

    def check_sizes(self, arrays: Mapping[str, Array], source: str) -> None:
        """Raise a ValueError if sizes of loaded arrays differ from each other."""

    def take_sizes(self, arrays: Mapping[str, Array]) -> None:
        """Set sizes that are not known yet from loaded arrays."""


def values(layer: Layer) -> dict[str, Array]:
    """Every parameter of a layer by its path, as NumPy arrays, and what describes cells of the user's own."""
    found = {}
    for name, p in layer.named_params():
        if p._data is None:
            raise ValueError(f"{name} has no values yet: its size is known at the first call")
        found[name] = cuda.as_numpy(p._data)
    for path, each in layer.walk():
        cell = vars(each).get("cell")
        if isinstance(cell, Cell) and not cell.is_builtin:
            found[f"{path}/cell" if path else "cell"] = np.array(list(order.describe(cell).items()))
    return found


def drawn(in_size: int, out_size: int, dtype: np.dtype[Any]) -> Array:
    """Initial values of a matrix, ``randn(in_size, out_size) * sqrt(1 / in_size)``, float32 for bfloat16."""
    values = np.random.randn(in_size, out_size).astype(np.float32 if dtype in bfloat16() else dtype)
    return values * float(np.sqrt(1 / in_size))


def checked_dtype(dtype: Any, low: bool = False) -> np.dtype[Any]:
    """The dtype, if it is float32, float64 or, with ``low``, bfloat16 of ml_dtypes; else a TypeError."""
    words = "float32, float64 or bfloat16 of the package ml_dtypes" if low else "float32 or float64"
    try:
        found: Any = None if dtype is None else np.dtype(dtype)  # NumPy takes None for float64
    except TypeError:  # such as a dtype of PyTorch
        found = dtype
    if not isinstance(found, np.dtype) or found not in (*FLOATS, *(bfloat16() if low else ())):
        raise TypeError(f"dtype: expected {words}, got {found}")
    return found


def _arguments(layer: type[Layer]) -> list[str]:
    """The names of a constructor's arguments, also of those that it passes on to a class above."""
    found: list[str] = []
    for base in layer.__mro__[:-1]:  # object has none
        if "__init__" in vars(base):
            _, *given = inspect.signature(vars(base)["__init__"]).parameters.values()
            own = [a.name for a in given if a.kind == a.KEYWORD_ONLY]
            if not found:
                own = [a.name for a in given if a.kind == a.POSITIONAL_OR_KEYWORD] + own
            found += [name for name in own if name not in found]
            if all(a.kind != a.VAR_KEYWORD for a in given):
                break
    return found
