// The product of a step by one block: sums over k of rows of the batch times the columns of its weights.
// SPDX-License-Identifier: Apache-2.0
//
// A warp has a tile of the sums (tile.h) for all rows in turn; warps left over share the k of a tile. The weights stay
// in the threads' registers, which are read at no cost: loads from shared memory would take as long as the
// multiplications in float, and longer than those of the matrix units. But a thread has room for Tile::kept alone. With
// them goes the state, of at most two units for each thread. The rows, and the sums, are in shared memory.
#pragma once
#include "cuda/jobs.h"
#include "cuda/tile.h"

namespace fusedrnn {
namespace cuda {

FUSEDRNN_INLINE constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

// From one row of K factors to the next: whole lines of all banks and 16 bytes more, so that lanes with 8 rows and 4
// neighbours of each meet different banks. backends/cuda/plans.py counts the same.
template <class F>
FUSEDRNN_INLINE constexpr Index pitch_of(Index K) {
  return round_up(K, sizeof(F) < 4 ? 2 * kWarp : kWarp) + 16 / Index(sizeof(F));
}

// How the warps share it.
struct Layout {
  int rows, columns, splits;  // of whole tiles; splits of k
  FUSEDRNN_INLINE Layout(const Cut& cut, int tile_columns)
      : rows(int(round_up(cut.rows, kRows))),
        columns(kWarps / int(cut.splits) * tile_columns),
        splits(int(cut.splits)) {}
  FUSEDRNN_INLINE Index sum(int split, Index row, Index column) const {
    return (split * rows + row) * columns + column;
  }
  // Over the splits.
  template <class T>
  FUSEDRNN_INLINE T total(const T* sums, Index row, Index column) const {
    T all = T(0);
    for (int split = 0; split < splits; ++split) all += sums[sum(split, row, column)];
    return all;
  }
};

// Weights that are loaded one by one, of(column)[k] or null, from a column and k on.
template <class Tile, class Of>
struct Loaded {
  using F = typename Tile::Factor;
  const Of& of;
  int K, column, k;
  FUSEDRNN_INLINE F one(int c, int i) const {
    const auto* p = of(column + c);
    return p && k + i < K ? Tile::factor(p[k + i]) : F(0);
  }
  FUSEDRNN_INLINE uint32_t two(int c, int i) const { return uint32_t(one(c, i)) | uint32_t(one(c, i + 1)) << 16; }
};

// Those of a warp in the registers of its lanes: of its tile of columns, 32 k of every `splits` times 32.
template <class Tile>
struct Weights {
  typename Tile::Columns of[Tile::kept];
  int K, first_k, step, first_column, split;

  template <class Of>
  FUSEDRNN_INLINE Weights(const Layout& layout, int K, const Of& weights) : K(K) {
    const int warp = threadIdx.x / kWarp;
    split = warp % layout.splits, first_column = warp / layout.splits * Tile::columns;
    first_k = split * kWarp, step = layout.splits * kWarp;
    // They move up one place each time, so that the loads are there once: copies of them, a place each, would all be
    // begun together, which takes more registers than there are, and most of the time to compile.
#pragma unroll 1
    for (int i = 0; i < Tile::kept; ++i) {
#pragma unroll
      for (int j = 1; j < Tile::kept; ++j) of[j - 1] = of[j];
      of[Tile::kept - 1] =
          Tile::template load<typename Tile::Columns>(Loaded<Tile, Of>{weights, K, first_column, first_k + i * step});
    }
  }

  FUSEDRNN_INLINE Tile times(const Factors<typename Tile::Factor>& rows) const {
    using Rows = typename Tile::Rows;
    Tile sums;
    Rows next{};
    if (Tile::ahead && first_k < K) next = Tile::template load<Rows>(rows.at(first_k));
#pragma unroll
    for (int i = 0; i < Tile::kept; ++i) {
      const int k = first_k + i * step;
      if (k < K) {
        const Rows now = Tile::ahead ? next : Tile::template load<Rows>(rows.at(k));
        if (Tile::ahead && i + 1 < Tile::kept && k + step < K) next = Tile::template load<Rows>(rows.at(k + step));
        sums.add(now, of[i]);
      }
    }
    return sums;
  }
};

}  // namespace cuda
}  // namespace fusedrnn
