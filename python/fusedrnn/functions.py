"""Functions of variables, for layers and losses. Arithmetic operators are in ``autograd``.

An argument is a Variable, an array or a number. The result is a Variable on the same device, of the dtype
that NumPy gives. An argument that is not made of numbers raises a ``TypeError``, and one whose shape does not
fit a ``ValueError``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedrnn import autograd, cuda, kernels, multilayer
from fusedrnn.autograd import Array, Function, Variable, as_variable, sum_to
from fusedrnn.backends.arguments import booleans, check_rate, check_shape
from fusedrnn.cells import Cell
from fusedrnn.config import config


class Exp(Function):
    """The exponential of each element."""

    def forward(self, x: Array) -> Array:
        self.y = cuda.get_array_module(x).exp(x)
        return self.y

    def backward(self, gy: Variable) -> Array:
        return gy._data * self.y


class Log(Function):
    """The natural logarithm of each element."""

    def forward(self, x: Array) -> Array:
        return cuda.get_array_module(x).log(x)

    def backward(self, gy: Variable) -> Array:
        return gy._data / self.inputs[0]._data


class Tanh(Function):
    """The hyperbolic tangent of each element."""

    def forward(self, x: Array) -> Array:
        self.y = cuda.get_array_module(x).tanh(x)
        return self.y

    def backward(self, gy: Variable) -> Array:
        return gy._data * (1 - self.y * self.y)


class Sigmoid(Function):
    """``1 / (1 + exp(-x))``, by ``exp(-|x|)``, which cannot overflow."""

    def forward(self, x: Array) -> Array:
        xp = cuda.get_array_module(x)
        e = xp.exp(-xp.abs(x))
        self.y = xp.where(x < 0, e, 1) / (1 + e)
        return self.y

    def backward(self, gy: Variable) -> Array:
        return gy._data * self.y * (1 - self.y)


class ReLU(Function):
    """x where it is positive or NaN, else 0."""

    def forward(self, x: Array) -> Array:
        xp = cuda.get_array_module(x)
        return xp.where(x <= 0, xp.zeros_like(x), x)

    def backward(self, gy: Variable) -> Array:
        xp = cuda.get_array_module(gy)
        return xp.where(self.inputs[0]._data <= 0, xp.zeros_like(gy._data), gy._data)


class Concatenate(Function):
    """Join arrays along an existing axis."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def forward(self, *xs: Array) -> Array:
        y: Array = cuda.get_array_module(xs[0] if xs else None).concatenate(xs, self.axis)
        self.cuts = list(itertools.accumulate(x.shape[self.axis] for x in xs))[:-1]
        return y

    def backward(self, gy: Variable) -> tuple[Array, ...]:
        return tuple(cuda.get_array_module(gy).split(gy._data, self.cuts, self.axis))


