// The product of a step by one block: sums over k of rows of the batch times the columns of its weights.
// SPDX-License-Identifier: Apache-2.0
//
// A warp has a tile of the sums (tile.h), or several in turn; warps left over share the k of a tile. What is multiplied
// lies in shared memory, the weights there too or in the threads' registers.
#pragma once
#include "cuda/tile.h"

namespace fusedrnn {
namespace cuda {

FUSEDRNN_INLINE constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

// Where a block has its weights. Registers are read at no cost, where loads from shared memory take as long as the
// multiplications in float, and longer than those of the matrix units; but a thread has room for Tile::kept alone.
// With them goes the state, of at most two units for each thread.
enum class Weights { registers, shared };

// How the warps share a product of `rows` x `columns`; backends/cuda/plans.py counts the same.
struct Layout {
  int tile_columns, column_tiles, row_tiles, splits;
  FUSEDRNN_INLINE Layout(Index rows, Index columns, int tile_columns, Weights in)
      : tile_columns(tile_columns),
        column_tiles(int(round_up(columns, tile_columns)) / tile_columns),
        row_tiles(int(round_up(rows, kRows)) / kRows),
        splits(1) {
    if (in == Weights::registers) {  // a warp has the same columns for all rows
      int power = 1;
      while (power < column_tiles) power *= 2;
      column_tiles = power, splits = kWarps / power;
    }
    while (in == Weights::shared && 2 * splits * column_tiles * row_tiles <= kWarps) splits *= 2;
  }
  FUSEDRNN_INLINE int rows() const { return row_tiles * kRows; }
  FUSEDRNN_INLINE int columns() const { return column_tiles * tile_columns; }
  FUSEDRNN_INLINE Index sum(int split, Index row, Index column) const {
    return (split * rows() + row) * columns() + column;
  }
};

// From one row of K factors in shared memory to the next: whole lines of all banks and 16 bytes more, so that lanes
// with 8 rows and 4 neighbours of each meet different banks.
template <class F>
FUSEDRNN_INLINE Index pitch_of(Index K) {
  return round_up(K, sizeof(F) < 4 ? 2 * kWarp : kWarp) + 16 / Index(sizeof(F));
}

// The shared memory of a block. backends/cuda/plans.py counts the same.
template <class T, class F>
struct Shared {
  F* weights;   // [column][k], k rounded up; only where they are here
  F* operands;  // [row][k]
  T* sums;      // [split][row][column]
  T *h, *c;     // [row][unit]; not where they are in registers
  T* end;
  FUSEDRNN_INLINE Shared(char* memory, const Layout& layout, Index columns, Index K, Index operand_rows,
                         Index operand_k, Index states, Weights in) {
    if (in == Weights::registers) columns = states = 0;
    weights = reinterpret_cast<F*>(memory);
    operands = weights + columns * pitch_of<F>(K);
    sums = reinterpret_cast<T*>(operands + operand_rows * pitch_of<F>(operand_k));
    h = sums + layout.splits * layout.rows() * layout.columns();
    c = h + states;
    end = c + states;
  }
};

// By a warp: to shared memory the factors of `count` numbers from p on, null for zeros, and zeros up to `room`, which
// is whole warps. Groups of 16 bytes where they are aligned, four on their way at a time: they come from the L2 cache.
template <class Tile, class S>
FUSEDRNN_INLINE void bring(typename Tile::Factor* to, const S* p, int count, int room) {
  using T = Compute<S>;
  constexpr int n = kSixteenBytes<S>, kAhead = 4;
  using Group = Several<typename Tile::Factor, n>;
  Group* const groups = reinterpret_cast<Group*>(to);
  const int full = p && reinterpret_cast<uintptr_t>(p) % 16 == 0 ? count / n : 0;
  for (int g = lane(); g < full; g += kAhead * kWarp) {
    Sixteen<S> all[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (g + i * kWarp < full) all[i] = load_sixteen_shared_by_blocks(p + (g + i * kWarp) * n);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (g + i * kWarp < full) {
        Group group;
#pragma unroll
        for (int j = 0; j < n; ++j) group.of[j] = Tile::factor(all[i].of[j]);
        groups[g + i * kWarp] = group;
      }
  }
  for (int g = full + ((lane() - full) & (kWarp - 1)); g * n < room; g += kWarp) {
    Group group;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const int k = g * n + j;
      group.of[j] = Tile::factor(p && k < count ? T(load_shared_by_blocks(p + k)) : T(0));
    }
    groups[g] = group;
  }
}

// --- the weights ----------------------------------------------------------------------------------------------------

// A block's columns in shared memory. A tile goes beyond the last of them: that one stands in for what is not there,
// whose sums nobody takes.
template <class F>
struct WeightsInMemory {
  struct Columns {
    const F* p;
    Index pitch;
    int column, last;
    FUSEDRNN_INLINE Index begin(int c) const { return (column + c < last ? column + c : last) * pitch; }
    FUSEDRNN_INLINE F one(int c, int k) const { return p[begin(c) + k]; }
    FUSEDRNN_INLINE uint32_t two(int c, int k) const { return load_two(p + begin(c) + k); }
  };
  const F* p;
  int columns, K;
  FUSEDRNN_INLINE Columns at(int column, int k) const { return {p + k, pitch_of<F>(K), column, columns - 1}; }
};

// Factors that are loaded one by one, of(column)[k], from a column and k on.
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

// The weights of a warp in the registers of its lanes: of its tile of columns, 32 k of every `splits` times 32.
template <class Tile>
struct WeightsInRegisters {
  typename Tile::Columns of[Tile::kept];
  int K, first_k, step, first_column, split;

