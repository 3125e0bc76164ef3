"""The reference backend: whole sequences forward and backward in plain NumPy. It defines what is right.

It takes float32, float64 and long double, and complex numbers for derivatives by a complex step. Written to
be read: a list of steps in the order they run, a loop forward over it, a loop backward over it. What one step
computes is in ``fusedrnn.cells.evaluation``; the derivation is in docs/bptt.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np

from fusedrnn import masks
from fusedrnn.backends.arguments import ForwardArguments, check_backward, check_forward, check_weights
from fusedrnn.backends.protocol import Array, Forward, Gradients, Options, State, Weights
from fusedrnn.cells import Cell
from fusedrnn.cells.evaluation import Evaluation

DTYPES = tuple(np.dtype(d) for d in "fdgFDG")


class Step(NamedTuple):
    """One step of the loop: its time, its valid rows, and the rows whose state is cleared before it."""

    t: int
    rows: Any  # slice(None), or an array of row numbers
    cut: Array | None  # (B,) bool
    stop: Array | None = None  # (B,) bool: the rows whose gradient does not go on to the step before


class Run(NamedTuple):
    """What a loop over steps leaves: the state before the first and after each, and the values of each."""

    states: list[State]
    steps: list[Evaluation]


@dataclass(frozen=True)
class Tape:
    """What backward needs. It borrows x and the weights of the call; the rest is its own."""

    arguments: ForwardArguments
    chunks: list[list[Step]]
    kept: list[Run | State]  # of each chunk its run, or with save="boundary_states" the state before it


class ReferenceBackend:
    """The NumPy backend; see ``fusedrnn.backends.protocol``."""

    name = "reference"

    def unavailable(self) -> str | None:
        """None: it needs nothing but NumPy."""
        return None

    def pack(self, cell: Cell, weights: Weights) -> dict[str, Array]:
        """The checked weights; NumPy needs no preparation."""
        return check_weights(cell, weights, DTYPES)[0]

    def forward(
        self, cell: Cell, x: Array, weights: Weights, state0: State | None = None, **options: Unpack[Options]
    ) -> Forward:
        """Run one layer in one direction; see ``fusedrnn.backends.protocol``."""
        a = check_forward(cell, x, weights, state0, **options, dtypes=DTYPES)
        T, B, _, _, P = a.sizes
        y = np.zeros((T, B, P), a.x.dtype)
        state = _start(a) if a.state0 is None else tuple(s.copy() for s in a.state0)
        states = tuple(np.empty((T, *s.shape), s.dtype) for s in state) if a.return_states else ()

        chunks = _chunks(_steps(a))
        kept: list[Run | State] = []
        with np.errstate(all="ignore"):
            for chunk in chunks:
                run = _run(a, chunk, state)
                if a.save is not None:
                    kept.append(run if a.save == "all" else state)
                for step, after in zip(chunk, run.states[1:], strict=True):
                    y[step.t, step.rows] = after[0][step.rows]
                    for sequence, s in zip(states, after, strict=False):
                        sequence[step.t] = s
                state = run.states[-1]
        tape = None if a.save is None else Tape(a, chunks, kept)
        return Forward(y, tuple(s.copy() for s in state), states or None, tape)

    def backward(
        self,
        tape: Tape,
        dy: Array | None = None,
        dstateT: tuple[Array | None, ...] | None = None,
        dstates: tuple[Array | None, ...] | None = None,
        *,
        need: Collection[str] | None = None,
    ) -> Gradients:
        """Back-propagation through time; see ``fusedrnn.backends.protocol``."""
        if not isinstance(tape, Tape):
            raise TypeError(f"tape: expected that of a reference forward, got {type(tape).__name__}")
        a = tape.arguments
        b = check_backward(
            a.cell, a.weights, a.sizes, dy, dstateT, dstates, need=need, return_states=a.return_states
        )
        upstream = [
            [d for d in (b.dy if k == 0 else None, b.dstates[k] if b.dstates else None) if d is not None]
            for k in range(len(a.cell.states))
        ]  # of each state, what comes in at every step
        chain = _gradient(a, b.dstateT)  # gradient of the state that came out of the step at hand
        dx = np.zeros(a.x.shape, a.x.dtype) if "x" in b.need else None
        dweights = {n: np.zeros_like(w) for n, w in a.weights.items() if n in b.need}
        dscalars = {n: np.zeros_like(s) for n, s in a.scalars.items() if n in b.need}
        with np.errstate(all="ignore"):
            for chunk, kept in zip(reversed(tape.chunks), reversed(tape.kept), strict=True):
                run = kept if isinstance(kept, Run) else _run(a, chunk, kept)
                for step, values in zip(reversed(chunk), reversed(run.steps), strict=True):
                    t, rows = step.t, step.rows
                    dstate = tuple(
                        sum((d[t, rows] for d in ds), start=c[rows])
                        for c, ds in zip(chain, upstream, strict=True)
                    )
                    keeps = _keeps(a, step)
                    dbefore = values.backward(_each(keeps, lambda keep, d: keep * d, dstate))
                    dbefore = _each(keeps, lambda keep, d, all_d: d + (1 - keep) * all_d, dbefore, dstate)
                    dbefore = _stopped(step, dbefore)
                    chain = tuple(_put(c, rows, d) for c, d in zip(chain, dbefore, strict=True))
                    values.add_weight_gradients(dweights)
                    if dx is not None:
                        dx[t, rows] = values.input_gradient()
                    for name, d in dscalars.items():
                        d[t, rows] = values.scalar_gradient(name)
        return Gradients(
            dx,
            {n: dweights.get(n) for n in a.weights},
            chain if "state0" in b.need else None,
            {n: dscalars.get(n) for n in a.scalars},
        )


def _dropout(a: ForwardArguments, step: Step) -> Array | None:
    """(rows, H), what recurrent dropout multiplies operands with; None: nothing."""
    r = a.regularization
    if r is None or r.seed is None or not r.recurrent_dropout:
        return None
    rows = np.arange(a.sizes.B)[step.rows]
    return masks.dropout(r.recurrent_dropout, r.seed, r.stream, rows, a.sizes.H).astype(a.x.dtype)


def _keeps(a: ForwardArguments, step: Step) -> tuple[Array | None, ...]:
    """Of each state, what zoneout keeps of the new one, of the step's rows; None: all of it."""
    r = a.regularization
    if r is None:
        return (None,) * len(a.cell.states)

    rates, rows = {"h": r.zoneout_h, "c": r.zoneout_c}, np.arange(a.sizes.B)[step.rows]
    found = (
        masks.zoneout(rates.get(name, 0.0), name, r.seed, r.stream, step.t, rows, width)
        for name, width in zip(a.cell.states, _widths(a), strict=True)
    )
    return tuple(None if keep is None else keep.astype(a.x.dtype) for keep in found)


