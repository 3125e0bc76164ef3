"""The kernels of the Numba backend. Imports Numba; ``fusedrnn.backends.numba`` imports it on first use.

A step of a cell is written by ``numba_steps``. The time loops below are written once and compiled for every
cell and dtype. All arrays are of the dtype at hand, float32 or float64, and nothing in between is wider.

Only valid steps have a position: positions count them in order of (t, b), so that the rows of one t lie
side by side. ``rows[p] = t*B + b``; ``before[p]`` is the position of the step before in running order, or
-1-b where that is the initial state of row b, or -1-B where the state is cleared. ``initial`` states have
B+1 rows, in the last one what a cleared state is. ``first[t]`` and ``last[t]`` bound the positions of t that
a call works on.

``numba_layout`` says what lies in ``gates`` (T*B or fewer, ·), ``da`` and ``operands``, ``numba_steps`` what
else a step takes. ``operands`` are as wide as a product needs, with zeros beyond H. What a cell, or a caller,
does not need is an array of width 0, on which every loop is empty.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
from numba import njit, types

from fusedrnn.backends import numba_functions, numba_steps
from fusedrnn.backends.numba_functions import OPTIONS
from fusedrnn.backends.numba_layout import layout
from fusedrnn.cells import activations
from fusedrnn.cells.definition import Cell


def _compiled(function: Callable[..., Any]) -> Any:
    return njit(**OPTIONS)(function)


def _in_any_order(function: Callable[..., Any]) -> Any:
    """For a sum of many values."""
    return njit(**{**OPTIONS, "fastmath": {"contract", "reassoc"}})(function)


# ------------------------------------------------------------------------------------------------- products


@_compiled
def product(d: Any, dj: Any, n: Any, a: Any, a0: Any, ai: Any, ak: Any, w: Any, wj: Any) -> None:
    """d[i, dj+j] += sum over k of a[a0 + i*ai + k*ak] * w[k, wj+j], for j < n.

    Four rows by four k at a time, so that four loads of w serve sixteen multiplications; panels of 4 KiB
    times 32 rows of d stay in the cache. Summed in the order of k, so that each term is one FMA.
    """
    panel = 4096 // d.itemsize
    m = d.shape[0]
    K = w.shape[0]
    for j0 in range(0, n, panel):
        width = min(panel, n - j0)
        dlo = dj + j0
        dhi = dlo + width
        wlo = wj + j0
        whi = wlo + width
        for i0 in range(0, m, 32):
            i1 = min(m, i0 + 32)
            fours = i0 + (i1 - i0) // 4 * 4
            for k in range(0, K - 3, 4):
                w0 = w[k, wlo:whi]
                w1 = w[k + 1, wlo:whi]
                w2 = w[k + 2, wlo:whi]
                w3 = w[k + 3, wlo:whi]
                for i in range(i0, fours, 4):
                    d0 = d[i, dlo:dhi]
                    d1 = d[i + 1, dlo:dhi]
                    d2 = d[i + 2, dlo:dhi]
                    d3 = d[i + 3, dlo:dhi]
                    p = a0 + i * ai + k * ak
                    a00, a01, a02, a03 = a[p], a[p + ak], a[p + 2 * ak], a[p + 3 * ak]
                    p += ai
                    a10, a11, a12, a13 = a[p], a[p + ak], a[p + 2 * ak], a[p + 3 * ak]
                    p += ai
                    a20, a21, a22, a23 = a[p], a[p + ak], a[p + 2 * ak], a[p + 3 * ak]
                    p += ai
                    a30, a31, a32, a33 = a[p], a[p + ak], a[p + 2 * ak], a[p + 3 * ak]
                    for j in range(d0.shape[0]):
                        u0 = w0[j]  # once, before anything is stored
                        u1 = w1[j]
                        u2 = w2[j]
                        u3 = w3[j]
                        d0[j] = d0[j] + a00 * u0 + a01 * u1 + a02 * u2 + a03 * u3
                        d1[j] = d1[j] + a10 * u0 + a11 * u1 + a12 * u2 + a13 * u3
                        d2[j] = d2[j] + a20 * u0 + a21 * u1 + a22 * u2 + a23 * u3
                        d3[j] = d3[j] + a30 * u0 + a31 * u1 + a32 * u2 + a33 * u3
                for i in range(fours, i1):
                    d0 = d[i, dlo:dhi]
                    p = a0 + i * ai + k * ak
                    a00, a01, a02, a03 = a[p], a[p + ak], a[p + 2 * ak], a[p + 3 * ak]
                    for j in range(d0.shape[0]):
                        d0[j] = d0[j] + a00 * w0[j] + a01 * w1[j] + a02 * w2[j] + a03 * w3[j]
            for k in range(K // 4 * 4, K):
                w0 = w[k, wlo:whi]
                for i in range(i0, i1):
                    d0 = d[i, dlo:dhi]
                    a00 = a[a0 + i * ai + k * ak]
                    for j in range(d0.shape[0]):
                        d0[j] = d0[j] + a00 * w0[j]


@_compiled
def copy(to: Any, values: Any) -> None:
    """Copy a row into the front of another."""
    for j in range(values.shape[0]):
        to[j] = values[j]


@_compiled
def add(to: Any, values: Any) -> None:
    """Add a row to the front of another."""
    for j in range(values.shape[0]):
        to[j] += values[j]


@_compiled
def flat(a: Any) -> Any:
    """A C-contiguous array as a vector."""
    return a.reshape(a.size)


@_in_any_order
def dot(a: Any, b: Any) -> Any:
    """The sum of a * b, over the length of b."""
    total = a[0] * b[0]
    for k in range(1, b.shape[0]):
        total += a[k] * b[k]
    return total


@_in_any_order
def total(a: Any) -> Any:
    """The sum of a row."""
    found = a[0]
    for j in range(1, a.shape[0]):
        found += a[j]
    return found


@_in_any_order
def norm_numbers(values: Any, centred: Any, eps: Any) -> Any:
    """The mean of all values of a row, or 0, and 1 / their deviation from it."""
    number = values[0].dtype.type
    count = number(len(values) * values[0].shape[0])
    mean = number(0)
    if centred:
        for v in values:
            for j in range(v.shape[0]):
                mean += v[j]
        mean /= count
    squares = number(0)
    for v in values:
        for j in range(v.shape[0]):
            squares += (v[j] - mean) * (v[j] - mean)
    return mean, number(1) / np.sqrt(squares / count + eps)


@_in_any_order
def norm_gradient_numbers(ds: Any, values: Any, count: Any, centred: Any, mean: Any, inverse: Any) -> Any:
    """The mean, or 0, of gradients d of ``count`` normalised values of a row, and the mean of d * value."""
    number = values[0].dtype.type
    total, along = number(0), number(0)
    for n in range(len(ds)):
        d, v = ds[n], values[n]
        for j in range(d.shape[0]):
            total += d[j]
            along += d[j] * (v[j] - mean)
    return total / number(count) if centred else number(0), along * inverse / number(count)


@_compiled
def weight_gradient(dw: Any, wj: Any, n: Any, v: Any, da: Any, aj: Any, tile: Any) -> None:
    """dw[i, wj+j] += sum over rows p of v[p, i] * da[p, aj+j], for j < n: the transpose of the gradient.

    The rows are summed from zero before they are added: more accurate than one running sum.
    """
    for i0 in range(0, dw.shape[0], tile.shape[0]):
        m = min(tile.shape[0], dw.shape[0] - i0)
        for j0 in range(0, n, tile.shape[1]):
            width = min(tile.shape[1], n - j0)
            d = tile[:m]
            d[:] = 0
            product(d, 0, width, flat(v), i0, 1, v.shape[1], da, aj + j0)
            for i in range(m):
                add(dw[i0 + i, wj + j0 : wj + j0 + width], d[i, :width])


@_compiled
def add_sums(dsums: Any, da: Any, tile: Any) -> None:
    """dsums[0] += sum of the rows of da, from zero like the weight gradients."""
    for j0 in range(0, da.shape[1], tile.shape[1]):
        width = min(tile.shape[1], da.shape[1] - j0)
        total = tile[0, :width]
        total[:] = 0
        for p in range(da.shape[0]):
            add(total, da[p, j0 : j0 + width])
        add(dsums[0, j0 : j0 + width], total)


@_compiled
def gather(operands: Any, q: Any, states: Any, initial: Any, before: Any) -> None:
    """operands[n, q+i] = the state n at the position before[i]; what is wider is left alone."""
    for n in range(len(states)):
        values = states[n]
        for i in range(before.shape[0]):
            p = before[i]
            copy(operands[n, q + i], values[p] if p >= 0 else initial[n, -1 - p])


# ----------------------------------------------------------------------------------------------- time loops
#
# What does not depend on the cell is in functions of its own: they are compiled once for each dtype.


@_compiled
def widest(first: Any, last: Any) -> Any:
    """The largest number of rows of a step."""
    most = 0
    for t in range(first.shape[0]):
        most = max(most, last[t] - first[t])
    return most


@_compiled
def input_part(
    gates: Any, x: Any, rows: Any, first: Any, last: Any, low: Any, high: Any, ih: Any, bias: Any, x_rows: Any
) -> None:
    """bias + x weight_ih for the steps low..high-1, into the first rows of gates."""
    B = x.shape[1]
    base = first[low]
    for t in range(low, high):
        for p in range(first[t], last[t]):
            copy(x_rows[p - base], x[t, rows[p] - t * B])
            copy(gates[p - base], bias)
    product(gates[: last[high - 1] - base], 0, ih.shape[1], flat(x_rows), 0, ih.shape[0], 1, ih, 0)


@_compiled
def arrive(now: Any, chain: Any, upstream: Any, rows: Any, t: Any) -> None:
    """now[n, k] = the gradient of state n after step t, of the row that rows[k] belongs to."""
    S, B = chain.shape[:2]
    dy = upstream[0]
    for n in range(S):
        dstate = upstream[1 + n]
        for k in range(rows.shape[0]):
            into = now[n, k]
            copy(into, chain[n, rows[k] - t * B])
            if n == 0:
                add(into, dy[rows[k]])
            add(into, dstate[rows[k]])


@_compiled
def downstream(chain: Any, prev: Any, before: Any, rows: Any, t: Any) -> None:
    """The gradients of the states before step t, zero where these were cleared."""
    S, B = chain.shape[:2]
    for n in range(S):
        for k in range(rows.shape[0]):
            b = rows[k] - t * B
            if before[k] == -1 - B:
                chain[n, b] = 0
            else:
                copy(chain[n, b], prev[n, k])


@_compiled
def leave(
    dx: Any, dih: Any, dhh: Any, dsums: Any, da: Any, operands: Any, x: Any, rows: Any, ih: Any, narrow: Any,
    parts: Any,
) -> None:  # fmt: skip
    """A chunk of da goes into everything that is wanted; row p of it belongs to rows[p] of the sequence."""
    m = rows.shape[0]
    if dx.shape[1] > 0:
        if narrow:
            for p in range(m):
                for i in range(dx.shape[1]):
                    dx[rows[p], i] = dot(da[p], ih[i])
        else:
            out = np.zeros((m, dx.shape[1]), dx.dtype)
            product(out, 0, dx.shape[1], flat(da), 0, da.shape[1], 1, ih, 0)
            for p in range(m):
                copy(dx[rows[p]], out[p])
    tile = np.empty((32, 4096 // dx.itemsize), dx.dtype)
    if dih.shape[0] > 0:
        x_rows = np.zeros((m, dih.shape[0]), dx.dtype)
        for p in range(m):
            copy(x_rows[p], x[rows[p] // x.shape[1], rows[p] % x.shape[1]])
        weight_gradient(dih, 0, dih.shape[1], x_rows, da, 0, tile)
    for k in range(parts.shape[0]):
        operand, first, columns, column = parts[k]
        weight_gradient(dhh, column, columns, operands[operand], da, first, tile)
    if dsums.shape[0] > 0:
        add_sums(dsums, da, tile)


step: Any = None  # of the cell that a loop is compiled for, as all of these: see _for_cell
back: Any = None
OPERANDS = WORK = NORMS = 0


def _forward_loop(
    gates: Any, states: Any, x: Any, rows: Any, before: Any, first: Any, last: Any, initial: Any, ih: Any,
    hh: Any, bias: Any, vectors: Any, scalars: Any, reverse: Any, keep: Any, ahead: Any,
) -> None:  # fmt: skip
    """Forward through time, for the positions first[t]..last[t]-1 of every t.

    Args:
        gates: (positions, ·) with ``keep``, else as many rows as ``ahead`` steps need.
        states: of each, (positions, H).
        x: (T, B, I), any strides. ih: weight_ih transposed, hh: weight_hh transposed, both with rows of zeros
            up to a multiple of four. vectors: all in one. scalars: (row scalars, positions).
        ahead: Steps whose input products are made in one go; above 1 only where their rows lie side by side.
    """
    T = first.shape[0]
    most = widest(first, last)
    x_rows = np.zeros((most * ahead, ih.shape[0]), x.dtype)
    operands = np.zeros((OPERANDS, most, hh.shape[0]), x.dtype)
    work = np.empty((WORK, most, states[0].shape[1]), x.dtype)
    norms = np.empty((most, NORMS), x.dtype)
    base = 0
    for s in range(T):
        t = T - 1 - s if reverse else s
        if s % ahead == 0:
            low, high = (max(0, t - ahead + 1), t + 1) if reverse else (t, min(T, t + ahead))
            base = 0 if keep else first[low]
            input_part(gates[first[low] - base :], x, rows, first, last, low, high, ih, bias, x_rows)
        lo, hi = first[t], last[t]
        gather(operands, 0, states, initial, before[lo:hi])
        step(gates[lo - base : hi - base], operands, states, lo, hh, vectors, scalars, work, norms)


def _backward_loop(
    dx: Any, dih: Any, dhh: Any, dsums: Any, chain: Any, upstream: Any, gates: Any, states: Any, x: Any,
    rows: Any, before: Any, first: Any, last: Any, initial: Any, ih: Any, hh: Any, vectors: Any, scalars: Any,
    dscalars: Any, parts: Any, narrow: Any, reverse: Any, chunk: Any,
) -> None:  # fmt: skip
    """Backward through time, for the positions first[t]..last[t]-1 of every t.

    Whatever is wanted is added to: dih and dhh, transposed with rows up to a multiple of four, dsums (1,
    columns of da). What is not wanted has no rows (dx: no columns).

    Args:
        dx: (T*B, I). chain: (states, B, H), gradients of the final states, become those of the initial ones.
        upstream: dy, then those of all steps of each state, each (T*B, H).
        ih: weight_ih, or transposed if ``narrow``; hh: weight_hh. parts: operand, first column of da, number
            of columns, first column of dhh. scalars, dscalars: (row scalars, positions).
        chunk: The rows of ``da`` kept before they go into dx and the weight gradients.
    """
    T = first.shape[0]
    S, H = chain.shape[0], chain.shape[2]
    most = widest(first, last)
    size = max(chunk, most)
    da = np.empty((size, dsums.shape[1]), dx.dtype)
    operands = np.zeros((OPERANDS, size, max(H, dhh.shape[0])), dx.dtype)
    now = np.empty((S, most, H), dx.dtype)
    prev = np.empty((S, most, H), dx.dtype)
    work = np.empty((WORK, most, H), dx.dtype)
    norms = np.empty((most, NORMS), dx.dtype)
    chunk_rows = np.empty(size, np.int64)
    q = 0
    for s in range(T):
        t = s if reverse else T - 1 - s
        lo, hi = first[t], last[t]
        m = hi - lo
        chunk_rows[q : q + m] = rows[lo:hi]
        gather(operands, q, states, initial, before[lo:hi])
        arrive(now, chain, upstream, rows[lo:hi], t)
        back(
            da[q : q + m], operands, q, now, prev, gates[lo:hi], states, lo, hh, vectors, scalars, dscalars,
            work, norms,
        )  # fmt: skip
        downstream(chain, prev, before[lo:hi], rows[lo:hi], t)
        q += m
        if q + most > size or s == T - 1:
            leave(dx, dih, dhh, dsums, da[:q], operands, x, chunk_rows[:q], ih, narrow, parts)
            q = 0


# ---------------------------------------------------------------------------------- compiling the time loops


@functools.cache
def _written(cell: Cell) -> str:
    return numba_steps.source(layout(cell))


_lock = threading.Lock()
_loops: dict[tuple[str, Cell, str], Any] = {}


def loop(direction: str, cell: Cell, dtype: np.dtype[Any]) -> Any:
    """``_forward_loop`` or ``_backward_loop`` for this cell and dtype, compiled or loaded at first."""
    key = (direction, cell, dtype.name)
    with _lock:
        if key not in _loops:
            _loops[key] = _for_cell(direction, cell, dtype)
        return _loops[key]


def steps(cell: Cell, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The functions ``step`` and ``back`` of a cell, and the numbers that go with them."""
    called = (product, flat, total, norm_numbers, norm_gradient_numbers)
    functions: dict[str, Any] = activations.OPERATIONS | {f.__name__: f for f in called}
    functions |= {"fma": numba_functions.fma, "number": dtype.type}
    written = _written(cell)
    exec(compile(written, f"<{cell!r}>", "exec"), functions)
    for name in ("step", "back"):
        # Symbols of compiled code go by this name, also of code from Numba's cache: each cell needs its own.
        functions[name].__qualname__ = f"{name}_{_fingerprint(written)}"
        functions[name] = _compiled(functions[name])
    return {name: functions[name] for name in ("step", "back", "OPERANDS", "WORK", "NORMS")}


