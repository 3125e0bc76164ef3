"""Several layers, both directions and dropout between layers, with any backend.

The order is PyTorch's. ``weights`` has one entry per layer and direction, layer by layer, forward before
reverse. States are (L*D, B, ·). y is the concatenation of the last layer's directions, (T, B, D*P).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import cuda, kernels
from fusedrnn.backends.arguments import (
    check_bool,
    check_cell,
    check_need,
    check_rate,
    check_regularization,
    check_shape,
    check_sized,
    entries,
)
from fusedrnn.backends.protocol import Array, Forward, Regularization, Rows, Scalars, State, Weights
from fusedrnn.cells import Cell


class Tape(NamedTuple):
    """What ``forward_multilayer`` keeps for ``backward_multilayer``."""

    cell: Cell
    tapes: list[kernels.Tape]  # layer by layer, forward before reverse
    D: int
    masks: list[Array | None]  # by what the output of each layer but the last was multiplied
    y_shape: tuple[int, ...]


class MultilayerGradients(NamedTuple):
    """Result of ``backward_multilayer``. Gradients that are not in ``need`` are None.

    ``dx`` is (T, B, I). ``dweights`` has one dictionary per layer and direction. ``dstate0`` has (L*D, B, ·)
    for each state. ``dscalars`` has (T, B) for each name, the sum over layers and directions.
    """

    dx: Array | None
    dweights: list[dict[str, Any]]
    dstate0: State | None
    dscalars: dict[str, Any]


def dropout_mask(rng: np.random.Generator, dropout: float, shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of this shape and dtype: 0 with probability ``dropout``, else 1 / (1 - dropout)."""
    scale = np.asarray(0 if dropout == 1 else 1 / (1 - dropout), dtype)
    return np.where(rng.random(shape) < dropout, np.zeros((), dtype), scale)


def forward_multilayer(
    cell: Cell,
    x: Array,
    weights: Sequence[Weights | kernels.Packed],
    state0: State | None = None,
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    rng: np.random.Generator | None = None,
    masks: Sequence[Array] | None = None,
    lengths: Rows | None = None,
    reset: Rows | None = None,
    return_states: bool = False,
    detach_every: int | None = None,
    regularization: Regularization | None = None,
    scalars: Scalars | None = None,
    save: str | None = "all",
    backend: str | None = None,
) -> Forward:
    """Run L layers in D directions over a whole sequence.

    Args:
        cell: The cell of every layer.
        x: (T, B, I).
        weights: L*D mappings by name (or what ``kernels.pack`` returned); from the second layer on I is D*P.
        state0: (h,) or (h, c), each (L*D, B, ·). None: the initial values of the cell.
        bidirectional: D = 2: every layer also runs in reverse.
        dropout: The probability that an output of each layer but the last is zeroed; the others are scaled by
            1 / (1 - dropout). For training only: pass 0 in evaluation.
        rng: The generator of the masks; needed with dropout if ``masks`` is None.
        masks: L-1 arrays (T, B, D*P) of x's dtype that multiply the layers' outputs, instead of masks that
            are drawn. None for a layer without dropout.
        regularization: As in ``kernels.forward``. Each layer and direction draws different masks from the
            seed; ``stream`` is set for this.
        scalars: As in ``kernels.forward``. All layers and directions get the same values.
        lengths, reset, return_states, detach_every, save, backend: As in ``kernels.forward``.

    Returns:
        y (T, B, D*P); stateT like state0; states (L*D, T, B, ·) each, or None; tape for
        ``backward_multilayer``, or None.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it, what it got and what was expected.
        RuntimeError: The backend cannot run here.
    """
    D = 2 if check_bool("bidirectional", bidirectional) else 1
    if isinstance(weights, kernels.Packed) or not isinstance(weights, Sequence):
        raise TypeError(
            f"weights: expected a list, one entry per layer and direction, got {type(weights).__name__}"
        )
    if not weights or len(weights) % D:
        expected = "L*2 entries (bidirectional)" if bidirectional else "at least 1 entry"
        raise ValueError(f"weights: expected {expected}, got {len(weights)}")
    L = len(weights) // D
    _check_states("state0", cell, state0, L * D)
    regularization = check_regularization(check_cell(cell), regularization)
    check_rate("dropout", dropout)
    if masks is not None and check_sized("masks", masks) != L - 1:
        raise ValueError(f"masks: expected {L - 1}, one for each layer but the last, got {len(masks)}")
    if masks is None and dropout > 0 and L > 1 and not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: expected a numpy Generator for dropout > 0, got {type(rng).__name__}")

    xp = cuda.get_array_module(x)
    results: list[Forward] = []
    used: list[Array | None] = []
    y = x
    for layer in range(L):
        if layer > 0:
            mask = masks[layer - 1] if masks is not None else None
            if mask is not None:
                _check_mask(f"masks[{layer - 1}]", mask, y)
            elif masks is None and dropout > 0 and rng is not None:
                mask = xp.asarray(dropout_mask(rng, dropout, y.shape, y.dtype))
            used.append(mask)
            y = y if mask is None else y * mask
        outs = [
            kernels.forward(
                cell,
                y,
                weights[n],
                None if state0 is None else tuple(s[n] for s in state0),
                lengths=lengths,
                reset=reset,
                reverse=n % D == 1,
                return_states=return_states,
                detach_every=detach_every,
                regularization=None if regularization is None else regularization._replace(stream=n),
                scalars=scalars,
                save=save,
                backend=backend,
            )
            for n in range(layer * D, layer * D + D)
        ]
        results += outs
        y = outs[0].y if D == 1 else xp.concatenate([out.y for out in outs], axis=2)
    stateT = tuple(xp.stack([r.stateT[k] for r in results]) for k in range(len(cell.states)))
    all_states = [r.states for r in results if r.states is not None]
    states = tuple(xp.stack(s) for s in zip(*all_states, strict=True)) if all_states else None
    tape = Tape(cell, [r.tape for r in results], D, used, y.shape) if save is not None else None
    return Forward(y, stateT, states, tape)


