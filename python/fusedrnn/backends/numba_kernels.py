"""The kernels of the Numba backend. Imports Numba; ``fusedrnn.backends.numba`` imports it on first use.

A step of a cell is written by ``numba_steps``; ``tanh`` and ``sigmoid`` get the polynomials of
csrc/simd/math.h. The time loops below are written once and compiled for every cell and dtype. All arrays are
of the dtype at hand, float32 or float64, and nothing in between is wider.

Only valid steps have a position: positions count them in order of (t, b), so that the rows of one t lie
side by side. ``rows[p] = t*B + b``; ``before[p]`` is the position of the step before in running order, or
-1-b where that is the initial state of row b, or -1-B where the state is cleared. Initial states have B+1
rows, the last one of zeros. ``first[t]`` and ``last[t]`` bound the positions of t that a call works on.

The columns of ``gates`` and of ``da`` are the cell's accumulators (``fusedrnn.cells.kernel``): first those of
x, last those of states; ``rh`` is what the second product of a cell with two phases multiplies.
What a cell, or a caller, does not need is an array of width 0, on which every loop is empty.
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
from numba.extending import intrinsic, overload

from fusedrnn.backends import numba_steps
from fusedrnn.cells import Cell, activations
from fusedrnn.cells.kernel import Kernel

# Contraction to FMA keeps NaN, infinities, signs and the order of sums; no other liberty is given.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True}
# A sum of many products may be taken in any order.
ANY_ORDER: dict[str, Any] = {**OPTIONS, "fastmath": {"contract", "reassoc"}}
# A call inside a loop keeps the loop from being vectorised.
INLINE: Any = {**OPTIONS, "forceinline": True}


def _compiled(function: Callable[..., Any]) -> Any:
    return njit(**OPTIONS)(function)


def _inlined(function: Callable[..., Any]) -> Any:
    return njit(**INLINE)(function)


# ---------------------------------------------------------------------------------------------- activations


class _Float32:
    """Constants of csrc/simd/math.h; coefficients.py there computes them."""

    log2e = float.fromhex("0x1.715476p+0")
    ln2_high = float.fromhex("0x1.62e4p-1")
    ln2_low = float.fromhex("0x1.7f7d1cp-20")
    expm1 = ("0x1.fffffep-2", "0x1.5554bp-3", "0x1.555674p-5", "0x1.122776p-7", "0x1.6bec0cp-10")
    mantissa_bits = 23
    shifter = 1.5 * 2.0**23 + 127  # x + shifter: round(x) + exponent bias in the lowest bits
    sigmoid_one = 30  # sigmoid is 1 above
    sigmoid_large = -16.28  # below, s + 1 is not exact
    sigmoid_zero = -88  # below, sigmoid is less than 2^-126: a zero
    tanh_one = 10  # tanh is 1 above


class _Float64:
    """The same for float64."""

    log2e = float.fromhex("0x1.71547652b82fep+0")
    ln2_high = float.fromhex("0x1.62e42fefa4p-1")
    ln2_low = float.fromhex("-0x1.8432a1b0e2634p-43")
    expm1 = (
        "0x1.0000000000000p-1",
        "0x1.5555555555559p-3",
        "0x1.555555555553fp-5",
        "0x1.111111110f6dap-7",
        "0x1.6c16c16c1f071p-10",
        "0x1.a01a01afd3d60p-13",
        "0x1.a01a017bc8620p-16",
        "0x1.71ddf87ed1aa5p-19",
        "0x1.27e53628f65f4p-22",
        "0x1.af5e74e35bab8p-26",
        "0x1.1ee88b77cb4fep-29",
    )
    mantissa_bits = 52
    shifter = 1.5 * 2.0**52 + 1023
    sigmoid_one = 60
    sigmoid_large = -36.38
    sigmoid_zero = -709
    tanh_one = 22


CONSTANTS: dict[Any, Any] = {types.float32: _Float32, types.float64: _Float64}


def _integer(x: Any) -> Any:
    """The integer type as wide as a float type."""
    return types.int32 if x.bitwidth == 32 else types.int64


def _power_of_two(context: Any, n: Any) -> Any:
    """2^n from n + shifter: its lowest bits moved to where the exponent is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = _integer(n)
        bits = builder.bitcast(args[0], context.get_value_type(integer))
        moved = builder.shl(bits, context.get_constant(integer, CONSTANTS[n].mantissa_bits))
        return builder.bitcast(moved, args[0].type)

    return n(n), generate


