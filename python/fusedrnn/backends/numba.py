"""The Numba backend: the Python cells compiled at run time, for machines without a C++ compiler.

Importing this file does not import Numba. The kernels are in ``numba_kernels``; here arguments are checked
and arrays laid out for them. The rows of a batch are shared out among threads of our own, because Numba's
abort the process when two threads of the caller meet in them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np

from fusedrnn.backends.arguments import (
    BackwardArguments,
    ForwardArguments,
    check_backward,
    check_cell,
    check_forward,
    check_weights,
)
from fusedrnn.backends.numba_layout import Layout, layout
from fusedrnn.backends.protocol import Array, Forward, Gradients, Options, State, Unsupported, Weights
from fusedrnn.cells import Cell
from fusedrnn.threads import get_num_threads

NARROW = 16  # below this input size, dx is made of dot products
CHUNK = 1 << 18  # bytes of da before they go into dx and the weight gradients
AHEAD = 32  # rows whose input products are made in one go, where a step has fewer
WORTH_A_THREAD = 2_000_000  # multiplications


class Packed(NamedTuple):
    """Copies of the weights in the kernels' order, and the arrays they were made of."""

    cell: Cell
    weights: dict[str, Array]
    layout: Layout
    ih_t: Array  # (I, ·), columns of the accumulators of x, rows of zeros up to a multiple of four
    hh_t: Array  # (H, ·), columns of the parts, the same
    bias: Array  # (columns of accumulators,)
    ih: Array  # (·, I)
    hh: Array  # (·, H)
    vectors: Array  # all in one


class Order(NamedTuple):
    """The positions of the valid steps; see ``numba_kernels``."""

    rows: Array
    before: Array
    start: Array  # (T, B + 1): where the positions of t, from row b on, begin
    final: Array  # (B,): of each row's last state
    held: Array | None  # (T*B,): of the state that stands at each step; None where all steps are valid


@dataclass(frozen=True)
class Tape:
    """What backward needs. x and y are borrowed."""

    arguments: ForwardArguments
    packed: Packed
    order: Order
    initial: Array  # (states, B + 1, H), in the last row what a cleared state is
    gates: Array
    states: State  # (positions, H) each; the first one is y where all steps are valid
    scalars: Array  # (row scalars, positions)

    @property
    def bytes(self) -> int:
        """Bytes saved for backward beside x and y."""
        arrays = [*self.packed[3:], *self.order[:4], self.initial, self.gates, *self.states[1:], self.scalars]
        return sum(a.nbytes for a in arrays) + (0 if self.order.held is None else self.states[0].nbytes)


class NumbaBackend:
    """Every cell in float32 and float64; see ``protocol`` for the methods.

    The first call for a cell and dtype compiles it, which takes seconds; Numba keeps the result on disk.
    """

    name = "numba"

    def unavailable(self) -> str | None:
        """None, or why Numba is missing."""
        return _unavailable()

    def pack(self, cell: Cell, weights: Weights) -> Packed:
        """Weights prepared for repeated calls, stale as soon as one of them changes."""
        checked, *_ = check_weights(cell, weights)
        if cell.projects:
            raise Unsupported("weight_hr: is not supported by the numba backend; use cpu or reference")
        return pack(cell, checked)

    def forward(
        self,
        cell: Cell,
        x: Array,
        weights: Weights | Packed,
        state0: State | None = None,
        **options: Unpack[Options],
    ) -> Forward:
        """One layer, one direction, the whole sequence."""
        packed = weights if isinstance(weights, Packed) else self.pack(cell, weights)
        if packed.cell != check_cell(cell):
            raise ValueError(f"weights: packed for {packed.cell!r}, expected {cell!r}")
        a = check_forward(cell, x, packed.weights, state0, **options)
        if a.detach_every is not None:
            raise Unsupported("detach_every: is not supported by the numba backend; use another")
        if (r := a.regularization) is not None:
            rates = {name: getattr(r, name) for name in ("recurrent_dropout", "zoneout_h", "zoneout_c")}
            asked = ", ".join(name for name, rate in rates.items() if rate)
            raise Unsupported(f"{asked}: not supported by the numba backend; use another")
        if a.save == "boundary_states":
            raise Unsupported(
                'save: "boundary_states" (recompute=True of a layer) is not supported by the numba backend; '
                'use "all", or another'
            )
        return forward(packed, a)

    def backward(
        self,
        tape: Tape,
        dy: Array | None = None,
        dstateT: tuple[Array | None, ...] | None = None,
        dstates: tuple[Array | None, ...] | None = None,
        *,
        need: Collection[str] | None = None,
    ) -> Gradients:
        """Gradients of everything in ``need``."""
        if not isinstance(tape, Tape):
            raise TypeError(
                f"tape: expected what forward of the numba backend returned, got {type(tape).__name__}"
            )
        a = tape.arguments
        b = check_backward(
            a.cell, a.weights, a.sizes, dy, dstateT, dstates, need=need, return_states=a.return_states
        )
        return backward(tape, b)