  template <class Of>
  FUSEDRNN_INLINE WeightsInRegisters(const Layout& layout, int K, const Of& weights) : K(K) {
    const int warp = threadIdx.x / kWarp;
    split = warp % layout.splits, first_column = warp / layout.splits * Tile::columns;
    first_k = split * kWarp, step = layout.splits * kWarp;
    // They move up one place each time, so that the loads are there once: copies of them, a place each, would all be
    // begun together, which takes more registers than there are, and most of the time to compile.
#pragma unroll 1
    for (int i = 0; i < Tile::kept; ++i) {
#pragma unroll
      for (int j = 1; j < Tile::kept; ++j) of[j - 1] = of[j];
      of[Tile::kept - 1] = Tile::columns_of(Loaded<Tile, Of>{weights, K, first_column, first_k + i * step});
    }
  }

  template <class Rows>
  FUSEDRNN_INLINE Tile times(const Rows& rows) const {
    Tile sums;
    typename Tile::Rows next{};
    if (Tile::ahead && first_k < K) next = Tile::rows_of(rows.at(first_k));
#pragma unroll
    for (int i = 0; i < Tile::kept; ++i) {
      const int k = first_k + i * step;
      if (k < K) {
        const typename Tile::Rows now = Tile::ahead ? next : Tile::rows_of(rows.at(k));
        if (Tile::ahead && i + 1 < Tile::kept && k + step < K) next = Tile::rows_of(rows.at(k + step));
        sums.add(now, of[i]);
      }
    }
    return sums;
  }
};

// The block's weights, of(column) or null, as `multiply` takes them.
template <class Tile, Weights in, class Of>
FUSEDRNN_INLINE auto block_weights(const Of& of, typename Tile::Factor* memory, const Layout& layout, int columns,
                                   int K) {
  using F = typename Tile::Factor;
  if constexpr (in == Weights::registers) {
    return WeightsInRegisters<Tile>(layout, K, of);
  } else {
    for (int column = threadIdx.x / kWarp; column < columns; column += kWarps)
      bring<Tile>(memory + column * pitch_of<F>(K), of(column), K, int(round_up(K, kWarp)));
    return WeightsInMemory<F>{memory, columns, K};
  }
}

// --- what they multiply ---------------------------------------------------------------------------------------------

// Rows source(r) of memory that other blocks have written, null for zeros: brought to shared memory, so many rows and
// so much of k at a time.
template <class Tile, class Source>
struct StagedRows {
  using F = typename Tile::Factor;
  F* memory;
  int K, at_once, chunk;
  const Source& source;

