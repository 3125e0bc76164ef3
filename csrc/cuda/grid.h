// All steps of the recurrence in one launch. SPDX-License-Identifier: Apache-2.0
//
// A block has some hidden units, with all their gates, of one tile of the batch, from the first step to the last. Their
// weights and their state stay with it; what the other blocks need, h going forward and da going back, lies in the
// results themselves. Blocks of one tile of the batch count themselves in after every step and wait until all have. So
// all blocks must run at once: the caller launches no more than fit.
//
// The product of a step: a warp has a tile (tile.h). What is multiplied is brought to shared memory in chunks of k;
// warps left over share the k of a chunk. With the weights in registers a warp keeps its columns and its k of them, and
// takes one tile of rows after the other, of as many as are brought at a time with all of k.
#pragma once
#include "cuda/tile.h"
#include "cuda/unit.h"

namespace fusedrnn {
namespace cuda {

FUSEDRNN_INLINE constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

// Where a block has its weights. Registers are read at no cost, where loads from shared memory take as long as the
// multiplications in float, and longer than those of the matrix units; but a thread has room for Tile::kept alone.
// With them goes the state, of at most two units for each thread. Streamed: read anew in every step.
enum class Weights { registers, shared, streamed };

// How the warps share a product of `rows` x `columns`, at most kWarps tiles of columns.
struct Layout {
  // Tiles times splits are kWarps; with the weights in registers the tiles of columns alone.
  int tile_columns, column_tiles, row_tiles, splits;
  FUSEDRNN_INLINE Layout(Index rows, Index columns, int tile_columns, bool registers)
      : tile_columns(tile_columns), column_tiles(1), row_tiles(1) {
    while (column_tiles * tile_columns < columns) column_tiles *= 2;
    if (registers) row_tiles = int((rows + kRows - 1) / kRows);
    while (row_tiles * kRows < rows && row_tiles * column_tiles < kWarps) row_tiles *= 2;
    splits = kWarps / (column_tiles * (registers ? 1 : row_tiles));
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
  F* weights;  // [column][k], k rounded up; only where they are here
  F* staged;   // [row][k of a chunk]
  T* sums;     // [split][row][column]
  T *h, *c;    // [row of the tile of the batch][unit]; not where they are in registers
  T* end;
  FUSEDRNN_INLINE Shared(const Layout& layout, Index columns, Index K, Index at_once, Index chunk, Index rows,
                         Index units, Weights in) {
    weights = reinterpret_cast<F*>(shared_memory());
    staged = weights + (in == Weights::shared ? columns * pitch_of<F>(K) : 0);
    T* p = reinterpret_cast<T*>(staged + at_once * pitch_of<F>(chunk));
    sums = p, p += layout.splits * layout.rows() * layout.columns();
    const Index state = in == Weights::registers ? 0 : rows * units;
    h = p, p += state;
    c = p, p += state;
    end = p;
  }
};

// What a unit of a row hands from step to step: h and c, or going back what reaches them beside the product.
template <class T>
struct State {
  T h, c;
};
// That of all of a block: in shared memory, or in the registers of the thread that Grid::each gives it to.
template <class Cell, class T, bool registers>
struct States {
  T *h, *c;
  FUSEDRNN_INLINE State<T> get(Index i) const { return {h[i], Cell::has_c ? c[i] : T(0)}; }
  FUSEDRNN_INLINE void set(Index i, State<T> x) {
    h[i] = x.h;
    if (Cell::has_c) c[i] = x.c;
  }
};
template <class Cell, class T>
struct States<Cell, T, true> {
  State<T> first, second;
  FUSEDRNN_INLINE States(T*, T*) : first{}, second{} {}
  FUSEDRNN_INLINE State<T> get(Index i) const { return i < kThreads ? first : second; }
  FUSEDRNN_INLINE void set(Index i, State<T> x) {
    if (i < kThreads)
      first = x;
    else
      second = x;
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

// Those of a block's columns in shared memory, from a column on. A tile goes beyond the last of them: that one stands
// in for what is not there, whose sums nobody takes.
template <class F>
struct ColumnsInMemory {
  const F* p;
  Index pitch;
  int column, last;
  FUSEDRNN_INLINE Index begin(int c) const { return (column + c < last ? column + c : last) * pitch; }
  FUSEDRNN_INLINE F one(int c, int k) const { return p[begin(c) + k]; }
  FUSEDRNN_INLINE uint32_t two(int c, int k) const { return load_two(p + begin(c) + k); }
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

  // rows(k): what they are multiplied with, from k on.
  template <class Rows>
  FUSEDRNN_INLINE Tile sums(Rows rows) const {
    Tile sums;
    typename Tile::Rows next{};
    if (Tile::ahead && first_k < K) next = Tile::rows_of(rows(first_k));
#pragma unroll
    for (int i = 0; i < Tile::kept; ++i) {
      const int k = first_k + i * step;
      if (k < K) {
        const typename Tile::Rows now = Tile::ahead ? next : Tile::rows_of(rows(k));
        if (Tile::ahead && i + 1 < Tile::kept && k + step < K) next = Tile::rows_of(rows(k + step));
        sums.add(now, of[i]);
      }
    }
    return sums;
  }
};

// Sums of products of rows and columns, both along k.
template <class S, class Tile>
struct Product {
  using T = Compute<S>;
  using F = typename Tile::Factor;
  const Layout& layout;
  const Shared<T, F>& shared;
  int K, chunk, at_once;  // of k; rows

  // Sums of the rows whose memory row(r) gives, null for zeros; weights(column, k) are the factors from there on. Ends
  // with all sums in shared memory.
  template <class Row, class Columns>
  FUSEDRNN_INLINE void run(Row row, const Columns& weights) const {
    const int warp = threadIdx.x / kWarp, split = warp % layout.splits, tile = warp / layout.splits;
    const int first_row = tile % layout.row_tiles * kRows, first_column = tile / layout.row_tiles * Tile::columns;
    Tile sums;
    for (int k0 = 0; k0 < K; k0 += chunk) {
      const int count = K - k0 < chunk ? K - k0 : chunk;
      stage(row, 0, k0, count);
      for (int k = split * kWarp; k < count; k += layout.splits * kWarp)
        sums.add(Tile::rows_of(staged(first_row, k)), Tile::columns_of(weights(first_column, k0 + k)));
    }
    store(sums, split, first_row, first_column);
    sync_block();
  }
  // With the weights in registers k is one chunk.
  template <class Row>
  FUSEDRNN_INLINE void run(Row row, const WeightsInRegisters<Tile>& weights) const {
    for (int r = 0; r < layout.rows(); r += kRows) {
      const int place = r % at_once;
      if (place == 0) stage(row, r, 0, K);
      store(weights.sums([&](int k) { return staged(place, k); }), weights.split, r, weights.first_column);
    }
    sync_block();
  }

  // To shared memory: `count` k of the rows from `first` on.
  template <class Row>
  FUSEDRNN_INLINE void stage(Row row, int first, int k0, int count) const {
    sync_block();  // what was staged before has been read
    for (int r = threadIdx.x / kWarp; r < at_once; r += kWarps) {
      const S* p = row(first + r);
      bring<Tile>(shared.staged + r * pitch_of<F>(chunk), p ? p + k0 : p, count, int(round_up(count, kWarp)));
    }
    sync_block();  // it is there
  }
  FUSEDRNN_INLINE Factors<F> staged(int row, int k) const {
    const int pitch = int(pitch_of<F>(chunk));
    return {shared.staged + row * pitch + k, pitch};
  }
  FUSEDRNN_INLINE void store(Tile sums, int split, int row, int column) const {
    sums.store(shared.sums + (split * layout.rows() + row) * layout.columns() + column, layout.columns());
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

// The block's weights, of(column): where they are, or in shared memory.
template <class Tile, bool streamed, class Of>
struct BlockWeights {
  using F = typename Tile::Factor;
  const Of& of;
  F* kept;
  int columns, K;

  FUSEDRNN_INLINE auto operator()(int column, int k) const {
    if constexpr (streamed)
      return Loaded<Tile, Of>{of, K, column, k};
    else
      return ColumnsInMemory<F>{kept + k, pitch_of<F>(K), column, columns - 1};
  }
};
// The weights as Product::run takes them.
template <class Tile, Weights in, class Of>
FUSEDRNN_INLINE auto block_weights(const Of& of, typename Tile::Factor* kept, const Layout& layout, int columns,
                                   int K) {
  if constexpr (in == Weights::registers) {
    return WeightsInRegisters<Tile>(layout, K, of);
  } else {
    if constexpr (in == Weights::shared) bring_weights<Tile>(kept, columns, K, of);
    return BlockWeights<Tile, in == Weights::streamed, Of>{of, kept, columns, K};
  }
}

template <class Cell, class S, class Tile, Weights in>
FUSEDRNN_INLINE void grid_forward(const ForwardJob<S>& job) {
  using T = Compute<S>;
  const Grid<ForwardJob<S>> grid(job);
  const int K = int(job.H), columns = int(job.units) * kRecurrent<Cell>;
  const Layout layout(job.rows, columns, Tile::columns, in == Weights::registers);
  const Shared<T, typename Tile::Factor> shared(layout, columns, K, job.at_once, job.chunk, job.rows, job.units, in);
  const Product<S, Tile> product{layout, shared, K, int(job.chunk), int(job.at_once)};
  const auto of = [&](int column) { return forward_weights<Cell>(grid, column); };
  const auto weights = block_weights<Tile, in>(of, shared.weights, layout, columns, K);
  States<Cell, T, in == Weights::registers> states{shared.h, shared.c};
  grid.each(0, job.rows, [&](Index r, Index j) {
    const ForwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
    states.set(r * job.units + j, {unit.start_h(), Cell::has_c ? unit.start_c() : T(0)});
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
        State<T> state = states.get(r * job.units + j);
        const ForwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
        unit.step(t, products, 1, state.h, state.c);
        states.set(r * job.units + j, state);
      });
    }
    grid.arrive();
    if (s + 1 < job.steps.T) grid.template prefetch_step<ForwardUnit<Cell, S>>(s + 1);
  }
  grid.each(0, job.rows, [&](Index r, Index j) {
    const Index i = (grid.first_row + r) * job.H + grid.first_unit + j;
    const State<T> state = states.get(r * job.units + j);
    job.hT[i] = S(state.h);
    if (Cell::has_c) job.cT[i] = S(state.c);
  });
}

template <class Cell, class S, class Tile, Weights in>
FUSEDRNN_INLINE void grid_backward(const BackwardJob<S>& job) {
  using T = Compute<S>;
  const Grid<BackwardJob<S>> grid(job);
  const int K = kRecurrent<Cell> * int(job.H);
  const Layout layout(job.rows, job.units, Tile::columns, in == Weights::registers);
  const Shared<T, typename Tile::Factor> shared(layout, job.units, K, job.at_once, job.chunk, job.rows, job.units, in);
  const Product<S, Tile> product{layout, shared, K, int(job.chunk), int(job.at_once)};
  const auto of = [&](int column) { return backward_weights<Cell>(grid, column); };
  const auto weights = block_weights<Tile, in>(of, shared.weights, layout, int(job.units), K);
  States<Cell, T, in == Weights::registers> states{shared.h, shared.c};
  grid.each(0, job.rows, [&](Index r, Index j) {
    const BackwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
    states.set(r * job.units + j, {unit.start(job.dhT), Cell::has_c ? unit.start(job.dcT) : T(0)});
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
        const T chain = follows && unit.chained(s + 1) ? product.sum(r - group, j) : T(0);
        State<T> state = states.get(r * job.units + j);
        if (s < 0) return unit.finish(chain, state.h, state.c);
        const Index t = time_of(job.steps, s);
        unit.step(t, chain, state.h, state.c, unit.da(t), job.H);
        states.set(r * job.units + j, state);
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
  template <class Tile, Weights in, class S>
  FUSEDRNN_INLINE static void forward(const ForwardJob<S>& job) {
    grid_forward<Cell, S, Tile, in>(job);
  }
  template <class Tile, Weights in, class S>
  FUSEDRNN_INLINE static void backward(const BackwardJob<S>& job) {
    grid_backward<Cell, S, Tile, in>(job);
  }
};
template <class Cell>
struct GridKernels<Cell, false> {
  template <class Tile, Weights in, class S>
  FUSEDRNN_INLINE static void forward(const ForwardJob<S>&) {}
  template <class Tile, Weights in, class S>
  FUSEDRNN_INLINE static void backward(const BackwardJob<S>&) {}
};

}  // namespace cuda
}  // namespace fusedrnn