def backward_multilayer(
    tape: Tape,
    dy: Array | None = None,
    dstateT: tuple[Array | None, ...] | None = None,
    dstates: tuple[Array | None, ...] | None = None,
    *,
    need: Collection[str] | None = None,
) -> MultilayerGradients:
    """Gradients of ``sum(y*dy) + sum(stateT*dstateT) + sum(states*dstates)`` through all layers.

    Args:
        tape: From ``forward_multilayer``.
        dy: (T, B, D*P) or None.
        dstateT: One entry per state, (L*D, B, ·) or None each, or None.
        dstates: One entry per state, (L*D, T, B, ·) or None each, or None; only after ``return_states=True``.
        need: "x", the input of the first layer; names of weights, in every layer; names of scalars;
            "state0". None for all.

    Returns:
        dx (T, B, I); dweights, by name, for each layer and direction; dstate0 like state0; dscalars, by name,
        each the sum over layers and directions. What is not in ``need`` is None.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it, what it got and what was expected.
    """
    if not isinstance(tape, Tape):
        raise TypeError(f"tape: expected what forward_multilayer returned, got {type(tape).__name__}")
    cell, D = tape.cell, tape.D
    N = len(tape.tapes)
    wanted = check_need(cell, need)
    _check_states("dstateT", cell, dstateT, N)
    _check_states("dstates", cell, dstates, N)
    if dy is not None:
        _check_like("dy", dy, tape.y_shape)
    dx: Array | None = dy
    dweights: list[dict[str, Any]] = []
    dstate0: list[State] = []
    dscalars: dict[str, Any] = dict.fromkeys(cell.scalars)
    for layer in reversed(range(N // D)):
        dys = [None] * D if dx is None else cuda.get_array_module(dx).split(dx, D, axis=2)
        need_layer = wanted if layer == 0 else wanted | {"x"}
        gradients = [
            kernels.backward(
                tape.tapes[n], dys[n % D], _entry(dstateT, n), _entry(dstates, n), need=need_layer
            )
            for n in range(layer * D, layer * D + D)
        ]
        dweights = [g.dweights for g in gradients] + dweights
        dstate0 = [g.dstate0 for g in gradients if g.dstate0 is not None] + dstate0
        for g in gradients:
            for name, d in g.dscalars.items():
                dscalars[name] = d if dscalars[name] is None else dscalars[name] + d
        parts = [g.dx for g in gradients if g.dx is not None]
        dx = sum(parts[1:], start=parts[0]) if parts else None
        mask = tape.masks[layer - 1] if layer > 0 else None
        if dx is not None and mask is not None:
            dx = dx * mask
    stacked = (cuda.get_array_module(s[0]).stack(s) for s in zip(*dstate0, strict=True))
    return MultilayerGradients(dx, dweights, tuple(stacked) if "state0" in wanted else None, dscalars)


def _entry(states: tuple[Array | None, ...] | None, n: int) -> tuple[Array | None, ...] | None:
    """The part of state-like gradients that belongs to one layer and direction."""
    return None if states is None else tuple(None if s is None else s[n] for s in states)


def _check_states(name: str, cell: Cell, states: Any, N: int) -> None:
    """Check a tuple with one entry per state: None, or an array whose first axis is N layers x directions."""
    check_cell(cell)
    if states is None:
        return
    for state, s in zip(cell.states, entries(name, cell, states), strict=True):
        if s is None and name != "state0":
            continue
        if not cuda.is_array(s):
            raise TypeError(f"{name} {state}: expected a NumPy or CuPy array, got {type(s).__name__}")
        if s.ndim == 0 or len(s) != N:
            raise ValueError(
                f"{name} {state}: expected a first axis of {N}, layers x directions, got {s.shape}"
            )


def _check_mask(name: str, mask: Any, y: Array) -> None:
    _check_like(name, mask, y.shape)
    if cuda.on_gpu(mask) != cuda.on_gpu(y):
        raise TypeError(
            f"{name}: expected an array of {type(y).__module__}, like x, got one of {type(mask).__module__}"
        )
    if mask.dtype != y.dtype:
        raise TypeError(f"{name}: expected dtype {y.dtype} (that of x), got {mask.dtype}")


def _check_like(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not cuda.is_array(value):
        raise TypeError(f"{name}: expected a NumPy or CuPy array, got {type(value).__name__}")
    check_shape(name, value.shape, shape)