def _each(
    keeps: tuple[Array | None, ...], change: Callable[..., Array], values: Any, *more: Any
) -> tuple[Array, ...]:
    """The values, one for each state, changed where zoneout acts."""
    return tuple(
        value if keep is None else change(keep, value, *others)
        for keep, value, *others in zip(keeps, values, *more, strict=True)
    )


def _run(a: ForwardArguments, steps: list[Step], state: State) -> Run:
    """Forward over some steps from a state."""
    run = Run([state], [])
    for step in steps:
        before = _cleared(a, step, state)
        scalars = {name: s[step.t, step.rows, None] for name, s in a.scalars.items()}
        x = a.x[step.t, step.rows]
        values = Evaluation(a.cell, a.weights, x, before, scalars, _dropout(a, step))
        after = _each(_keeps(a, step), lambda keep, n, s: keep * n + (1 - keep) * s, values.after, before)
        state = tuple(_put(s, step.rows, n) for s, n in zip(state, after, strict=True))
        run.states.append(state)
        run.steps.append(values)
    return run


def _steps(a: ForwardArguments) -> list[Step]:
    """The steps in the order they run."""
    T = a.sizes.T
    valid = None if a.lengths is None else np.arange(T)[:, None] < a.lengths  # (T, B)
    cuts = a.reset
    if a.reset is not None and a.reverse:  # what comes from t+1 is cleared where t+1 is reset, and valid
        cuts = np.zeros_like(a.reset)
        cuts[:-1] = a.reset[1:] if valid is None else a.reset[1:] & valid[1:]
    steps = [
        Step(t, slice(None) if valid is None else np.flatnonzero(valid[t]), None if cuts is None else cuts[t])
        for t in range(T)
    ]
    steps = steps[::-1] if a.reverse else steps
    every = a.detach_every or T + 1
    for s in range(every, T, every):
        ran = np.ones(a.sizes.B, bool) if valid is None else valid[steps[s - 1].t]
        steps[s] = steps[s]._replace(stop=ran)
    return steps


def _chunks(steps: list[Step]) -> list[list[Step]]:
    """The steps in chunks of about sqrt(T): save="boundary_states" holds few states and one short run."""
    size = max(1, math.isqrt(len(steps)))
    return [steps[k : k + size] for k in range(0, len(steps), size)]


def _start(a: ForwardArguments) -> State:
    """The state that a sequence starts from where none is given."""
    starts = zip(_widths(a), a.cell.trace.start.values(), strict=True)
    return tuple(np.full((a.sizes.B, width), start, a.x.dtype) for width, start in starts)


def _widths(a: ForwardArguments) -> tuple[int, ...]:
    """Of each state how many columns it has."""
    return a.cell.widths(a.sizes.H, a.sizes.P)


def _gradient(a: ForwardArguments, given: tuple[Array | None, ...] | None) -> State:
    """A copy of the gradient of a state, zeros for what is missing."""
    pairs = zip(_widths(a), given or (None,) * len(a.cell.states), strict=True)
    return tuple(np.zeros((a.sizes.B, width), a.x.dtype) if d is None else d.copy() for width, d in pairs)


def _put(state: Array, rows: Any, new: Array) -> Array:
    """The state with new values in these rows; the others stand still."""
    state = state.copy()
    state[rows] = new
    return state


def _cut(rows: Array | None, step: Step, values: State, new: Sequence[float]) -> State:
    """The new numbers in these rows of all; ``values`` are of the step's rows."""
    if rows is None:
        return values
    return tuple(
        np.where(rows[step.rows, None], v.dtype.type(n), v) for v, n in zip(values, new, strict=True)
    )


def _stopped(step: Step, values: State) -> State:
    """The gradient of the state before the step, of its rows."""
    zeros = [0.0] * len(values)
    return _cut(step.stop, step, _cut(step.cut, step, values, zeros), zeros)


def _cleared(a: ForwardArguments, step: Step, state: State) -> State:
    """The state that goes into the step, of its rows."""
    start = list(a.cell.trace.start.values())
    return _cut(step.cut, step, tuple(s[step.rows] for s in state), start)
