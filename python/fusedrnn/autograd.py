"""The tape: define-by-run variables, the functions that connect them, and backward.

A ``Function`` turns arrays into arrays and remembers the variables it was given; a ``Variable`` remembers the
function that made it. That chain is the whole graph: ``backward`` walks it from the newest function to the
oldest, ``unchain_backward`` cuts it. Functions hold their outputs by weak references, so that a graph
without other references is freed at once, without the garbage collector. First derivatives only: gradients
are not themselves part of a graph.
"""

from __future__ import annotations

import heapq
import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fusedrnn import cuda
from fusedrnn.backends.arguments import bfloat16, check_bool, check_number, check_shape
from fusedrnn.backends.protocol import Array as Array
from fusedrnn.config import config
from fusedrnn.config import no_grad as no_grad


class Variable:
    """An array with a gradient and a reference to the function that made it.

    ``grad`` is a Variable of the same shape and dtype, or None. ``version`` counts how often ``data`` was
    set (an in-place operator such as ``v.data += 1`` sets it too; writing to elements, ``v.data[0] = 1``,
    does not). If it has changed between a function's forward and backward pass, backward raises an error.
    """

    __slots__ = ("__weakref__", "_data", "creator", "grad", "name", "requires_grad", "version")
    __array_ufunc__ = None  # array + variable is Variable.__radd__, not a loop over the array's elements

    def __init__(self, data: Array | None, name: str | None = None) -> None:
        self._data: Any = data if type(data) is np.ndarray else _checked(data)
        self.name = name
        self.grad: Variable | None = None
        self.creator: Function | None = None
        self.requires_grad = True
        self.version = 0

    @property
    def data(self) -> Any:
        """The array, or None while its size is not known. Setting it counts as a change."""
        return self._data

    @data.setter
    def data(self, value: Array | None) -> None:
        self._data = _checked(value)
        self.version += 1

    def _known(self) -> Any:
        """The array, or an AttributeError if there is none yet."""
        if self._data is not None:
            return self._data
        raise AttributeError(f"{self.name or 'variable'} has no values yet: its size is known at first use")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self._known().shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._known().ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._known().size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the array."""
        return self._known().dtype

    def __len__(self) -> int:
        return len(self._data)

    def item(self) -> Any:
        """The only element, as a plain number.

        Raises:
            ValueError: There are several elements, or none yet.
        """
        if self._data is None or self._data.size != 1:
            got = "none yet" if self._data is None else f"shape {self.shape}"
            raise ValueError(f"item: expected a variable of one element, got {got}; index it, or take a sum")
        return self._data.item()

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    # By value, as of arrays; == compares identity, which the graph needs.
    def __lt__(self, other: Any) -> Any:
        return self._data < as_variable(other, "operand")._data

    def __le__(self, other: Any) -> Any:
        return self._data <= as_variable(other, "operand")._data

    def __gt__(self, other: Any) -> Any:
        return self._data > as_variable(other, "operand")._data

    def __ge__(self, other: Any) -> Any:
        return self._data >= as_variable(other, "operand")._data

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """For ``np.asarray(v)`` and what calls it, such as Matplotlib.

        A read-only view without a gradient, since backward reads this memory; a copy if it is on a GPU.
        """
        data = self._data
        if data is None:
            raise ValueError(f"{self.name or 'variable'} has no values yet: its size is known at first use")
        if cuda.on_gpu(data):
            if copy is False:
                raise ValueError("copy: expected None or True for an array on a GPU, got False")
            data = cuda.as_numpy(data)
        array = np.array(data, dtype, copy=copy)
        if np.may_share_memory(array, data):
            array = array.view()
            array.flags.writeable = False
        return array

    def __repr__(self) -> str:
        text = "None" if self._data is None else str(self._data).replace("\n", "\n" + " " * 9)
        return f"variable({text})"

    def cleargrad(self) -> None:
        """Set ``grad`` to None."""
        self.grad = None

    def backward(self, retain_grad: bool = False, create_graph: bool = False, *, grad: Any = None) -> None:
        """Add the gradient of this variable to the ``grad`` of every variable it was made from.

        Args:
            retain_grad: keep the gradients of intermediate variables, which are dropped otherwise.
            create_graph: True raises an error: only first derivatives are supported.
            grad: the upstream gradient, of this variable's shape: a variable or an array.
                None: its ``.grad`` if that is set, else 1, which only a variable of one element may have.

        Raises:
            RuntimeError: No function made this variable, or it was not recorded.
            ValueError: There is no upstream gradient, or it has another shape.
        """
        check_bool("retain_grad", retain_grad, "; pass an upstream gradient as backward(grad=...)")
        if create_graph:
            raise NotImplementedError("create_graph=True: second derivatives are not supported")
        if self.creator is None:
            raise RuntimeError(f"backward: {self._unrecorded()}")
        if grad is not None:
            array = as_variable(grad, "grad")._data
            check_shape("grad", array.shape, self.shape)
            self.grad = Variable(cuda.as_array(cuda.like(array, self._data), self.dtype))
        elif self.grad is None:
            if self._data.size != 1:
                raise ValueError(
                    f"backward: a variable of shape {self.shape} needs an upstream gradient; pass "
                    "backward(grad=...) or set .grad, or reduce it to one number first, e.g. with .sum()"
                )
            self.grad = Variable(cuda.get_array_module(self._data).ones_like(self._data))
        heap = [(-self.creator.order, self.creator)]  # newest first; the order is unique
        seen = {self.creator}
        with no_grad():
            while heap:
                function = heapq.heappop(heap)[1]
                for x, gradient in zip(function.inputs, function.gradients(retain_grad), strict=True):
                    if gradient is None or not x.requires_grad:
                        continue
                    x.grad = gradient if x.grad is None else Variable(x.grad._data + gradient._data)
                    if x.creator is not None and x.creator not in seen:
                        seen.add(x.creator)
                        heapq.heappush(heap, (-x.creator.order, x.creator))

    def _unrecorded(self) -> str:
        """Why there is no graph for backward, and what to do."""
        if not self.requires_grad:
            return (
                "this variable was computed from arrays and numbers only; what needs a gradient has to be a "
                "Variable or a Parameter"
            )
        return (
            "this variable has no graph: it is an input, was computed within no_grad(), or was cut off by "
            "unchain() or unchain_backward(); run forward again, outside no_grad(), and call backward() on "
            "the result"
        )

    def unchain(self) -> None:
        """Forget the function that made this variable."""
        self.creator = None

    def unchain_backward(self) -> None:
        """Cut the graph behind this variable; every value stays.

        Every output of every function in the graph is cut, not only those that led here: a fused node also
        returns its final state, and gradients of the next chunk must not reach this one through it.
        """
        functions = [] if self.creator is None else [self.creator]
        seen = set(functions)
        while functions:
            function = functions.pop()
            for reference in function.outputs:
                if (output := reference()) is not None:
                    output.creator = None
            for x in function.inputs:
                if x.creator is not None and x.creator not in seen:
                    seen.add(x.creator)
                    functions.append(x.creator)

    def reshape(self, *shape: Any) -> Variable:
        """The same elements in another shape, given as one tuple or as several numbers."""
        return Reshape(shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape)(self)

    def transpose(self, *axes: Any) -> Variable:
        """The axes in another order, as in ``numpy.transpose``; without an argument in reverse order."""
        one = len(axes) == 1 and not isinstance(axes[0], int)
        return Transpose(axes[0] if one else axes or None)(self)

    @property
    def T(self) -> Variable:
        """The axes in reverse order."""
        self._known()
        return Transpose(None)(self)

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Variable:
        """The sum over all elements, or over the axes ``axis``, which ``keepdims`` keeps with length 1."""
        return Sum(axis, keepdims)(self)

    def __getitem__(self, index: Any) -> Variable:
        return GetItem(index)(self)

    def __neg__(self) -> Variable:
        return Neg()(self)

    def __add__(self, other: Any) -> Variable:
        return Add()(self, as_operand(other, self))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Variable:
        return Sub()(self, as_operand(other, self))

    def __rsub__(self, other: Any) -> Variable:
        return Sub()(as_operand(other, self), self)

    def __mul__(self, other: Any) -> Variable:
        return Mul()(self, as_operand(other, self))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Variable:
        return Div()(self, as_operand(other, self))

    def __rtruediv__(self, other: Any) -> Variable:
        return Div()(as_operand(other, self), self)

    def __pow__(self, exponent: float) -> Variable:
        return Pow(exponent)(self)

    def __matmul__(self, other: Any) -> Variable:
        return MatMul()(self, other)

    def __rmatmul__(self, other: Any) -> Variable:
        return MatMul()(other, self)


class Parameter(Variable):
    """A variable that a layer owns and an optimiser changes.

    ``private`` is true as long as no reference to its array has left the library. Then a change of the array
    changes ``version`` too, and a layer may keep a packed copy until ``version`` changes.
    """

    __slots__ = ("private",)

    def __init__(self, data: Array | None, name: str | None = None) -> None:
        super().__init__(data, name)
        self.private = data is None

    @property
    def data(self) -> Any:
        """The array. The caller may write to it, so ``private`` becomes False."""
        self.private = False
        return self._data

    @data.setter
    def data(self, value: Array | None) -> None:
        self.private = False
        self._data = _checked(value)
        self.version += 1

    def assign(self, value: Array) -> None:
        """Take over an array that has no other references."""
        self.data = value
        self.private = True


def _checked(data: Any) -> Any:
    if isinstance(data, np.generic):  # what NumPy makes of sums of arrays without axes
        return np.asarray(data)
    if data is not None and not cuda.is_array(data):
        raise TypeError(f"data: expected a NumPy or CuPy array or None, got {type(data).__name__}")
    return data


def as_array(x: Any) -> Array:
    """Convert plain numbers to arrays without axes."""
    return cuda.as_array(x)


def as_variable(x: Any, name: str = "x") -> Variable:
    """Variables as they are; arrays and numbers as constants, which get no gradient; else an error."""
    if isinstance(x, Variable):
        return x
    variable = Variable(cuda.as_numbers(name, x))
    variable.requires_grad = False
    return variable


def as_operand(x: Any, other: Variable) -> Variable:
    """As ``as_variable``; a plain number takes the other operand's precision."""
    if type(x) in (int, float, bool):
        xp = cuda.get_array_module(other)
        return as_variable(xp.asarray(x, dtype=np.result_type(other.dtype, x)))
    return as_variable(x, "operand")


