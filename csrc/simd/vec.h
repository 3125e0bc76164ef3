// Vec<float> and Vec<double> of the level this file is compiled for, and the activations on them.
//
// A level is chosen by two macros: FUSEDRNN_LEVEL is its bare name, which is also the namespace (so that nothing
// compiled for one instruction set is ever linked for another), and one of FUSEDRNN_LEVEL_PORTABLE, _PORTABLE_FMA,
// _AVX2, _AVX512, _AVX512_BF16, _AMX_BF16, _NEON, _CUDA is defined. Compile with -ffp-contract=off: every FMA is
// written out.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "inline.h"

#if defined(FUSEDRNN_LEVEL_AVX512) || defined(FUSEDRNN_LEVEL_AVX512_BF16) || defined(FUSEDRNN_LEVEL_AMX_BF16)
#include "avx512.h"
#elif defined(FUSEDRNN_LEVEL_AVX2)
#include "avx2.h"
#elif defined(FUSEDRNN_LEVEL_NEON)
#include "neon.h"
#elif defined(FUSEDRNN_LEVEL_PORTABLE) || defined(FUSEDRNN_LEVEL_PORTABLE_FMA)
#include "portable.h"
#elif defined(FUSEDRNN_LEVEL_CUDA)
#include "scalar.h"
#else
#error "define FUSEDRNN_LEVEL and one FUSEDRNN_LEVEL_..."
#endif

#if !defined(FUSEDRNN_LEVEL_CUDA)
namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

// The interface, the same on every level (T is float or double). What differs is in Native<T>, on its vector type.
template <class T>
struct Vec : Native<T> {
  using N = Native<T>;
  using Vector = typename N::Vector;
  using Mask = typename N::Mask;
  using N::lanes, N::v;
  using scalar = T;
  static constexpr int registers = kRegisters;      // as many vectors as the machine's registers hold
  static constexpr bool fused = kFused;             // whether fma and fnma round once (all but plain portable)
  static constexpr bool whole_lines = kWholeLines;  // whether a vector is a cache line

  Vec() = default;
  FUSEDRNN_INLINE Vec(Vector x) : N{x} {}

  static FUSEDRNN_INLINE Vec zero() { return Vector{}; }
  static FUSEDRNN_INLINE Vec set(T x) { return N::set(x); }
  // All lanes, any alignment; with a count the first min(count, lanes): the others read as 0, are not written, not
  // touched.
  static FUSEDRNN_INLINE Vec load(const T* p) { return N::load(p); }
  static FUSEDRNN_INLINE Vec load(const T* p, int64_t count) { return count >= lanes ? N::load(p) : N::load(p, count); }
  // Pieces of 16 bytes, at p, p + step, ...
  static FUSEDRNN_INLINE Vector pieces(const T* p, int64_t step) { return N::pieces(p, step); }
  FUSEDRNN_INLINE void store(T* p) const { N::store(p, v); }
  FUSEDRNN_INLINE void store(T* p, int64_t count) const { count >= lanes ? N::store(p, v) : N::store(p, v, count); }
  // Store past the caches, p aligned, where a vector is a cache line; N::fence puts it before what follows.
  FUSEDRNN_INLINE void stream(T* p) const { N::stream(p, v); }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return N::negative(a.v); }                 // flips the sign bit
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return N::fma(a.v, b.v, c.v); }    // c + a*b
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return N::fnma(a.v, b.v, c.v); }  // c - a*b
  // On the sign bit, NaN included.
  friend FUSEDRNN_INLINE Vec abs(Vec x) { return N::abs(x.v); }
  friend FUSEDRNN_INLINE Vec copysign(Vec x, Vec sign) { return N::copysign(x.v, sign.v); }
  // x where it is NaN, for a bound that is a number.
  friend FUSEDRNN_INLINE Vec min(Vec bound, Vec x) { return N::min(bound.v, x.v); }
  friend FUSEDRNN_INLINE Vec max(Vec bound, Vec x) { return N::max(bound.v, x.v); }
  // False where either is NaN.
  friend FUSEDRNN_INLINE Mask greater(Vec a, Vec b) { return N::greater(a.v, b.v); }
  friend FUSEDRNN_INLINE Mask greater_equal(Vec a, Vec b) { return N::greater_equal(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec select(Mask mask, Vec a, Vec b) {
    return N::select(mask, a.v, b.v);
  }  // a where it is true
  friend FUSEDRNN_INLINE Vec zero_where(Mask mask, Vec x) { return N::zero_where(mask, x.v); }
  // The lowest bits of x moved into the exponent's place.
  friend FUSEDRNN_INLINE Vec exponent_bits(Vec x) { return N::exponent_bits(x.v); }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
#endif

#include "math.h"