def _for_cell(direction: str, cell: Cell, dtype: np.dtype[Any]) -> Any:
    whole = _forward_loop if direction == "forward" else _backward_loop
    function = FunctionType(whole.__code__, {**whole.__globals__, **steps(cell, dtype)}, whole.__name__)
    # Numba's cache goes by this name, and sees changes of this file only.
    function.__qualname__ = f"{direction}_{cell.__name__}_{_fingerprint(_written(cell))}"
    signature = _signature(direction, dtype, len(cell.trace.states))
    try:
        return njit(signature, cache=True, **OPTIONS)(function)
    except RuntimeError:  # no directory for the cache can be written to
        return njit(signature, **OPTIONS)(function)


def _signature(direction: str, dtype: np.dtype[Any], states: int) -> Any:
    """One signature for every call: whether an input may be written to, and its strides, do not matter."""
    f = types.float32 if dtype == np.float32 else types.float64
    vector, matrix, matrices = (types.Array(f, n, "C") for n in (1, 2, 3))
    tuple_of: Any = types.UniTuple
    given = types.Array(f, 2, "C", readonly=True)
    x = types.Array(f, 3, "A", readonly=True)
    integers = types.Array(types.int64, 1, "C")
    flag, whole = types.boolean, types.int64
    tape = (matrix, tuple_of(matrix, states), x, *[integers] * 4, matrices, matrix, matrix)
    if direction == "forward":
        return types.void(*tape, vector, vector, matrix, flag, flag, whole)
    gradients = (*[matrix] * 4, matrices, tuple_of(given, 1 + states))
    rows = (matrix, matrix)
    return types.void(*gradients, *tape, vector, *rows, types.Array(whole, 2, "C"), flag, flag, whole)


def _fingerprint(written: str) -> str:
    """Of a step, and of the functions that it calls."""
    called = "".join(inspect.getsource(module) for module in (activations, numba_functions))
    return hashlib.sha256((written + called).encode()).hexdigest()[:16]