class Stack(Function):
    """Join arrays of the same shape along a new axis."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def forward(self, *xs: Array) -> Array:
        return cuda.get_array_module(xs[0] if xs else None).stack(xs, self.axis)

    def backward(self, gy: Variable) -> tuple[Array, ...]:
        return tuple(cuda.get_array_module(gy).moveaxis(gy._data, self.axis, 0))


class Where(Function):
    """a where the condition is true, else b. A NaN in the other branch has no effect."""

    def __init__(self, condition: Array) -> None:
        self.condition = condition

    def forward(self, a: Array, b: Array) -> Array:
        return cuda.get_array_module(a).where(self.condition, a, b)

    def backward(self, gy: Variable) -> tuple[Array, ...]:
        a, b = self.inputs
        xp = cuda.get_array_module(gy)
        zero = xp.zeros_like(gy._data)
        return (
            sum_to(xp.where(self.condition, gy._data, zero), a.shape),
            sum_to(xp.where(self.condition, zero, gy._data), b.shape),
        )


class Linear(Function):
    """x W + b on the last axis: x (..., I), W (I, O), b (O,)."""

    def forward(self, x: Array, W: Array, b: Array | None = None) -> Array:
        if x.ndim == 0 or W.ndim != 2 or x.shape[-1] != W.shape[0]:
            raise ValueError(f"linear: expected x (..., I) and W (I, O), got x {x.shape} and W {W.shape}")
        if b is not None:
            check_shape("b", b.shape, W.shape[1:])
        if cuda.on_gpu(x) != cuda.on_gpu(W):
            raise TypeError(f"x: expected an array of {_module(W)}, like W, got one of {_module(x)}")
        self.x = cuda.as_array(x, W.dtype)
        y: Array = self.x.reshape(-1, W.shape[0]) @ W
        if b is not None:
            y += b
        return y.reshape(*x.shape[:-1], W.shape[1])

    def backward(self, gy: Variable) -> tuple[Array | None, ...]:
        x, W = self.inputs[:2]
        rows = gy._data.reshape(-1, W.shape[1])
        xp = cuda.get_array_module(gy)
        back = xp.multiply if W.shape[1] == 1 else xp.matmul  # an outer product takes BLAS four times as long
        gradients = (
            back(rows, W._data.T).reshape(x.shape) if x.requires_grad else None,
            self.x.reshape(-1, W.shape[0]).T @ rows if W.requires_grad else None,
            rows.sum(axis=0),
        )
        return gradients[: len(self.inputs)]


class Cast(Function):
    """The elements in another dtype; the gradient goes back in the dtype of the input."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def forward(self, x: Array) -> Array:
        self.before = x.dtype
        return cuda.as_array(x, self.dtype)

    def backward(self, gy: Variable) -> Array:
        return cuda.as_array(gy._data, self.before)


class Dropout(Function):
    """Set each element to zero with probability ``ratio`` and divide the others by ``1 - ratio``."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def forward(self, x: Array) -> Array:
        xp = cuda.get_array_module(x)
        self.keep = xp.asarray(np.random.rand(*x.shape) > self.ratio)
        self.scale = x.dtype.type(1 / (1 - self.ratio))
        return xp.where(self.keep, x * self.scale, xp.zeros_like(x))

    def backward(self, gy: Variable) -> Array:
        xp = cuda.get_array_module(gy)
        return xp.where(self.keep, gy._data * self.scale, xp.zeros_like(gy._data))


class MeanSquaredError(Function):
    """See ``mean_squared_error``."""

    def __init__(self, mask: Any = None) -> None:
        self.mask = mask

    def forward(self, y: Array, t: Array) -> Array:
        try:
            fits = np.broadcast_shapes(t.shape, y.shape) == y.shape and t.size == y.size
        except ValueError:
            fits = False
        if y.ndim == 0 or not fits:
            raise ValueError(f"t: expected the shape of y, {y.shape}, got {t.shape}")
        self.divisor: Any = y.shape[1] if y.ndim == 3 else y.shape[0]
        if self.mask is not None:
            keep = _kept(self.mask, y, (y.shape[:-1], y.shape))
            xp = cuda.get_array_module(y)
            keep = xp.broadcast_to(keep if keep.ndim == y.ndim else keep[..., np.newaxis], y.shape)
            self.divisor = _count(keep, y.dtype)
            y, t = _selected(keep, y), _selected(keep, xp.broadcast_to(t, y.shape))
        self.difference = y - t
        return cuda.as_array((self.difference * self.difference).sum() / self.divisor)

    def backward(self, gy: Variable) -> tuple[Array | None, ...]:
        t = self.inputs[1]
        gradient = self.difference * (2 / self.divisor * gy._data)
        return gradient, -gradient.reshape(t.shape) if t.requires_grad else None


class SoftmaxCrossEntropy(Function):
    """See ``softmax_cross_entropy``."""

    def __init__(self, mask: Any = None) -> None:
        self.mask = mask

    def forward(self, x: Array, t: Array) -> Array:
        if x.ndim not in (2, 3) or t.shape != x.shape[:-1] or t.dtype.kind not in "iu":
            raise ValueError(
                "softmax_cross_entropy: expected x (N, C) and t (N,), or x (T, B, C) and t (T, B), t of "
                f"integers, got x {x.shape} and t {t.shape} of {t.dtype}"
            )
        xp = cuda.get_array_module(x)
        self.keep = None
        self.count: Any = t.size
        if self.mask is not None:
            self.keep = _kept(self.mask, x, (t.shape,))
            self.count = _count(self.keep, x.dtype)
            x, t = _selected(self.keep[..., np.newaxis], x), _selected(self.keep, t)
        if t.size and not (t.min() >= 0 and t.max() < x.shape[-1]):
            raise ValueError(f"softmax_cross_entropy: t has values outside 0..{x.shape[-1] - 1}")
        self.t = t[..., np.newaxis]
        shifted = x - x.max(axis=-1, keepdims=True)
        self.log_p = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
        found = xp.take_along_axis(self.log_p, self.t, -1)[..., 0]
        found = found if self.keep is None else _selected(self.keep, found)
        return cuda.as_array(-found.sum() / self.count)

    def backward(self, gy: Variable) -> tuple[Array, None]:
        xp = cuda.get_array_module(gy)
        gradient: Array = xp.exp(self.log_p)
        gradient -= self.t == xp.arange(gradient.shape[-1])
        gradient *= gy._data / self.count
        return gradient if self.keep is None else _selected(self.keep[..., np.newaxis], gradient), None


def _kept(mask: Any, y: Array, shapes: Sequence[tuple[int, ...]]) -> Array:
    """A loss's mask as booleans on the device of y; it must have one of the shapes."""
    keep: Array = cuda.like(as_variable(mask, "mask")._data, y)
    if keep.shape not in shapes:
        expected = " or ".join(dict.fromkeys(map(str, shapes)))
        raise ValueError(f"mask: expected shape {expected}, got {keep.shape}")
    return keep if keep.dtype == np.bool_ else booleans("mask", keep)


