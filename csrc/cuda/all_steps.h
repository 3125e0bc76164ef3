// All steps of the recurrence in one launch. SPDX-License-Identifier: Apache-2.0
//
// A block has some hidden units, with all their gates, of one tile of the batch, from the first step to the last. Their
// weights and their state stay with it; every step needs of the other blocks of its tile h, going forward, and da,
// going back. They pass it through two buffers, [row][k], which take turns: who writes for product n + 1 has waited for
// all that was given for product n, so nobody reads that of n - 1 any more. The buffers are
//
//   grid      in memory. The blocks count themselves in after every step and wait until all have: all blocks must run
//             at once, so the caller launches no more than fit.
//   cluster   in the shared memory of every block (sm_90 and later). The blocks of a tile are one cluster. Its barrier
//             ends a step.
#pragma once
#include "cuda/product.h"
#include "cuda/unit.h"

namespace fusedrnn {
namespace cuda {

template <class F>
struct GridExchange {
  static constexpr bool there = true;
  F *const buffers, *const shared;
  unsigned* const arrived;
  const int rows, at_once;
  const Index pitch;

  FUSEDRNN_INLINE GridExchange(const Cut& cut, F* shared, int rows, Index pitch)
      : buffers(static_cast<F*>(cut.exchanged) + 2 * blockIdx.y * rows * pitch),
        shared(shared),
        arrived(cut.arrived + blockIdx.y),
        rows(rows),
        at_once(int(cut.at_once)),
        pitch(pitch) {}
  FUSEDRNN_INLINE void* after_shared() const { return shared + at_once * pitch; }

  FUSEDRNN_INLINE F* row_of(Index n, Index row) const { return buffers + (n % 2 * rows + row) * pitch; }
  FUSEDRNN_INLINE void begin() const {}
  // For product n.
  FUSEDRNN_INLINE void give(Index n, Index row, Index k, F x) const { row_of(n, row)[k] = x; }
  FUSEDRNN_INLINE void end() const {
    sync_block();
    if (threadIdx.x == 0) add_release(arrived);
  }
  FUSEDRNN_INLINE void wait(Index n) const {
    if (threadIdx.x == 0)
      while (load_acquire(arrived) < unsigned((n + 1) * gridDim.x)) {
      }
  }
  // What was given for product n from a row on, in shared memory; so many rows at once are brought there.
  FUSEDRNN_INLINE const F* at(Index n, int row) const {
    if (row % at_once == 0) {
      constexpr int kAhead = 4;  // on their way at a time: they come from the L2 cache
      const Index count = (rows - row < at_once ? rows - row : at_once) * pitch / Sixteen<F>::count;
      const auto* from = reinterpret_cast<const Sixteen<F>*>(row_of(n, row));
      auto* to = reinterpret_cast<Sixteen<F>*>(shared);
      sync_block();  // all has arrived, and what was here before has been read
      for (Index first = threadIdx.x; first < count; first += kAhead * kThreads) {
        Sixteen<F> all[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (first + i * kThreads < count) all[i] = load_shared_by_blocks(from + first + i * kThreads);
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (first + i * kThreads < count) to[first + i * kThreads] = all[i];
      }
      sync_block();  // it is there
    }
    return shared + row % at_once * pitch;
  }
};

template <class F>
struct ClusterExchange {
  static constexpr bool there = kClusters;
  F* const shared;
  const int rows;
  const Index pitch;

  FUSEDRNN_INLINE ClusterExchange(const Cut&, F* shared, int rows, Index pitch)
      : shared(shared), rows(rows), pitch(pitch) {}
  FUSEDRNN_INLINE void* after_shared() const { return shared + 2 * rows * pitch; }