class Function:
    """One node of the graph. A subclass gives ``forward`` and ``backward``.

    ``forward`` takes arrays and returns an array or a tuple of arrays. ``backward`` takes the gradient of
    each output: a Variable, or None if there is none (possible only with several outputs). It returns for
    each input a gradient (a Variable or an array) or None. While a graph is recorded, ``inputs`` holds the
    input variables and ``outputs`` weak references to the output variables.
    """

    inputs: tuple[Variable, ...] = ()
    outputs: tuple[weakref.ref[Variable], ...] = ()
    versions: tuple[int, ...] = ()
    order = 0
    _orders = itertools.count()
    needs_backward = True  # else forward keeps nothing

    def __call__(self, *inputs: Any) -> Any:
        # One loop over the inputs and one over the outputs: this is most of the cost of a small operation.
        variables, arrays, versions, wanted = [], [], [], False
        for k, x in enumerate(inputs):
            if not isinstance(x, Variable):
                x = as_variable(x, f"{type(self).__name__}: input {k}")
            variables.append(x)
            arrays.append(x._data)
            versions.append(x.version)
            wanted = wanted or x.requires_grad
        recording = config.enable_backprop
        self.needs_backward = needed = recording and wanted
        if needed:
            # before forward, which may check which inputs need a gradient
            self.inputs = tuple(variables)
            self.versions = tuple(versions)
            self.order = next(self._orders)
        ys = self.forward(*arrays)
        outputs, references = [], []
        for array in ys if isinstance(ys, tuple) else (ys,):
            y = Variable(array if type(array) is np.ndarray else cuda.as_array(array))
            outputs.append(y)
            if needed:
                y.creator = self
                references.append(weakref.ref(y))
            else:
                y.requires_grad = not recording  # of constants only: a constant too
        self.outputs = tuple(references)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def forward(self, *xs: Any) -> Any:
        """The outputs, an array or a tuple of arrays, for the arrays of the inputs."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def backward(self, *gys: Any) -> Any:
        """The gradient of each input, an array, a Variable or None, for the gradient of each output."""
        raise NotImplementedError(f"{type(self).__name__}.backward")

    def gradients(self, retain_grad: bool) -> list[Variable | None]:
        """Gradients of the inputs from those of the outputs, checked, each in its input's dtype."""
        name = type(self).__name__
        outputs = [reference() for reference in self.outputs]
        for what, pairs in (
            ("input", zip(self.inputs, self.versions, strict=True)),
            ("output", ((y, 0) for y in outputs if y is not None)),
        ):
            for k, (variable, version) in enumerate(pairs):
                if variable.version != version:
                    raise RuntimeError(
                        f"{name}: {what} {k} ({variable.name or 'unnamed'}) was changed after forward; call "
                        "backward before the optimiser's update, and between sequences reset_state() or "
                        "unchain_backward(), or backward continues into older steps"
                    )
        upstream = [None if y is None else y.grad for y in outputs]
        result = self.backward(*upstream)
        gradients = result if isinstance(result, tuple) else (result,)
        if len(gradients) != len(self.inputs):
            raise ValueError(f"{name}.backward: expected {len(self.inputs)} gradients, got {len(gradients)}")
        for y in outputs if not retain_grad else ():
            if y is not None:
                y.grad = None
        given = zip(gradients, self.inputs, strict=True)
        found = [None if g is None else _gradient(g, x, name) for g, x in given]
        for k, (g, x) in enumerate(zip(found, self.inputs, strict=True)):
            if g is not None and x.creator is None and x.grad is None and x.requires_grad:
                found[k] = _alone(g, (*found, *upstream))  # the program may write to it
        return found