def _selected(keep: Array, a: Array) -> Array:
    """Zero where it is not kept: a selection, so that a NaN there has no effect."""
    xp = cuda.get_array_module(a)
    return xp.where(keep, a, xp.zeros((), a.dtype))


def _count(keep: Array, dtype: np.dtype[Any]) -> Array:
    """How many are kept, at least 1: the sum of none is 0. It does not wait for a GPU."""
    return cuda.get_array_module(keep).maximum(keep.sum(), 1).astype(dtype)


class Fused(Function):
    """Recurrent layers over a whole sequence, or one step, as one node.

    Inputs: x ``(T, B, I)``, with ``step`` ``(B, I)``; then the weights of each layer and direction, by
        ``names``; then the cell's row scalars, ``(T, B)`` or ``(B,)`` each; then the initial state, if
        there is one. Outputs: y, the final state, and with ``return_states`` the state of every step; with
        ``step`` only the new state. Everything is cast to the dtype of the weights. ``packed`` has the
        weights of each layer and direction prepared. ``options`` are those of ``fusedrnn.multilayer`` for
        several layers or directions, else those of ``kernels.forward``.
    """

    tape: Any = None

    def __init__(
        self,
        cell: Cell,
        names: Sequence[Sequence[str]],
        packed: Sequence[kernels.Packed],
        options: dict[str, Any],
        step: bool,
    ) -> None:
        self.cell, self.names, self.packed, self.options, self.step = cell, names, packed, options, step
        self.flat = names[0] if len(names) == 1 else [name for slot in names for name in slot]

    def forward(self, x: Array, *arrays: Array) -> tuple[Array, ...]:
        dtype = arrays[0].dtype
        x = cuda.as_array(x, dtype)
        state: list[Array] = []
        for s in arrays[len(self.flat) :]:
            state.append(cuda.as_array(s, dtype))
        if self.step:
            x = x[np.newaxis]
        if names := self.cell.scalars:
            given, state = state[: len(names)], state[len(names) :]
            given = [s[np.newaxis] for s in given] if self.step else given
            self.options["scalars"] = dict(zip(names, given, strict=True))
        state0 = tuple(state) or None
        if not self.needs_backward:
            self.options["save"] = None
        packed, self.packed = self.packed, ()  # the tape keeps what backward needs
        if len(packed) == 1:  # directly to the backend that packed, since a step is short
            self.backend, _, weights = packed[0]
            out = self.backend.forward(self.cell, x, weights, state0, **self.options)
        else:
            out = multilayer.forward_multilayer(self.cell, x, packed, state0, **self.options)
        y, stateT, states, self.tape = out
        return stateT if self.step else (y, *stateT, *(states or ()))

    def backward(self, *gys: Variable | None) -> tuple[Array | None, ...]:
        n = len(self.cell.states)
        wanted = [x.requires_grad for x in self.inputs]
        before = ["x", *self.flat, *self.cell.scalars]  # of the state
        need = {name for name, want in zip(before, wanted, strict=False) if want}
        if any(wanted[len(before) :]):
            need.add("state0")
        dtype = self.inputs[1].dtype
        gradients = [None if g is None else _contiguous(g._data, dtype) for g in gys]
        if self.step:
            gradients = [None, *gradients]
        dy, dstateT, dstates = gradients[0], tuple(gradients[1 : 1 + n]), tuple(gradients[1 + n :]) or None
        if len(self.names) == 1:
            run = self.backend.backward
            dx, dweights, dstate0, dscalars = run(self.tape, dy, dstateT, dstates, need=need)
            slots = [dweights]
        else:
            dx, slots, dstate0, dscalars = multilayer.backward_multilayer(
                self.tape, dy, dstateT, dstates, need=need
            )
        found = [slot[name] for slot, names in zip(slots, self.names, strict=True) for name in names]
        if self.step and dx is not None:
            dx = dx[0]
        for d in dscalars.values():
            found.append(d[0] if self.step and d is not None else d)
        states = () if len(self.inputs) == len(before) else dstate0 or (None,) * n
        return dx, *found, *states


