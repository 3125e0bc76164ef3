// All steps of the recurrence in one launch, for hidden sizes whose weights fit a cluster. SPDX-License-Identifier:
// Apache-2.0
//
// As in grid.h a block has some hidden units of one tile of the batch. The blocks of a tile are one cluster: each
// writes what the others need straight into their shared memory, and the cluster's own barrier ends a step. Two buffers
// take turns, so one barrier is enough: who writes for step s + 1 has passed the one that ended the reading of step s
// - 1.
#pragma once
#include "cuda/grid.h"

namespace fusedrnn {
namespace cuda {

// The shared memory of a block. backends/cuda_plan.py counts the same.
template <class T, class F>
struct ClusterShared {
  Layout layout;               // with the weights in registers; else a warp has any of the tiles
  Index pitch, rows, columns;  // of k; rounded up to whole tiles
  int tiles;
  int splits;   // warps that share the k of a tile, where there are fewer tiles than warps
  F* weights;   // [column][k]; only where they are here
  F* operands;  // two of [row][k]
  T* sums;      // [split][row][column]
  T *h, *c;     // [row][unit]; not where they are in registers
  T* end;
  FUSEDRNN_INLINE ClusterShared(Index K, Index rows, Index columns, Index units, int tile_columns, bool registers)
      : layout(rows, columns, tile_columns, registers),
        pitch(pitch_of<F>(K)),
        rows(round_up(rows, kRows)),
        columns(round_up(columns, tile_columns)),
        splits(1) {
    tiles = int(this->rows / kRows * (this->columns / tile_columns));
    while (splits * 2 * tiles <= kWarps) splits *= 2;
    if (registers) this->columns = layout.columns(), splits = layout.splits;
    const Index state = registers ? 0 : rows * units;
    weights = reinterpret_cast<F*>(shared_memory());
    operands = weights + (registers ? 0 : columns * pitch);
    T* p = reinterpret_cast<T*>(operands + 2 * this->rows * pitch);
    sums = p, p += splits * this->rows * this->columns;
    h = p, p += state;
    c = p, p += state;
    end = p;
  }
  // What the product multiplies when so many steps have run.
  FUSEDRNN_INLINE F* operand(Index steps) const { return operands + steps % 2 * rows * pitch; }
  FUSEDRNN_INLINE T* sum(Index split, Index r, Index column) const {
    return sums + (split * rows + r) * columns + column;
  }
};

// Factors of the rows that are there, and zeros.
template <class F>
struct Masked {
  Factors<F> factors;
  unsigned rows;  // a bit each
  FUSEDRNN_INLINE F one(Index r, Index k) const { return rows >> r & 1 ? factors.one(r, k) : F(0); }
  FUSEDRNN_INLINE uint32_t two(Index r, Index k) const { return rows >> r & 1 ? factors.two(r, k) : 0; }
};

template <class T, class Tile>
struct ClusterProduct {
  using F = typename Tile::Factor;
  const ClusterShared<T, F>& shared;
  int K;

  // Sums of all rows; of those where present(r) is false, which are not read, zeros. Ends with all sums in shared
  // memory.
  template <class Columns, class Present>
  FUSEDRNN_INLINE void run(const Columns& weights, const F* operand, Present present) const {
    const int row_tiles = int(shared.rows) / kRows;
    for (int i = threadIdx.x / kWarp; i < shared.tiles * shared.splits; i += kWarps) {
      const int split = i % shared.splits, tile = i / shared.splits;
      const int first_row = tile % row_tiles * kRows, first_column = tile / row_tiles * Tile::columns;
      const unsigned rows = rows_present(first_row, present);
      Tile sums;
      for (int k = split * kWarp; k < K; k += shared.splits * kWarp)
        sums.add(Tile::rows_of(masked(operand, first_row, k, rows)), Tile::columns_of(weights(first_column, k)));
      sums.store(shared.sum(split, first_row, first_column), shared.columns);
    }
    sync_block();
  }
  template <class Present>
  FUSEDRNN_INLINE void run(const WeightsInRegisters<Tile>& weights, const F* operand, Present present) const {
    for (int first_row = 0; first_row < shared.rows; first_row += kRows) {
      const unsigned rows = rows_present(first_row, present);
      Tile sums = weights.sums([&](int k) { return masked(operand, first_row, k, rows); });
      sums.store(shared.sum(weights.split, first_row, weights.first_column), shared.columns);
    }
    sync_block();
  }

