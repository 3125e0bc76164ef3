"""Compare a recurrent layer of this library with the NumPy reference in long double."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedrnn import cuda, multilayer
from fusedrnn.autograd import Variable
from fusedrnn.backends.protocol import Array, Regularization
from fusedrnn.functions import Fused
from fusedrnn.gradcheck.adapters import VariableAdapter, backward, call_recurrent, host, rebuild, split
from fusedrnn.gradcheck.central import breaking_off
from fusedrnn.gradcheck.compare import compare, fixed_random, same
from fusedrnn.layers import Recurrent

WIDE = np.dtype(np.longdouble)
# Relative to each tensor's largest entry, on standard problems: PyTorch's initialisation, inputs of order
# one, upstream gradients on every step, H >= 7, T up to 256.
FORWARD = {"float32": 2e-6, "float64": 1e-14}
GRADIENT = {"float32": 5e-6, "float64": 2e-14}
TIMES_NUMPY = 4  # and at most this many times plain NumPy's error, which counts as at least ...
FLOOR = 4  # ... this many machine epsilons: smaller errors are chance


def check_oracle(
    layer: Recurrent,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    atol: float | None,
    rtol: float | None,
    nondet_tol: float,
    seed: int,
) -> None:
    """Compare a layer with the reference in long double; a failure raises a ``GradcheckError``.

    The arguments are those of ``fusedrnn.gradcheck.gradcheck``.
    """
    unknown = sorted(set(options) - {"lengths", "reset"})
    if unknown:
        raise ValueError(f'options: expected lengths and reset with method "oracle", got {unknown}')
    x, state, scalars = split(layer, inputs)
    with VariableAdapter(layer, inputs, options) as adapter:
        assert isinstance(adapter, VariableAdapter)
        begin = layer.state if state is None and not layer.bidirectional else state
        call = _Call(
            layer,
            host(x).astype(layer.dtype),
            None if begin is None else [host(s).astype(layer.dtype) for s in begin],
            {name: host(s).astype(layer.dtype) for name, s in scalars.items()},
            *_drawn(layer, adapter, inputs, options, seed),
            options,
        )
        variables = adapter.given(adapter.values)
        everything = [*variables, *adapter.params]
        # leaf 0 of the inputs is x, the last ones are row scalars, the others are the state
        others = [*layer.cell.states, *[""] * len(adapter.leaves)][: len(adapter.leaves) - 1 - len(scalars)]
        tensors = [["x", *others, *scalars][k] for k in adapter.slots]
        tensors += adapter.names[len(adapter.slots) :]
        dtypes = {name: value.dtype for name, value in zip(tensors, adapter.values, strict=True)}

        def ours(upstream: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Any]]:
            with fixed_random(seed):
                adapter.kept.restore_states()
                for v in everything:
                    v.cleargrad()
                outputs = call_recurrent(layer, adapter.arguments(variables), options)
                with breaking_off():
                    backward([(outputs[name], u) for name, u in upstream.items() if name in outputs])
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
                        # if NumPy has lost half of all digits, a larger error is not allowed
                        numpys = min(numpys, largest * float(np.finfo(layer.dtype).eps) ** 0.5)
                        limit = max(figures[layer.dtype.name] * largest, TIMES_NUMPY * numpys)
                    else:
                        limit = rtol * largest
                    dtype = dtypes[name] if k else layer.dtype
                    label = f"{what}{name}{note if k else ''}"
                    compare(label, got, truth, limit + (atol or 0), dtype=dtype)
                    same(label, got, again[k][name], nondet_tol)


def _drawn(
    layer: Recurrent, adapter: VariableAdapter, inputs: Any, options: Mapping[str, Any], seed: int
) -> tuple[Sequence[Array] | None, Regularization | None]:
    """What the layer draws: the masks of dropout between layers, and its regularization with the seed.

    They are taken from a copy of the layer that runs on the reference.
    """
    if not any((layer.dropout, layer.recurrent_dropout, layer.zoneout_h, layer.zoneout_c)):
        return None, None
    adapter.kept.restore_states()
    clone = copy.copy(layer)
    clone.fused, clone.backend = True, "reference"
    clone.to_cpu()  # with the parameters, which are the layer's own
    with fixed_random(seed):
        given = rebuild(inputs, (None if leaf is None else host(leaf) for _, leaf in adapter.leaves))
        node = call_recurrent(clone, given, _on_host(options))["y"].creator
    if layer.gpu:
        layer.to_gpu()
    while not isinstance(node, Fused):
        assert node is not None
        node = node.inputs[0].creator
    return node.options.get("masks"), node.options.get("regularization")


def _on_host(options: Mapping[str, Any]) -> dict[str, Any]:
    """Lengths and resets as NumPy arrays."""
    return {name: None if a is None else cuda.as_numpy(a) for name, a in options.items()}


@dataclass(frozen=True)
class _Call:
    """One call of a recurrent layer, as NumPy arrays."""

    layer: Recurrent
    x: Array  # (B, I) or (T, B, I)
    state0: Sequence[Array] | None
    scalars: Mapping[str, Array]  # (B,) or (T, B) each
    masks: Sequence[Array] | None
    regularization: Regularization | None
    options: Mapping[str, Any]

    def reference(
        self, upstream: Mapping[str, Array], dtype: np.dtype[Any]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """All outputs, and all gradients for upstream gradients of some outputs, by NumPy in ``dtype``."""
        layer, names = self.layer, self.layer.cell.states
        step, single = self.x.ndim == 2, len(layer.suffixes) == 1

        def stacked(a: Array) -> Array:  # layers x directions first, as in multilayer
            a = np.asarray(a).astype(dtype)
            return a[np.newaxis] if single else a

        def shown(a: Array) -> Array:
            return a[0] if single else a

        def incoming(name: str) -> Array | None:
            return stacked(upstream[name]) if name in upstream else None

        def widened(p: Variable) -> Array:
            return cuda.as_numpy(p._data).astype(dtype)

        slots = [layer.weights_of(suffix) for suffix in layer.suffixes]
        out = multilayer.forward_multilayer(
            layer.cell,
            self.x.astype(dtype)[np.newaxis] if step else self.x.astype(dtype),
            [{n: widened(w) for n, w in weights.items()} for weights in slots],
            None if self.state0 is None else tuple(map(stacked, self.state0)),
            bidirectional=layer.bidirectional,
            masks=None if self.masks is None else [m.astype(dtype) for m in self.masks],
            return_states=True,
            regularization=self.regularization,
            scalars={
                n: s.astype(dtype)[np.newaxis] if step else s.astype(dtype) for n, s in self.scalars.items()
            },
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
        gradients |= {n: d[0] if step else d for n, d in g.dscalars.items()}
        gradients |= {n: shown(s) for n, s in zip(names, g.dstate0 or (), strict=True)}
        for suffix, dweights in zip(layer.suffixes, g.dweights, strict=True):
            gradients |= {n + suffix: d for n, d in dweights.items()}
        return outputs, gradients