  FUSEDRNN_INLINE Factors<F> tile(int row) const {
    const Index pitch = pitch_of<F>(chunk);
    return {memory + row % at_once * pitch, pitch};
  }
  // `at_once` rows from `first` on.
  FUSEDRNN_INLINE void stage(int first, int k0) const {
    const int count = K - k0 < chunk ? K - k0 : chunk;
    sync_block();  // what was here before has been read
    for (int r = threadIdx.x / kWarp; r < at_once; r += kWarps) {
      const auto* p = source(first + r);
      bring<Tile>(memory + r * pitch_of<F>(chunk), p ? p + k0 : p, count, int(round_up(count, kWarp)));
    }
    sync_block();  // it is there
  }
};

// Rows that lie in shared memory, all of them with all k; zeros where source(r) is null.
template <class Tile, class Source>
struct ResidentRows {
  using F = typename Tile::Factor;
  const F* memory;
  int K, at_once, chunk;
  const Source& source;

  // Factors of the rows that are there, and zeros.
  struct Masked {
    Factors<F> factors;
    unsigned there;  // a bit each
    FUSEDRNN_INLINE F one(Index r, Index k) const { return there >> r & 1 ? factors.one(r, k) : F(0); }
    FUSEDRNN_INLINE uint32_t two(Index r, Index k) const { return there >> r & 1 ? factors.two(r, k) : 0; }
    FUSEDRNN_INLINE Masked at(Index k) const { return {factors.at(k), there}; }
  };
  FUSEDRNN_INLINE Masked tile(int row) const {
    unsigned there = 0;
    for (int r = 0; r < kRows; ++r) there |= unsigned(source(row + r) != nullptr) << r;
    const Index pitch = pitch_of<F>(K);
    return {{memory + row * pitch, pitch}, there};
  }
  FUSEDRNN_INLINE void stage(int, int) const {}
};

// --- the product ----------------------------------------------------------------------------------------------------

// All sums of x times the weights, in shared memory, where every thread sees them.
template <class Tile, class X, class T>
FUSEDRNN_INLINE void multiply(const Layout& layout, const X& x, const WeightsInMemory<typename Tile::Factor>& weights,
                              T* sums) {
  const int items = layout.row_tiles * layout.column_tiles * layout.splits;
  for (int first = 0; first < items; first += kWarps) {
    const int item = first + threadIdx.x / kWarp, split = item % layout.splits, tile = item / layout.splits;
    const bool some = item < items;  // all warps stage
    const int row = some ? tile % layout.row_tiles * kRows : 0, column = tile / layout.row_tiles * Tile::columns;
    const auto rows = x.tile(row);
    Tile product;
    for (int k0 = 0; k0 < x.K; k0 += x.chunk) {
      if (first == 0 || x.chunk < x.K) x.stage(0, k0);
      const int count = x.K - k0 < x.chunk ? x.K - k0 : x.chunk;
      for (int k = split * kWarp; some && k < count; k += layout.splits * kWarp)
        product.add(Tile::rows_of(rows.at(k)), Tile::columns_of(weights.at(column, k0 + k)));
    }
    if (some) product.store(sums + layout.sum(split, row, column), layout.columns());
  }
  sync_block();
}
template <class Tile, class X, class T>
FUSEDRNN_INLINE void multiply(const Layout& layout, const X& x, const WeightsInRegisters<Tile>& weights, T* sums) {
  for (int row = 0; row < layout.rows(); row += kRows) {
    if (row % x.at_once == 0) x.stage(row, 0);
    Tile product = weights.times(x.tile(row));
    product.store(sums + layout.sum(weights.split, row, weights.first_column), layout.columns());
  }
  sync_block();
}

// Of a row and column, over the splits.
template <class T>
FUSEDRNN_INLINE T total(const Layout& layout, const T* sums, Index row, Index column) {
  T all = T(0);
  for (int split = 0; split < layout.splits; ++split) all += sums[layout.sum(split, row, column)];
  return all;
}

}  // namespace cuda
}  // namespace fusedrnn
