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
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.backends.arguments import (
    ForwardArguments,
    check_backward,
    check_cell,
    check_forward,
    check_weights,
)
from fusedrnn.backends.protocol import (
    Array,
    Forward,
    Gradients,
    Regularization,
    Rows,
    State,
    Unsupported,
    Weights,
)
from fusedrnn.cells import Cell
from fusedrnn.cells.kernel import Kernel
from fusedrnn.cells.trace import side
from fusedrnn.threads import get_num_threads

NARROW = 16  # below this input size, dx is made of dot products
CHUNK = 1 << 18  # bytes of da before they go into dx and the weight gradients
AHEAD = 32  # rows whose input products are made in one go, where a step has fewer
WORTH_A_THREAD = 2_000_000  # multiplications


class Packed(NamedTuple):
    """Copies of the weights in the kernels' order, and the arrays they were made of."""

    cell: Cell
    weights: dict[str, Array]
    ih_t: Array  # (I, G*H), rows of zeros added up to a multiple of four
    hh_t: Array  # (H, G*H), the same
    bias: Array  # (columns of gates,)
    ih: Array  # (G*H, I)
    hh: Array  # (G*H, H)


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
    state0: State  # (B + 1, H) each, the last row zeros
    gates: Array
    h: Array
    c: Array

    @property
    def bytes(self) -> int:
        """Bytes saved for backward beside x and y."""
        arrays = [*self.packed[2:], *self.order[:4], *self.state0, self.gates, self.c]
        return sum(a.nbytes for a in arrays) + (0 if self.order.held is None else self.h.nbytes)


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
        checked, I, H, _ = check_weights(cell, weights)
        if cell.projects:
            raise Unsupported("weight_hr: is not supported by the numba backend; use cpu or reference")
        if cell.vectors:
            raise Unsupported("layer_norm: is not supported by the numba backend; use cpu or reference")
        kernel = _kernels().kernel(cell)
        bias = np.zeros((len(kernel.products), H), checked["weight_ih"].dtype)
        for name, k, block in _biases(kernel):
            if (b := checked.get(name)) is not None:
                bias[k] += b[block * H : (block + 1) * H]
        ih = checked["weight_ih"].reshape(-1, H, I)[kernel.input.blocks].reshape(-1, I)
        hh = checked["weight_hh"].reshape(-1, H, H)[_recurrent(kernel)].reshape(-1, H)
        return Packed(cell, checked, _transposed(ih), _transposed(hh), bias.reshape(-1), ih, hh)

    def forward(
        self,
        cell: Cell,
        x: Array,
        weights: Weights | Packed,
        state0: State | None = None,
        *,
        lengths: Rows | None = None,
        reset: Rows | None = None,
        reverse: bool = False,
        return_states: bool = False,
        detach_every: int | None = None,
        regularization: Regularization | None = None,
        save: str | None = "all",
    ) -> Forward:
        """One layer, one direction, the whole sequence."""
        packed = weights if isinstance(weights, Packed) else self.pack(cell, weights)
        if packed.cell != check_cell(cell):
            raise ValueError(f"weights: packed for {packed.cell!r}, expected {cell!r}")
        a = check_forward(
            cell,
            x,
            packed.weights,
            state0,
            lengths=lengths,
            reset=reset,
            reverse=reverse,
            return_states=return_states,
            detach_every=detach_every,
            regularization=regularization,
            save=save,
        )
        if a.detach_every is not None:
            raise Unsupported("detach_every: is not supported by the numba backend; use another")
        if a.regularization is not None:
            raise Unsupported("regularization: is not supported by the numba backend; use another")
        if a.save == "boundary_states":
            raise Unsupported(
                'save: "boundary_states" is not supported by the numba backend; use "all", or the reference'
            )
        T, B, _, H, _ = a.sizes
        dtype = a.x.dtype
        loop = _kernels().forward_loop(cell, dtype)
        order = _order(a)
        N = len(order.rows)
        two = "c" in cell.states
        initial = np.zeros((2, B + 1, H), dtype)
        for padded, s in zip(initial, a.state0 or (), strict=False):
            padded[:B] = s
        h0, c0 = initial[0], initial[1] if two else _nothing(B + 1, 0, dtype)
        h, c = np.empty((N, H), dtype), np.empty((N, H if two else 0), dtype)
        kernel = _kernels().kernel(cell)
        keep = a.save is not None and bool(kernel.saved)
        groups = _groups(a, order)
        ahead = max(1, AHEAD // B) if B and len(groups) == 1 else 1
        gates = _nothing(N if keep else 0, len(packed.bias), dtype)

        def run(first: Array, last: Array) -> None:
            most = int((last - first).max(initial=0))
            scratch = gates if keep else np.empty((most * ahead, len(packed.bias)), dtype)
            loop(
                scratch, h, c, a.x, order.rows, order.before, first, last, h0, c0,
                packed.ih_t, packed.hh_t, packed.bias, len(kernel.second) * H, a.reverse, keep, ahead,
            )  # fmt: skip

        _share(run, groups)
        state = list(zip((h, c), (h0, c0), cell.states, strict=False))
        stateT = tuple(_at(values, s, order.final) for values, s, _ in state)
        states = None
        if order.held is None:
            y = h.reshape(T, B, H)
            if a.return_states:
                states = tuple(values.reshape(T, B, H).copy() for values, *_ in state)
        else:
            y = np.zeros((T, B, H), dtype)
            y.reshape(T * B, H)[order.rows] = h
            if a.return_states:
                states = tuple(_at(values, s, order.held).reshape(T, B, H) for values, s, _ in state)
        tape = None if a.save is None else Tape(a, packed, order, (h0, c0), gates, h, c)
        return Forward(y, stateT, states, tape)

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
        a, packed, order = tape.arguments, tape.packed, tape.order
        b = check_backward(
            a.cell, a.weights, a.sizes, dy, dstateT, dstates, need=need, return_states=a.return_states
        )
        T, B, I, H, _ = a.sizes
        dtype = a.x.dtype
        loop = _kernels().backward_loop(a.cell, dtype)
        two = "c" in a.cell.states
        kernel = _kernels().kernel(a.cell)

        def steps(d: Array | None) -> Array:
            return _nothing(T * B, 0, dtype) if d is None else d.reshape(T * B, H)

        def start(d: Array | None, width: int) -> Array:
            return np.zeros((B, width), dtype) if d is None else d.copy()

        final, every = ((*(d or ()), None, None) for d in (b.dstateT, b.dstates))
        upstream = steps(b.dy), steps(every[0]), steps(every[1])
        dh, dc = start(final[0], H), start(final[1], H if two else 0)
        all_valid = order.held is None
        dx = (np.empty if all_valid else np.zeros)((T * B, I if "x" in b.need else 0), dtype)
        narrow = I < NARROW
        rows = max(1, CHUNK // (len(packed.bias) * dtype.itemsize))
        bias_needed = bool(b.need & {"bias_ih", "bias_hh"})
        columns = packed.ih_t.shape[1]
        groups = _groups(a, order)
        sums = [
            (
                np.zeros((len(packed.ih_t) if "weight_ih" in b.need else 0, columns), dtype),
                np.zeros((len(packed.hh_t) if "weight_hh" in b.need else 0, columns), dtype),
                np.zeros((int(bias_needed), len(packed.bias)), dtype),
            )
            for _ in groups
        ]

        def run(first: Array, last: Array, dih: Array, dhh: Array, dbias: Array) -> None:
            chunk = min(rows, int((last - first).sum()))
            loop(
                dx, dih, dhh, dbias, dh, dc, *upstream, tape.gates, tape.h, tape.c,
                a.x, order.rows, order.before, first, last, *tape.state0,
                packed.ih_t if narrow else packed.ih, packed.hh,
                narrow, len(kernel.second) * H, a.reverse, chunk,
            )  # fmt: skip

        _share(run, [(*group, *s) for group, s in zip(groups, sums, strict=True)])
        dih, dhh, dbias = (functools.reduce(np.add, parts) for parts in zip(*sums, strict=True))
        return Gradients(
            dx.reshape(T, B, I) if "x" in b.need else None,
            _unpacked(packed, kernel, b.need, dih[:I], dhh[:H], dbias),
            ((dh, dc) if two else (dh,)) if "state0" in b.need else None,
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


def _recurrent(kernel: Kernel) -> list[int]:
    """The blocks of weight_hh in the order of the accumulators that they feed."""
    return [*kernel.recurrent.blocks, *kernel.recurrent2.blocks]


def _biases(kernel: Kernel) -> Iterator[tuple[str, int, int]]:
    """Each block of a bias and the accumulator that it is added to: parameter, accumulator, block."""
    for k, n in enumerate(kernel.products):
        for operand, block in zip(n.args, n.attribute.biases, strict=True):
            yield f"bias_{side(operand)}", k, block


def _nothing(rows: int, columns: int, dtype: np.dtype[Any]) -> Array:
    return np.empty((rows, columns), dtype)


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


def _groups(a: ForwardArguments, order: Order) -> list[tuple[Array, Array]]:
    """Bounds (first, last) of the positions of each t, one pair for each thread that is worth it."""
    T, B, I, H, _ = a.sizes
    rows = np.full(B, T) if a.lengths is None else a.lengths
    work = len(order.rows) * H * (a.cell.blocks["weight_ih"] * I + a.cell.blocks["weight_hh"] * H)
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
    packed: Packed, kernel: Kernel, need: frozenset[str], dih_t: Array, dhh_t: Array, dbias: Array
) -> dict[str, Array | None]:
    """The gradients of the weights, in the order of the weights."""
    found: dict[str, Array] = {}
    for name, columns, blocks in (
        ("weight_ih", dih_t, kernel.input.blocks),
        ("weight_hh", dhh_t, _recurrent(kernel)),
    ):
        if name in need:
            found[name] = np.empty((columns.shape[1], columns.shape[0]), columns.dtype)
            H = columns.shape[1] // len(blocks)
            for k, block in enumerate(blocks):
                found[name][block * H : (block + 1) * H] = columns[:, k * H : (k + 1) * H].T
    H = dbias.shape[1] // len(kernel.products)
    for name in need & {"bias_ih", "bias_hh"}:
        found[name] = np.empty(len(kernel.cell.trace.blocks[name]) * H, dbias.dtype)
    for name, k, block in _biases(kernel):
        if name in found:
            found[name][block * H : (block + 1) * H] = dbias[0, k * H : (k + 1) * H]
    return {name: found.get(name) for name in packed.weights}