def _module(x: Any) -> str:
    return cuda.get_array_module(x).__name__


def _contiguous(array: Any, dtype: Any) -> Array:
    return cuda.get_array_module(array).asarray(array, dtype, order="C")


def exp(x: Any) -> Variable:
    """The exponential of each element."""
    return Exp()(x)


def log(x: Any) -> Variable:
    """The natural logarithm of each element."""
    return Log()(x)


def tanh(x: Any) -> Variable:
    """The hyperbolic tangent of each element."""
    return Tanh()(x)


def sigmoid(x: Any) -> Variable:
    """``1 / (1 + exp(-x))`` of each element. It does not overflow."""
    return Sigmoid()(x)


def relu(x: Any) -> Variable:
    """x where it is positive or NaN, else 0."""
    return ReLU()(x)


def sum(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Variable:
    """The sum over all elements, or over the axes ``axis``.

    Args:
        x: A variable or an array.
        axis: An axis or a tuple of axes. None: all.
        keepdims: Keep the summed axes with length 1.
    """
    return as_variable(x).sum(axis, keepdims)


def mean(x: Any) -> Variable:
    """The mean over all elements, a variable of one element."""
    x = as_variable(x)
    return x.sum() / x.size


def reshape(x: Any, shape: tuple[int, ...]) -> Variable:
    """The elements of x in another shape."""
    return as_variable(x).reshape(shape)


def transpose(x: Any, axes: tuple[int, ...] | None = None) -> Variable:
    """The axes of x in the order ``axes``; None: in reverse order."""
    return as_variable(x).transpose(axes)


def concatenate(xs: Sequence[Any], axis: int = 0) -> Variable:
    """Join variables or arrays along an existing axis, as in ``numpy.concatenate``."""
    return Concatenate(axis)(*xs)


def stack(xs: Sequence[Any], axis: int = 0) -> Variable:
    """Join variables or arrays of the same shape along a new axis, as in ``numpy.stack``."""
    return Stack(axis)(*xs)


def cast(x: Any, dtype: np.dtype[Any]) -> Variable:
    """The elements of x in another dtype. The gradient has the dtype of x."""
    return Cast(dtype)(x)


def where(condition: Array, a: Any, b: Any) -> Variable:
    """The elements of a where the condition is true, else those of b, with broadcasting.

    A NaN in the branch that is not taken has no effect. A plain number has the dtype of the other branch.

    Raises:
        TypeError: The condition is not made of numbers or booleans.
    """
    if isinstance(b, Variable):
        a = autograd.as_operand(a, b)
    elif isinstance(a, Variable):
        b = autograd.as_operand(b, a)
    return Where(cuda.as_array(cuda.as_numbers("condition", condition), bool))(a, b)


def matmul(a: Any, b: Any) -> Variable:
    """The product of two matrices.

    Raises:
        ValueError: a or b does not have two axes.
    """
    return autograd.MatMul()(a, b)


def linear(x: Any, W: Any, b: Any = None) -> Variable:
    """``x W + b`` on the last axis, in the dtype of W.

    Args:
        x: ``(..., I)``.
        W: ``(I, O)``.
        b: ``(O,)``, or None.

    Returns:
        ``(..., O)``.

    Raises:
        ValueError: The last axis of x does not match W, or b has another shape.
        TypeError: One array is on a GPU and the other is not.
    """
    return Linear()(x, W) if b is None else Linear()(x, W, b)


def dropout(x: Any, dropout_ratio: float = 0.5) -> Variable:
    """Set elements to zero with probability ``dropout_ratio``; divide the others by ``1 - dropout_ratio``.

    The mask is drawn from NumPy's global generator. Within ``test_mode()`` the result is x itself.

    Raises:
        ValueError: ``dropout_ratio`` is not at least 0 and below 1.
    """
    check_rate("dropout_ratio", dropout_ratio, below_one=True)
    return Dropout(dropout_ratio)(x) if config.train and dropout_ratio > 0 else as_variable(x)


def mean_squared_error(y: Any, t: Any, mask: Any = None) -> Variable:
    """``((y - t)**2).sum() / B``, so that the losses of single steps add up to the loss of their sequence.

    Args:
        y: ``(B,)`` or ``(B, O)``, one step, or ``(T, B, O)``, a sequence.
        t: Of the shape of y; leading axes of length 1 may be missing.
        mask: ``(T, B)`` or of the shape of y, booleans or 0 and 1. With a mask, the loss is the mean over the
            elements where it is true, ``((y - t)**2)[mask].mean()``. This mean is also over time and outputs,
            so a mask of ones is not the same as no mask. Other elements may be NaN. If the mask is false
            everywhere, the loss is 0.

    Returns:
        A variable of one element.

    Raises:
        ValueError: The shapes do not match.
    """
    return MeanSquaredError(mask)(y, t)


def softmax(x: Any) -> Variable:
    """``exp(x)`` divided by its sum over the last axis: x ``(N, C)`` to ``(N, C)``."""
    x = as_variable(x)
    e = exp(x - x._data.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_cross_entropy(x: Any, t: Any, mask: Any = None) -> Variable:
    """The mean over n of ``-log softmax(x)[n, t[n]]``.

    Args:
        x: ``(N, C)``, or for a sequence ``(T, B, C)``.
        t: ``(N,)`` or ``(T, B)`` integers from 0 to C-1.
        mask: Of the shape of t, booleans or 0 and 1: the mean is over the elements where it is true. Others
            may be NaN in x and any integer in t. If the mask is false everywhere, the loss is 0.

    Returns:
        A variable of one element.

    Raises:
        ValueError: The shapes do not match, or t has a value out of its range.
    """
    return SoftmaxCrossEntropy(mask)(x, t)
