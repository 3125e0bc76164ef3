// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. The interface is described in vec.h.
// min, max and shifts are written with a full mask: GCC 12 warns about an uninitialized value in the plain ones.
// Whole vectors branch past the masks, which costs less than to mask them: 1 to 2 % of a kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <immintrin.h>

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

constexpr int kRegisters = 32;
constexpr bool kFused = true;
constexpr bool kWholeLines = true;

template <class T>
struct Native;

template <>
struct Native<float> {
  using Vector = __m512;
  using Mask = __mmask16;
  static constexpr int lanes = 16;
  static constexpr Mask all = 0xFFFF;
  Vector v;

  static FUSEDRNN_INLINE Mask first(int64_t count) {
    return Mask(count >= lanes ? all : count <= 0 ? 0 : (1u << count) - 1);
  }
  static FUSEDRNN_INLINE Vector set(float x) { return _mm512_set1_ps(x); }
  static FUSEDRNN_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static FUSEDRNN_INLINE Vector load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static FUSEDRNN_INLINE Vector pieces(const float* p, int64_t step) {
    Vector x = _mm512_maskz_broadcast_f32x4(all, _mm_loadu_ps(p));
    x = _mm512_mask_broadcast_f32x4(x, 0x00f0, _mm_loadu_ps(p + step));
    x = _mm512_mask_broadcast_f32x4(x, 0x0f00, _mm_loadu_ps(p + 2 * step));
    return _mm512_mask_broadcast_f32x4(x, 0xf000, _mm_loadu_ps(p + 3 * step));
  }
  static FUSEDRNN_INLINE void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static FUSEDRNN_INLINE void stream(float* p, Vector v) { _mm512_stream_ps(p, v); }
  static FUSEDRNN_INLINE void fence() { _mm_sfence(); }
  static FUSEDRNN_INLINE void store(float* p, Vector v, int64_t count) { _mm512_mask_storeu_ps(p, first(count), v); }

  static FUSEDRNN_INLINE Vector negative(Vector a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  static FUSEDRNN_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static FUSEDRNN_INLINE Vector fnma(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }
  static FUSEDRNN_INLINE Vector abs(Vector x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
  static FUSEDRNN_INLINE Vector copysign(Vector x, Vector sign) {
    // 0xD8: the third operand chooses bit by bit between the second and the first
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(x), _mm512_castps_si512(sign),
                                                         _mm512_set1_epi32(INT32_MIN), 0xD8));
  }
  static FUSEDRNN_INLINE Vector min(Vector bound, Vector x) { return _mm512_maskz_min_ps(all, bound, x); }
  static FUSEDRNN_INLINE Vector max(Vector bound, Vector x) { return _mm512_maskz_max_ps(all, bound, x); }
  static FUSEDRNN_INLINE Mask greater(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static FUSEDRNN_INLINE Mask greater_equal(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static FUSEDRNN_INLINE Vector select(Mask mask, Vector a, Vector b) { return _mm512_mask_blend_ps(mask, b, a); }
  static FUSEDRNN_INLINE Vector zero_where(Mask mask, Vector x) { return select(mask, Vector{}, x); }
  static FUSEDRNN_INLINE Vector exponent_bits(Vector x) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(all, _mm512_castps_si512(x), 23));
  }
};

template <>
struct Native<double> {
  using Vector = __m512d;
  using Mask = __mmask8;
  static constexpr int lanes = 8;
  static constexpr Mask all = 0xFF;
  Vector v;

  static FUSEDRNN_INLINE Mask first(int64_t count) {
    return Mask(count >= lanes ? all : count <= 0 ? 0 : (1u << count) - 1);
  }
  static FUSEDRNN_INLINE Vector set(double x) { return _mm512_set1_pd(x); }
  static FUSEDRNN_INLINE Vector load(const double* p) { return _mm512_loadu_pd(p); }
  static FUSEDRNN_INLINE Vector load(const double* p, int64_t count) { return _mm512_maskz_loadu_pd(first(count), p); }
  static FUSEDRNN_INLINE Vector pieces(const double* p, int64_t step) {
    Vector x = _mm512_maskz_broadcast_f64x2(all, _mm_loadu_pd(p));
    x = _mm512_mask_broadcast_f64x2(x, 0x0c, _mm_loadu_pd(p + step));
    x = _mm512_mask_broadcast_f64x2(x, 0x30, _mm_loadu_pd(p + 2 * step));
    return _mm512_mask_broadcast_f64x2(x, 0xc0, _mm_loadu_pd(p + 3 * step));
  }
  static FUSEDRNN_INLINE void store(double* p, Vector v) { _mm512_storeu_pd(p, v); }
  static FUSEDRNN_INLINE void stream(double* p, Vector v) { _mm512_stream_pd(p, v); }
  static FUSEDRNN_INLINE void fence() { _mm_sfence(); }
  static FUSEDRNN_INLINE void store(double* p, Vector v, int64_t count) { _mm512_mask_storeu_pd(p, first(count), v); }

  static FUSEDRNN_INLINE Vector negative(Vector a) { return _mm512_xor_pd(a, _mm512_set1_pd(-0.0)); }
  static FUSEDRNN_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_pd(a, b, c); }
  static FUSEDRNN_INLINE Vector fnma(Vector a, Vector b, Vector c) { return _mm512_fnmadd_pd(a, b, c); }
  static FUSEDRNN_INLINE Vector abs(Vector x) { return _mm512_andnot_pd(_mm512_set1_pd(-0.0), x); }
  static FUSEDRNN_INLINE Vector copysign(Vector x, Vector sign) {
    return _mm512_castsi512_pd(_mm512_ternarylogic_epi64(_mm512_castpd_si512(x), _mm512_castpd_si512(sign),
                                                         _mm512_set1_epi64(INT64_MIN), 0xD8));
  }
  static FUSEDRNN_INLINE Vector min(Vector bound, Vector x) { return _mm512_maskz_min_pd(all, bound, x); }
  static FUSEDRNN_INLINE Vector max(Vector bound, Vector x) { return _mm512_maskz_max_pd(all, bound, x); }
  static FUSEDRNN_INLINE Mask greater(Vector a, Vector b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
  static FUSEDRNN_INLINE Mask greater_equal(Vector a, Vector b) { return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ); }
  static FUSEDRNN_INLINE Vector select(Mask mask, Vector a, Vector b) { return _mm512_mask_blend_pd(mask, b, a); }
  static FUSEDRNN_INLINE Vector zero_where(Mask mask, Vector x) { return select(mask, Vector{}, x); }
  static FUSEDRNN_INLINE Vector exponent_bits(Vector x) {
    return _mm512_castsi512_pd(_mm512_maskz_slli_epi64(all, _mm512_castpd_si512(x), 52));
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
