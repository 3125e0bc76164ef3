// What a warp computes of a product: sums over k of rows times columns, for a tile of 8 rows. SPDX-License-Identifier:
// Apache-2.0
//
//   columns        of the tile
//   Factor         what the factors are kept as; factor(x) makes one, rounded
//   add(x, w)      32 more k of rows and columns: x.one(row, k) is a factor, x.two(row, k) it and the next in one word
//   store(sums, pitch)   sums[row * pitch + column], each by the lane that has it, after the last add
//
// IeeeTile multiplies in T itself. MatrixTile has the matrix units multiply rounded factors and add in float:
//   tf32     10 bits of mantissa     tf32x3   each factor as a sum of two such, the product of the smaller parts left
//   out bf16     7 bits                  fp16     10 bits, to 65504
#pragma once
#include "cuda/half.h"
#include "steps.h"

namespace fusedrnn {
namespace cuda {

constexpr int kRows = 8;  // of a tile

// Factors in memory.
template <class F>
struct Factors {
  const F* p;
  Index pitch;
  FUSEDRNN_INLINE F one(Index row, Index k) const { return p[row * pitch + k]; }
  FUSEDRNN_INLINE uint32_t two(Index row, Index k) const { return load_two(p + row * pitch + k); }  // k is even
};

template <class T>
struct IeeeTile {
  using Factor = T;
  static constexpr int columns = 8, count = kRows * columns;  // two sums for each lane
  T sums[count];

  FUSEDRNN_INLINE static Factor factor(T x) { return x; }

  FUSEDRNN_INLINE IeeeTile() {
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] = T(0);
  }

  // A lane has one of the k, of all rows and columns.
  template <class X, class W>
  FUSEDRNN_INLINE void add(X x, W w) {
    const int k = lane();
    T row[kRows], column[columns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i] = x.one(i, k), column[i] = w.one(i, k);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < columns; ++j)
        sums[i * columns + j] = Native<T>::fma(row[i], column[j], sums[i * columns + j]);
  }

  FUSEDRNN_INLINE void store(T* out, Index pitch) {
    reduce<count / 2>();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int sum = 2 * lane() + i;
      out[sum / columns * pitch + sum % columns] = sums[i];
    }
  }

  // Over the lanes: each gives half of its sums away and takes the other half, five times. Lane i is left with the
  // sums 2i and 2i + 1.
  template <int n>
  FUSEDRNN_INLINE void reduce() {
    constexpr int mask = n / 2;
    const bool upper = lane() & mask;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const T kept = upper ? sums[i + n] : sums[i], given = upper ? sums[i] : sums[i + n];
      sums[i] = kept + from_lane(given, mask);
    }
    if constexpr (n > 2) reduce<n / 2>();
  }
};

template <bool first, class A, class B>
struct Choose {
  using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using type = B;
};

enum class Precision { ieee, tf32, tf32x3, bf16, fp16 };

// The columns are the rows of the first factor, so that the few rows of a batch fill the shorter side. Which lane has
// which element of the factors and of the sums is laid down with the instructions (PTX, mma.m16n8k8 and m16n8k16).
template <Precision precision>
struct MatrixTile {
  static constexpr bool pairs = precision == Precision::bf16 || precision == Precision::fp16;
  using Factor = typename Choose<pairs, uint16_t, float>::type;
  static constexpr int columns = 16;
  float sums[4] = {0, 0, 0, 0};

  FUSEDRNN_INLINE static Factor factor(float x) {
    if constexpr (precision == Precision::bf16) return to_bf16(x);
    if constexpr (precision == Precision::fp16) return to_fp16(x);
    if constexpr (precision == Precision::tf32) return Native<float>::of_bits(to_tf32(x));
    return Factor(x);
  }
  // What is kept as it is: Half is multiplied as fp16 and Bfloat16 as bf16 alone.
  FUSEDRNN_INLINE static uint16_t factor(Half x) { return x.bits; }
  FUSEDRNN_INLINE static uint16_t factor(Bfloat16 x) { return x.bits; }

  template <class X, class W>
  FUSEDRNN_INLINE void add(X x, W w) {
    const int g = lane() / 4, t = lane() % 4;
    if constexpr (pairs) {
#pragma unroll
      for (int k = 0; k < kWarp; k += 16) {
        const int first = k + 2 * t, second = first + 8;
        const uint32_t a[4] = {w.two(g, first), w.two(g + 8, first), w.two(g, second), w.two(g + 8, second)};
        const uint32_t b[2] = {x.two(g, first), x.two(g, second)};
        if constexpr (precision == Precision::bf16)
          multiply_bf16(sums, a, b);
        else
          multiply_fp16(sums, a, b);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kWarp; k += 8) {
        const float first[4] = {w.one(g, k + t), w.one(g + 8, k + t), w.one(g, k + t + 4), w.one(g + 8, k + t + 4)};
        const float second[2] = {x.one(g, k + t), x.one(g, k + t + 4)};
        uint32_t a[4], b[2];
        if constexpr (precision == Precision::tf32x3) {
          uint32_t a_rest[4], b_rest[2];
          split<4>(first, a, a_rest), split<2>(second, b, b_rest);
          multiply_tf32(sums, a_rest, b);
          multiply_tf32(sums, a, b_rest);
        } else {
          for (int i = 0; i < 4; ++i) a[i] = Native<float>::bits(first[i]);
          for (int i = 0; i < 2; ++i) b[i] = Native<float>::bits(second[i]);
        }
        multiply_tf32(sums, a, b);
      }
    }
  }

  // Each as a sum of two that the units take.
  template <int n>
  FUSEDRNN_INLINE static void split(const float* x, uint32_t* larger, uint32_t* rest) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      larger[i] = to_tf32(x[i]);
      rest[i] = to_tf32(x[i] - Native<float>::of_bits(larger[i]));
    }
  }

  FUSEDRNN_INLINE void store(float* out, Index pitch) const {
    const int g = lane() / 4, t = lane() % 4;
    out[2 * t * pitch + g] = sums[0];
    out[(2 * t + 1) * pitch + g] = sums[1];
    out[2 * t * pitch + g + 8] = sums[2];
    out[(2 * t + 1) * pitch + g + 8] = sums[3];
  }
};

template <class S, Precision precision>
struct TileOf {
  using type = MatrixTile<precision>;
};
template <class S>
struct TileOf<S, Precision::ieee> {
  using type = IeeeTile<Compute<S>>;
};

}  // namespace cuda
}  // namespace fusedrnn
