// AVX2 with FMA: 8 floats or 4 doubles. The interface is described in vec.h.
// Whole vectors branch past the masks: masked stores are slow on some processors, masked loads 10 % of a kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <immintrin.h>

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using scalar = float;
  using Mask = __m256;
  static constexpr int lanes = 8;
  static constexpr int registers = 16;
  static constexpr bool fused = true;
  static constexpr bool whole_lines = false;
  __m256 v;

  Vec() = default;
  FUSEDRNN_INLINE Vec(__m256 x) : v(x) {}

  static FUSEDRNN_INLINE __m256i first(int64_t count) {
    const int n = count >= lanes ? lanes : count <= 0 ? 0 : int(count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FUSEDRNN_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static FUSEDRNN_INLINE Vec set(float x) { return _mm256_set1_ps(x); }
  static FUSEDRNN_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static FUSEDRNN_INLINE Vec load(const float* p, int64_t count) {
    return count >= lanes ? load(p) : _mm256_maskload_ps(p, first(count));
  }
  FUSEDRNN_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FUSEDRNN_INLINE void store(float* p, int64_t count) const {
    if (count >= lanes) return store(p);
    _mm256_maskstore_ps(p, first(count), v);
  }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)); }
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec abs(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v); }
  friend FUSEDRNN_INLINE Vec copysign(Vec x, Vec sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, x.v), _mm256_and_ps(bit, sign.v));
  }
  friend FUSEDRNN_INLINE Vec min(Vec bound, Vec x) { return _mm256_min_ps(bound.v, x.v); }
  friend FUSEDRNN_INLINE Vec max(Vec bound, Vec x) { return _mm256_max_ps(bound.v, x.v); }
  friend FUSEDRNN_INLINE Mask greater(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  friend FUSEDRNN_INLINE Mask greater_equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ); }
  friend FUSEDRNN_INLINE Vec select(Mask mask, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, mask); }
  friend FUSEDRNN_INLINE Vec zero_where(Mask mask, Vec x) { return _mm256_andnot_ps(mask, x.v); }
  friend FUSEDRNN_INLINE Vec exponent_bits(Vec x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23));
  }
};

template <>
struct Vec<double> {
  using scalar = double;
  using Mask = __m256d;
  static constexpr int lanes = 4;
  static constexpr int registers = 16;
  static constexpr bool fused = true;
  static constexpr bool whole_lines = false;
  __m256d v;

  Vec() = default;
  FUSEDRNN_INLINE Vec(__m256d x) : v(x) {}

  static FUSEDRNN_INLINE __m256i first(int64_t count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static FUSEDRNN_INLINE Vec zero() { return _mm256_setzero_pd(); }
  static FUSEDRNN_INLINE Vec set(double x) { return _mm256_set1_pd(x); }
  static FUSEDRNN_INLINE Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static FUSEDRNN_INLINE Vec load(const double* p, int64_t count) {
    return count >= lanes ? load(p) : _mm256_maskload_pd(p, first(count));
  }
  FUSEDRNN_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  FUSEDRNN_INLINE void store(double* p, int64_t count) const {
    if (count >= lanes) return store(p);
    _mm256_maskstore_pd(p, first(count), v);
  }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_pd(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_pd(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_pd(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_pd(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return _mm256_xor_pd(a.v, _mm256_set1_pd(-0.0)); }
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_pd(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec abs(Vec x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x.v); }
  friend FUSEDRNN_INLINE Vec copysign(Vec x, Vec sign) {
    const __m256d bit = _mm256_set1_pd(-0.0);
    return _mm256_or_pd(_mm256_andnot_pd(bit, x.v), _mm256_and_pd(bit, sign.v));
  }
  friend FUSEDRNN_INLINE Vec min(Vec bound, Vec x) { return _mm256_min_pd(bound.v, x.v); }
  friend FUSEDRNN_INLINE Vec max(Vec bound, Vec x) { return _mm256_max_pd(bound.v, x.v); }
  friend FUSEDRNN_INLINE Mask greater(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ); }
  friend FUSEDRNN_INLINE Mask greater_equal(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_GE_OQ); }
  friend FUSEDRNN_INLINE Vec select(Mask mask, Vec a, Vec b) { return _mm256_blendv_pd(b.v, a.v, mask); }
  friend FUSEDRNN_INLINE Vec zero_where(Mask mask, Vec x) { return _mm256_andnot_pd(mask, x.v); }
  friend FUSEDRNN_INLINE Vec exponent_bits(Vec x) {
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(x.v), 52));
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