  FUSEDRNN_INLINE F* row_of(Index n, Index row) const { return shared + (n % 2 * rows + row) * pitch; }
  FUSEDRNN_INLINE void begin() const {
    for (Index i = threadIdx.x; i < 2 * rows * pitch; i += kThreads) shared[i] = F(0);
    sync_cluster();
  }
  // To every block of the cluster.
  FUSEDRNN_INLINE void give(Index n, Index row, Index k, F x) const {
    for (unsigned rank = 0; rank < gridDim.x; ++rank) *in_block(row_of(n, row) + k, rank) = x;
  }
  FUSEDRNN_INLINE void end() const { sync_cluster(); }
  FUSEDRNN_INLINE void wait(Index) const {}
  FUSEDRNN_INLINE const F* at(Index n, int row) const { return row_of(n, row); }
};

// What a unit of a row hands from step to step: h and c, or going back what reaches them beside the product. A thread
// has those of the units that Loop::each gives it.
template <class T>
struct State {
  T h, c;
};
template <class T>
struct States {
  State<T> first{}, second{};
  FUSEDRNN_INLINE State<T> get(Index i) const { return i < kThreads ? first : second; }
  FUSEDRNN_INLINE void set(Index i, State<T> x) {
    if (i < kThreads)
      first = x;
    else
      second = x;
  }
};

// What forward and backward have alike: the rows and units of a block, the product of a step, of K factors, the states.
template <class Unit, class Tile, template <class> class Exchange, class Job>
struct Loop {
  using T = typename Unit::T;
  const Job& job;
  const Index first_unit, first_row, rows;
  const Layout layout;
  const Exchange<typename Tile::Factor> exchange;
  const Weights<Tile> weights;
  T* const sums;
  States<T> states;

  template <class Of>
  FUSEDRNN_INLINE Loop(const Job& job, Index K, const Of& weight)
      : job(job),
        first_unit(blockIdx.x * job.cut.units),
        first_row(blockIdx.y * job.cut.rows),
        rows(job.steps.B - first_row < job.cut.rows ? job.steps.B - first_row : job.cut.rows),
        layout(job.cut, Tile::columns),
        exchange(job.cut, reinterpret_cast<typename Tile::Factor*>(shared_memory()), layout.rows,
                 pitch_of<typename Tile::Factor>(K)),
        weights(layout, int(K), weight),
        sums(static_cast<T*>(exchange.after_shared())) {
    exchange.begin();
  }

  FUSEDRNN_INLINE Unit unit(Index r, Index j) const { return {job, first_row + r, first_unit + j}; }
  // Calls f(row of the tile of the batch, unit of the block, number of both) for those that there are.
  template <class F>
  FUSEDRNN_INLINE void each(F f) const {
    const int units = int(job.cut.units), all = int(rows) * units;  // 64 bits take ten times as long to divide
    for (int i = threadIdx.x; i < all; i += kThreads) {
      const Index r = i / units, j = i % units;
      if (first_unit + j < job.H) f(r, j, i);
    }
  }

  FUSEDRNN_INLINE void multiply(Index n) const {
    exchange.wait(n);
    for (int row = 0; row < layout.rows; row += kRows)
      weights.times({exchange.at(n, row), exchange.pitch})
          .store(sums + layout.sum(weights.split, row, weights.first_column), layout.columns);
    sync_block();  // every thread sees all sums
  }

