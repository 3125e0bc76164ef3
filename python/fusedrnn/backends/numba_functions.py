"""Functions of one value in the kernels of the Numba backend, for float32 and float64.

``tanh`` and ``sigmoid`` are those of csrc/simd/math.h; the others are Numba's. Nothing in between is wider
than the argument.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

from fusedrnn.cells import activations

# Contraction to FMA keeps NaN, infinities, signs and the order of sums; no other liberty is given.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True}
# A call inside a loop keeps the loop from being vectorised.
INLINE: Any = {**OPTIONS, "forceinline": True}


class _Float32:
    """Constants of csrc/simd/math.h, which tools/coefficients.py computes."""

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

    tail_inlined: Any = njit(**INLINE)(tail)

    def reduce(x: Any) -> Any:
        shifted = x * log2e + shifter
        n = shifted - shifter
        r = x + n * high
        r = r + n * low
        return power_of_two(shifted), r + r * r * tail_inlined(r)

    return njit(**INLINE)(reduce)


def _tanh(x: Any) -> Any:
    if x not in CONSTANTS:
        return None
    C, scalar = CONSTANTS[x], np.dtype(x.name).type
    reduce, most, half = _reduce(x, -2), scalar(C.tanh_one), scalar(0.5)
    two, slope, refined = scalar(2), scalar(2.9), x == types.float64  # a step for float64: see math.h

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


def _softplus(x: Any) -> Any:
    zero = np.dtype(x.name).type(0)

    def softplus(x: Any) -> Any:
        positive = x > zero
        return (x if positive else zero) + np.log1p(np.exp(-x if positive else x))

    return softplus


def _absolute(x: Any) -> Any:
    zero = np.dtype(x.name).type(0)

    def absolute(x: Any) -> Any:
        return x if x > zero else zero - x

    return absolute


def _maximum(a: Any, b: Any) -> Any:
    def maximum(a: Any, b: Any) -> Any:
        return a if a >= b or np.isnan(a) else b

    return maximum


def _minimum(a: Any, b: Any) -> Any:
    def minimum(a: Any, b: Any) -> Any:
        return a if a <= b or np.isnan(a) else b

    return minimum


for _plain, _compilable in (
    (activations.tanh, _tanh),
    (activations.sigmoid, _sigmoid),
    (activations.relu, _relu),
    (activations.softplus, _softplus),
    (activations.absolute, _absolute),
    (activations.maximum, _maximum),
    (activations.minimum, _minimum),
):
    overload(_plain, jit_options=INLINE)(_compilable)