def _copysign(context: Any, x: Any, y: Any) -> Any:
    """|x| with the sign of y, in bits; Numba's own is a call."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = _integer(x)
        sign = context.get_constant(integer, -(1 << (x.bitwidth - 1)))
        size, other = (builder.bitcast(a, context.get_value_type(integer)) for a in args)
        joined = builder.or_(builder.and_(size, builder.not_(sign)), builder.and_(other, sign))
        return builder.bitcast(joined, args[0].type)

    return x(x, y), generate


def _fma(context: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z in one rounding, where contraction would not do it because x * y is used twice."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return x(x, y, z), generate


power_of_two: Any = intrinsic(_power_of_two)
fma: Any = intrinsic(_fma)
copysign: Any = intrinsic(_copysign)


@functools.cache
def _reduce(dtype: Any, k: int) -> Any:
    """The function x -> s, q with exp(k x) = s + k s q; see math.h."""
    C, scalar = CONSTANTS[dtype], np.dtype(dtype.name).type
    log2e, shifter = scalar(k * C.log2e), scalar(C.shifter)
    high, low = scalar(-C.ln2_high / k), scalar(-C.ln2_low / k)
    c = tuple(scalar(float.fromhex(text) * k ** (i + 1)) for i, text in enumerate(C.expm1))

    if len(c) == 5:

        def tail(r: Any) -> Any:
            return c[0] + r * (c[1] + r * (c[2] + r * (c[3] + r * c[4])))
    else:

        def tail(r: Any) -> Any:
            upper = c[6] + r * (c[7] + r * (c[8] + r * (c[9] + r * c[10])))
            return c[0] + r * (c[1] + r * (c[2] + r * (c[3] + r * (c[4] + r * (c[5] + r * upper)))))

    tail_inlined = _inlined(tail)

    def reduce(x: Any) -> Any:
        shifted = x * log2e + shifter
        n = shifted - shifter
        r = x + n * high
        r = r + n * low
        return power_of_two(shifted), r + r * r * tail_inlined(r)

    return _inlined(reduce)


def _tanh(x: Any) -> Any:
    if x not in CONSTANTS:
        return None
    C, scalar = CONSTANTS[x], np.dtype(x.name).type
    reduce, most, half = _reduce(x, -2), scalar(C.tanh_one), scalar(0.5)
    two, slope, refined = (
        scalar(2),
        scalar(2.9),
        x == types.float64,
    )  # the step that float64 needs: see math.h

    def tanh(x: Any) -> Any:
        y = abs(x)
        y = most if y > most else y  # NaN stays
        s, q = reduce(y)
        a = half - half * s
        b = half + half * s
        denominator = fma(-s, q, b)
        ratio = fma(s, q, a) / denominator
        if refined:
            sq = s * q
            rest = fma(ratio, sq, fma(-ratio, b, a) + sq)
            ratio = fma(rest, slope - two * denominator, ratio)
        return copysign(ratio, x)

    return tanh


def _sigmoid(x: Any) -> Any:
    if x not in CONSTANTS:
        return None
    C, scalar = CONSTANTS[x], np.dtype(x.name).type
    reduce, most = _reduce(x, -1), scalar(C.sigmoid_one)
    large, least, one, zero = scalar(C.sigmoid_large), scalar(C.sigmoid_zero), scalar(1), scalar(0)

    def sigmoid(x: Any) -> Any:
        y = most if x > most else x
        s, q = reduce(y)
        total = fma(-s, q, one) + s if x < large else fma(-s, q, s + one)
        return zero if x < least else one / total

    return sigmoid


def _relu(x: Any) -> Any:
    zero = np.dtype(x.name).type(0)

    def relu(x: Any) -> Any:
        return zero if x <= zero else x

    return relu


for _plain, _compilable in (
    (activations.tanh, _tanh),
    (activations.sigmoid, _sigmoid),
    (activations.relu, _relu),
):
    overload(_plain, jit_options=INLINE)(_compilable)


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


def _dot(a: Any, b: Any) -> Any:
    total = a[0] * b[0]
    for k in range(1, b.shape[0]):
        total += a[k] * b[k]
    return total


dot = njit(**ANY_ORDER)(_dot)


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
def bias_gradient(dbias: Any, da: Any, tile: Any) -> None:
    """dbias[0] += sum of the rows of da, from zero like the weight gradients."""
    for j0 in range(0, da.shape[1], tile.shape[1]):
        width = min(tile.shape[1], da.shape[1] - j0)
        total = tile[0, :width]
        total[:] = 0
        for p in range(da.shape[0]):
            add(total, da[p, j0 : j0 + width])
        add(dbias[0, j0 : j0 + width], total)


@_compiled
def gather(out: Any, values: Any, initial: Any, before: Any) -> None:
    """out[i] = the state at the position before[i]; wider columns of ``out`` are left alone."""
    for i in range(before.shape[0]):
        p = before[i]
        copy(out[i], values[p] if p >= 0 else initial[-1 - p])


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
def chained(now: Any, chain: Any, rows: Any, t: Any) -> None:
    """now[k] = the gradient in the chain of the row that rows[k] belongs to."""
    for k in range(rows.shape[0]):
        copy(now[k], chain[rows[k] - t * chain.shape[0]])


@_compiled
def add_rows(now: Any, every: Any, rows: Any) -> None:
    """now[k] += every[rows[k]]"""
    for k in range(rows.shape[0]):
        add(now[k], every[rows[k]])


@_compiled
def downstream(chain: Any, prev: Any, before: Any, rows: Any, t: Any) -> None:
    """The gradient of the state before step t, zero where that state was cleared."""
    B = chain.shape[0]
    for k in range(rows.shape[0]):
        b = rows[k] - t * B
        if before[k] == -1 - B:
            chain[b] = 0
        else:
            copy(chain[b], prev[k])


@_compiled
def leave(
    dx: Any, dih: Any, dhh: Any, dbias: Any, da: Any, h_prev: Any, rh: Any, x: Any, rows: Any, ih: Any,
    narrow: Any, late: Any,
) -> None:  # fmt: skip
    """A chunk of da goes into everything that is wanted; row p of it belongs to rows[p] of the sequence.

    ``late``: the columns of dhh that rh multiplies.
    """
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
    direct = dhh.shape[1] - late
    offset = da.shape[1] - dhh.shape[1]
    weight_gradient(dhh, 0, direct, h_prev, da, offset, tile)
    weight_gradient(dhh, direct, dhh.shape[1] - direct, rh, da, offset + direct, tile)
    if dbias.shape[0] > 0:
        bias_gradient(dbias, da, tile)


step: Any = None  # of the cell that the loop is compiled for: see _for_cell
back: Any = None


def _forward_loop(
    gates: Any, h: Any, c: Any, x: Any, rows: Any, before: Any, first: Any, last: Any,
    h0: Any, c0: Any, ih: Any, hh: Any, bias: Any, late: Any, reverse: Any, keep: Any, ahead: Any,
) -> None:  # fmt: skip
    """Forward through time, for the positions first[t]..last[t]-1 of every t.

    Args:
        gates: (positions, ·) with ``keep``, else as many rows as ``ahead`` steps need.
        x: (T, B, I), any strides. ih: weight_ih transposed, hh: weight_hh transposed, both with rows of zeros
            up to a multiple of four.
        ahead: Steps whose input products are made in one go; above 1 only where their rows lie side by side.
    """
    T = first.shape[0]
    most = widest(first, last)
    x_rows = np.zeros((most * ahead, ih.shape[0]), h.dtype)
    h_prev = np.zeros((most, hh.shape[0]), h.dtype)
    c_prev = np.empty((most, c.shape[1]), h.dtype)
    rh = np.zeros((most if late else 0, hh.shape[0]), h.dtype)
    base = 0
    for s in range(T):
        t = T - 1 - s if reverse else s
        if s % ahead == 0:
            low, high = (max(0, t - ahead + 1), t + 1) if reverse else (t, min(T, t + ahead))
            base = 0 if keep else first[low]
            input_part(gates[first[low] - base :], x, rows, first, last, low, high, ih, bias, x_rows)
        lo, hi = first[t], last[t]
        m = hi - lo
        gather(h_prev, h, h0, before[lo:hi])
        gather(c_prev, c, c0, before[lo:hi])
        step(gates[lo - base : hi - base], h_prev[:m], c_prev[:m], h[lo:hi], c[lo:hi], hh, rh)


def _backward_loop(
    dx: Any, dih: Any, dhh: Any, dbias: Any, dh: Any, dc: Any, dy: Any, dh_steps: Any, dc_steps: Any,
    gates: Any, h: Any, c: Any, x: Any, rows: Any, before: Any, first: Any, last: Any,
    h0: Any, c0: Any, ih: Any, hh: Any, narrow: Any, late: Any, reverse: Any, chunk: Any,
) -> None:  # fmt: skip
    """Backward through time, for the positions first[t]..last[t]-1 of every t.

    Whatever is wanted is added to: dih (I, G*H) and dhh (H, G*H), transposed with rows up to a multiple of
    four, dbias (1, columns of da). What is not wanted has no rows (dx: no columns).

    Args:
        dx, dy, dh_steps, dc_steps: (T*B, ·). dh, dc: (B, H), gradient of the final state, becomes that of the
            initial one. ih: weight_ih, or transposed if ``narrow``; hh: weight_hh.
        chunk: The rows of ``da`` kept before they go into dx and the weight gradients.
    """
    T = first.shape[0]
    most = widest(first, last)
    size = max(chunk, most)
    da = np.empty((size, dbias.shape[1]), h.dtype)
    h_prev = np.zeros((size, max(h.shape[1], dhh.shape[0])), h.dtype)
    rh = np.zeros((size, h_prev.shape[1] if late else 0), h.dtype)
    c_prev = np.empty((most, c.shape[1]), h.dtype)
    dh_now = np.empty((most, h.shape[1]), h.dtype)
    dc_now = np.empty((most, c.shape[1]), h.dtype)
    dh_prev = np.empty((most, h.shape[1]), h.dtype)
    dc_prev = np.empty((most, c.shape[1]), h.dtype)
    chunk_rows = np.empty(size, np.int64)
    q = 0
    for s in range(T):
        t = s if reverse else T - 1 - s
        lo, hi = first[t], last[t]
        m = hi - lo
        chunk_rows[q : q + m] = rows[lo:hi]
        gather(h_prev[q:], h, h0, before[lo:hi])
        gather(c_prev, c, c0, before[lo:hi])
        chained(dh_now, dh, rows[lo:hi], t)
        add_rows(dh_now, dy, rows[lo:hi])
        add_rows(dh_now, dh_steps, rows[lo:hi])
        chained(dc_now, dc, rows[lo:hi], t)
        add_rows(dc_now, dc_steps, rows[lo:hi])
        back(
            da[q : q + m], dh_now[:m], dc_now[:m], gates[lo:hi], h[lo:hi], c[lo:hi],
            h_prev[q : q + m], c_prev[:m], dh_prev[:m], dc_prev[:m], hh, rh[q : q + m],
        )  # fmt: skip
        downstream(dh, dh_prev, before[lo:hi], rows[lo:hi], t)
        downstream(dc, dc_prev, before[lo:hi], rows[lo:hi], t)
        q += m
        if q + most > size or s == T - 1:
            leave(dx, dih, dhh, dbias, da[:q], h_prev, rh, x, chunk_rows[:q], ih, narrow, late)
            q = 0


# ---------------------------------------------------------------------------------- compiling the time loops


@functools.cache
def kernel(cell: Cell) -> Kernel:
    """What is derived of a cell for its kernels."""
    return Kernel(cell)


@functools.cache
def _written(cell: Cell) -> str:
    return numba_steps.source(kernel(cell))


_lock = threading.Lock()
_loops: dict[tuple[str, Cell, str], Any] = {}


def forward_loop(cell: Cell, dtype: np.dtype[Any]) -> Any:
    """``_forward_loop`` for this cell and dtype, compiled or from Numba's cache on the first call."""
    return _loop("forward", cell, dtype)


