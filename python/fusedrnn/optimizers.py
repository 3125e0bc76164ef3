"""Optimizers, which update the parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fusedrnn import cuda
from fusedrnn.autograd import Array, Parameter, as_variable
from fusedrnn.backends.arguments import bfloat16, check_number, check_shape
from fusedrnn.layer import Missing
from fusedrnn.layers import Layer


class Optimizer:
    """The base class of all optimizers.

    Parameters without a gradient do not change. The gradients do not change.

    Args:
        weight_decay: Each parameter times this number is added to its gradient; at least 0.
        max_norm: The gradients are scaled down if the Euclidean norm of all of them together is above this
            number. None: never.

    Raises:
        TypeError, ValueError: An argument is not a number or out of its range.
    """

    if not TYPE_CHECKING:  # methods of torch.optim
        load_state_dict = Missing("load_state(state)")
        state_dict = Missing("state()")
        step = Missing("update()")
        zero_grad = Missing("cleargrads() of the model")

    def __init__(self, *, weight_decay: float = 0.0, max_norm: float | None = None) -> None:
        self.weight_decay = _rate("weight_decay", weight_decay)
        self.max_norm = None if max_norm in (None, math.inf) else _rate("max_norm", max_norm)
        if self.max_norm == 0:
            raise ValueError("max_norm: expected None or above 0, got 0")
        self.target: Layer | None = None
        self.t = 0
        self.slots: dict[Parameter, dict[str, Array]] = {}  # what is kept for each parameter

    def setup(self, target: Layer) -> Self:
        """Set the model whose parameters ``update`` changes.

        Returns:
            The optimizer.

        Raises:
            TypeError: ``target`` is not a Model or a Layer.
            ValueError: It has no parameters, or has some that are not attributes, for example in a list.
        """
        name = type(self).__name__
        if not isinstance(target, Layer):
            raise TypeError(f"{name}.setup: expected a Model or a Layer, got {type(target).__name__}")
        for path, layer in target.walk():
            if (attribute := _not_found(layer)) is not None:
                where = f"{path}/{attribute}" if path else attribute
                raise ValueError(
                    f"{name}.setup: the layers or parameters in {where} would not be trained; assign each to "
                    "an attribute of its own, for example self.fc = Linear(1)"
                )
        if next(target.params(), None) is None:
            raise ValueError(f"{name}.setup: {type(target).__name__} has no parameters")
        self.target = target
        return self

    def _model(self, method: str) -> Layer:
        """What ``setup`` was given."""
        if self.target is None:
            raise RuntimeError(f"{method}: expected a call of setup(model) before")
        return self.target

    def update(self) -> None:
        """Change every parameter that has a gradient.

        Raises:
            RuntimeError: ``setup`` has not been called.
            FloatingPointError: A gradient has a value that is not finite; the message names the first such
                parameter. Nothing has changed.
            TypeError, ValueError: A gradient that you have set is not made of numbers, or has another shape
                than its parameter; or a parameter is in bfloat16.
        """
        found = []
        for path, p in self._model("update").named_params():
            if p.grad is not None:
                g = as_variable(p.grad, f"gradient of {path}")._data
                check_shape(f"gradient of {path}", g.shape, p.shape)
                found.append((path, p, cuda.as_array(g, p.dtype)))
        refused = bfloat16()
        for path, p, _ in found:
            if p.dtype in refused:
                raise TypeError(
                    f"{path}: expected float32 or float64, got bfloat16, which rounds small changes away; "
                    "keep the weights in float32, and pass a copy in bfloat16 to fusedrnn.kernels"
                )
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(sum(g.sum() for *_, g in found))  # one pass; and a GPU is asked once
        if not math.isfinite(total):
            _check_finite(found)
        pairs = [(p, g) for _, p, g in found]
        self.t += 1
        if self.max_norm is not None:
            squares = (cuda.get_array_module(g).square(g, dtype=np.float64).sum() for _, g in pairs)
            norm = math.sqrt(math.fsum(map(float, squares)))
            if norm > self.max_norm:
                pairs = [(p, g * (self.max_norm / norm)) for p, g in pairs]
        for p, g in pairs:
            if self.weight_decay:
                g = g + self.weight_decay * p._data
            self.update_one(p, g)
            p.version += 1  # the change was in place

    def update_one(self, p: Parameter, g: Array) -> None:
        """Change ``p._data`` in place by the gradient g."""
        raise NotImplementedError(f"{type(self).__name__}.update_one")

    def slot(self, p: Parameter) -> dict[str, Array]:
        """The arrays that are kept for the parameter, on the device of its array."""
        slot = self.slots.setdefault(p, {})
        for name, array in slot.items():
            if cuda.on_gpu(array) != cuda.on_gpu(p._data):
                slot[name] = cuda.like(array, p._data)
        return slot

    def state(self) -> dict[str, Any]:
        """The state of the optimizer: the number of steps, and arrays named ``slot/parameter``.

        Raises:
            RuntimeError: ``setup`` has not been called.
        """
        target = self._model("state")
        return {"t": np.asarray(self.t)} | {
            f"{slot}/{name}": cuda.as_numpy(array)
            for name, p in target.named_params()
            for slot, array in self.slots.get(p, {}).items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what ``state`` returned. The model must already have its weights.

        Raises:
            RuntimeError: ``setup`` has not been called.
            TypeError, ValueError: It is not what ``state`` returns, or an array does not have the shape of a
                parameter.
        """
        params = dict(self._model("load_state").named_params())
        if not isinstance(state, Mapping) or "t" not in state:
            raise TypeError(f"state: expected what state() returned, got {type(state).__name__} without t")
        slots: dict[Parameter, dict[str, Array]] = {}
        for key, array in state.items():
            if key == "t":
                continue
            slot, _, name = key.partition("/")
            if name not in params or params[name].shape != array.shape:
                raise ValueError(
                    f"optimizer state {key}: expected the shape of a parameter, got {array.shape}"
                )
            slots.setdefault(params[name], {})[slot] = array.copy()  # moved to the parameter's device later
        self.slots, self.t = slots, int(state["t"])


