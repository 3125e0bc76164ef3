// AVX2 with FMA: 16 floats or 8 doubles, in two registers. The interface is described in vec.h.
// Whole vectors branch past the masks: masked stores are slow on some processors, masked loads 10 % of a kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <immintrin.h>

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

constexpr int kRegisters = 8;  // pairs of them
constexpr bool kFused = true;
constexpr bool kWholeLines = true;  // Two of them

template <class T>
struct Register;

template <>
struct Register<float> {
  using Vector = __m256;
  using Mask = __m256;
  static constexpr int lanes = 8;

  static FUSEDRNN_INLINE __m256i first(int64_t count) {
    const int n = count >= lanes ? lanes : count <= 0 ? 0 : int(count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FUSEDRNN_INLINE Vector set(float x) { return _mm256_set1_ps(x); }
  static FUSEDRNN_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static FUSEDRNN_INLINE Vector load(const float* p, int64_t count) {
    return count >= lanes ? load(p) : _mm256_maskload_ps(p, first(count));
  }
  static FUSEDRNN_INLINE Vector pieces(const float* p, int64_t step) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1);
  }
  static FUSEDRNN_INLINE void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static FUSEDRNN_INLINE void stream(float* p, Vector v) { _mm256_stream_ps(p, v); }
  static FUSEDRNN_INLINE void store(float* p, Vector v, int64_t count) {
    count >= lanes ? store(p, v) : _mm256_maskstore_ps(p, first(count), v);
  }

  static FUSEDRNN_INLINE Vector negative(Vector a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
  static FUSEDRNN_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static FUSEDRNN_INLINE Vector fnma(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
  static FUSEDRNN_INLINE Vector abs(Vector x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static FUSEDRNN_INLINE Vector copysign(Vector x, Vector sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, x), _mm256_and_ps(bit, sign));
  }
  static FUSEDRNN_INLINE Vector min(Vector bound, Vector x) { return _mm256_min_ps(bound, x); }
  static FUSEDRNN_INLINE Vector max(Vector bound, Vector x) { return _mm256_max_ps(bound, x); }
  static FUSEDRNN_INLINE Mask greater(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static FUSEDRNN_INLINE Mask greater_equal(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static FUSEDRNN_INLINE Vector select(Mask mask, Vector a, Vector b) { return _mm256_blendv_ps(b, a, mask); }
  static FUSEDRNN_INLINE Vector zero_where(Mask mask, Vector x) { return _mm256_andnot_ps(mask, x); }
  static FUSEDRNN_INLINE Vector exponent_bits(Vector x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
  }
};

template <>
struct Register<double> {
  using Vector = __m256d;
  using Mask = __m256d;
  static constexpr int lanes = 4;

  static FUSEDRNN_INLINE __m256i first(int64_t count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static FUSEDRNN_INLINE Vector set(double x) { return _mm256_set1_pd(x); }
  static FUSEDRNN_INLINE Vector load(const double* p) { return _mm256_loadu_pd(p); }
  static FUSEDRNN_INLINE Vector load(const double* p, int64_t count) {
    return count >= lanes ? load(p) : _mm256_maskload_pd(p, first(count));
  }
  static FUSEDRNN_INLINE Vector pieces(const double* p, int64_t step) {
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p)), _mm_loadu_pd(p + step), 1);
  }
  static FUSEDRNN_INLINE void store(double* p, Vector v) { _mm256_storeu_pd(p, v); }
  static FUSEDRNN_INLINE void stream(double* p, Vector v) { _mm256_stream_pd(p, v); }
  static FUSEDRNN_INLINE void store(double* p, Vector v, int64_t count) {
    count >= lanes ? store(p, v) : _mm256_maskstore_pd(p, first(count), v);
  }

  static FUSEDRNN_INLINE Vector negative(Vector a) { return _mm256_xor_pd(a, _mm256_set1_pd(-0.0)); }
  static FUSEDRNN_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_pd(a, b, c); }
  static FUSEDRNN_INLINE Vector fnma(Vector a, Vector b, Vector c) { return _mm256_fnmadd_pd(a, b, c); }
  static FUSEDRNN_INLINE Vector abs(Vector x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
  static FUSEDRNN_INLINE Vector copysign(Vector x, Vector sign) {
    const __m256d bit = _mm256_set1_pd(-0.0);
    return _mm256_or_pd(_mm256_andnot_pd(bit, x), _mm256_and_pd(bit, sign));
  }
  static FUSEDRNN_INLINE Vector min(Vector bound, Vector x) { return _mm256_min_pd(bound, x); }
  static FUSEDRNN_INLINE Vector max(Vector bound, Vector x) { return _mm256_max_pd(bound, x); }
  static FUSEDRNN_INLINE Mask greater(Vector a, Vector b) { return _mm256_cmp_pd(a, b, _CMP_GT_OQ); }
  static FUSEDRNN_INLINE Mask greater_equal(Vector a, Vector b) { return _mm256_cmp_pd(a, b, _CMP_GE_OQ); }
  static FUSEDRNN_INLINE Vector select(Mask mask, Vector a, Vector b) { return _mm256_blendv_pd(b, a, mask); }
  static FUSEDRNN_INLINE Vector zero_where(Mask mask, Vector x) { return _mm256_andnot_pd(mask, x); }
  static FUSEDRNN_INLINE Vector exponent_bits(Vector x) {
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(x), 52));
  }
};

