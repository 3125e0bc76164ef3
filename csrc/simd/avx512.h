// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. The interface is described in vec.h.
// min, max and shifts are written with a full mask: GCC 12 warns about an uninitialized value in the plain ones.
// Whole vectors branch past the masks, which costs less than to mask them: 1 to 2 % of a kernel.
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
  using Mask = __mmask16;
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  static constexpr bool fused = true;
  static constexpr bool whole_lines = true;
  static constexpr Mask all = 0xFFFF;
  __m512 v;

  Vec() = default;
  FUSEDRNN_INLINE Vec(__m512 x) : v(x) {}

  static FUSEDRNN_INLINE Mask first(int64_t count) {
    return Mask(count >= lanes ? all : count <= 0 ? 0 : (1u << count) - 1);
  }
  static FUSEDRNN_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static FUSEDRNN_INLINE Vec set(float x) { return _mm512_set1_ps(x); }
  static FUSEDRNN_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static FUSEDRNN_INLINE Vec load(const float* p, int64_t count) {
    return count >= lanes ? load(p) : _mm512_maskz_loadu_ps(first(count), p);
  }
  FUSEDRNN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FUSEDRNN_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  static FUSEDRNN_INLINE void fence() { _mm_sfence(); }
  FUSEDRNN_INLINE void store(float* p, int64_t count) const {
    if (count >= lanes) return store(p);
    _mm512_mask_storeu_ps(p, first(count), v);
  }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f)); }
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec abs(Vec x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x.v); }
  friend FUSEDRNN_INLINE Vec copysign(Vec x, Vec sign) {
    // 0xD8: the third operand chooses bit by bit between the second and the first
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(x.v), _mm512_castps_si512(sign.v),
                                                         _mm512_set1_epi32(INT32_MIN), 0xD8));
  }
  friend FUSEDRNN_INLINE Vec min(Vec bound, Vec x) { return _mm512_maskz_min_ps(all, bound.v, x.v); }
  friend FUSEDRNN_INLINE Vec max(Vec bound, Vec x) { return _mm512_maskz_max_ps(all, bound.v, x.v); }
  friend FUSEDRNN_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  friend FUSEDRNN_INLINE Mask greater_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
  friend FUSEDRNN_INLINE Vec select(Mask mask, Vec a, Vec b) { return _mm512_mask_blend_ps(mask, b.v, a.v); }
  friend FUSEDRNN_INLINE Vec zero_where(Mask mask, Vec x) { return select(mask, Vec::zero(), x); }
  friend FUSEDRNN_INLINE Vec exponent_bits(Vec x) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(all, _mm512_castps_si512(x.v), 23));
  }
};

template <>
struct Vec<double> {
  using scalar = double;
  using Mask = __mmask8;
  static constexpr int lanes = 8;
  static constexpr int registers = 32;
  static constexpr bool fused = true;
  static constexpr bool whole_lines = true;
  static constexpr Mask all = 0xFF;
  __m512d v;

  Vec() = default;
  FUSEDRNN_INLINE Vec(__m512d x) : v(x) {}

  static FUSEDRNN_INLINE Mask first(int64_t count) {
    return Mask(count >= lanes ? all : count <= 0 ? 0 : (1u << count) - 1);
  }
  static FUSEDRNN_INLINE Vec zero() { return _mm512_setzero_pd(); }
  static FUSEDRNN_INLINE Vec set(double x) { return _mm512_set1_pd(x); }
  static FUSEDRNN_INLINE Vec load(const double* p) { return _mm512_loadu_pd(p); }
  static FUSEDRNN_INLINE Vec load(const double* p, int64_t count) {
    return count >= lanes ? load(p) : _mm512_maskz_loadu_pd(first(count), p);
  }
  FUSEDRNN_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  FUSEDRNN_INLINE void stream(double* p) const { _mm512_stream_pd(p, v); }
  static FUSEDRNN_INLINE void fence() { _mm_sfence(); }
  FUSEDRNN_INLINE void store(double* p, int64_t count) const {
    if (count >= lanes) return store(p);
    _mm512_mask_storeu_pd(p, first(count), v);
  }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_pd(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_pd(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_pd(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_pd(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return _mm512_xor_pd(a.v, _mm512_set1_pd(-0.0)); }
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_pd(a.v, b.v, c.v); }
  friend FUSEDRNN_INLINE Vec abs(Vec x) { return _mm512_andnot_pd(_mm512_set1_pd(-0.0), x.v); }
  friend FUSEDRNN_INLINE Vec copysign(Vec x, Vec sign) {
    return _mm512_castsi512_pd(_mm512_ternarylogic_epi64(_mm512_castpd_si512(x.v), _mm512_castpd_si512(sign.v),
                                                         _mm512_set1_epi64(INT64_MIN), 0xD8));
  }
  friend FUSEDRNN_INLINE Vec min(Vec bound, Vec x) { return _mm512_maskz_min_pd(all, bound.v, x.v); }
  friend FUSEDRNN_INLINE Vec max(Vec bound, Vec x) { return _mm512_maskz_max_pd(all, bound.v, x.v); }
  friend FUSEDRNN_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }
  friend FUSEDRNN_INLINE Mask greater_equal(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GE_OQ); }
  friend FUSEDRNN_INLINE Vec select(Mask mask, Vec a, Vec b) { return _mm512_mask_blend_pd(mask, b.v, a.v); }
  friend FUSEDRNN_INLINE Vec zero_where(Mask mask, Vec x) { return select(mask, Vec::zero(), x); }
  friend FUSEDRNN_INLINE Vec exponent_bits(Vec x) {
    return _mm512_castsi512_pd(_mm512_maskz_slli_epi64(all, _mm512_castpd_si512(x.v), 52));
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
