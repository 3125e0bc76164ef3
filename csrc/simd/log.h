// log and softplus on any Vec of a CPU. SPDX-License-Identifier: Apache-2.0
//
// x = 2^n (1 + f) with 1 + f from sqrt(1/2) to sqrt(2), s = f / (2 + f), log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2))
// with a polynomial R: as in fdlibm (Sun Microsystems 1993), whose coefficients these are. The error is below 1 ULP, of
// softplus below 2. Every level runs the same operations in the same order, so levels with FMA give the same bits.
#pragma once
#include "vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <class T>
struct LogConstants;

template <>
struct LogConstants<float> {
  using Bits = int32_t;
  using Unsigned = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr Unsigned root_half = 0x3f3504f3;  // sqrt(1/2)
  static constexpr float smallest = 0x1p-126f, scale = 0x1p32f;
  static constexpr float ln2_high = 0x1.62e3p-1f, ln2_low = 0x1.2fefa2p-17f;
  static constexpr float r[] = {0xaaaaaa.0p-24f, 0xccce13.0p-25f, 0x91e9ee.0p-25f, 0xf89e26.0p-26f};
};

template <>
struct LogConstants<double> {
  using Bits = int64_t;
  using Unsigned = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr Unsigned root_half = 0x3fe6a09e667f3bcd;
  static constexpr double smallest = 0x1p-1022, scale = 0x1p64;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double r[] = {0x1.5555555555593p-1, 0x1.999999997fa04p-2, 0x1.2492494229359p-2, 0x1.c71c51d8e78afp-3,
                                 0x1.7466496cb03dep-3, 0x1.39a09d078c69fp-3, 0x1.2f112df3e5244p-3};
};

// log(2^n (1 + f))
template <class V>
FUSEDRNN_INLINE V log_of(V f, V n) {
  using T = typename V::scalar;
  using C = LogConstants<T>;
  const V s = f / (V::set(2) + f), z = s * s;
  constexpr int last = int(sizeof(C::r) / sizeof(T)) - 1;
  V r = V::set(C::r[last]);
#pragma GCC unroll 8
  for (int k = last - 1; k >= 0; --k) r = fma(r, z, V::set(C::r[k]));
  const V half = V::set(T(0.5)) * f * f;
  const V low = fma(n, V::set(C::ln2_low), s * fma(r, z, half));
  return fma(n, V::set(C::ln2_high), f - (half - low));
}

// NaN below 0, minus infinity at 0 (and for subnormals, where those are flushed).
template <class V>
FUSEDRNN_INLINE V log(V x) {
  using T = typename V::scalar;
  using C = LogConstants<T>;
  const V zero = V::zero();
  const auto small = greater(V::set(C::smallest), x);
  alignas(64) T m[V::lanes], n[V::lanes];
  select(small, x * V::set(C::scale), x).store(m);
  for (int i = 0; i < V::lanes; ++i) {
    typename C::Unsigned bits;
    __builtin_memcpy(&bits, m + i, sizeof(T));
    const auto exponent = typename C::Bits(bits - C::root_half) >> C::mantissa;
    n[i] = T(exponent);
    bits -= typename C::Unsigned(exponent) << C::mantissa;
    __builtin_memcpy(m + i, &bits, sizeof(T));
  }
  const V exponent = V::load(n) - select(small, V::set(T(sizeof(T) * 8)), zero);
  V y = log_of(V::load(m) - V::set(1), exponent);
  const V infinity = V::set(T(__builtin_inf()));
  y = select(greater_equal(x, infinity), x, y);
  y = select(greater_equal(zero, x), select(greater(zero, x), V::set(T(__builtin_nan(""))), -infinity), y);
  return select(greater_equal(x, -infinity), y, x);  // NaN
}

// log(1 + exp(x)), with exp of -x or x, whichever cannot overflow: e is at most 1.
template <class V>
FUSEDRNN_INLINE V softplus(V x) {
  using T = typename V::scalar;
  const V e = exp(-abs(x)), one = V::set(1);
  const auto large = greater(e, V::set(T(0.41421356237309504880)));
  const V f = select(large, V::set(T(0.5)) * (e - one), e);
  return relu(x) + log_of(f, select(large, one, V::zero()));
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