def _check_finite(found: list[tuple[str, Parameter, Array]]) -> None:
    """Name the first gradient that is not finite. There may be none, where their sum alone overflows."""
    for path, _, g in found:
        count = g.size - int(cuda.get_array_module(g).isfinite(g).sum())
        if count:
            raise FloatingPointError(
                f"update: expected a finite gradient of {path}, got {count} of {g.size} values that are not; "
                "no parameter has changed. An input, a target or the loss may not be finite"
            )


def _not_found(layer: Layer) -> str | None:
    """The first list, tuple or dict that has a layer or parameter which is not also an attribute."""
    own = vars(layer)
    known = {id(value) for value in own.values()}
    for name, value in own.items():
        inside = value.values() if isinstance(value, dict) else value
        if isinstance(value, list | tuple | dict) and any(
            isinstance(each, Layer | Parameter) and id(each) not in known for each in inside
        ):
            return name
    return None


def _rate(name: str, value: Any) -> float:
    hint = "" if isinstance(value, str) else "; a model is passed to setup"
    number = check_number(name, value, hint)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return number


class SGD(Optimizer):
    """Gradient descent: ``p -= lr * g`` for each parameter p and its gradient g.

    Args:
        lr: The learning rate.
        weight_decay, max_norm: As in ``Optimizer``.

    Raises:
        TypeError, ValueError: An argument is not a finite number of at least 0.
    """

    def __init__(self, lr: float = 0.01, *, weight_decay: float = 0.0, max_norm: float | None = None) -> None:
        super().__init__(weight_decay=weight_decay, max_norm=max_norm)
        self.lr = _rate("lr", lr)

    def update_one(self, p: Parameter, g: Array) -> None:
        p._data -= self.lr * g


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015), in the form at the end of section 2 of the paper.

    Args:
        alpha: The learning rate; 0.001 if neither it nor ``lr`` is given.
        beta1: The decay rate of m, the mean of g; at least 0 and below 1.
        beta2: The decay rate of v, the mean of g*g; at least 0 and below 1.
        eps: Added to the square root of v.
        lr: Another name for ``alpha``.
        weight_decay, max_norm: As in ``Optimizer``.

    Raises:
        TypeError, ValueError: An argument has a wrong type or is out of its range.

    With ``step = alpha * sqrt(1 - beta2**t) / (1 - beta1**t)``:
    ``m += (1 - beta1) * (g - m)``, ``v += (1 - beta2) * (g*g - v)``, ``p -= step * m / (sqrt(v) + eps)``.
    """

    def __init__(
        self,
        alpha: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        *,
        lr: float | None = None,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(weight_decay=weight_decay, max_norm=max_norm)
        if alpha is not None and lr is not None:
            _rate("alpha", alpha)  # as in torch.optim.Adam(parameters, lr=0.1)
            raise TypeError(f"alpha, lr: expected one of them, since they are the same, got {alpha} and {lr}")
        name, given = ("alpha", alpha) if lr is None else ("lr", lr)
        self.alpha = 0.001 if given is None else _rate(name, given)
        self.beta1, self.beta2 = _rate("beta1", beta1), _rate("beta2", beta2)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if beta >= 1:
                raise ValueError(f"{name}: expected at least 0 and below 1, got {beta}")
        self.eps = _rate("eps", eps)

    @property
    def lr(self) -> float:
        """The same as ``alpha``."""
        return self.alpha

    @lr.setter
    def lr(self, value: float) -> None:
        self.alpha = value

    def update_one(self, p: Parameter, g: Array) -> None:
        xp = cuda.get_array_module(p)
        slot = self.slot(p)
        if not slot:
            slot |= {"m": xp.zeros_like(p._data), "v": xp.zeros_like(p._data)}
        m, v = slot["m"], slot["v"]
        step = self.alpha * math.sqrt(1 - self.beta2**self.t) / (1 - self.beta1**self.t)
        work = g - m
        work *= 1 - self.beta1
        m += work
        xp.multiply(g, g, out=work)
        work -= v
        work *= 1 - self.beta2
        v += work
        xp.sqrt(v, out=work)
        work += self.eps
        xp.divide(m, work, out=work)
        work *= step
        p._data -= work
