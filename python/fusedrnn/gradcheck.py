"""Gradient checking of one layer or function, ours or anybody's. All kernels at once: ``gradcheck_suite``.

Two measures of right. ``oracle``: the NumPy reference in long double, itself proved by complex-step
derivatives, against which a kernel's error is a few units in the last place. ``central``: differences
``(f(x + h) - f(x - h)) / 2h``, which need nothing but the function, and are good to about 1e-10 in float64.

Sources of the figures: the oracle's are what the kernels promise on standard problems (docs/accuracy.md). A
central difference errs by about ``h**2`` (truncation) plus ``eps / h`` (rounding), least at
``h = eps**(1/3)``, where both are ``eps**(2/3)`` (SciPy's choice too, scipy/optimize/_numdiff.py).
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedrnn import cuda, multilayer
from fusedrnn.autograd import Parameter, Variable
from fusedrnn.backends.protocol import Array, Regularization, Weights
from fusedrnn.functions import Fused
from fusedrnn.layers import Layer, Recurrent

WIDE = np.dtype(np.longdouble)
# Relative to each tensor's largest entry, on standard problems: PyTorch's initialisation, inputs of order
# one, upstream gradients on every step, H >= 7, T up to 256.
FORWARD = {"float32": 2e-6, "float64": 1e-14}
GRADIENT = {"float32": 5e-6, "float64": 2e-14}
TIMES_NUMPY = 4  # and never more than this many times plain NumPy's error, for which at least ...
FLOOR = 4  # ... this many machine epsilons count: what is below them is luck
SAFETY = 300  # central: multiples of eps**(2/3); a third derivative of a hundred times the first is not rare
DIRECTIONS = 4  # fast_mode: random directions for each tensor


class GradcheckError(AssertionError):
    """An output or a gradient is wrong. The message names the tensor, the index and both values."""


def gradcheck(
    func_or_layer: Any,
    inputs: Any,
    *,
    eps: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    fast_mode: bool = False,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> bool:
    """Check the gradients of a layer or function, and of a layer its parameters'.

    What can be checked: the layers of this library; functions of its Variables; PyTorch modules and functions
    of PyTorch tensors; and functions of NumPy arrays that return ``(outputs, backward)``, where
    ``backward(*doutputs)`` gives the gradients in the structure of the inputs.

    Fails on: a wrong element, NaN or infinity, a wrong shape or dtype, a missing gradient, a result that
    differs when the same thing is evaluated again, an input that was written to.

    Args:
        func_or_layer: What is checked. Parameters and carried states are as before when this returns.
        inputs: One input or a tuple of them, nested as the function takes them. Checked are arrays of float32
            or float64, of Variables and tensors those that require a gradient. A recurrent layer of ours
            takes ``x`` or ``(x, state)``, x (B, I) or (T, B, I); without a state it begins with the one it
            carries. A layer on a GPU takes CuPy's arrays; it is evaluated there and compared on the CPU.
        eps: ``central``: the step. None: the cube root of the machine epsilon times max(1, abs(x)).
        atol, rtol: ``central``: passed where ``abs(a - n) <= atol + rtol * abs(n)`` for every element, as in
            PyTorch; rtol None: 300 * epsilon**(2/3) (1.1e-8 in float64, 7e-3 in float32); atol None: that,
            times the largest output or derivative. ``oracle``: rtol is relative to the tensor's largest
            entry; None: outputs 1e-14 and gradients 2e-14 in float64, 2e-6 and 5e-6 in float32, or 4 times
            plain NumPy's own error where a badly conditioned problem makes that larger; atol None: 0.
        raise_exception: False: return False instead of raising ``GradcheckError``.
        nondet_tol: By how much two evaluations of the same may differ.
        fast_mode: ``central``: a few random directions instead of every element: 8 evaluations a tensor
            instead of 2 an element.
        method: "oracle", for the RNN, LSTM and GRU of ``fusedrnn.layers``; "central", for everything. None:
            the first where it is possible.
        options: Keyword arguments of every call, such as ``{"lengths": lengths}``.
        seed: Of the random upstream gradients and directions; also of NumPy's, Python's and PyTorch's global
            generators, which are set anew for every evaluation, so that dropout draws the same masks, and
            left as they were.

    Returns:
        True, or False where a check failed and ``raise_exception`` is False.

    Raises:
        GradcheckError: A check failed; an AssertionError.
        TypeError, ValueError: An argument is wrong.
    """
    possible = isinstance(func_or_layer, Recurrent)
    if method is None:
        method = "oracle" if possible else "central"
    if method not in ("oracle", "central"):
        raise ValueError(f'method: expected "oracle", "central" or None, got {method!r}')
    if method == "oracle" and not possible:
        raise TypeError(
            'method: "oracle" checks the RNN, LSTM and GRU of fusedrnn.layers, '
            f'got {type(func_or_layer).__name__}; use "central"'
        )
    if method == "oracle" and (eps is not None or fast_mode):
        raise ValueError('eps, fast_mode: expected None and False with method "oracle", which takes no steps')
    if not callable(func_or_layer):
        raise TypeError(f"func_or_layer: expected something to call, got {type(func_or_layer).__name__}")
    for name, value in (("eps", eps), ("atol", atol), ("rtol", rtol), ("nondet_tol", nondet_tol)):
        if value is not None and not (value > 0 if name == "eps" else value >= 0):
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    options = dict(options or {})
    inputs = tuple(inputs) if type(inputs) in (tuple, list) else (inputs,)
    try:
        if method == "oracle":
            _oracle(func_or_layer, inputs, options, atol, rtol, nondet_tol, seed)
        else:
            with _adapter(func_or_layer, inputs, options) as adapter:
                _central(adapter, eps, atol, rtol, nondet_tol, fast_mode, seed)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


# --- comparing ----------------------------------------------------------------------------------------------


def _compare(
    name: str | Callable[[tuple[int, ...]], str], got: Any, expected: Array, limit: Any, *, dtype: Any = None
) -> None:
    """GradcheckError unless ``abs(got - expected) <= limit`` everywhere; NaN and infinity are never right."""
    label = name if callable(name) else lambda index: f"{name}{list(index) if index else ''}"
    whole = name if isinstance(name, str) else name(())
    if got is None:
        raise GradcheckError(f"{whole}: missing, expected an array of shape {expected.shape}")
    if not isinstance(got, np.ndarray):
        raise GradcheckError(
            f"{whole}: got {type(got).__name__}, expected an array of shape {expected.shape}"
        )
    if got.shape != expected.shape:
        raise GradcheckError(f"{whole}: got shape {got.shape}, expected {expected.shape}")
    if dtype is not None and got.dtype != dtype:
        raise GradcheckError(f"{whole}: got dtype {got.dtype}, expected {dtype}")
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - expected)
        wrong = ~(difference <= limit) | ~np.isfinite(got)
        if not wrong.any():
            return
        excess = np.where(wrong, np.where(np.isfinite(difference), difference - limit, np.inf), -np.inf)
    index = tuple(int(k) for k in np.unravel_index(np.argmax(excess), excess.shape))
    allowed = np.broadcast_to(limit, got.shape)[index]
    wanted = "a finite number"
    if np.isfinite(allowed):
        wanted = f"{expected[index]}, difference {difference[index]:.2g}, allowed {allowed:.2g}"
    raise GradcheckError(
        f"{label(index)}: got {got[index]}, expected {wanted}; {wrong.sum()} of {wrong.size} are wrong"
    )


def _finite(name: str, got: Any, like: Array) -> None:
    """GradcheckError unless an array has the shape and dtype of another, and no NaN or infinity."""
    _compare(name, got, np.zeros_like(like), np.inf, dtype=like.dtype)


def _same(name: str, first: Any, second: Any, nondet_tol: float) -> None:
    """GradcheckError unless two evaluations agree."""
    if first is None and second is None:
        return
    if first is None or second is None or first.shape != second.shape:
        raise GradcheckError(f"{name}: nondeterministic, missing or of another shape when evaluated again")
    with np.errstate(invalid="ignore"):
        difference = np.where(first == second, 0, np.abs(first - second))
    both_nan = np.isnan(first) & np.isnan(second)  # equal; that it is wrong, others say
    wrong = ~(difference <= nondet_tol) & ~both_nan
    if wrong.any():
        index = tuple(int(k) for k in np.argwhere(wrong)[0])
        raise GradcheckError(
            f"{name}{list(index)}: nondeterministic, {first[index]} and then {second[index]} from the same "
            "inputs (the global random generators were set to one seed; draw from them, or fix your own)"
        )


def _unchanged(name: str, now: Array, before: Array) -> None:
    """GradcheckError if an array was written to."""
    if now.tobytes() != before.tobytes():
        wrong = np.argwhere(~((now == before) | (np.isnan(now) & np.isnan(before))))
        index = [int(k) for k in wrong[0]] if len(wrong) else ""
        raise GradcheckError(f"{name}{index}: modified by the function, which may only read its inputs")


@contextlib.contextmanager
def _fixed_random(seed: int) -> Iterator[None]:
    """Set the global random generators, and put them back."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch: Any = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_initialized()
    torch_state = None if torch is None else torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else None
    try:
        np.random.seed(seed)
        random.seed(seed)
        if torch is not None:
            torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if torch is not None:
            torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)


