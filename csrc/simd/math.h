// exp, sigmoid, tanh and relu on any Vec. Included by vec.h.
//
// One reduction serves all: k x = n ln 2 + k r, s = 2^n, q = expm1(k r) / k, so exp(k x) = s + k s q. What keeps the
// error below 2 ULP is that the polynomial gives expm1, not exp, and that s q enters each sum by one FMA.
// Every level runs the same operations in the same order, so levels with FMA give the same bits.
// NaN stays NaN: bounds are applied by min/max that keep it, results by comparisons that are false for it.
// The constants come from tools/coefficients.py.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float log2e = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.62e4p-1f;  // n * ln2_high is exact
  static constexpr float ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float expm1[] = {0x1.fffffep-2f, 0x1.5554bp-3f, 0x1.555674p-5f, 0x1.122776p-7f, 0x1.6bec0cp-10f};
  static constexpr float shifter = 0x1.8p23f + 127;  // x + shifter: round(x) + exponent bias in the lowest bits
  static constexpr float exp_high = 89.5f;           // exp is infinite above, zero below exp_low
  static constexpr float exp_low = -104.5f;
  static constexpr float sigmoid_one = 30;         // sigmoid is 1 above
  static constexpr float sigmoid_large = -16.28f;  // below, s + 1 is not exact
  static constexpr float sigmoid_zero = -88;       // below, sigmoid is less than 2^-126: a zero
  static constexpr float tanh_one = 10;            // tanh is 1 above
};

template <>
struct Constants<double> {
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42fefa4p-1;
  static constexpr double ln2_low = -0x1.8432a1b0e2634p-43;
  static constexpr double expm1[] = {0x1.0000000000000p-1,  0x1.5555555555559p-3,  0x1.555555555553fp-5,
                                     0x1.111111110f6dap-7,  0x1.6c16c16c1f071p-10, 0x1.a01a01afd3d60p-13,
                                     0x1.a01a017bc8620p-16, 0x1.71ddf87ed1aa5p-19, 0x1.27e53628f65f4p-22,
                                     0x1.af5e74e35bab8p-26, 0x1.1ee88b77cb4fep-29};
  static constexpr double shifter = 0x1.8p52 + 1023;
  static constexpr double exp_high = 710.5;
  static constexpr double exp_low = -746;
  static constexpr double sigmoid_one = 60;
  static constexpr double sigmoid_large = -36.38;
  static constexpr double sigmoid_zero = -709;
  static constexpr double tanh_one = 22;
};

template <class V>
struct Reduced {
  V n, s, q;
};

// c[i] k^(i+1) + r (c[i+1] k^(i+2) + ...), c = expm1; k is 1, -1 or -2, so the products are exact.
template <int k, int i, class V>
FUSEDRNN_INLINE V expm1_tail(V r) {
  using T = typename V::scalar;
  constexpr T c = Constants<T>::expm1[i] * (k == -2 ? T(2 << i) : T(1)) * (k < 0 && i % 2 == 0 ? -1 : 1);
  constexpr int last = sizeof(Constants<T>::expm1) / sizeof(T) - 1;
  if constexpr (i == last)
    return V::set(c);
  else
    return fma(expm1_tail<k, i + 1>(r), r, V::set(c));
}

template <int k, class V>
FUSEDRNN_INLINE Reduced<V> reduce(V x) {
  using C = Constants<typename V::scalar>;
  const V shifted = fma(x, V::set(k * C::log2e), V::set(C::shifter));
  const V n = shifted - V::set(C::shifter);
  V r = fma(n, V::set(-C::ln2_high / k), x);
  r = fma(n, V::set(-C::ln2_low / k), r);
  return {n, exponent_bits(shifted), fma(r * r, expm1_tail<k, 0>(r), r)};
}

// Not in the cells' path: 2^n in two factors, so that infinity, zero and subnormals come out right without a branch.
template <class V>
FUSEDRNN_INLINE V exp(V x) {
  using T = typename V::scalar;
  using C = Constants<T>;
  x = max(V::set(C::exp_low), min(V::set(C::exp_high), x));
  const Reduced<V> e = reduce<1>(x);
  const V shifter = V::set(C::shifter);
  const V half = fma(e.n, V::set(T(0.5)), shifter);
  const V rest = (e.n - (half - shifter)) + shifter;
  const V s = exponent_bits(half);
  return fma(s, e.q, s) * exponent_bits(rest);
}

// 1 / (1 + exp(-x)), the sum as 1 + s - s q.
template <class V>
FUSEDRNN_INLINE V sigmoid(V x) {
  using T = typename V::scalar;
  using C = Constants<T>;
  const V one = V::set(1);
  const Reduced<V> e = reduce<-1>(min(V::set(C::sigmoid_one), x));
  const V sum = select(greater(V::set(C::sigmoid_large), x), fnma(e.s, e.q, one) + e.s, fnma(e.s, e.q, e.s + one));
  return zero_where(greater(V::set(C::sigmoid_zero), x), one / sum);
}

// (1 - exp(-2|x|)) / (1 + exp(-2|x|)), both halved, with the sign of x: odd to the last bit, -0 kept. exp(-2|x|) and
// not exp(2|x|): the denominator then lies just below a power of two, where a rounding is small, for small x.
template <class V>
FUSEDRNN_INLINE V tanh(V x) {
  using T = typename V::scalar;
  using C = Constants<T>;
  const V half = V::set(T(0.5));
  const V y = min(V::set(C::tanh_one), abs(x));
  const Reduced<V> e = reduce<-2>(y);
  const V a = fma(e.s, V::set(T(-0.5)), half);
  const V b = fma(e.s, half, half);
  const V denominator = fnma(e.s, e.q, b);
  V ratio = fma(e.s, e.q, a) / denominator;
  if constexpr (sizeof(T) == 8) {
    // float stays below 2 ULP over all inputs, double was seen at 2.06: one step that makes good the three roundings
    // of the line above, by (a + sq) - ratio (b - sq), divided by the denominator (0.5 to 1) to within a tenth.
    const V sq = e.s * e.q;
    const V rest = fma(ratio, sq, fnma(ratio, b, a) + sq);
    ratio = fma(rest, fnma(V::set(2), denominator, V::set(T(2.9))), ratio);
  }
  return copysign(ratio, x);
}

// 0 where x <= 0 (also for -0), else x: NaN stays NaN, as in np.maximum(x, 0).
template <class V>
FUSEDRNN_INLINE V relu(V x) {
  return zero_where(greater_equal(V::zero(), x), x);
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