def pack(cell: Cell, weights: dict[str, Array]) -> Packed:
    """Checked weights, by name, in the kernels' order; a bias may be missing."""
    found = layout(cell)
    weight_ih = weights["weight_ih"]
    H, I = len(weight_ih) // cell.blocks["weight_ih"], weight_ih.shape[1]
    weight_hh = weights.get("weight_hh", np.empty((0, H), weight_ih.dtype))

    def block(name: str, number: int) -> Any:
        return weights[name][number * H : (number + 1) * H] if name in weights else 0

    bias = np.zeros((len(found.products), H), weight_ih.dtype)
    for name, k, number in found.biases:
        bias[k] += block(name, number)
    vectors = np.zeros((len(found.vectors), H), weight_ih.dtype)
    for k, n in enumerate(found.vectors):
        vectors[k] = block(*n.attribute)
    ih = weight_ih.reshape(-1, H, I)[found.input].reshape(-1, I)
    hh = weight_hh.reshape(-1, H, H)[found.hidden].reshape(-1, H)
    return Packed(
        cell, weights, found, _transposed(ih), _transposed(hh), bias.reshape(-1), ih, hh, vectors.reshape(-1)
    )


def forward(packed: Packed, a: ForwardArguments) -> Forward:
    """Forward with checked arguments."""
    T, B, _, H, _ = a.sizes
    dtype, found, trace = a.x.dtype, packed.layout, packed.layout.cell.trace
    loop = _kernels().loop("forward", found.cell, dtype)
    order = _order(a)
    N = len(order.rows)
    initial = np.empty((len(trace.states), B + 1, H), dtype)
    initial[:] = np.reshape([*trace.start.values()], (-1, 1, 1))
    for padded, s in zip(initial, a.state0 or (), strict=False):
        padded[:B] = s
    computed = tuple(np.empty((N, H), dtype) for _ in trace.states)
    scalars = np.empty((len(a.scalars), N), dtype)
    for into, s in zip(scalars, a.scalars.values(), strict=True):
        into[:] = s.reshape(-1)[order.rows]
    keep = a.save is not None and bool(found.saved)
    groups = _groups(a, order, packed)
    ahead = max(1, AHEAD // B) if B and len(groups) == 1 else 1
    columns = found.columns * H
    gates = np.empty((N if keep else 0, columns), dtype)

    def run(first: Array, last: Array) -> None:
        most = int((last - first).max(initial=0))
        scratch = gates if keep else np.empty((most * ahead, columns), dtype)
        loop(
            scratch, computed, a.x, order.rows, order.before, first, last, initial, packed.ih_t, packed.hh_t,
            packed.bias, packed.vectors, scalars, a.reverse, keep, ahead,
        )  # fmt: skip

    _share(run, groups)
    stateT = tuple(map(_at, computed, initial, [order.final] * len(computed)))
    states = None
    if order.held is None:
        y = computed[0].reshape(T, B, H)
        if a.return_states:
            states = tuple(values.reshape(T, B, H).copy() for values in computed)
    else:
        y = np.zeros((T, B, H), dtype)
        y.reshape(T * B, H)[order.rows] = computed[0]
        if a.return_states:
            held = map(_at, computed, initial, [order.held] * len(computed))
            states = tuple(values.reshape(T, B, H) for values in held)
    tape = None if a.save is None else Tape(a, packed, order, initial, gates, computed, scalars)
    return Forward(y, stateT, states, tape)


def backward(tape: Tape, b: BackwardArguments) -> Gradients:
    """Backward with checked arguments."""
    a, packed, order, found = tape.arguments, tape.packed, tape.order, tape.packed.layout
    T, B, I, H, _ = a.sizes
    dtype = a.x.dtype
    loop = _kernels().loop("backward", found.cell, dtype)

    def steps(d: Array | None) -> Array:
        return np.empty((T * B, 0), dtype) if d is None else d.reshape(T * B, H)

    upstream = tuple(map(steps, (b.dy, *(b.dstates or (None,) * len(tape.states)))))
    chain = np.zeros((len(tape.states), B, H), dtype)
    for into, d in zip(chain, b.dstateT or (), strict=False):
        into[:] = 0 if d is None else d
    all_valid = order.held is None
    dx = (np.empty if all_valid else np.zeros)((T * B, I if "x" in b.need else 0), dtype)
    dscalars = np.zeros_like(tape.scalars)
    narrow = I < NARROW
    columns = len(found.gradients) * H
    rows = max(1, CHUNK // (columns * dtype.itemsize))
    parts = np.array(
        [(p.operand, p.first * H, len(p.blocks) * H, p.column * H) for p in found.parts], np.int64
    ).reshape(-1, 4)
    groups = _groups(a, order, packed)
    sums = [
        (
            np.zeros((len(packed.ih_t) if "weight_ih" in b.need else 0, packed.ih_t.shape[1]), dtype),
            np.zeros((len(packed.hh_t) if "weight_hh" in b.need else 0, packed.hh_t.shape[1]), dtype),
            np.zeros((int(bool(b.need - {"x", "weight_ih", "weight_hh", "state0"})), columns), dtype),
        )
        for _ in groups
    ]

    def run(first: Array, last: Array, dih: Array, dhh: Array, dsums: Array) -> None:
        chunk = min(rows, int((last - first).sum()))
        loop(
            dx, dih, dhh, dsums, chain, upstream, tape.gates, tape.states, a.x, order.rows, order.before,
            first, last, tape.initial, packed.ih_t if narrow else packed.ih, packed.hh, packed.vectors,
            tape.scalars, dscalars, parts, narrow, a.reverse, chunk,
        )  # fmt: skip

    _share(run, [(*group, *s) for group, s in zip(groups, sums, strict=True)])
    dih, dhh, dsums = (functools.reduce(np.add, each) for each in zip(*sums, strict=True))
    dweights = _unpacked(found, b.need, dih[:I], dhh[:H], dsums)
    drows: dict[str, Array | None] = dict.fromkeys(a.scalars)
    for name, d in zip(a.scalars, dscalars, strict=True):
        if name in b.need:
            drows[name] = padded = np.zeros((T, B), dtype)
            padded.reshape(-1)[order.rows] = d
    return Gradients(
        dx.reshape(T, B, I) if "x" in b.need else None,
        {name: dweights.get(name) for name in a.weights},
        tuple(chain) if "state0" in b.need else None,
        drows,
    )


@functools.cache
def _unavailable() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'fusedrnn[numba]'"
    try:
        _kernels()
    except ImportError as error:  # NumPy is too new for it, say
        return f"numba cannot be imported: {error}"
    return None


def _kernels() -> Any:
    return importlib.import_module("fusedrnn.backends.numba_kernels")


def _transposed(w: Array) -> Array:
    """w transposed, with rows of zeros up to a multiple of four."""
    rows, columns = w.shape
    w_t = np.zeros((-(-columns // 4) * 4, rows), w.dtype)
    w_t[:columns] = w.T
    return w_t


def _order(a: ForwardArguments) -> Order:
    """The positions of the valid steps, from lengths, resets and direction."""
    T, B = a.sizes[:2]
    own, cleared = -1 - np.arange(B), -1 - B
    valid = np.ones((T, B), bool) if a.lengths is None else np.arange(T)[:, None] < a.lengths
    start = np.zeros((T, B + 1), np.int64)
    counts = valid.cumsum().reshape(T, B)
    start[:, 1:] = counts
    start[1:, 0] = counts[:-1, -1] if B else 0
    position = start[:, :B]
    before = np.empty((T, B), np.int64)
    if T:
        if a.reverse:
            before[:-1] = position[1:]
            before[-1] = own
            if a.lengths is not None:
                (some,) = a.lengths.nonzero()
                before[a.lengths[some] - 1, some] = own[some]
            if a.reset is not None:
                before[:-1][a.reset[1:] & valid[1:]] = cleared
        else:
            before[1:] = position[:-1]
            before[0] = own
            if a.reset is not None:
                before[a.reset] = cleared
    final = own.copy()
    if a.lengths is None:
        if T:
            final = position[0 if a.reverse else -1].copy()
        return Order(np.arange(T * B), before.reshape(-1), start, final, None)
    if T:
        (some,) = a.lengths.nonzero()
        final[some] = position[0 if a.reverse else a.lengths[some] - 1, some]
    held = np.where(valid, position, own if a.reverse else final)
    return Order(np.flatnonzero(valid), before[valid], start, final, held.reshape(-1))


def _groups(a: ForwardArguments, order: Order, packed: Packed) -> list[tuple[Array, Array]]:
    """Bounds (first, last) of the positions of each t, one pair for each thread that is worth it."""
    T, B, *_ = a.sizes
    rows = np.full(B, T) if a.lengths is None else a.lengths
    work = len(order.rows) * (packed.ih.size + packed.hh.size)
    count = max(1, min(get_num_threads(), B // 4, work // WORTH_A_THREAD))
    total = rows.cumsum()
    cuts = [0, *(int(np.searchsorted(total, k * total[-1] / count)) for k in range(1, count)), B]
    return [
        (np.ascontiguousarray(order.start[:, lo]), np.ascontiguousarray(order.start[:, hi]))
        for lo, hi in itertools.pairwise(cuts)
    ]


def _share(run: Callable[..., None], groups: Sequence[tuple[Array, ...]]) -> None:
    """Run every group, all but the first in a thread of its own."""
    if len(groups) == 1:
        run(*groups[0])
        return
    others = [_threads(os.getpid()).submit(run, *group) for group in groups[1:]]
    try:
        run(*groups[0])
    finally:
        wait(others)  # they write to arrays of this call
    for other in others:
        other.result()


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Kept, because starting a thread takes longer than a small call; a forked process has none of them."""
    return ThreadPoolExecutor(thread_name_prefix="fusedrnn")


def _at(values: Array, initial: Array, positions: Array) -> Array:
    """The states at these positions."""
    out = np.empty((len(positions), values.shape[1]), values.dtype)
    computed = positions >= 0
    out[computed] = values[positions[computed]]
    out[~computed] = initial[-1 - positions[~computed]]
    return out


def _unpacked(
    found: Layout, need: frozenset[str], dih_t: Array, dhh_t: Array, dsums: Array
) -> dict[str, Array]:
    """The gradients of the weights by name, in the order of the weights."""
    blocks, gradient = found.cell.trace.blocks, found.cell.gradient
    H = dsums.shape[1] // len(found.gradients)
    gradients = {name: np.zeros(len(rows) * H, dsums.dtype) for name, rows in blocks.items() if name in need}
    for name, columns, order in (("weight_ih", dih_t, found.input), ("weight_hh", dhh_t, found.hidden)):
        if name in gradients:
            gradients[name] = np.empty((columns.shape[1], columns.shape[0]), columns.dtype)
            for k, block in enumerate(order):
                gradients[name][block * H : (block + 1) * H] = columns[:, k * H : (k + 1) * H].T
    sums = list(found.biases)
    for n, d in gradient.vectors.items():
        name, block = n.attribute
        sums.append((name, found.gradients.index(d), block))
    for name, k, block in sums:
        if name in gradients:
            gradients[name][block * H : (block + 1) * H] = dsums[0, k * H : (k + 1) * H]
    return gradients
