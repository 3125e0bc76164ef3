// All steps of the recurrence in one launch. SPDX-License-Identifier: Apache-2.0
//
// A block has some hidden units, with all their gates, of one tile of the batch, from the first step to the last. Their
// weights and their state stay in its shared memory; what the other blocks need, h going forward and da going back,
// lies in the results themselves. Blocks of one tile of the batch count themselves in after every step and wait until
// all have. So all blocks must run at once: the caller launches no more than fit.
//
// The product of a step: a warp has a tile (tile.h). What is multiplied is brought to shared memory in chunks of k;
// warps left over share the k of a chunk.
#pragma once
#include "cuda/tile.h"
#include "cuda/unit.h"

namespace fusedrnn {
namespace cuda {

FUSEDRNN_INLINE constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

// How the warps share a product of `rows` x `columns`, at most kWarps tiles of columns.
struct Layout {
  int tile_columns, column_tiles, row_tiles, splits;  // the tiles and splits together kWarps
  FUSEDRNN_INLINE Layout(Index rows, Index columns, int tile_columns)
      : tile_columns(tile_columns), column_tiles(1), row_tiles(1) {
    while (column_tiles * tile_columns < columns) column_tiles *= 2;
    while (row_tiles * kRows < rows && row_tiles * column_tiles < kWarps) row_tiles *= 2;
    splits = kWarps / (column_tiles * row_tiles);
  }
  FUSEDRNN_INLINE Index rows() const { return row_tiles * kRows; }
  FUSEDRNN_INLINE Index columns() const { return column_tiles * tile_columns; }
};

// From one row of K factors in shared memory to the next: whole lines of all banks and 16 bytes more, so that lanes
// with 8 rows and 4 neighbours of each meet different banks.
template <class F>
FUSEDRNN_INLINE Index pitch_of(Index K) {
  return round_up(K, sizeof(F) < 4 ? 2 * kWarp : kWarp) + 16 / Index(sizeof(F));
}

// The shared memory of a block. backends/cuda_plan.py counts the same.
template <class T, class F>
struct Shared {
  F* weights;  // [column][k], k rounded up; only where they are resident
  F* staged;   // [row][k of a chunk]
  T* sums;     // [split][row][column]
  T *h, *c;    // [row of the tile of the batch][unit]
  FUSEDRNN_INLINE Shared(const Layout& layout, Index K, Index chunk, Index rows, Index units, bool resident) {
    weights = reinterpret_cast<F*>(shared_memory());
    staged = weights + (resident ? layout.columns() * pitch_of<F>(K) : 0);
    T* p = reinterpret_cast<T*>(staged + layout.rows() * pitch_of<F>(chunk));
    sums = p, p += layout.splits * layout.rows() * layout.columns();
    h = p, p += rows * units;
    c = p;
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

// Sums of products of rows and columns, both along k.
template <class S, class Tile>
struct Product {
  using T = Compute<S>;
  using F = typename Tile::Factor;
  const Layout& layout;
  const Shared<T, F>& shared;
  int K, chunk;

  // Sums of the rows whose memory row(r) gives, null for zeros; weights(column, k) are the factors from there on. Ends
  // with all sums in shared memory.
  template <class Row, class Weights>
  FUSEDRNN_INLINE void run(Row row, Weights weights) const {
    const int warp = threadIdx.x / kWarp, split = warp % layout.splits, tile = warp / layout.splits;
    const int first_row = tile % layout.row_tiles * kRows, first_column = tile / layout.row_tiles * Tile::columns;
    const int pitch = int(pitch_of<F>(chunk)), rows = int(layout.rows());
    Tile sums;
    for (int k0 = 0; k0 < K; k0 += chunk) {
      const int count = K - k0 < chunk ? K - k0 : chunk;
      sync_block();  // what was staged before has been read
      for (int r = warp; r < rows; r += kWarps) {
        const S* p = row(r);
        bring<Tile>(shared.staged + r * pitch, p ? p + k0 : p, count, int(round_up(count, kWarp)));
      }
      sync_block();  // it is there
      for (int k = split * kWarp; k < count; k += layout.splits * kWarp)
        sums.add(Factors<F>{shared.staged + first_row * pitch + k, pitch}, weights(first_column, k0 + k));
    }
    sums.store(shared.sums + (split * layout.rows() + first_row) * layout.columns() + first_column, layout.columns());
    sync_block();
  }

  // Of a row and column, over the splits.
  FUSEDRNN_INLINE T sum(Index r, Index column) const {
    T all = T(0);
    for (int split = 0; split < layout.splits; ++split)
      all += shared.sums[(split * layout.rows() + r) * layout.columns() + column];
    return all;
  }
};

// What forward and backward have in common. `Loop` gives the product's rows and weights.
template <class Job>
struct Grid {
  const Job& job;
  Index first_unit, first_row, rows;  // of this block
  unsigned* arrived;

  FUSEDRNN_INLINE explicit Grid(const Job& job)
      : job(job),
        first_unit(blockIdx.x * job.units),
        first_row(blockIdx.y * job.rows),
        arrived(job.arrived + blockIdx.y) {
    rows = job.steps.B - first_row < job.rows ? job.steps.B - first_row : job.rows;
  }

  // Everything that the blocks of this tile of the batch wrote in their first `steps` steps can be read after the
  // block's next barrier.
  FUSEDRNN_INLINE void wait(Index steps) const {
    if (threadIdx.x == 0)
      while (load_acquire(arrived) < unsigned(steps * gridDim.x)) {
      }
  }
  FUSEDRNN_INLINE void arrive() const {
    sync_block();
    if (threadIdx.x == 0) add_release(arrived);
  }

  // Calls f(row of the tile of the batch, unit of the block) for those that there are, of `count` rows from `begin`.
  template <class F>
  FUSEDRNN_INLINE void each(Index begin, Index count, F f) const {
    const int units = int(job.units), all = int(count) * units;  // 64 bits take ten times as long to divide
    for (int i = threadIdx.x; i < all; i += kThreads) {
      const Index r = begin + i / units, j = i % units;
      if (r < rows && first_unit + j < job.H) f(r, j);
    }
  }

  // Each thread its own share of what the pointwise part of step s reads: it comes while the other blocks are waited
  // for, not after.
  template <class Unit>
  FUSEDRNN_INLINE void prefetch_step(Index s) const {
    const Index t = time_of(job.steps, s), cut = cut_of(job.steps, t, first_row);
    if (job.steps.reset && threadIdx.x < rows && cut + threadIdx.x < job.steps.T * job.steps.B)
      prefetch(job.steps.reset + cut + threadIdx.x);
    each(0, job.rows, [&](Index r, Index j) { Unit{job, first_row + r, first_unit + j}.prefetch_step(t); });
  }
};

// The weights that multiply what goes forward, h, for a column of the block: gate by gate its units; and what goes
// back, da gate by gate: its units. Null where there are none.
template <class Cell, class S>
FUSEDRNN_INLINE const S* forward_weights(const Grid<ForwardJob<S>>& grid, int column) {
  const auto& job = grid.job;
  const int gate = column / int(job.units);
  const Index u = grid.first_unit + column % int(job.units);
  return gate >= kRecurrent<Cell> || u >= job.H ? nullptr : job.weight + (gate * job.H + u) * job.H;
}
template <class Cell, class S>
FUSEDRNN_INLINE const S* backward_weights(const Grid<BackwardJob<S>>& grid, int column) {
  const auto& job = grid.job;
  const Index u = grid.first_unit + column;
  return column >= job.units || u >= job.H ? nullptr : job.weight + u * kRecurrent<Cell> * job.H;
}

// Those of all columns to shared memory.
template <class Tile, class Of>
FUSEDRNN_INLINE void bring_weights(typename Tile::Factor* to, int columns, int K, Of of) {
  for (int column = threadIdx.x / kWarp; column < columns; column += kWarps)
    bring<Tile>(to + column * pitch_of<typename Tile::Factor>(K), of(column), K, int(round_up(K, kWarp)));
}

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

// The block's weights, of(column): where they are, or in shared memory.
template <class Tile, bool resident, class Of>
struct BlockWeights {
  using F = typename Tile::Factor;
  const Of& of;
  F* kept;
  int K;

  FUSEDRNN_INLINE BlockWeights(const Of& of, F* kept, int columns, int K) : of(of), kept(kept), K(K) {
    if constexpr (resident) bring_weights<Tile>(kept, columns, K, of);
  }
  FUSEDRNN_INLINE auto operator()(int column, int k) const {
    if constexpr (resident)
      return Factors<F>{kept + column * pitch_of<F>(K) + k, pitch_of<F>(K)};
    else
      return Loaded<Tile, Of>{of, K, column, k};
  }
};
template <class Tile, bool resident, class Of>
FUSEDRNN_INLINE BlockWeights<Tile, resident, Of> block_weights(const Of& of, typename Tile::Factor* kept, int columns,
                                                               int K) {
  return {of, kept, columns, K};
}

template <class Cell, class S, class Tile, bool resident>
FUSEDRNN_INLINE void grid_forward(const ForwardJob<S>& job) {
  using T = Compute<S>;
  const Grid<ForwardJob<S>> grid(job);
  const int K = int(job.H), columns = int(job.units) * kRecurrent<Cell>;
  const Layout layout(job.rows, columns, Tile::columns);
  const Shared<T, typename Tile::Factor> shared(layout, K, job.chunk, job.rows, job.units, resident);
  const Product<S, Tile> product{layout, shared, K, int(job.chunk)};
  const auto of = [&](int column) { return forward_weights<Cell>(grid, column); };
  const auto weights = block_weights<Tile, resident>(of, shared.weights, int(layout.columns()), K);
  grid.each(0, job.rows, [&](Index r, Index j) {
    const ForwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
    shared.h[r * job.units + j] = unit.start_h();
    if (Cell::has_c) shared.c[r * job.units + j] = unit.start_c();
  });
  for (Index s = 0; s < job.steps.T; ++s) {
    const Index t = time_of(job.steps, s);
    if (s > 0) grid.wait(s);
    for (Index group = 0; group < grid.rows; group += layout.rows()) {
      const auto row = [&](Index r) -> const S* {
        if (group + r >= grid.rows) return nullptr;
        const Index b = grid.first_row + group + r;
        if (!valid(job.steps, t, b)) return nullptr;
        switch (before(job.steps, t, b)) {
          case Before::start:
            return job.h0 ? job.h0 + b * job.H : nullptr;
          case Before::previous:
            return job.y + ((job.steps.reverse ? t + 1 : t - 1) * job.steps.B + b) * job.H;
          default:
            return nullptr;
        }
      };
      product.run(row, weights);
      grid.each(group, layout.rows(), [&](Index r, Index j) {
        T products[kRecurrent<Cell>];
        for (int a = 0; a < kRecurrent<Cell>; ++a) products[a] = product.sum(r - group, a * job.units + j);
        T c = Cell::has_c ? shared.c[r * job.units + j] : T(0);
        ForwardUnit<Cell, S>{job, grid.first_row + r, grid.first_unit + j}.step(t, products, 1,
                                                                                shared.h[r * job.units + j], c);
        if (Cell::has_c) shared.c[r * job.units + j] = c;
      });
    }
    grid.arrive();
    if (s + 1 < job.steps.T) grid.template prefetch_step<ForwardUnit<Cell, S>>(s + 1);
  }
  grid.each(0, job.rows, [&](Index r, Index j) {
    const Index i = (grid.first_row + r) * job.H + grid.first_unit + j;
    job.hT[i] = S(shared.h[r * job.units + j]);
    if (Cell::has_c) job.cT[i] = S(shared.c[r * job.units + j]);
  });
}

template <class Cell, class S, class Tile, bool resident>
FUSEDRNN_INLINE void grid_backward(const BackwardJob<S>& job) {
  using T = Compute<S>;
  const Grid<BackwardJob<S>> grid(job);
  const int K = kRecurrent<Cell> * int(job.H);
  const Layout layout(job.rows, job.units, Tile::columns);
  const Shared<T, typename Tile::Factor> shared(layout, K, job.chunk, job.rows, job.units, resident);
  const Product<S, Tile> product{layout, shared, K, int(job.chunk)};
  const auto of = [&](int column) { return backward_weights<Cell>(grid, column); };
  const auto weights = block_weights<Tile, resident>(of, shared.weights, int(layout.columns()), K);
  T *const direct = shared.h, *const dc = shared.c;
  grid.each(0, job.rows, [&](Index r, Index j) {
    const BackwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
    direct[r * job.units + j] = unit.start(job.dhT);
    if (Cell::has_c) dc[r * job.units + j] = unit.start(job.dcT);
  });
  for (Index s = job.steps.T - 1; s >= -1; --s) {  // -1: the initial state
    if (s < 0 && !job.dh0) break;
    const bool follows = s + 1 < job.steps.T;
    if (follows) grid.wait(job.steps.T - 1 - s);
    for (Index group = 0; group < grid.rows; group += layout.rows()) {
      if (follows) {
        const Index next = time_of(job.steps, s + 1);
        const auto row = [&](Index r) -> const S* {
          if (group + r >= grid.rows) return nullptr;
          const Index b = grid.first_row + group + r;
          if (!BackwardUnit<Cell, S>{job, b, 0}.chained(s + 1)) return nullptr;
          return job.da + ((next * job.steps.B + b) * Cell::accumulators + Cell::recurrent.first) * job.H;
        };
        product.run(row, weights);
      } else {
        sync_block();
      }
      grid.each(group, layout.rows(), [&](Index r, Index j) {
        const BackwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
        const Index i = r * job.units + j;
        const T chain = follows && unit.chained(s + 1) ? product.sum(r - group, j) : T(0);
        if (s < 0) return unit.finish(chain, direct[i], Cell::has_c ? dc[i] : T(0));
        const Index t = time_of(job.steps, s);
        T dc_carried = Cell::has_c ? dc[i] : T(0);
        unit.step(t, chain, direct[i], dc_carried, unit.da(t), job.H);
        if (Cell::has_c) dc[i] = dc_carried;
      });
    }
    if (s >= 0) grid.arrive();
    if (s > 0) grid.template prefetch_step<BackwardUnit<Cell, S>>(s - 1);
  }
}

// Which cells can run all steps in one launch. A cell of two phases would need two products and two waits a step;
// recurrent dropout changes what other blocks read of h; layer norm needs sums over all units of a row.
template <class Cell>
constexpr bool kWhole = Cell::phases == 1 && !kRegularized<Cell> && !Cell::layer_norm;

// What kernels.cu calls; nothing for cells that run step by step alone.
template <class Cell, bool runs = kWhole<Cell>>
struct GridKernels {
  template <class Tile, bool resident, class S>
  FUSEDRNN_INLINE static void forward(const ForwardJob<S>& job) {
    grid_forward<Cell, S, Tile, resident>(job);
  }
  template <class Tile, bool resident, class S>
  FUSEDRNN_INLINE static void backward(const BackwardJob<S>& job) {
    grid_backward<Cell, S, Tile, resident>(job);
  }
};
template <class Cell>
struct GridKernels<Cell, false> {
  template <class Tile, bool resident, class S>
  FUSEDRNN_INLINE static void forward(const ForwardJob<S>&) {}
  template <class Tile, bool resident, class S>
  FUSEDRNN_INLINE static void backward(const BackwardJob<S>&) {}
};

}  // namespace cuda
}  // namespace fusedrnn