def backward_loop(cell: Cell, dtype: np.dtype[Any]) -> Any:
    """``_backward_loop`` for this cell and dtype, compiled or from Numba's cache on the first call."""
    return _loop("backward", cell, dtype)


def _loop(direction: str, cell: Cell, dtype: np.dtype[Any]) -> Any:
    key = (direction, cell, dtype.name)
    with _lock:
        if key not in _loops:
            _loops[key] = _for_cell(direction, cell, dtype)
        return _loops[key]


def steps(cell: Cell, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The functions ``step`` and ``back`` of a cell."""
    functions: dict[str, Any] = {"product": product, "flat": flat, "number": dtype.type}
    functions |= {name: getattr(activations, name) for name in ("tanh", "sigmoid", "relu")}
    written = _written(cell)
    exec(compile(written, f"<{cell!r}>", "exec"), functions)
    for name in ("step", "back"):
        # Symbols of compiled code go by this name, also of code from Numba's cache: each cell needs its own.
        functions[name].__qualname__ = f"{name}_{_fingerprint(written)}"
    return {name: _compiled(functions[name]) for name in ("step", "back")}


def _for_cell(direction: str, cell: Cell, dtype: np.dtype[Any]) -> Any:
    loop = _forward_loop if direction == "forward" else _backward_loop
    function = FunctionType(loop.__code__, {**loop.__globals__, **steps(cell, dtype)}, loop.__name__)
    # Numba's cache goes by this name, and sees changes of this file only.
    function.__qualname__ = f"{direction}_{cell.name}_{_fingerprint(_written(cell))}"
    signature = _signature(direction, dtype)
    try:
        return njit(signature, cache=True, **OPTIONS)(function)
    except RuntimeError:  # no directory for the cache can be written to
        return njit(signature, **OPTIONS)(function)


def _signature(direction: str, dtype: np.dtype[Any]) -> Any:
    """One signature for every call: whether an input may be written to, and its strides, do not matter."""
    f = types.float32 if dtype == np.float32 else types.float64
    vector, matrix = types.Array(f, 1, "C"), types.Array(f, 2, "C")
    given = types.Array(f, 2, "C", readonly=True)
    x = types.Array(f, 3, "A", readonly=True)
    integers = types.Array(types.int64, 1, "C")
    tape = (*[matrix] * 3, x, *[integers] * 4, *[matrix] * 4)
    if direction == "forward":
        return types.void(*tape, vector, types.int64, *[types.boolean] * 2, types.int64)
    gradients = (*[matrix] * 6, *[given] * 3)
    return types.void(*gradients, *tape, types.boolean, types.int64, types.boolean, types.int64)


def _fingerprint(written: str) -> str:
    """Of a step, and of the functions that it calls."""
    return hashlib.sha256((written + inspect.getsource(activations)).encode()).hexdigest()[:16]