def _gradient(gradient: Any, x: Variable, name: str) -> Variable:
    array = gradient._data if isinstance(gradient, Variable) else cuda.as_array(gradient)
    if array.shape != x.shape:
        check_shape(f"{name}.backward: gradient of an input", array.shape, x.shape)
    if array.dtype != x.dtype and (x.dtype.kind == "f" or x.dtype in bfloat16()):
        array = array.astype(x.dtype)
    return Variable(array)


def _alone(gradient: Variable, others: Iterable[Variable | None]) -> Variable:
    """The gradient in memory that none of the others has."""
    shares = cuda.get_array_module(gradient).may_share_memory
    there = (g._data for g in others if g is not None and g is not gradient)
    return Variable(gradient._data.copy()) if any(shares(gradient._data, g) for g in there) else gradient


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum over the axes along which ``shape`` was broadcast to ``x.shape``."""
    if x.shape == shape:
        return x
    lead = x.ndim - len(shape)
    ones = tuple(k + lead for k, n in enumerate(shape) if n == 1 and x.shape[k + lead] != 1)
    total: Array = x.sum(axis=tuple(range(lead)) + ones, keepdims=True)
    return total.reshape(shape)


class Add(Function):
    """``a + b``, with broadcasting."""

    def forward(self, a: Array, b: Array) -> Array:
        return a + b

    def backward(self, gy: Variable) -> tuple[Array, ...]:
        a, b = self.inputs
        return sum_to(gy._data, a.shape), sum_to(gy._data, b.shape)


class Sub(Function):
    """``a - b``, with broadcasting."""

    def forward(self, a: Array, b: Array) -> Array:
        return a - b

    def backward(self, gy: Variable) -> tuple[Array, ...]:
        a, b = self.inputs
        return sum_to(gy._data, a.shape), sum_to(-gy._data, b.shape)


class Mul(Function):
    """``a * b``, with broadcasting."""

    def forward(self, a: Array, b: Array) -> Array:
        return a * b

    def backward(self, gy: Variable) -> tuple[Array | None, ...]:
        a, b = self.inputs
        return (
            sum_to(gy._data * b._data, a.shape) if a.requires_grad else None,
            sum_to(gy._data * a._data, b.shape) if b.requires_grad else None,
        )


class Div(Function):
    """``a / b``, with broadcasting."""

    def forward(self, a: Array, b: Array) -> Array:
        return a / b

    def backward(self, gy: Variable) -> tuple[Array | None, ...]:
        a, b = self.inputs
        return (
            sum_to(gy._data / b._data, a.shape) if a.requires_grad else None,
            sum_to(-gy._data * (a._data / b._data) / b._data, b.shape) if b.requires_grad else None,
        )


class Neg(Function):
    """``-a``."""

    def forward(self, a: Array) -> Array:
        return -a

    def backward(self, gy: Variable) -> Array:
        return -gy._data


class Pow(Function):
    """A plain number as exponent. With 0 the gradient is 0, also at 0, where the formula would be 0 * inf."""

    def __init__(self, exponent: float) -> None:
        check_number("exponent", exponent)
        self.exponent = exponent

    def forward(self, a: Array) -> Array:
        return a**self.exponent

    def backward(self, gy: Variable) -> Array:
        return gy._data * (n := self.exponent) * (self.inputs[0]._data ** (n - 1) if n else 0)


class MatMul(Function):
    """``a @ b`` of two matrices."""

    def forward(self, a: Array, b: Array) -> Array:
        if a.ndim != 2 or b.ndim != 2:
            raise ValueError(f"matmul: expected two matrices, got shapes {a.shape} and {b.shape}")
        return a @ b

    def backward(self, gy: Variable) -> tuple[Array | None, ...]:
        a, b = self.inputs
        return (
            gy._data @ b._data.T if a.requires_grad else None,
            a._data.T @ gy._data if b.requires_grad else None,
        )


class Sum(Function):
    """The sum over axes."""

    def __init__(self, axis: int | tuple[int, ...] | None, keepdims: bool) -> None:
        self.axis, self.keepdims = axis, keepdims

    def forward(self, a: Array) -> Array:
        return a.sum(axis=self.axis, keepdims=self.keepdims)

    def backward(self, gy: Variable) -> Array:
        gradient, xp = gy._data, cuda.get_array_module(gy)
        if self.axis is not None and not self.keepdims:
            gradient = xp.expand_dims(gradient, self.axis)
        return xp.broadcast_to(gradient, self.inputs[0].shape)


class Reshape(Function):
    """The same elements in another shape."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape

    def forward(self, a: Array) -> Array:
        return a.reshape(self.shape)

    def backward(self, gy: Variable) -> Array:
        return gy._data.reshape(self.inputs[0].shape)


class Transpose(Function):
    """The axes in another order."""

    def __init__(self, axes: tuple[int, ...] | None) -> None:
        self.axes = axes

    def forward(self, a: Array) -> Array:
        return a.transpose(self.axes)

    def backward(self, gy: Variable) -> Array:
        return gy._data.transpose(None if self.axes is None else np.argsort(np.array(self.axes) % gy.ndim))


class GetItem(Function):
    """``a[index]``, for every index that NumPy takes."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def forward(self, a: Array) -> Array:
        return a[self.index]

    def backward(self, gy: Variable) -> Array:
        xp = cuda.get_array_module(gy)
        gradient: Array = xp.zeros(self.inputs[0].shape, gy.dtype)
        index = self.index if isinstance(self.index, tuple) else (self.index,)
        if all(isinstance(k, int | slice | None) or k is Ellipsis for k in index):
            gradient[self.index] = gy._data
        else:
            xp.add.at(gradient, self.index, gy._data)  # such an index may contain an element twice
        return gradient
