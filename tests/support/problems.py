"""The one list of problems that every kernel test runs, and how two results are compared.

A problem is drawn in float32 and only then cast, so that it is the same in every dtype. Weights are as
PyTorch initialises them; states, inputs and upstream gradients are normal. What must never be read (x and
upstream gradients at padding) is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusedrnn.backends import get
from fusedrnn.backends.protocol import Array, Forward, Gradients, Regularization, State, Weights
from fusedrnn.cells import Cell, gru, lstm, rnn
from fusedrnn.problems import map_floats

# What every backend has, and what the kernels of the CPU have beside these and layer norm.
PLAIN: tuple[Cell, ...] = (rnn, rnn.with_options(relu=True), lstm, gru, gru.with_options(reset_after=False))
PROJECTED = lstm.with_options(project=True)
CELLS = (*PLAIN, PROJECTED)

NORMED: tuple[Cell, ...] = tuple(cell.with_options(layer_norm=True) for cell in PLAIN)

# T, B, I, H: T > 1; primes, and one more or less than the widths of vectors and tiles.
SIZES = ((2, 3, 5, 7), (5, 1, 1, 15), (7, 7, 3, 17), (3, 13, 17, 31), (11, 2, 2, 33))

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"reverse": True},
    {"lengths": True},
    {"lengths": True, "reverse": True},
    {"reset": True},
    {"reset": True, "reverse": True, "return_states": True},
    {"return_states": True},
    {"lengths": True, "reset": True, "return_states": True},
    {"lengths": True, "reset": True, "reverse": True, "return_states": True},
    {"biases": "none", "state0": False},
    {"detach_every": 2, "lengths": True, "return_states": True},
    {"detach_every": 3, "reset": True, "reverse": True},
    {"detach_every": 1, "lengths": True, "reverse": True},
    {"biases": "both"},
    {"biases": "bias_hh"},
)


@dataclass(frozen=True)
class Problem:
    """Everything that goes into one forward and one backward."""

    cell: Cell
    x: Array  # (T, B, I)
    weights: Weights
    state0: State | None
    lengths: Array | None
    reset: Array | None
    reverse: bool
    return_states: bool
    detach_every: int | None
    regularization: Regularization | None
    dy: Array | None  # (T, B, P)
    dstateT: tuple[Array | None, ...] | None
    dstates: tuple[Array | None, ...] | None
    scalars: dict[str, Array] = field(default_factory=dict)  # (T, B) each

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``forward``."""
        return {
            "lengths": self.lengths,
            "reset": self.reset,
            "reverse": self.reverse,
            "return_states": self.return_states,
            "detach_every": self.detach_every,
            "regularization": self.regularization,
            **({"scalars": self.scalars} if self.scalars else {}),
        }

    def astype(self, dtype: Any) -> Problem:
        """The same numbers in another dtype."""
        return map_floats(self, lambda a: a.astype(dtype))


