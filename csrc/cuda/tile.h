// What a warp computes of a product: sums over k of rows times columns, for a tile of 8 rows. SPDX-License-Identifier:
// Apache-2.0
//
//   columns        of the tile
//   Factor         what the factors are kept as; factor(x) makes one, rounded
//   Rows, Columns  what a lane multiplies of 32 k: rows_of(x), columns_of(w). x.one(row, k) is a factor, x.two(row, k)
//                  it and the next in one word
//   add(Rows, Columns)   32 more k
//   store(sums, pitch)   sums[row * pitch + column], each by the lane that has it, after the last add
//   kept           so many Columns may stay in a lane's registers: half of them
//   ahead          then Rows are loaded while those before are multiplied
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
  FUSEDRNN_INLINE Factors at(Index k) const { return {p + k, pitch}; }
};

constexpr int kKeptBytes = 512;  // of the 1020 in a lane's registers

template <class T>
struct IeeeTile {
  using Factor = T;
  static constexpr int columns = 8, count = kRows * columns;  // two sums for each lane
  static constexpr bool ahead = false;  // no registers left, and 64 multiplications to hide a load behind
  static constexpr int kept = (kKeptBytes - (sizeof(T) - 4) * count) / (columns * sizeof(T));
  T sums[count];

  FUSEDRNN_INLINE static Factor factor(T x) { return x; }

  FUSEDRNN_INLINE IeeeTile() {
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] = T(0);
  }

  // A lane has one of the k, of all rows and columns.
  struct Rows {
    T of[kRows];
  };
  struct Columns {
    T of[columns];
  };
  template <class X>
  FUSEDRNN_INLINE static Rows rows_of(X x) {
    Rows rows;
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows.of[i] = x.one(i, lane());
    return rows;
  }
  template <class W>
  FUSEDRNN_INLINE static Columns columns_of(W w) {
    Columns all;
#pragma unroll
    for (int i = 0; i < columns; ++i) all.of[i] = w.one(i, lane());
    return all;
  }
  FUSEDRNN_INLINE void add(const Rows& x, const Columns& w) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < columns; ++j) sums[i * columns + j] = Native<T>::fma(x.of[i], w.of[j], sums[i * columns + j]);
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

enum class Precision { ieee, tf32, tf32x3, bf16, fp16 };

// The columns are the rows of the first factor, so that the few rows of a batch fill the shorter side. Which lane has
// which element of the factors and of the sums is laid down with the instructions (PTX, mma.m16n8k8 and m16n8k16).
template <Precision precision>
struct MatrixTile {
  static constexpr bool pairs = precision == Precision::bf16 || precision == Precision::fp16;
  using Factor = typename Choose<pairs, uint16_t, float>::type;
  using Word = typename Choose<pairs, uint32_t, float>::type;  // of neighbours along k
  static constexpr int columns = 16;
  static constexpr int kNeighbours = pairs ? 2 : 1, kSteps = kWarp / (8 * kNeighbours);  // of 8 words of k
  static constexpr bool ahead = true;
  // Of tf32x3 both parts stay.
  static constexpr int kept = precision == Precision::tf32x3 ? 3 : kKeptBytes / (kSteps * 4 * sizeof(Word));
  float sums[2][4] = {};  // take turns: an instruction need not wait for the sums of the one before

  FUSEDRNN_INLINE static Factor factor(float x) {
    if constexpr (precision == Precision::bf16) return to_bf16(x);
    if constexpr (precision == Precision::fp16) return to_fp16(x);
    if constexpr (precision == Precision::tf32) return Native<float>::of_bits(to_tf32(x));
    return Factor(x);
  }
  // What is kept as it is: Half is multiplied as fp16 and Bfloat16 as bf16 alone.
  FUSEDRNN_INLINE static uint16_t factor(Half x) { return x.bits; }
  FUSEDRNN_INLINE static uint16_t factor(Bfloat16 x) { return x.bits; }

  struct Rows {
    Word of[kSteps][2];
  };
  struct Columns {
    Word of[kSteps][4];
  };
  template <class X>
  FUSEDRNN_INLINE static Word word(X x, int row, int k) {
    if constexpr (pairs)
      return x.two(row, kNeighbours * k);
    else
      return x.one(row, k);
  }
  template <class X>
  FUSEDRNN_INLINE static Rows rows_of(X x) {
    const int g = lane() / 4, t = lane() % 4;
    Rows rows;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) rows.of[i][0] = word(x, g, 8 * i + t), rows.of[i][1] = word(x, g, 8 * i + t + 4);
    return rows;
  }
  template <class W>
  FUSEDRNN_INLINE static Columns columns_of(W w) {
    const int g = lane() / 4, t = lane() % 4;
    Columns all;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      all.of[i][0] = word(w, g, 8 * i + t), all.of[i][1] = word(w, g + 8, 8 * i + t);
      all.of[i][2] = word(w, g, 8 * i + t + 4), all.of[i][3] = word(w, g + 8, 8 * i + t + 4);
    }
    return all;
  }
  FUSEDRNN_INLINE void add(const Rows& x, const Columns& w) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (precision == Precision::bf16) multiply_bf16(sums[i % 2], w.of[i], x.of[i]);
      if constexpr (precision == Precision::fp16) multiply_fp16(sums[i % 2], w.of[i], x.of[i]);
      if constexpr (!pairs) {
        uint32_t a[4], b[2];
        if constexpr (precision == Precision::tf32x3) {
          uint32_t a_rest[4], b_rest[2];
          split<4>(w.of[i], a, a_rest), split<2>(x.of[i], b, b_rest);
          multiply_tf32(sums[i % 2], a_rest, b);
          multiply_tf32(sums[i % 2], a, b_rest);
        } else {
          for (int j = 0; j < 4; ++j) a[j] = Native<float>::bits(w.of[i][j]);
          for (int j = 0; j < 2; ++j) b[j] = Native<float>::bits(x.of[i][j]);
        }
        multiply_tf32(sums[i % 2], a, b);
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
#pragma unroll
    for (int i = 0; i < 4; ++i) out[(2 * t + i % 2) * pitch + g + i / 2 * 8] = sums[0][i] + sums[1][i];
  }
};

template <class S, Precision precision>
using TileOf = Choose<precision == Precision::ieee, IeeeTile<Compute<S>>, MatrixTile<precision>>;

}  // namespace cuda
}  // namespace fusedrnn
