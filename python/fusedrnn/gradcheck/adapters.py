"""Adapters that make functions of NumPy arrays from functions of Variables and of PyTorch tensors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fusedrnn import cuda
from fusedrnn.autograd import Parameter, Variable
from fusedrnn.backends.protocol import Array
from fusedrnn.gradcheck.compare import GradcheckError, fixed_random, unchanged
from fusedrnn.layers import Layer, Recurrent

VJP = Callable[[list[Array]], list[Any]]


def _flatten(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested tuples, lists and dictionaries, with their paths."""
    parts: Any = None
    if isinstance(tree, Mapping):
        parts = tree.items()
    elif isinstance(tree, tuple | list):
        parts = enumerate(tree)
    if parts is None:
        return [(path, tree)]
    return [leaf for key, part in parts for leaf in _flatten(part, f"{path}[{key!r}]")]


def rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """The same tree with other leaves."""
    if isinstance(tree, Mapping):
        return {key: rebuild(part, leaves) for key, part in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [rebuild(part, leaves) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return next(leaves)


def _is_float(value: Any) -> bool:
    return cuda.is_array(value) and value.dtype in (np.float32, np.float64)


def host(value: Any) -> Array:
    """A copy of an array or a variable as a NumPy array."""
    return np.array(cuda.as_numpy(value._data if isinstance(value, Variable) else value))


class Adapter:
    """A function, its inputs, and the leaves that are checked: ``names`` and ``values``, which are copies.

    As a context manager it saves the parameters and states of what it calls, and restores them.
    """

    def __init__(self, func: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.func, self.inputs, self.options = func, inputs, options
        self.leaves = _flatten(inputs, "inputs")
        self.slots = [k for k, (_, leaf) in enumerate(self.leaves) if self.checked(leaf)]
        self.names = [self.leaves[k][0] for k in self.slots]
        self.values = [self.to_array(self.leaves[k][1]) for k in self.slots]

    def __enter__(self) -> Adapter:
        if not self.values:
            raise ValueError(
                "inputs: expected at least one of float32 or float64 that requires a gradient, got none"
            )
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def checked(self, leaf: Any) -> bool:
        """Whether the gradient of this input is checked."""
        return _is_float(leaf)

    def to_array(self, leaf: Any) -> Array:
        """A copy as a NumPy array."""
        return np.array(leaf)

    def arguments(self, given: Sequence[Any]) -> Any:
        """The inputs with other values in the leaves that are checked."""
        leaves = [leaf for _, leaf in self.leaves]
        for k, value in zip(self.slots, given, strict=False):
            leaves[k] = value
        return rebuild(self.inputs, iter(leaves))

    def run(self, values: Sequence[Array]) -> tuple[list[Array], VJP]:
        """The outputs at these values, and the function that maps their gradients to those of the values."""
        given = [value.copy() for value in values]
        outputs, backward = self._results(self.func(*self.arguments(given), **self.options))
        self._check_unchanged(given, values)
        arrays = [leaf for _, leaf in _flatten(outputs) if leaf is not None]
        for array in arrays:
            if not isinstance(array, np.ndarray | np.floating):
                raise GradcheckError(f"outputs: expected NumPy arrays, got {type(array).__name__}")

        def vjp(upstream: list[Array]) -> list[Any]:
            kept = [u.copy() for u in upstream]
            found = [leaf for _, leaf in _flatten(backward(*upstream))]
            for k, (u, before) in enumerate(zip(upstream, kept, strict=True)):
                unchanged(f"doutputs[{k}]", u, before)
            self._check_unchanged(given, values)
            found = [np.asarray(g) if isinstance(g, np.generic) else g for g in found]
            if len(found) == len(self.leaves):  # in the inputs' structure, with what is not checked
                return [found[k] for k in self.slots]
            if len(found) != len(self.slots):
                raise GradcheckError(f"backward: expected {len(self.slots)} gradients, got {len(found)}")
            return found

        return [np.array(a) for a in arrays], vjp

    @staticmethod
    def _results(result: Any) -> tuple[Any, Any]:
        if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
            raise TypeError(
                "func_or_layer: expected a function of NumPy arrays to return (outputs, backward), where "
                f"backward(*doutputs) returns the gradients of the inputs; got {type(result).__name__}"
            )
        return result

    def _check_unchanged(self, now: Sequence[Array], before: Sequence[Array]) -> None:
        for name, a, b in zip(self.names, now, before, strict=True):
            unchanged(name, a, b)


class VariableAdapter(Adapter):
    """Functions of Variables; for a layer also its parameters. Results on a GPU are compared on the CPU."""

    def __init__(self, func: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__(func, inputs, options)
        self.layer = func if isinstance(func, Layer) else None
        self.kept = _Kept(self.layer)
        if self.layer is not None and any(p._data is None for p in self.kept.params.values()):
            self._call(self.arguments(self.given(self.values)))  # sets sizes that are not known yet
        wanted = {n: p for n, p in self.kept.params.items() if p._data is not None and p.requires_grad}
        self.params = list(wanted.values())
        self.names += wanted
        self.values += map(host, self.params)

    def __enter__(self) -> Adapter:
        self.kept.remember()
        self.kept.restore_states()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.kept.restore()

    def checked(self, leaf: Any) -> bool:
        return _is_float(leaf) or (isinstance(leaf, Variable) and leaf.requires_grad and _is_float(leaf.data))

    def to_array(self, leaf: Any) -> Array:
        return host(leaf)

    def given(self, values: Sequence[Array]) -> list[Variable]:
        """The inputs of a call, on their devices: the first values. The other values are parameters."""
        leaves = [self.leaves[k][1] for k in self.slots]
        arrays = [leaf._data if isinstance(leaf, Variable) else leaf for leaf in leaves]
        return [Variable(cuda.like(v.copy(), a)) for v, a in zip(values, arrays, strict=False)]

    def _call(self, arguments: Any) -> list[Any]:
        if isinstance(self.layer, Recurrent):
            found = call_recurrent(self.layer, arguments, self.options)
            lengths = self.options.get("lengths")
            if lengths is not None and "y" in found and found["y"].ndim == 3:
                # past the end of a row the last state is repeated, but gradients there are ignored
                valid = np.nonzero(np.arange(len(found["y"]))[:, np.newaxis] < cuda.as_numpy(lengths))
                at = tuple(cuda.like(index, found["y"]._data) for index in valid)
                at = at if len(self.layer.suffixes) == 1 else (slice(None), *at)
                found = {n: v[at] if n.endswith("every step") else v for n, v in found.items()}
            return list(found.values())
        return [leaf for _, leaf in _flatten(self.func(*arguments, **self.options)) if leaf is not None]

    def run(self, values: Sequence[Array]) -> tuple[list[Array], VJP]:
        self.kept.restore_states()
        given = self.given(values)
        for p, v in zip(self.params, values[len(self.slots) :], strict=True):
            p.assign(cuda.like(v.copy(), p._data))
        everything = [*given, *self.params]
        outputs = self._call(self.arguments(given))
        for y in outputs:
            if not isinstance(y, Variable):
                raise GradcheckError(f"outputs: expected Variables, got {type(y).__name__}")
        self._check_unchanged([cuda.as_numpy(v._data) for v in everything], values)

        def vjp(upstream: list[Array]) -> list[Any]:
            for v in everything:
                v.cleargrad()
            backward(list(zip(outputs, upstream, strict=True)))
            self._check_unchanged([cuda.as_numpy(v._data) for v in everything], values)
            return [None if v.grad is None else cuda.as_numpy(v.grad._data) for v in everything]

        return [host(y) for y in outputs], vjp


class _TorchAdapter(Adapter):
    """Functions of PyTorch tensors; for a module also its parameters."""

    def __init__(self, func: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.torch: Any = sys.modules["torch"]
        super().__init__(func, inputs, options)
        wanted = {}
        if isinstance(func, self.torch.nn.Module):
            wanted = {name: p for name, p in func.named_parameters() if p.requires_grad}
        self.params = list(wanted.values())
        self.names += wanted
        self.values += [self.to_array(p) for p in self.params]

    def __exit__(self, *error: object) -> None:
        self._assign(self.values[len(self.slots) :])

    def checked(self, leaf: Any) -> bool:
        return isinstance(leaf, self.torch.Tensor) and leaf.requires_grad

    def to_array(self, leaf: Any) -> Array:
        if leaf.dtype not in (self.torch.float32, self.torch.float64):
            raise TypeError(f"inputs and parameters: expected float32 or float64, got {leaf.dtype}")
        return np.array(leaf.detach().cpu().numpy())

    def _assign(self, values: Sequence[Array]) -> None:
        with self.torch.no_grad():
            for p, v in zip(self.params, values, strict=True):
                p.copy_(self.torch.from_numpy(v))

    def run(self, values: Sequence[Array]) -> tuple[list[Array], VJP]:
        torch, n = self.torch, len(self.slots)
        given = []
        for k, value in zip(self.slots, values[:n], strict=True):
            tensor = self.leaves[k][1].detach().clone()  # keeps strides and device
            given.append(tensor.copy_(torch.from_numpy(value)).requires_grad_())
        self._assign(values[n:])
        everything = [*given, *self.params]
        with torch.enable_grad():
            result = self.func(*self.arguments(given), **self.options)
        tensors = [t for _, t in _flatten(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self._check_unchanged([self.to_array(t) for t in everything], values)

        def vjp(upstream: list[Array]) -> list[Any]:
            pairs = [(t, u) for t, u in zip(tensors, upstream, strict=True) if t.requires_grad]
            if not pairs:
                return [None] * len(everything)
            outputs, given_gradients = zip(*pairs, strict=True)
            incoming = [torch.from_numpy(u.copy()).to(t) for t, u in pairs]
            found = torch.autograd.grad(outputs, everything, incoming, retain_graph=True, allow_unused=True)
            for k, (t, u) in enumerate(zip(incoming, given_gradients, strict=True)):
                unchanged(f"doutputs[{k}]", self.to_array(t), u)
            self._check_unchanged([self.to_array(t) for t in everything], values)
            return [None if g is None else self.to_array(g) for g in found]

        return [self.to_array(t) for t in tensors], vjp


def adapted(func: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Adapter:
    """The adapter for a function, by its inputs and outputs."""
    leaves = [leaf for _, leaf in _flatten(inputs)]
    torch: Any = sys.modules.get("torch")  # if it is not loaded, no input can be a tensor
    if torch is not None and (
        isinstance(func, torch.nn.Module) or any(isinstance(leaf, torch.Tensor) for leaf in leaves)
    ):
        return _TorchAdapter(func, inputs, options)
    if isinstance(func, Layer) or any(isinstance(leaf, Variable) for leaf in leaves):
        return VariableAdapter(func, inputs, options)
    with fixed_random(0):
        result = func(*copy.deepcopy(inputs), **options)
    if any(isinstance(leaf, Variable) for _, leaf in _flatten(result)):
        return VariableAdapter(func, inputs, options)
    return Adapter(func, inputs, options)


class _Kept:
    """Parameters, gradients and states of a layer and all layers in it, to be restored."""

    def __init__(self, layer: Layer | None) -> None:
        self.params: dict[str, Parameter] = {} if layer is None else dict(layer.named_params())
        below = [] if layer is None else [found for _, found in layer.walk()]
        self.recurrent = [found for found in below if isinstance(found, Recurrent)]
        self.states = [(r, [vars(r)[n] for n in r.cell.states]) for r in self.recurrent]
        self.remember()

    def remember(self) -> None:
        """Keep the parameters as they are now."""
        self.saved = [(p, p._data, p.private, p.version, p.grad) for p in self.params.values()]

    def restore_states(self) -> None:
        """Let the next call start from the same state as the first one, without a graph."""
        for r, state in self.states:
            copies = [None if s is None else Variable(s._data.copy()) for s in state]
            for s in copies:
                if s is not None:
                    s.requires_grad = False
            r._carry(copies)

    def restore(self) -> None:
        for p, data, private, version, grad in self.saved:
            p._data, p.private, p.version, p.grad = data, private, version, grad
        for r, state in self.states:
            r._carry(state)
            r._packed = None  # of other weights, perhaps with the same version


def call_recurrent(layer: Recurrent, arguments: Any, options: Mapping[str, Any]) -> dict[str, Variable]:
    """All results of a call, by name: y, the final state, and the state of every step."""
    x, state, scalars = split(layer, arguments)
    if x.ndim == 2:
        found = {"y": layer.step(x, state, **scalars, **options)}
    else:
        y, states = layer.sequence(x, state, return_states=True, **scalars, **options)
        found = {"y": y} | {f"{n} of every step": s for n, s in zip(layer.cell.states, states, strict=True)}
    final = [vars(layer)[n] for n in layer.cell.states]
    return found | {f"final {n}": s for n, s in zip(layer.cell.states, final, strict=True)}


def split(layer: Recurrent, arguments: Sequence[Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Split ``(x,)``, ``(x, state)``, ``(x, h)`` or ``(x, h, c)``, then row scalars, into the three parts."""
    names = layer.cell.states
    x, *rest = arguments
    scalars = rest.pop() if rest and isinstance(rest[-1], Mapping) else {}
    if len(rest) == 1 and (isinstance(rest[0], tuple | list) or rest[0] is None):
        rest = list(rest[0] or ())
    if rest and len(rest) != len(names):
        raise ValueError(f"inputs: expected x, or x and a state ({', '.join(names)},), got {len(arguments)}")
    return x, tuple(rest) or None, dict(scalars)


def backward(pairs: Sequence[tuple[Variable, Array]]) -> None:
    """Gradients of the sum of ``(output * upstream).sum()``; the upstream gradients are not rounded."""
    terms = [(y * cuda.like(u, y._data)).sum() for y, u in pairs if y.requires_grad]
    if terms:
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        total.backward()
