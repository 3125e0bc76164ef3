// What a warp computes of a product: sums over k of rows times columns, for a tile of 8 rows. SPDX-License-Identifier:
// Apache-2.0
//
//   columns        of the tile
//   Factor         what the factors are kept as; factor(x) makes one, rounded
//   Rows, Columns  what a lane multiplies of 32 k: load<Rows>(x), load<Columns>(w). x.one(row, k) is a factor,
//                  x.two(row, k) it and the next in one word
//   add(Rows, Columns)   32 more k
//   store(sums, pitch)   sums[row * pitch + column], each by the lane that has it, after the last add
//   kept           so many Columns may stay in a lane's registers: half of them
//   ahead          then Rows are loaded while those before are multiplied
//
// IeeeTile multiplies in T itself. MatrixTile has the matrix units multiply rounded factors and add in float:
//   tf32     10 bits of mantissa     bf16   7 bits     fp16   10 bits, to 65504
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

  // A lane has one of the k, of all 8.
  struct Rows {
    T of[kRows];
  };
  using Columns = Rows;
  template <class Words, class X>
  FUSEDRNN_INLINE static Words load(X x) {
    Words words;
#pragma unroll
    for (int i = 0; i < kRows; ++i) words.of[i] = x.one(i, lane());
    return words;
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

enum class Precision { ieee, tf32, bf16, fp16 };

// Which lane has which element of the factors and of the sums is laid down with the instructions (PTX, mma.m16n8k8 and
// m16n8k16). 16 columns are the rows of the first factor, so that the few rows of a batch fill the shorter side. 8 are
// the second factor, and half of the first is zeros: so a block of few columns wastes no registers.
template <Precision precision, int columns_>
struct MatrixTile {
  static constexpr bool pairs = precision != Precision::tf32;  // in a word, of neighbours along k
  using Factor = typename Choose<pairs, uint16_t, uint32_t>::type;
  static constexpr int columns = columns_, kSteps = pairs ? 2 : 4;  // of 8 words of k
  static constexpr bool ahead = true;
  static constexpr int kept = kKeptBytes / (kSteps * columns);
  float sums[2][4] = {};  // take turns: an instruction need not wait for the sums of the one before

  FUSEDRNN_INLINE static Factor factor(float x) {
    if constexpr (precision == Precision::bf16) return to_bf16(x);
    if constexpr (precision == Precision::fp16) return to_fp16(x);
    if constexpr (precision == Precision::tf32) return to_tf32(x);
  }
  // What is kept as it is: Half is multiplied as fp16 and Bfloat16 as bf16 alone.
  FUSEDRNN_INLINE static uint16_t factor(Half x) { return x.bits; }
  FUSEDRNN_INLINE static uint16_t factor(Bfloat16 x) { return x.bits; }

  template <int n_>
  struct Fragment {
    static constexpr int n = n_;
    uint32_t of[kSteps][2 * n];  // of 8 n rows
  };
  using Rows = Fragment<1>;
  using Columns = Fragment<columns / 8>;
  template <class Words, class X>
  FUSEDRNN_INLINE static Words load(X x) {
    Words words;
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 2 * Words::n; ++j) {
        const int row = lane() / 4 + j % Words::n * 8, word = 8 * i + lane() % 4 + j / Words::n * 4;
        if constexpr (pairs)
          words.of[i][j] = x.two(row, 2 * word);
        else
          words.of[i][j] = x.one(row, word);
      }
    return words;
  }
  FUSEDRNN_INLINE void add(const Rows& x, const Columns& w) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (columns == 16) {
        multiply(sums[i % 2], w.of[i], x.of[i]);
      } else {
        const uint32_t rows[4] = {x.of[i][0], 0, x.of[i][1], 0};
        multiply(sums[i % 2], rows, w.of[i]);
      }
    }
  }
  FUSEDRNN_INLINE static void multiply(float* sums, const uint32_t* a, const uint32_t* b) {
    if constexpr (precision == Precision::tf32) multiply_tf32(sums, a, b);
    if constexpr (precision == Precision::bf16) multiply_bf16(sums, a, b);
    if constexpr (precision == Precision::fp16) multiply_fp16(sums, a, b);
  }

  FUSEDRNN_INLINE void store(float* out, Index pitch) const {
#pragma unroll
    for (int i = 0; i < columns / 4; ++i) {
      const int along = lane() / 4 + i / 2 * 8, across = 2 * (lane() % 4) + i % 2;  // in sums (16, 8)
      out[columns == 16 ? across * pitch + along : along * pitch + across] = sums[0][i] + sums[1][i];
    }
  }
};

template <class S, Precision precision, int columns>
using TileOf =
    typename Choose<precision == Precision::ieee, IeeeTile<Compute<S>>, MatrixTile<precision, columns>>::type;

}  // namespace cuda
}  // namespace fusedrnn
