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

constexpr int kRegisters = 16;
constexpr bool kWholeLines = false;

template <class T>
struct Format;  // the vector, its bits as integers, and where the exponent starts
template <>
struct Format<float> {
  typedef float Vector __attribute__((vector_size(16)));
  typedef int32_t Bits __attribute__((vector_size(16)));
  static constexpr int32_t sign_bit = INT32_MIN;
  static constexpr int mantissa = 23;
};
template <>
struct Format<double> {
  typedef double Vector __attribute__((vector_size(16)));
  typedef int64_t Bits __attribute__((vector_size(16)));
  static constexpr int64_t sign_bit = INT64_MIN;
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
struct Native {
  using Vector = typename Format<T>::Vector;
  using Bits = typename Format<T>::Bits;
  using Mask = Bits;
  static constexpr auto sign_bit = Format<T>::sign_bit;
  static constexpr int lanes = 16 / sizeof(T);
  Vector v;

  static FUSEDRNN_INLINE Vector set(T x) { return Vector{} + x; }
  static FUSEDRNN_INLINE Vector load(const T* p) {
    Vector x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static FUSEDRNN_INLINE Vector pieces(const T* p, int64_t) { return load(p); }
  static FUSEDRNN_INLINE Vector load(const T* p, int64_t count) {
    Vector x{};
    for (int i = 0; i < lanes - 1; ++i)
      if (i < count) x[i] = p[i];
    return x;
  }
  static FUSEDRNN_INLINE void store(T* p, Vector v) { __builtin_memcpy(p, &v, sizeof v); }
  static FUSEDRNN_INLINE void store(T* p, Vector v, int64_t count) {
    for (int i = 0; i < lanes - 1; ++i)
      if (i < count) p[i] = v[i];
  }

  static FUSEDRNN_INLINE Vector negative(Vector a) { return Vector(Bits(a) ^ sign_bit); }
  static FUSEDRNN_INLINE Vector fma(Vector a, Vector b, Vector c) { return multiply_add(a, b, c); }
  static FUSEDRNN_INLINE Vector fnma(Vector a, Vector b, Vector c) { return subtract_product(a, b, c); }
  static FUSEDRNN_INLINE Vector abs(Vector x) { return Vector(Bits(x) & ~sign_bit); }
  static FUSEDRNN_INLINE Vector copysign(Vector x, Vector sign) {
    return Vector((Bits(x) & ~sign_bit) | (Bits(sign) & sign_bit));
  }
  static FUSEDRNN_INLINE Vector min(Vector bound, Vector x) { return bound < x ? bound : x; }
  static FUSEDRNN_INLINE Vector max(Vector bound, Vector x) { return bound > x ? bound : x; }
  static FUSEDRNN_INLINE Mask greater(Vector a, Vector b) { return a > b; }
  static FUSEDRNN_INLINE Mask greater_equal(Vector a, Vector b) { return a >= b; }
  static FUSEDRNN_INLINE Vector select(Mask mask, Vector a, Vector b) { return mask ? a : b; }
  static FUSEDRNN_INLINE Vector zero_where(Mask mask, Vector x) { return Vector(Bits(x) & ~mask); }
  static FUSEDRNN_INLINE Vector exponent_bits(Vector x) { return Vector(Bits(x) << Format<T>::mantissa); }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
