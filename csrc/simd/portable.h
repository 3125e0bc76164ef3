// 16-byte vectors by the compiler's vector extension, on any architecture: 4 floats or 2 doubles.
// With FUSEDRNN_LEVEL_PORTABLE_FMA (x86, compiled with -mfma) fma is one instruction and the bits are those of AVX2
// and AVX-512; without, it rounds twice. The interface is described in vec.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#if defined(FUSEDRNN_LEVEL_PORTABLE_FMA)
#include <immintrin.h>
#endif

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <class T>
struct Native;  // the vector, its bits as integers, and where the exponent starts
template <>
struct Native<float> {
  typedef float Vector __attribute__((vector_size(16)));
  typedef int32_t Bits __attribute__((vector_size(16)));
  static constexpr int32_t sign = INT32_MIN;
  static constexpr int mantissa = 23;
};
template <>
struct Native<double> {
  typedef double Vector __attribute__((vector_size(16)));
  typedef int64_t Bits __attribute__((vector_size(16)));
  static constexpr int64_t sign = INT64_MIN;
  static constexpr int mantissa = 52;
};

#if defined(FUSEDRNN_LEVEL_PORTABLE_FMA)
constexpr bool kFused = true;
FUSEDRNN_INLINE __m128 multiply_add(__m128 a, __m128 b, __m128 c) { return _mm_fmadd_ps(a, b, c); }
FUSEDRNN_INLINE __m128d multiply_add(__m128d a, __m128d b, __m128d c) { return _mm_fmadd_pd(a, b, c); }
FUSEDRNN_INLINE __m128 subtract_product(__m128 a, __m128 b, __m128 c) { return _mm_fnmadd_ps(a, b, c); }
FUSEDRNN_INLINE __m128d subtract_product(__m128d a, __m128d b, __m128d c) { return _mm_fnmadd_pd(a, b, c); }
#else
constexpr bool kFused = false;
template <class V>
FUSEDRNN_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
template <class V>
FUSEDRNN_INLINE V subtract_product(V a, V b, V c) {
  return c - a * b;
}
#endif

template <class T>
struct Vec {
  using scalar = T;
  using Vector = typename Native<T>::Vector;
  using Bits = typename Native<T>::Bits;
  using Mask = Bits;
  static constexpr int lanes = 16 / sizeof(T);
  static constexpr int registers = 16;
  static constexpr bool fused = kFused;
  static constexpr bool whole_lines = false;
  Vector v;

  Vec() = default;
  FUSEDRNN_INLINE Vec(Vector x) : v(x) {}

  static FUSEDRNN_INLINE Vec zero() { return Vector{}; }
  static FUSEDRNN_INLINE Vec set(T x) { return Vector{} + x; }
  static FUSEDRNN_INLINE Vec load(const T* p) {
    Vector x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static FUSEDRNN_INLINE Vec load(const T* p, int64_t count) {
    if (count >= lanes) return load(p);
    Vector x{};
    for (int i = 0; i < lanes - 1; ++i)
      if (i < count) x[i] = p[i];
    return x;
  }
  FUSEDRNN_INLINE void store(T* p) const { __builtin_memcpy(p, &v, sizeof v); }
  FUSEDRNN_INLINE void store(T* p, int64_t count) const {
    if (count >= lanes) return store(p);
    for (int i = 0; i < lanes - 1; ++i)
      if (i < count) p[i] = v[i];
  }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return Vector(Bits(a.v) ^ Native<T>::sign); }
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return multiply_add(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return subtract_product(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec abs(Vec x) { return Vector(Bits(x.v) & ~Native<T>::sign); }
  friend FUSEDRNN_INLINE Vec copysign(Vec x, Vec sign) {
    return Vector((Bits(x.v) & ~Native<T>::sign) | (Bits(sign.v) & Native<T>::sign));
  }
  friend FUSEDRNN_INLINE Vec min(Vec bound, Vec x) { return select(bound.v < x.v, bound, x); }
  friend FUSEDRNN_INLINE Vec max(Vec bound, Vec x) { return select(bound.v > x.v, bound, x); }
  friend FUSEDRNN_INLINE Mask greater(Vec a, Vec b) { return a.v > b.v; }
  friend FUSEDRNN_INLINE Mask greater_equal(Vec a, Vec b) { return a.v >= b.v; }
  friend FUSEDRNN_INLINE Vec select(Mask mask, Vec a, Vec b) { return mask ? a.v : b.v; }
  friend FUSEDRNN_INLINE Vec zero_where(Mask mask, Vec x) { return Vector(Bits(x.v) & ~mask); }
  friend FUSEDRNN_INLINE Vec exponent_bits(Vec x) { return Vector(Bits(x.v) << Native<T>::mantissa); }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
