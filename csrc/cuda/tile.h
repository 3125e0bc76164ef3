// What a warp computes of a product: sums over k of rows times columns, for a tile of 8 rows. SPDX-License-Identifier:
// Apache-2.0
//
//   columns        of the tile
//   add(x, w)      32 more k: x(row, k) and w(column, k) give the factors
//   store(sums, pitch)   sums[row * pitch + column], each by the lane that has it, after the last add
//
// IeeeTile multiplies in T itself. MatrixTile has the matrix units multiply rounded factors and add in float:
//   tf32     10 bits of mantissa     tf32x3   each factor as a sum of two such, the product of the smaller parts left
//   out bf16     7 bits                  fp16     10 bits, to 65504
#pragma once
#include "cuda/device.h"
#include "simd/vec.h"
#include "steps.h"

namespace fusedrnn {
namespace cuda {

constexpr int kRows = 8;  // of a tile

template <class T>
struct IeeeTile {
  static constexpr int columns = 8, count = kRows * columns;  // two sums for each lane
  T sums[count];

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
    for (int i = 0; i < kRows; ++i) row[i] = x(i, k), column[i] = w(i, k);
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

enum class Precision { ieee, tf32, tf32x3, bf16, fp16 };

// The columns are the rows of the first factor, so that the few rows of a batch fill the shorter side. Which lane has
// which element of the factors and of the sums is laid down with the instructions (PTX, mma.m16n8k8 and m16n8k16).
template <Precision precision>
struct MatrixTile {
  static constexpr int columns = 16;
  float sums[4] = {0, 0, 0, 0};

  template <class X, class W>
  FUSEDRNN_INLINE void add(X x, W w) {
    const int g = lane() / 4, t = lane() % 4;
    if constexpr (precision == Precision::tf32 || precision == Precision::tf32x3) {
#pragma unroll
      for (int k = 0; k < kWarp; k += 8) {
        const float first[4] = {w(g, k + t), w(g + 8, k + t), w(g, k + t + 4), w(g + 8, k + t + 4)};
        const float second[2] = {x(g, k + t), x(g, k + t + 4)};
        uint32_t a[4], b[2];
        for (int i = 0; i < 4; ++i) a[i] = to_tf32(first[i]);
        for (int i = 0; i < 2; ++i) b[i] = to_tf32(second[i]);
        if constexpr (precision == Precision::tf32x3) {
          uint32_t a_rest[4], b_rest[2];
          for (int i = 0; i < 4; ++i) a_rest[i] = to_tf32(first[i] - Native<float>::of_bits(a[i]));
          for (int i = 0; i < 2; ++i) b_rest[i] = to_tf32(second[i] - Native<float>::of_bits(b[i]));
          multiply_tf32(sums, a_rest, b);
          multiply_tf32(sums, a, b_rest);
        }
        multiply_tf32(sums, a, b);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kWarp; k += 16) {
        const auto two = [](float low, float high) {
          return precision == Precision::bf16 ? pack_bf16(low, high) : pack_fp16(low, high);
        };
        const int first = k + 2 * t, second = first + 8;
        const uint32_t a[4] = {two(w(g, first), w(g, first + 1)), two(w(g + 8, first), w(g + 8, first + 1)),
                               two(w(g, second), w(g, second + 1)), two(w(g + 8, second), w(g + 8, second + 1))};
        const uint32_t b[2] = {two(x(g, first), x(g, first + 1)), two(x(g, second), x(g, second + 1))};
        if constexpr (precision == Precision::bf16)
          multiply_bf16(sums, a, b);
        else
          multiply_fp16(sums, a, b);
      }
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

template <class T, Precision precision>
struct TileOf {
  using type = MatrixTile<precision>;
};
template <class T>
struct TileOf<T, Precision::ieee> {
  using type = IeeeTile<T>;
};

}  // namespace cuda
}  // namespace fusedrnn