// Neighbours in memory, together a cache line. A tile that took half a line at a time would read every line of the
// weights from L2 twice: 6 to 34 % of a call.
template <class N>
struct Two {
  typename N::Vector low, high;
  friend FUSEDRNN_INLINE Two operator+(Two a, Two b) { return {a.low + b.low, a.high + b.high}; }
  friend FUSEDRNN_INLINE Two operator-(Two a, Two b) { return {a.low - b.low, a.high - b.high}; }
  friend FUSEDRNN_INLINE Two operator*(Two a, Two b) { return {a.low * b.low, a.high * b.high}; }
  friend FUSEDRNN_INLINE Two operator/(Two a, Two b) { return {a.low / b.low, a.high / b.high}; }
};

template <class T>
struct Native {
  using N = Register<T>;
  using Vector = Two<N>;
  using Mask = Vector;
  static constexpr int lanes = 2 * N::lanes;
  Vector v;

  static FUSEDRNN_INLINE Vector set(T x) { return {N::set(x), N::set(x)}; }
  static FUSEDRNN_INLINE Vector load(const T* p) { return {N::load(p), N::load(p + N::lanes)}; }
  static FUSEDRNN_INLINE Vector load(const T* p, int64_t count) {
    return {N::load(p, count), count > N::lanes ? N::load(p + N::lanes, count - N::lanes) : N::set(0)};
  }
  static FUSEDRNN_INLINE Vector pieces(const T* p, int64_t step) {
    return {N::pieces(p, step), N::pieces(p + 2 * step, step)};
  }
  static FUSEDRNN_INLINE void store(T* p, Vector v) { N::store(p, v.low), N::store(p + N::lanes, v.high); }
  static FUSEDRNN_INLINE void stream(T* p, Vector v) { N::stream(p, v.low), N::stream(p + N::lanes, v.high); }
  static FUSEDRNN_INLINE void fence() { _mm_sfence(); }
  static FUSEDRNN_INLINE void store(T* p, Vector v, int64_t count) {
    N::store(p, v.low, count);
    if (count > N::lanes) N::store(p + N::lanes, v.high, count - N::lanes);
  }

  static FUSEDRNN_INLINE Vector negative(Vector a) { return {N::negative(a.low), N::negative(a.high)}; }
  static FUSEDRNN_INLINE Vector fma(Vector a, Vector b, Vector c) {
    return {N::fma(a.low, b.low, c.low), N::fma(a.high, b.high, c.high)};
  }
  static FUSEDRNN_INLINE Vector fnma(Vector a, Vector b, Vector c) {
    return {N::fnma(a.low, b.low, c.low), N::fnma(a.high, b.high, c.high)};
  }
  static FUSEDRNN_INLINE Vector abs(Vector x) { return {N::abs(x.low), N::abs(x.high)}; }
  static FUSEDRNN_INLINE Vector copysign(Vector x, Vector sign) {
    return {N::copysign(x.low, sign.low), N::copysign(x.high, sign.high)};
  }
  static FUSEDRNN_INLINE Vector min(Vector bound, Vector x) {
    return {N::min(bound.low, x.low), N::min(bound.high, x.high)};
  }
  static FUSEDRNN_INLINE Vector max(Vector bound, Vector x) {
    return {N::max(bound.low, x.low), N::max(bound.high, x.high)};
  }
  static FUSEDRNN_INLINE Mask greater(Vector a, Vector b) {
    return {N::greater(a.low, b.low), N::greater(a.high, b.high)};
  }
  static FUSEDRNN_INLINE Mask greater_equal(Vector a, Vector b) {
    return {N::greater_equal(a.low, b.low), N::greater_equal(a.high, b.high)};
  }
  static FUSEDRNN_INLINE Vector select(Mask mask, Vector a, Vector b) {
    return {N::select(mask.low, a.low, b.low), N::select(mask.high, a.high, b.high)};
  }
  static FUSEDRNN_INLINE Vector zero_where(Mask mask, Vector x) {
    return {N::zero_where(mask.low, x.low), N::zero_where(mask.high, x.high)};
  }
  static FUSEDRNN_INLINE Vector exponent_bits(Vector x) { return {N::exponent_bits(x.low), N::exponent_bits(x.high)}; }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
