// Pairs of bfloat16, as AVX512-BF16 multiplies them. SPDX-License-Identifier: Apache-2.0
//
// A pair, of k and k + 1, has the size of a float, so the loops move pairs as they move floats. fma of vectors of pairs
// adds two products per lane. Rounding is to nearest, ties to even; subnormals are treated as zero.
#pragma once
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

struct Pairs {
  using scalar = float;  // of the sums; where an operand is meant, two bfloat16
  using V = Vec<float>;
  static constexpr int lanes = V::lanes;
  static constexpr int registers = V::registers;
  static constexpr bool fused = true;
  __m512 v;

  static FUSEDRNN_INLINE Pairs zero() { return {_mm512_setzero_ps()}; }
  static FUSEDRNN_INLINE Pairs set(float x) { return {_mm512_set1_ps(x)}; }
  static FUSEDRNN_INLINE Pairs load(const float* p) { return {_mm512_loadu_ps(p)}; }
  FUSEDRNN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  friend FUSEDRNN_INLINE Pairs operator+(Pairs a, Pairs b) { return {_mm512_add_ps(a.v, b.v)}; }
  // The sums c + a * b of pairs a and b.
  friend FUSEDRNN_INLINE Pairs fma(Pairs a, Pairs b, Pairs c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
  }

  // The first min(count, 32) numbers of bfloat16, the others zero.
  static FUSEDRNN_INLINE V load(const uint16_t* p, int64_t count) {
    const __mmask32 first = count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first, p));
  }
  // The first min(count, 16), each as a float.
  static FUSEDRNN_INLINE V widen(const uint16_t* p, int64_t count) {
    return _mm512_castsi512_ps(high(_mm256_maskz_loadu_epi16(V::first(count), p)));
  }
  // x in the first count lanes, zero in the others.
  static FUSEDRNN_INLINE V first(V x, int64_t count) { return _mm512_maskz_mov_ps(V::first(count), x.v); }
  static FUSEDRNN_INLINE V round(V x) { return _mm512_castsi512_ps(high(halves(x))); }
  // 16 numbers, rounded, to 8 pairs of neighbours.
  static FUSEDRNN_INLINE void put(V x, float* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves(x)); }
  // The first min(count, 16) numbers, rounded.
  static FUSEDRNN_INLINE void put(V x, uint16_t* to, int64_t count) {
    _mm256_mask_storeu_epi16(to, V::first(count), halves(x));
  }
  // In each lane a pair of x and y, rounded.
  static FUSEDRNN_INLINE V zip(V x, V y) { return joined(halves(x), halves(y)); }
  // The same of the first min(count, 16) numbers of bfloat16, the others zero; without y zeros.
  static FUSEDRNN_INLINE V zip(const uint16_t* x, const uint16_t* y, int64_t count) {
    const __mmask16 first = V::first(count), of_y = y ? first : 0;
    return joined(_mm256_maskz_loadu_epi16(first, x), _mm256_maskz_loadu_epi16(of_y, y ? y : x));
  }
  // The same of what `put` has stored.
  static FUSEDRNN_INLINE V zip(const float* x, const float* y) {
    return joined(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
                  y ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y)) : _mm256_setzero_si256());
  }

 private:
  static FUSEDRNN_INLINE __m256i halves(V x) { return (__m256i)_mm512_cvtneps_pbh(x.v); }
  static FUSEDRNN_INLINE __m512i low(__m256i h) { return _mm512_maskz_cvtepu16_epi32(V::all, h); }
  static FUSEDRNN_INLINE __m512i high(__m256i h) { return _mm512_maskz_slli_epi32(V::all, low(h), 16); }
  static FUSEDRNN_INLINE V joined(__m256i x, __m256i y) {
    return _mm512_castsi512_ps(_mm512_or_si512(low(x), high(y)));
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