# --- the three worlds: NumPy arrays, our variables, PyTorch tensors -----------------------------------------

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


def _rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """The same tree with other leaves."""
    if isinstance(tree, Mapping):
        return {key: _rebuild(part, leaves) for key, part in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [_rebuild(part, leaves) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return next(leaves)


def _is_float(value: Any) -> bool:
    return cuda.is_array(value) and value.dtype in (np.float32, np.float64)


def _host(value: Any) -> Array:
    """A copy as a NumPy array, of an array or of a variable's."""
    return np.array(cuda.as_numpy(value._data if isinstance(value, Variable) else value))


class _Adapter:
    """A function, its inputs, and which of their leaves are checked: ``names`` and ``values``, copies.

    As a context it keeps the parameters and states of what it calls, and puts them back.
    """

    def __init__(self, func: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.func, self.inputs, self.options = func, inputs, options
        self.leaves = _flatten(inputs, "inputs")
        self.slots = [k for k, (_, leaf) in enumerate(self.leaves) if self.checked(leaf)]
        self.names = [self.leaves[k][0] for k in self.slots]
        self.values = [self.to_array(self.leaves[k][1]) for k in self.slots]

    def __enter__(self) -> _Adapter:
        if not self.values:
            raise ValueError(
                "inputs: expected at least one of float32 or float64, which requires a gradient, got none"
            )
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def checked(self, leaf: Any) -> bool:
        return _is_float(leaf)

    def to_array(self, leaf: Any) -> Array:
        """A copy as a NumPy array."""
        return np.array(leaf)

    def arguments(self, given: Sequence[Any]) -> Any:
        """The inputs with other values in the leaves that are checked."""
        leaves = [leaf for _, leaf in self.leaves]
        for k, value in zip(self.slots, given, strict=False):
            leaves[k] = value
        return _rebuild(self.inputs, iter(leaves))

    def run(self, values: Sequence[Array]) -> tuple[list[Array], VJP]:
        """The outputs at these values, and the function from their gradients to those of the values."""
        given = [value.copy() for value in values]
        outputs, backward = self._results(self.func(*self.arguments(given), **self.options))
        self._check_unchanged(given, values)
        arrays = [leaf for _, leaf in _flatten(outputs) if leaf is not None]
        for array in arrays:
            if not isinstance(array, np.ndarray | np.floating):
                raise GradcheckError(f"outputs: got {type(array).__name__}, expected NumPy arrays")

        def vjp(upstream: list[Array]) -> list[Any]:
            kept = [u.copy() for u in upstream]
            found = [leaf for _, leaf in _flatten(backward(*upstream))]
            for k, (u, before) in enumerate(zip(upstream, kept, strict=True)):
                _unchanged(f"doutputs[{k}]", u, before)
            self._check_unchanged(given, values)
            found = [np.asarray(g) if isinstance(g, np.generic) else g for g in found]
            if len(found) == len(self.leaves):  # in the inputs' structure, with what is not checked
                return [found[k] for k in self.slots]
            if len(found) != len(self.slots):
                raise GradcheckError(f"backward: gave {len(found)} gradients, expected {len(self.slots)}")
            return found

        return [np.array(a) for a in arrays], vjp

    @staticmethod
    def _results(result: Any) -> tuple[Any, Any]:
        if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
            raise TypeError(
                "func_or_layer: a function of NumPy arrays returns (outputs, backward), where "
                f"backward(*doutputs) gives the gradients of the inputs; got {type(result).__name__}"
            )
        return result

    def _check_unchanged(self, now: Sequence[Array], before: Sequence[Array]) -> None:
        for name, a, b in zip(self.names, now, before, strict=True):
            _unchanged(name, a, b)


class _VariableAdapter(_Adapter):
    """Our Variables; of a layer also its parameters. On a GPU are theirs; all that is compared is NumPy's."""

    def __init__(self, func: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__(func, inputs, options)
        self.layer = func if isinstance(func, Layer) else None
        self.kept = _Kept(self.layer)
        if self.layer is not None and any(p._data is None for p in self.kept.params.values()):
            self._call(self.arguments(self.given(self.values)))  # settles lazy sizes
        wanted = {n: p for n, p in self.kept.params.items() if p._data is not None and p.requires_grad}
        self.params = list(wanted.values())
        self.names += wanted
        self.values += map(_host, self.params)

    def __enter__(self) -> _Adapter:
        self.kept.remember()
        self.kept.restore_states()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.kept.restore()

    def checked(self, leaf: Any) -> bool:
        return _is_float(leaf) or (isinstance(leaf, Variable) and leaf.requires_grad and _is_float(leaf.data))

    def to_array(self, leaf: Any) -> Array:
        return _host(leaf)

    def given(self, values: Sequence[Array]) -> list[Variable]:
        """What to call with, each where its leaf is: the first values; the others are the parameters'."""
        leaves = [self.leaves[k][1] for k in self.slots]
        arrays = [leaf._data if isinstance(leaf, Variable) else leaf for leaf in leaves]
        return [Variable(cuda.like(v.copy(), a)) for v, a in zip(values, arrays, strict=False)]

    def _call(self, arguments: Any) -> list[Any]:
        if isinstance(self.layer, Recurrent):
            found = _call_recurrent(self.layer, arguments, self.options)
            lengths = self.options.get("lengths")
            if lengths is not None and "y" in found and found["y"].ndim == 3:
                # states are held past a row's end, but what comes in there as gradient is never read
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
                raise GradcheckError(f"outputs: got {type(y).__name__}, expected Variables")
        self._check_unchanged([cuda.as_numpy(v._data) for v in everything], values)

        def vjp(upstream: list[Array]) -> list[Any]:
            for v in everything:
                v.cleargrad()
            _backward(list(zip(outputs, upstream, strict=True)))
            self._check_unchanged([cuda.as_numpy(v._data) for v in everything], values)
            return [None if v.grad is None else cuda.as_numpy(v.grad._data) for v in everything]

        return [_host(y) for y in outputs], vjp


class _TorchAdapter(_Adapter):
    """PyTorch tensors; of a module also its parameters."""

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
                _unchanged(f"doutputs[{k}]", self.to_array(t), u)
            self._check_unchanged([self.to_array(t) for t in everything], values)
            return [None if g is None else self.to_array(g) for g in found]

        return [self.to_array(t) for t in tensors], vjp


def _adapter(func: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> _Adapter:
    """The adapter for a function, by what it is given and what it returns."""
    leaves = [leaf for _, leaf in _flatten(inputs)]
    torch: Any = sys.modules.get("torch")  # nothing of PyTorch's can have been given where it is not loaded
    if torch is not None and (
        isinstance(func, torch.nn.Module) or any(isinstance(leaf, torch.Tensor) for leaf in leaves)
    ):
        return _TorchAdapter(func, inputs, options)
    if isinstance(func, Layer) or any(isinstance(leaf, Variable) for leaf in leaves):
        return _VariableAdapter(func, inputs, options)
    with _fixed_random(0):
        result = func(*copy.deepcopy(inputs), **options)
    if any(isinstance(leaf, Variable) for _, leaf in _flatten(result)):
        return _VariableAdapter(func, inputs, options)
    return _Adapter(func, inputs, options)


class _Kept:
    """Parameters, gradients and carried states of a layer and all below it, to be put back."""

    def __init__(self, layer: Layer | None) -> None:
        self.params: dict[str, Parameter] = {} if layer is None else dict(layer.named_params())
        below = [] if layer is None else [found for _, found in layer.walk()]
        self.recurrent = [found for found in below if isinstance(found, Recurrent)]
        self.states = [(r, r.h, r.c) for r in self.recurrent]
        self.remember()

    def remember(self) -> None:
        """Keep the parameters as they are now."""
        self.saved = [(p, p._data, p.private, p.version, p.grad) for p in self.params.values()]

    def restore_states(self) -> None:
        """Let the next call begin where the first one did, with nothing behind it to walk back into."""
        for r, h, c in self.states:
            r.h, r.c = (None if s is None else Variable(s._data.copy()) for s in (h, c))
            for s in (r.h, r.c):
                if s is not None:
                    s.requires_grad = False

    def restore(self) -> None:
        for p, data, private, version, grad in self.saved:
            p._data, p.private, p.version, p.grad = data, private, version, grad
        for r, h, c in self.states:
            r.h, r.c = h, c
            r._packed = None  # of other weights, perhaps under the same version


def _call_recurrent(layer: Recurrent, arguments: Any, options: Mapping[str, Any]) -> dict[str, Variable]:
    """All that a call gives, by name: y, the final state, and the state of every step."""
    x, state = _x_and_state(layer, arguments)
    if x.ndim == 2:
        found = {"y": layer.step(x, state, **options)}
    else:
        y, states = layer.sequence(x, state, return_states=True, **options)
        found = {"y": y} | {f"{n} of every step": s for n, s in zip(layer.cell.states, states, strict=True)}
    final = [s for s in (layer.h, layer.c) if s is not None]
    return found | {f"final {n}": s for n, s in zip(layer.cell.states, final, strict=True)}


def _x_and_state(layer: Recurrent, arguments: Sequence[Any]) -> tuple[Any, Any]:
    """``(x,)``, ``(x, state)``, or ``(x, h)`` and ``(x, h, c)``."""
    names = layer.cell.states
    x, *rest = arguments
    if len(rest) == 1 and (isinstance(rest[0], tuple | list) or rest[0] is None):
        rest = list(rest[0] or ())
    if rest and len(rest) != len(names):
        raise ValueError(f"inputs: expected x, or x and a state ({', '.join(names)},), got {len(arguments)}")
    return x, tuple(rest) or None


def _backward(pairs: Sequence[tuple[Variable, Array]]) -> None:
    """Gradients of the sum of ``(output * upstream).sum()``; the upstream gradients arrive exactly."""
    terms = [(y * cuda.like(u, y._data)).sum() for y, u in pairs if y.requires_grad]
    if terms:
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        total.backward()


# --- method "central" ---------------------------------------------------------------------------------------


def _central(
    adapter: _Adapter,
    eps: float | None,
    atol: float | None,
    rtol: float | None,
    nondet_tol: float,
    fast_mode: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)

    def forward(values: list[Array]) -> list[Array]:
        with _fixed_random(seed):
            arrays = adapter.run(values)[0]
        if [a.shape for a in arrays] != shapes:
            raise GradcheckError(f"outputs: shapes {[a.shape for a in arrays]}, and {shapes} before")
        return arrays

    def apply_vjp(vjp: VJP, upstream: list[Array]) -> list[Any]:
        with _breaking_off():
            found = vjp(upstream)
        for name, value, g in zip(adapter.names, adapter.values, found, strict=True):
            if g is not None:
                _finite(f"gradient of {name}", g, value)
        return found

    # Twice the same: outputs, and gradients for one random upstream gradient.
    with _fixed_random(seed):
        outputs, vjp = adapter.run(adapter.values)
        for k, y in enumerate(outputs):
            _finite(f"output {k}", y, y)
        shapes = [y.shape for y in outputs]
        upstream = [np.asarray(rng.standard_normal(y.shape), y.dtype) for y in outputs]
        together = apply_vjp(vjp, upstream)
    if not any(y.size for y in outputs):
        raise ValueError("func_or_layer: expected outputs with at least one element, got none")
    with _fixed_random(seed):
        again, vjp_again = adapter.run(adapter.values)
        together_again = apply_vjp(vjp_again, upstream)
    if [y.shape for y in again] != shapes:
        raise GradcheckError(
            f"outputs: nondeterministic, shapes {shapes} and then {[y.shape for y in again]}"
        )
    for k, (first, second) in enumerate(zip(outputs, again, strict=True)):
        _same(f"output {k}", first, second, nondet_tol)
    for name, first, second in zip(adapter.names, together, together_again, strict=True):
        _same(f"gradient of {name}", first, second, nondet_tol)

    machine = max(float(np.finfo(a.dtype).eps) for a in [*adapter.values, *outputs])
    rtol = SAFETY * machine ** (2 / 3) if rtol is None else rtol

    def difference(i: int, step: Array) -> list[Array]:
        """(f(x + step) - f(x - step)) and, first, the step as it was taken, doubled; in float64."""
        ends = [adapter.values[i] + step, adapter.values[i] - step]
        plus, minus = (forward([*adapter.values[:i], end, *adapter.values[i + 1 :]]) for end in ends)
        return [p.astype(np.float64) - m for p, m in zip((ends[0], *plus), (ends[1], *minus), strict=True)]

    def steps(value: Array) -> Array:
        return np.full(value.shape, eps) if eps else machine ** (1 / 3) * np.maximum(1, np.abs(value))

    if fast_mode:
        norm = float(np.sqrt(sum(np.square(y, dtype=np.float64).sum() for y in outputs)))
        for i, (name, value) in enumerate(zip(adapter.names, adapter.values, strict=True)):
            g = np.zeros(value.shape) if together[i] is None else together[i].astype(np.float64)
            missing = " (no gradient came back)" if together[i] is None else ""
            for k in range(DIRECTIONS if value.size else 0):
                v = rng.standard_normal(value.shape)
                h = float(steps(value).max())
                moved, *changes = difference(i, (h / np.linalg.norm(v) * v).astype(value.dtype))
                numeric = sum(float((u * c).sum()) for u, c in zip(upstream, changes, strict=True)) / (2 * h)
                analytic = float((g * moved).sum()) / (2 * h)
                allowed = rtol * max(norm, float(np.linalg.norm(g))) if atol is None else atol
                label = f"gradient of {name} along random direction {k}{missing}"
                label += " (fast_mode=False names the element)"
                _compare(label, np.asarray(analytic), np.asarray(numeric), allowed + rtol * abs(numeric))
        return

    # The Jacobian of each output by each input: analytically a row for each element of the output ...
    rows = [[np.zeros((y.size, value.size)) for value in adapter.values] for y in outputs]
    with _fixed_random(seed):
        _, vjp = adapter.run(adapter.values)
        for k, y in enumerate(outputs):
            for j in range(y.size):
                one = [np.zeros(other.shape, other.dtype) for other in outputs]
                one[k].flat[j] = 1
                for i, g in enumerate(apply_vjp(vjp, one)):
                    if g is not None:
                        rows[k][i][j] = g.ravel()
    # ... and numerically a column for each element of the input.
    for i, (name, value) in enumerate(zip(adapter.names, adapter.values, strict=True)):
        missing = " (no gradient came back)" if together[i] is None else ""
        columns = [np.empty((y.size, value.size)) for y in outputs]
        h_all = steps(value)
        for e, index in enumerate(np.ndindex(value.shape)):
            step = np.zeros_like(value)
            step[index] = h_all[index]
            moved, *changes = difference(i, step)
            for column, change in zip(columns, changes, strict=True):
                column[:, e] = change.ravel() / moved[index]
        for k, y in enumerate(outputs):

            def label_of(index: tuple[int, ...], k: int = k, name: str = name, missing: str = missing) -> str:
                at, of = list(index[: outputs[k].ndim]), list(index[outputs[k].ndim :])
                return f"d output {k}{at or ''} / d {name}{of or ''}{missing}"

            largest = max((float(np.abs(a).max()) for a in (y, columns[k]) if a.size), default=0.0)
            limit = (rtol * largest if atol is None else atol) + rtol * np.abs(columns[k])
            full = y.shape + value.shape
            _compare(label_of, rows[k][i].reshape(full), columns[k].reshape(full), limit.reshape(full))
        if together[i] is not None:  # the gradient from all outputs at once is the sum of those from each
            us = [u.astype(np.float64).ravel() for u in upstream]
            summed, bound = np.zeros(value.size), np.zeros(value.size)
            for u, of_output in zip(us, rows, strict=True):
                summed += u @ of_output[i]
                bound += np.abs(u) @ np.abs(of_output[i])
            label = f"gradient of {name} from all outputs at once"
            allowed = rtol * float(bound.max(initial=0))
            _compare(label, together[i], summed.reshape(value.shape), allowed)


@contextlib.contextmanager
def _breaking_off() -> Iterator[None]:
    """A backward pass that breaks off, for example over a gradient's shape, has failed the check."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise GradcheckError(f"backward raised {type(error).__name__}: {error}") from error


# --- method "oracle" ----------------------------------------------------------------------------------------


def _oracle(
    layer: Recurrent,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    atol: float | None,
    rtol: float | None,
    nondet_tol: float,
    seed: int,
) -> None:
    unknown = sorted(set(options) - {"lengths", "reset"})
    if unknown:
        raise ValueError(f'options: expected lengths and reset with method "oracle", got {unknown}')
    x, state = _x_and_state(layer, inputs)
    with _VariableAdapter(layer, inputs, options) as adapter:
        assert isinstance(adapter, _VariableAdapter)
        begin = layer.state if state is None and not layer.bidirectional else state
        call = _Call(
            layer,
            _host(x).astype(layer.dtype),
            None if begin is None else [_host(s).astype(layer.dtype) for s in begin],
            *_drawn(layer, adapter, x, state, options, seed),
            options,
        )
        variables = adapter.given(adapter.values)
        everything = [*variables, *adapter.params]
        # leaf 0 of the inputs is x, the others are the state
        tensors = ["x" if k == 0 else layer.cell.states[k - 1] for k in adapter.slots]
        tensors += adapter.names[len(adapter.slots) :]
        dtypes = {name: value.dtype for name, value in zip(tensors, adapter.values, strict=True)}

        def ours(upstream: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Any]]:
            with _fixed_random(seed):
                adapter.kept.restore_states()
                for v in everything:
                    v.cleargrad()
                outputs = _call_recurrent(layer, adapter.arguments(variables), options)
                with _breaking_off():
                    _backward([(outputs[name], u) for name, u in upstream.items() if name in outputs])
            adapter._check_unchanged([cuda.as_numpy(v._data) for v in everything], adapter.values)
            gradients = {
                n: None if v.grad is None else cuda.as_numpy(v.grad._data)
                for n, v in zip(tensors, everything, strict=True)
            }
            return {n: cuda.as_numpy(y._data) for n, y in outputs.items()}, gradients

        rng = np.random.default_rng(seed)
        shapes = {name: y.shape for name, y in call.reference({}, layer.dtype)[0].items()}
        drawn = {name: np.asarray(rng.standard_normal(shape), layer.dtype) for name, shape in shapes.items()}
        final = {name: u for name, u in drawn.items() if name.startswith("final")}
        for upstream in (drawn, {"y": drawn["y"]}, final):
            wide, plain = call.reference(upstream, WIDE), call.reference(upstream, layer.dtype)
            found, again = ours(upstream), ours(upstream)
            note = f" (upstream gradients of {', '.join(upstream)})"
            for k, (what, names, figures) in enumerate(
                (("output ", shapes, FORWARD), ("gradient of ", tensors, GRADIENT))
            ):
                for name in names:
                    truth, got = wide[k][name], found[k].get(name)
                    largest = float(np.abs(truth).max(initial=0))
                    if rtol is None:
                        numpys = float(np.abs(plain[k][name] - truth).max(initial=0))
                        # where NumPy has lost half of all digits, its error excuses nothing any more
                        numpys = min(numpys, largest * float(np.finfo(layer.dtype).eps) ** 0.5)
                        limit = max(figures[layer.dtype.name] * largest, TIMES_NUMPY * numpys)
                    else:
                        limit = rtol * largest
                    dtype = dtypes[name] if k else layer.dtype
                    label = f"{what}{name}{note if k else ''}"
                    _compare(label, got, truth, limit + (atol or 0), dtype=dtype)
                    _same(label, got, again[k][name], nondet_tol)


def _drawn(
    layer: Recurrent, adapter: _VariableAdapter, x: Any, state: Any, options: Mapping[str, Any], seed: int
) -> tuple[Sequence[Array] | None, Regularization | None]:
    """What the layer draws: the masks of dropout between layers, and its regularization with the seed.

    From a copy of the layer that runs on the reference.
    """
    if not any((layer.dropout, layer.recurrent_dropout, layer.zoneout_h, layer.zoneout_c)):
        return None, None
    adapter.kept.restore_states()
    clone = copy.copy(layer)
    clone.fused, clone.backend = True, "reference"
    clone.to_cpu()  # with the parameters, which are the layer's own
    with _fixed_random(seed):
        given = (_host(x), state and tuple(map(_host, state)))
        node = _call_recurrent(clone, given, _on_host(options))["y"].creator
    if layer.gpu:
        layer.to_gpu()
    while not isinstance(node, Fused):
        assert node is not None
        node = node.inputs[0].creator
    return node.options.get("masks"), node.options.get("regularization")


def _on_host(options: Mapping[str, Any]) -> dict[str, Any]:
    """Lengths and resets in NumPy's arrays."""
    return {name: None if a is None else cuda.as_numpy(a) for name, a in options.items()}


@dataclass(frozen=True)
class _Call:
    """One call of a recurrent layer, in plain arrays."""

    layer: Recurrent
    x: Array  # (B, I) or (T, B, I)
    state0: Sequence[Array] | None
    masks: Sequence[Array] | None
    regularization: Regularization | None
    options: Mapping[str, Any]

    def reference(
        self, upstream: Mapping[str, Array], dtype: np.dtype[Any]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """All outputs, and all gradients from the upstream ones of some of them, by NumPy in ``dtype``."""
        layer, names = self.layer, self.layer.cell.states
        step, single = self.x.ndim == 2, len(layer.suffixes) == 1

        def stacked(a: Array) -> Array:  # layers x directions in front, as multilayer has it
            a = np.asarray(a).astype(dtype)
            return a[np.newaxis] if single else a

        def shown(a: Array) -> Array:
            return a[0] if single else a

        def incoming(name: str) -> Array | None:
            return stacked(upstream[name]) if name in upstream else None

        def widened(p: Variable) -> Array:
            return cuda.as_numpy(p._data).astype(dtype)

        slots = [layer._slots(suffix) for suffix in layer.suffixes]
        out = multilayer.forward_multilayer(
            layer.cell,
            self.x.astype(dtype)[np.newaxis] if step else self.x.astype(dtype),
            [Weights(**dict(zip(n, map(widened, w), strict=True))) for n, w in slots],
            None if self.state0 is None else tuple(map(stacked, self.state0)),
            bidirectional=layer.bidirectional,
            masks=None if self.masks is None else [m.astype(dtype) for m in self.masks],
            return_states=True,
            regularization=self.regularization,
            backend="reference",
            **_on_host(self.options),
        )
        outputs = {"y": out.y[0] if step else out.y}
        if not step:
            outputs |= {f"{n} of every step": shown(s) for n, s in zip(names, out.states or (), strict=True)}
        outputs |= {f"final {n}": shown(s) for n, s in zip(names, out.stateT, strict=True)}

        dy = upstream.get("y")
        g = multilayer.backward_multilayer(
            out.tape,
            None if dy is None else dy.astype(dtype).reshape(out.y.shape),
            tuple(incoming(f"final {n}") for n in names),
            tuple(incoming(f"{n} of every step") for n in names),
        )
        assert g.dx is not None
        gradients = {"x": g.dx[0] if step else g.dx}
        gradients |= {n: shown(s) for n, s in zip(names, g.dstate0 or (), strict=True)}
        for suffix, dweights in zip(layer.suffixes, g.dweights, strict=True):
            gradients |= {n + suffix: d for n, d in dweights._asdict().items() if d is not None}
        return outputs, gradients