def problem(
    cell: Cell,
    T: int,
    B: int,
    I: int,
    H: int,
    seed: int = 0,
    dtype: Any = np.float64,
    *,
    lengths: bool = False,
    reset: bool = False,
    reverse: bool = False,
    return_states: bool = False,
    detach_every: int | None = None,
    regularization: Regularization | None = None,
    state0: bool = True,
    P: int | None = None,
    biases: str = "native",
    upstream: tuple[str, ...] = ("dy", "dstateT", "dstates"),
    gain: float = 0.1,
) -> Problem:
    """Draw a problem.

    Args:
        cell, T, B, I, H, seed, dtype: What the names say.
        lengths: Rows of different lengths, 0 and T among them where there are two rows or more.
        reset: New segments at random steps, step 0 of row 0 among them.
        reverse, return_states, detach_every, regularization: Passed on.
        state0: A non-zero initial state, else None.
        P: The projected size; None: two thirds of H, of a cell that projects.
        biases: "native" (bias_ih, and bias_hh for GRU reset-after), "both", "none", "bias_ih", "bias_hh".
        upstream: Which gradients come in; dstates only with return_states.
        gain: Of layer norm, about which its gains are drawn. 0.1 as in Cooijmans et al., "Recurrent batch
            normalization", 2016; with 1 many problems are chaotic, and an error grows with every step.
    """
    rng = np.random.default_rng([seed, T, B, I, H])

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    def uniform(*shape: int) -> Array:
        return rng.uniform(-(H**-0.5), H**-0.5, shape).astype(np.float32)

    if biases == "native":
        biases = "both" if cell.options.get("reset_after") else "bias_ih"
    P = H if not cell.projects else P or max(1, H * 2 // 3)
    shapes, widths = cell.shapes(I, H, P), cell.widths(H, P)
    absent = {n for n in ("bias_ih", "bias_hh") if biases not in ("both", n)}
    weights = {n: uniform(*shapes[n]) for n in shapes if n not in (*absent, *cell.vectors)}
    x, dy = normal(T, B, I), normal(T, B, P)
    starts = cell.trace.start.values()
    h0 = tuple(
        1 + abs(normal(B, width)) if start else normal(B, width)
        for start, width in zip(starts, widths, strict=True)
    )
    dstateT = tuple(normal(B, width) for width in widths)
    dstates = tuple(normal(T, B, width) for width in widths)
    for key in cell.vectors:
        drawn = normal(*shapes[key]) / 4
        weights[key] = np.float32(gain) * (1 + drawn) if key.startswith("gain") else drawn
    scalars = {key: (1 + np.abs(normal(T, B))) / 4 for key in cell.scalars}
    n = resets = None
    if reset:
        resets = rng.random((T, B)) < 0.3
        resets[0, :1] = True
    if lengths:
        n = rng.integers(0, T + 1, B)
        if B > 1:
            n[[0, B - 1]] = T, 0
        padding = np.arange(T)[:, None] >= n
        for a in (x, dy, *dstates, *scalars.values()):
            a[padding] = np.nan
    return Problem(
        cell,
        x,
        weights,
        h0 if state0 else None,
        n,
        resets,
        reverse,
        return_states,
        detach_every,
        regularization,
        dy if "dy" in upstream else None,
        dstateT if "dstateT" in upstream else None,
        dstates if "dstates" in upstream and return_states else None,
        scalars,
    ).astype(dtype)


def name(cell: Cell, options: dict[str, Any] | None = None) -> str:
    """A test id."""
    parts = [cell.name]
    if cell.options.get("relu"):
        parts.append("relu")
    if cell.options.get("reset_after") is False:
        parts.append("before")
    if cell.vectors:
        parts.append("norm")
    if cell.projects:
        parts.append("projected")
    for key, value in (options or {}).items():
        parts.append(key if value is True else f"{key}={value}")
    return "-".join(parts)


def run(
    backend: Any, p: Problem, *, save: str = "all", need: tuple[str, ...] | None = None
) -> dict[str, Array]:
    """Forward and backward on a backend, or on ``kernels``; every result by its name."""
    forward: Forward = backend.forward(p.cell, p.x, p.weights, p.state0, **p.options, save=save)
    gradients: Gradients = backend.backward(forward.tape, p.dy, p.dstateT, p.dstates, need=need)
    return named(p.cell, forward, gradients)


def named(cell: Cell, forward: Forward | None, gradients: Gradients | None) -> dict[str, Array]:
    """The arrays of results by name: y, hT, h (of every step), dx, dweight_ih, dh0, ..."""
    arrays: dict[str, Array | None] = {}
    if forward is not None:
        arrays["y"] = forward.y
        arrays |= {f"{s}T": a for s, a in zip(cell.states, forward.stateT, strict=True)}
        if forward.states is not None:
            arrays |= dict(zip(cell.states, forward.states, strict=True))
    if gradients is not None:
        arrays["dx"] = gradients.dx
        arrays |= {f"d{n}": a for n, a in gradients.dweights.items()}
        arrays |= {f"d{n}": a for n, a in gradients.dscalars.items()}
        if gradients.dstate0 is not None:
            arrays |= {f"d{s}0": a for s, a in zip(cell.states, gradients.dstate0, strict=True)}
    return {key: a for key, a in arrays.items() if a is not None}


def expected_names(p: Problem) -> set[str]:
    """What ``run`` must return for a problem with ``need=None``."""
    states = set(p.cell.states)
    names = {"y", "dx"} | {f"{s}T" for s in states} | {f"d{s}0" for s in states}
    names |= {f"d{n}" for n in (*p.weights, *p.scalars)}
    return names | (states if p.return_states else set())


def error(got: Array, want: Array) -> float:
    """The largest difference relative to the largest entry of ``want``; infinite for NaN or another shape."""
    if got.shape != want.shape:
        return float("inf")
    if got.size == 0:
        return 0.0
    difference = float(np.max(np.abs(got.astype(np.longdouble) - want.astype(np.longdouble))))
    if not np.isfinite(difference):
        return float("inf")
    scale = float(np.max(np.abs(want)))
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def errors(got: dict[str, Array], want: dict[str, Array]) -> dict[str, float]:
    """``error`` by name; infinite for a name that only one side has."""
    return {
        key: error(got[key], want[key]) if key in got and key in want else float("inf")
        for key in sorted(got.keys() | want.keys())
    }


def assert_close(got: dict[str, Array], want: dict[str, Array], tolerance: float) -> None:
    """Every array of ``want`` is there and within the tolerance, relative to its largest entry."""
    bad = {key: e for key, e in errors(got, want).items() if not e <= tolerance}
    assert not bad, f"beyond {tolerance}: {bad}"


FORWARD = {np.float32: 2e-6, np.float64: 1e-14}  # the promise of the project for standard problems
GRADIENT = {np.float32: 5e-6, np.float64: 2e-14}


def assert_standard(backend: Any, p: Problem, want: dict[str, Array] | None = None) -> dict[str, Array]:
    """The results are within the promised figures of the reference's in long double; they are returned."""
    dtype = p.x.dtype.type
    got, want = run(backend, p), want or run(get("reference"), p.astype(np.longdouble))
    assert got.keys() == want.keys() == expected_names(p)
    assert {a.dtype for a in got.values()} == {np.dtype(dtype)}
    for gradient, tolerance in ((False, FORWARD[dtype]), (True, GRADIENT[dtype])):
        part = {key: a for key, a in want.items() if key.startswith("d") == gradient}
        assert_close({key: got[key] for key in part}, part, tolerance)
    return got


def assert_bitwise_equal(got: dict[str, Array], want: dict[str, Array]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype, key
        assert got[key].shape == want[key].shape, key
        # of a long double only 10 of 16 bytes are bits; equal values and signs are equal bits, NaN apart
        same = (got[key] == want[key]) & (np.signbit(got[key]) == np.signbit(want[key]))
        assert (same | (np.isnan(got[key]) & np.isnan(want[key]))).all(), key
