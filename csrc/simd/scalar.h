// One number as a vector of one lane: what a thread of a GPU computes with. The operations round as those of the CPU's
// levels with FMA do, so activations have the same bits. Without __CUDACC__ it is the same on a CPU, for the emulation.
// The interface is described in vec.h. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdint.h>

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <class T>
struct Native;  // one FMA, its bits as an integer, and where the exponent starts
#if defined(__CUDACC__)
template <>
struct Native<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static FUSEDRNN_INLINE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static FUSEDRNN_INLINE Bits bits(float x) { return __float_as_uint(x); }
  static FUSEDRNN_INLINE float of_bits(Bits x) { return __uint_as_float(x); }
};
template <>
struct Native<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static FUSEDRNN_INLINE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
  static FUSEDRNN_INLINE Bits bits(double x) { return Bits(__double_as_longlong(x)); }
  static FUSEDRNN_INLINE double of_bits(Bits x) { return __longlong_as_double((long long)x); }
};
#else
template <class To, class From>
FUSEDRNN_INLINE To same_bits(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <>
struct Native<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static FUSEDRNN_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static FUSEDRNN_INLINE Bits bits(float x) { return same_bits<Bits>(x); }
  static FUSEDRNN_INLINE float of_bits(Bits x) { return same_bits<float>(x); }
};
template <>
struct Native<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static FUSEDRNN_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
  static FUSEDRNN_INLINE Bits bits(double x) { return same_bits<Bits>(x); }
  static FUSEDRNN_INLINE double of_bits(Bits x) { return same_bits<double>(x); }
};
#endif

template <class T>
struct Vec {
  using scalar = T;
  using Bits = typename Native<T>::Bits;
  using Mask = bool;
  static constexpr int lanes = 1;
  static constexpr bool fused = true;
  static constexpr Bits sign = Bits(1) << (8 * sizeof(T) - 1);
  T v;

  Vec() = default;
  FUSEDRNN_INLINE Vec(T x) : v(x) {}

  static FUSEDRNN_INLINE Vec zero() { return T(0); }
  static FUSEDRNN_INLINE Vec set(T x) { return x; }
  static FUSEDRNN_INLINE Vec load(const T* p) { return *p; }
  FUSEDRNN_INLINE void store(T* p) const { *p = v; }

  FUSEDRNN_INLINE Bits bits() const { return Native<T>::bits(v); }
  static FUSEDRNN_INLINE Vec of_bits(Bits bits) { return Native<T>::of_bits(bits); }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return of_bits(a.bits() ^ sign); }
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return Native<T>::fma(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return Native<T>::fma(-a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec abs(Vec x) { return of_bits(x.bits() & ~sign); }
  friend FUSEDRNN_INLINE Vec copysign(Vec x, Vec sign_of) {
    return of_bits((x.bits() & ~sign) | (sign_of.bits() & sign));
  }
  friend FUSEDRNN_INLINE Vec min(Vec bound, Vec x) { return bound.v < x.v ? bound : x; }
  friend FUSEDRNN_INLINE Vec max(Vec bound, Vec x) { return bound.v > x.v ? bound : x; }
  friend FUSEDRNN_INLINE Mask greater(Vec a, Vec b) { return a.v > b.v; }
  friend FUSEDRNN_INLINE Mask greater_equal(Vec a, Vec b) { return a.v >= b.v; }
  friend FUSEDRNN_INLINE Vec select(Mask mask, Vec a, Vec b) { return mask ? a : b; }
  friend FUSEDRNN_INLINE Vec zero_where(Mask mask, Vec x) { return mask ? zero() : x; }
  friend FUSEDRNN_INLINE Vec exponent_bits(Vec x) { return of_bits(x.bits() << Native<T>::mantissa); }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