  template <class Present>
  FUSEDRNN_INLINE static unsigned rows_present(int first, Present present) {
    unsigned rows = 0;
    for (int r = 0; r < kRows; ++r) rows |= unsigned(present(first + r)) << r;
    return rows;
  }
  FUSEDRNN_INLINE Masked<F> masked(const F* operand, int row, int k, unsigned rows) const {
    return {{operand + row * shared.pitch + k, shared.pitch}, rows};
  }

  FUSEDRNN_INLINE T sum(Index r, Index column) const {
    T all = T(0);
    for (int split = 0; split < shared.splits; ++split) all += *shared.sum(split, r, column);
    return all;
  }
};

// Before the first step: what it multiplies, zeros where k is rounded up.
template <class Tile, class T, class F, class Start>
FUSEDRNN_INLINE void begin_cluster(const ClusterShared<T, F>& shared, int K, Start start) {
  for (Index r = threadIdx.x / kWarp; r < shared.rows; r += kWarps)
    for (int k = lane(); k < shared.pitch; k += kWarp) {
      shared.operand(0)[r * shared.pitch + k] = Tile::factor(k < K ? start(r, k) : T(0));
      shared.operand(1)[r * shared.pitch + k] = Tile::factor(T(0));
    }
}

// To element i of the next step's operand, of every block of the cluster.
template <class F>
FUSEDRNN_INLINE void give(F* operand, Index i, F value) {
  for (unsigned rank = 0; rank < gridDim.x; ++rank) store_to_block(operand + i, rank, value);
}

template <class Cell, class S, class Tile, Weights in>
FUSEDRNN_INLINE void cluster_forward(const ForwardJob<S>& job) {
  using T = Compute<S>;
  const Grid<ForwardJob<S>> grid(job);
  const int K = int(job.H), columns = int(job.units) * kRecurrent<Cell>;
  const ClusterShared<T, typename Tile::Factor> shared(K, job.rows, columns, job.units, Tile::columns,
                                                       in == Weights::registers);
  const ClusterProduct<T, Tile> product{shared, K};
  const auto of = [&](int column) { return forward_weights<Cell>(grid, column); };
  const auto weights = block_weights<Tile, in>(of, shared.weights, shared.layout, columns, K);
  States<Cell, T, in == Weights::registers> states{shared.h, shared.c};
  begin_cluster<Tile>(shared, K, [&](Index r, Index k) {
    return r < grid.rows && job.h0 ? T(job.h0[(grid.first_row + r) * job.H + k]) : T(0);
  });
  grid.each(0, job.rows, [&](Index r, Index j) {
    const ForwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
    states.set(r * job.units + j, {unit.start_h(), Cell::has_c ? unit.start_c() : T(0)});
  });
  sync_cluster();
  for (Index s = 0; s < job.steps.T; ++s) {
    const Index t = time_of(job.steps, s);
    product.run(weights, shared.operand(s), [&](Index r) {
      const Index b = grid.first_row + r;
      return r < grid.rows && valid(job.steps, t, b) && before(job.steps, t, b) != Before::nothing;
    });
    grid.each(0, job.rows, [&](Index r, Index j) {
      T products[kRecurrent<Cell>];
      for (int a = 0; a < kRecurrent<Cell>; ++a) products[a] = product.sum(r, a * job.units + j);
      State<T> state = states.get(r * job.units + j);
      const ForwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
      unit.step(t, products, 1, state.h, state.c);
      states.set(r * job.units + j, state);
      give(shared.operand(s + 1), r * shared.pitch + unit.u, Tile::factor(state.h));
    });
    if (s + 1 < job.steps.T) grid.template prefetch_step<ForwardUnit<Cell, S>>(s + 1);
    sync_cluster();
  }
  grid.each(0, job.rows, [&](Index r, Index j) {
    const Index i = (grid.first_row + r) * job.H + grid.first_unit + j;
    const State<T> state = states.get(r * job.units + j);
    job.hT[i] = S(state.h);
    if (Cell::has_c) job.cT[i] = S(state.c);
  });
}

template <class Cell, class S, class Tile, Weights in>
FUSEDRNN_INLINE void cluster_backward(const BackwardJob<S>& job) {
  using T = Compute<S>;
  const Grid<BackwardJob<S>> grid(job);
  const int K = kRecurrent<Cell> * int(job.H);
  const ClusterShared<T, typename Tile::Factor> shared(K, job.rows, job.units, job.units, Tile::columns,
                                                       in == Weights::registers);
  const ClusterProduct<T, Tile> product{shared, K};
  const auto of = [&](int column) { return backward_weights<Cell>(grid, column); };
  const auto weights = block_weights<Tile, in>(of, shared.weights, shared.layout, int(job.units), K);
  States<Cell, T, in == Weights::registers> states{shared.h, shared.c};
  begin_cluster<Tile>(shared, K, [](Index, Index) { return T(0); });
  grid.each(0, job.rows, [&](Index r, Index j) {
    const BackwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
    states.set(r * job.units + j, {unit.start(job.dhT), Cell::has_c ? unit.start(job.dcT) : T(0)});
  });
  sync_cluster();
  for (Index s = job.steps.T - 1; s >= -1; --s) {  // -1: the initial state
    if (s < 0 && !job.dh0) break;
    const bool follows = s + 1 < job.steps.T;
    if (follows)
      product.run(weights, shared.operand(s + 1), [&](Index r) {
        return r < grid.rows && BackwardUnit<Cell, S>{job, grid.first_row + r, 0}.chained(s + 1);
      });
    grid.each(0, job.rows, [&](Index r, Index j) {
      const BackwardUnit<Cell, S> unit{job, grid.first_row + r, grid.first_unit + j};
      const T chain = follows && unit.chained(s + 1) ? product.sum(r, j) : T(0);
      State<T> state = states.get(r * job.units + j);
      if (s < 0) return unit.finish(chain, state.h, state.c);
      S da[Cell::accumulators];
      unit.step(time_of(job.steps, s), chain, state.h, state.c, da, 1);
      states.set(r * job.units + j, state);
      S* out = unit.da(time_of(job.steps, s));
      for (int a = 0; a < Cell::accumulators; ++a) out[a * job.H] = da[a];
      for (int a = 0; a < kRecurrent<Cell>; ++a)
        give(shared.operand(s), r * shared.pitch + a * job.H + unit.u, Tile::factor(da[Cell::recurrent.first + a]));
    });
    if (s > 0) grid.template prefetch_step<BackwardUnit<Cell, S>>(s - 1);
    sync_cluster();
  }
}

// What kernels.cu calls; nothing where there are no clusters, or for cells that run step by step alone.
template <class Cell, bool runs = kClusters && kWhole<Cell>>
struct ClusterKernels {
  template <class Tile, Weights in, class S>
  FUSEDRNN_INLINE static void forward(const ForwardJob<S>& job) {
    cluster_forward<Cell, S, Tile, in>(job);
  }
  template <class Tile, Weights in, class S>
  FUSEDRNN_INLINE static void backward(const BackwardJob<S>& job) {
    cluster_backward<Cell, S, Tile, in>(job);
  }
};
template <class Cell>
struct ClusterKernels<Cell, false> {
  template <class Tile, Weights in, class S>
  FUSEDRNN_INLINE static void forward(const ForwardJob<S>&) {}
  template <class Tile, Weights in, class S>
  FUSEDRNN_INLINE static void backward(const BackwardJob<S>&) {}
};

}  // namespace cuda
}  // namespace fusedrnn