  // Ends a step before step s. Each thread fetches its own share of what the pointwise part of that one reads: it comes
  // while the other blocks are waited for, not after.
  FUSEDRNN_INLINE void end(Index s) const {
    if (s >= 0 && s < job.steps.T) {
      const Index t = time_of(job.steps, s), cut = cut_of(job.steps, t, first_row);
      if (job.steps.reset && threadIdx.x < rows && cut + threadIdx.x < job.steps.T * job.steps.B)
        prefetch(job.steps.reset + cut + threadIdx.x);
      each([&](Index r, Index j, Index) { unit(r, j).prefetch_step(t); });
    }
    exchange.end();
  }
};

template <class Cell, class S, class Tile, template <class> class Exchange>
FUSEDRNN_INLINE void all_steps(const ForwardJob<S>& job) {
  using T = Compute<S>;
  constexpr int R = kRecurrent<Cell>;
  const Index H = job.H, units = job.cut.units;
  // Gate by gate the units of the block.
  const auto weight = [&](int column) {
    const Index gate = column / int(units), u = blockIdx.x * units + column % int(units);
    return gate < R && u < H ? job.weight + (gate * H + u) * H : nullptr;
  };
  Loop<ForwardUnit<Cell, S>, Tile, Exchange, ForwardJob<S>> loop(job, H, weight);
  const auto carry = [&](Index n, Index r, Index j, Index i, State<T> state) {
    loop.states.set(i, state);
    loop.exchange.give(n, r, loop.first_unit + j, Tile::factor(state.h));
  };
  loop.each(
      [&](Index r, Index j, Index i) { carry(0, r, j, i, {loop.unit(r, j).start_h(), loop.unit(r, j).start_c()}); });
  loop.end(0);
  for (Index s = 0; s < job.steps.T; ++s) {
    loop.multiply(s);
    loop.each([&](Index r, Index j, Index i) {
      T products[R];
      for (int a = 0; a < R; ++a) products[a] = loop.layout.total(loop.sums, r, a * units + j);
      State<T> state = loop.states.get(i);
      loop.unit(r, j).step(time_of(job.steps, s), products, 1, state.h, state.c);
      carry(s + 1, r, j, i, state);
      if (s + 1 == job.steps.T) loop.unit(r, j).give_last(state.h, state.c);
    });
    loop.end(s + 1);
  }
}

template <class Cell, class S, class Tile, template <class> class Exchange>
FUSEDRNN_INLINE void all_steps(const BackwardJob<S>& job) {
  using T = Compute<S>;
  constexpr int R = kRecurrent<Cell>;
  const Index H = job.H, units = job.cut.units;
  const auto weight = [&](int column) {
    const Index u = blockIdx.x * units + column;
    return column < units && u < H ? job.weight + u * R * H : nullptr;
  };
  Loop<BackwardUnit<Cell, S>, Tile, Exchange, BackwardJob<S>> loop(job, R * H, weight);
  loop.each([&](Index r, Index j, Index i) {
    loop.states.set(i, {loop.unit(r, j).start(job.dhT), Cell::has_c ? loop.unit(r, j).start(job.dcT) : T(0)});
  });
  for (Index s = job.steps.T - 1; s >= (job.dh0 ? -1 : 0); --s) {  // -1: the initial state
    const Index done = job.steps.T - 1 - s;
    if (done) loop.multiply(done - 1);
    loop.each([&](Index r, Index j, Index i) {
      const auto unit = loop.unit(r, j);
      const T chain = done && unit.chained(s + 1) ? loop.layout.total(loop.sums, r, j) : T(0);
      State<T> state = loop.states.get(i);
      if (s < 0) return unit.finish(chain, state.h, state.c);
      const Index t = time_of(job.steps, s);
      S da[Cell::accumulators];
      unit.step(t, chain, state.h, state.c, da, 1);
      loop.states.set(i, state);
      for (int a = 0; a < Cell::accumulators; ++a) unit.da(t)[a * H] = da[a];
      for (int a = 0; a < R; ++a)
        loop.exchange.give(done, r, a * H + unit.u, Tile::factor(da[Cell::recurrent.first + a]));
    });
    if (s >= 0) loop.end(s - 1);
  }
}

// Which cells run all steps in one launch. A cell of two phases would need two products and two waits a step; layer
// norm needs sums over all units of a row; regularized cells would take as much time again to compile.
template <class Cell>
constexpr bool kWhole = Cell::phases == 1 && !kRegularized<Cell> && !Cell::layer_norm;

}  // namespace cuda
}  // namespace fusedrnn
