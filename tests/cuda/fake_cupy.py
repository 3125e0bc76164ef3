"""CuPy's place taken by NumPy, for computers without a GPU: an array type that mixes with nothing of NumPy's.

Code that runs on these arrays makes no implicit copy, calls the array's own module, and uses of CuPy only
what ``NAMES`` and ``METHODS`` list, which ``test_cuda_native`` looks up in CuPy itself where that is
installed. What CuPy computes is not tested here.
"""

from __future__ import annotations

import operator
import types
from dataclasses import replace
from typing import Any

import numpy as np

from emulated import EmulatedDevice

# What the package may use.
NAMES = [
    "abs", "add", "arange", "asarray", "broadcast_to", "concatenate", "divide", "empty", "exp", "expand_dims",
    "full", "log", "matmul", "maximum", "may_share_memory", "moveaxis", "multiply", "ones_like", "split",
    "sqrt", "square", "stack", "take_along_axis", "tanh", "where", "zeros", "zeros_like",
]  # fmt: skip
VALUES = ["shape", "ndim", "size", "dtype", "itemsize", "strides", "nbytes", "flags"]
METHODS = ["any", "astype", "copy", "item", "max", "min", "reshape", "sum", "transpose"]
OPERATORS = [
    "add", "sub", "mul", "truediv", "pow", "matmul", "floordiv", "neg", "lt", "le", "gt", "ge", "eq", "ne",
    "and_", "or_", "iadd", "isub", "imul", "itruediv",
]  # fmt: skip


class ndarray:
    """A NumPy array, hidden."""

    __module__ = "cupy"
    device = types.SimpleNamespace(id=0)

    def __init__(self, array: Any) -> None:
        self._array = np.asarray(array)
        assert not isinstance(array, ndarray)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            return NotImplemented
        return _wrapped(getattr(ufunc, method)(*map(_own, inputs), **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name in VALUES:
            return getattr(self._array, name)
        if name in METHODS:
            return _calling(getattr(self._array, name))
        raise AttributeError(name)

    @property
    def T(self) -> ndarray:
        return ndarray(self._array.T)

    def get(self) -> Any:
        return self._array.copy()

    def __getitem__(self, index: Any) -> ndarray:
        return ndarray(self._array[_own(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._array[_own(index)] = _own(value)

    def __iter__(self) -> Any:
        return map(ndarray, self._array)


for _name in OPERATORS:
    _function = getattr(operator, _name)
    setattr(
        ndarray,
        f"__{_name.strip('_')}__",
        lambda a, *b, f=_function: _wrapped(f(a._array, *map(_own, b))),
    )
    if _name in ("add", "sub", "mul", "truediv", "pow"):
        setattr(ndarray, f"__r{_name}__", lambda a, b, f=_function: _wrapped(f(_own(b), a._array)))
for _function in (len, float, int, bool, repr):
    setattr(ndarray, f"__{_function.__name__}__", lambda a, f=_function: f(a._array))
ndarray.__hash__ = None  # type: ignore[assignment]


def _own(value: Any) -> Any:
    """The NumPy array of a hidden one; an array of NumPy's itself does not belong here."""
    if isinstance(value, ndarray):
        return value._array
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return type(value)(map(_own, value)) if type(value) in (tuple, list) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return ndarray(value)
    return type(value)(map(_wrapped, value)) if isinstance(value, tuple | list) else value


def _calling(function: Any) -> Any:
    """A function of NumPy on hidden arrays."""

    def call(*args: Any, **kwargs: Any) -> Any:
        made = function(*map(_own, args), **{k: _own(v) for k, v in kwargs.items()})
        return kwargs["out"] if "out" in kwargs else _wrapped(made)

    return call


def _asarray(a: Any, dtype: Any = None, order: Any = None) -> ndarray:
    if isinstance(a, ndarray):
        made = np.asarray(a._array, dtype, order=order)
        return a if made is a._array else ndarray(made)
    return ndarray(np.array(a, dtype, order=order or "K"))


def module() -> types.ModuleType:
    """What stands in ``sys.modules`` as ``cupy``."""
    made = types.ModuleType("cupy")
    for name in NAMES:
        setattr(made, name, _calling(getattr(np, name)))
    made.asarray, made.ndarray = _asarray, ndarray  # type: ignore[attr-defined]
    made.add.at = _calling(np.add.at)  # type: ignore[attr-defined]
    return made


class HiddenDevice(EmulatedDevice):
    """The emulated device with such arrays."""

    def is_array(self, a: Any) -> bool:
        return isinstance(a, ndarray)

    def empty(self, shape: Any, dtype: Any) -> Any:
        return ndarray(super().empty(shape, dtype))

    def pointer(self, a: Any) -> int:
        return super().pointer(a._array)

    def matmul(self, a: Any, b: Any, out: Any, precision: str = "ieee") -> None:
        super().matmul(a._array, b._array, out._array, precision)

    def asarray(self, a: Any) -> Any:
        return _asarray(a)


ONE = ("x", "dy", "lengths", "reset")  # of a problem, beside tuples


def moved(p: Any, put: Any) -> Any:
    """The problem with all its arrays elsewhere."""

    def all_of(arrays: Any) -> Any:
        return None if arrays is None else tuple(None if a is None else put(a) for a in arrays)

    tuples = {n: all_of(getattr(p, n)) for n in ("state0", "dstateT", "dstates")}
    ones = dict(zip(ONE, all_of(getattr(p, n) for n in ONE), strict=True))
    return replace(p, weights={n: put(w) for n, w in p.weights.items()}, **tuples, **ones)


def hidden(p: Any) -> Any:
    """The problem with arrays of a device that are not NumPy's."""
    return moved(p, _asarray)
