// All steps of the recurrence in one launch. SPDX-License-Identifier: Apache-2.0
//
// A block has some hidden units, with all their gates, of one tile of the batch, from the first step to the last. Their
// weights and their state stay with it; every step needs of the other blocks of its tile h, going forward, and da,
// going back. They pass it in one of two ways:
//
//   grid      through the results themselves, in memory. The blocks count themselves in after every step and wait until
//             all have: all blocks must run at once, so the caller launches no more than fit.
//   cluster   into each other's shared memory (sm_90 and later). The blocks of a tile are one cluster, whose barrier
//             ends a step. Two buffers take turns, so one barrier is enough: who writes for step s + 1 has passed the
//             one that ended the reading of step s - 1.
#pragma once
#include "cuda/product.h"
#include "cuda/unit.h"

namespace fusedrnn {
namespace cuda {

// What a unit of a row hands from step to step: h and c, or going back what reaches them beside the product.
template <class T>
struct State {
  T h, c;
};
// That of all of a block: in shared memory, or in the registers of the thread that Block::each gives it to.
template <class Cell, class T, Weights in>
struct States {
  T *h, *c;
  FUSEDRNN_INLINE State<T> get(Index i) const { return {h[i], Cell::has_c ? c[i] : T(0)}; }
  FUSEDRNN_INLINE void set(Index i, State<T> x) {
    h[i] = x.h;
    if (Cell::has_c) c[i] = x.c;
  }
};
template <class Cell, class T>
struct States<Cell, T, Weights::registers> {
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

// The rows and units of a block.
template <class Job>
struct Block {
  const Job& job;
  Index first_unit, first_row, rows;

  FUSEDRNN_INLINE explicit Block(const Job& job)
      : job(job), first_unit(blockIdx.x * job.units), first_row(blockIdx.y * job.rows) {
    rows = job.steps.B - first_row < job.rows ? job.steps.B - first_row : job.rows;
  }

  // Calls f(row of the tile of the batch, unit of the block, number of both) for those that there are.
  template <class F>
  FUSEDRNN_INLINE void each(F f) const {
    const int units = int(job.units), all = int(rows) * units;  // 64 bits take ten times as long to divide
    for (int i = threadIdx.x; i < all; i += kThreads) {
      const Index r = i / units, j = i % units;
      if (first_unit + j < job.H) f(r, j, i);
    }
  }

  // Each thread its own share of what the pointwise part of step s reads: it comes while the other blocks are waited
  // for, not after.
  template <class Unit>
  FUSEDRNN_INLINE void prefetch_step(Index s) const {
    const Index t = time_of(job.steps, s), cut = cut_of(job.steps, t, first_row);
    if (job.steps.reset && threadIdx.x < rows && cut + threadIdx.x < job.steps.T * job.steps.B)
      prefetch(job.steps.reset + cut + threadIdx.x);
    each([&](Index r, Index j, Index) { Unit{job, first_row + r, first_unit + j}.prefetch_step(t); });
  }
};

// How the blocks of a tile of the batch pass what the next step multiplies.
template <class Job, class Tile>
struct GridExchange {
  static constexpr int kBuffers = 1;
  const Block<Job>& block;
  typename Tile::Factor* memory;
  int K;

  template <class Start>
  FUSEDRNN_INLINE void begin(Start) const {}
  // What the blocks wrote in their first `steps` steps, rows source(r), can be read after the block's next barrier.
  template <class Source>
  FUSEDRNN_INLINE StagedRows<Tile, Source> operand(Index steps, const Source& source) const {
    if (threadIdx.x == 0)
      while (load_acquire(block.job.arrived + blockIdx.y) < unsigned(steps * gridDim.x)) {
      }
    return {memory, K, int(block.job.at_once), int(block.job.chunk), source};
  }
  template <class X>
  FUSEDRNN_INLINE void give(Index, Index, Index, X) const {}
  template <class Meanwhile>
  FUSEDRNN_INLINE void end(Meanwhile meanwhile) const {
    sync_block();
    if (threadIdx.x == 0) add_release(block.job.arrived + blockIdx.y);
    meanwhile();
  }
};

template <class Job, class Tile>
struct ClusterExchange {
  static constexpr int kBuffers = 2;
  const Block<Job>& block;
  typename Tile::Factor* memory;
  int K;

  FUSEDRNN_INLINE typename Tile::Factor* buffer(Index steps) const {
    return memory + steps % 2 * block.job.at_once * pitch_of<typename Tile::Factor>(K);
  }
  // start(r, k): what the first step multiplies; zeros where rows and k are rounded up.
  template <class Start>
  FUSEDRNN_INLINE void begin(Start start) const {
    const Index pitch = pitch_of<typename Tile::Factor>(K);
    for (Index r = threadIdx.x / kWarp; r < block.job.at_once; r += kWarps)
      for (Index k = lane(); k < pitch; k += kWarp) {
        using T = decltype(start(r, k));
        buffer(0)[r * pitch + k] = Tile::factor(r < block.rows && k < K ? start(r, k) : T(0));
        buffer(1)[r * pitch + k] = Tile::factor(T(0));
      }
    sync_cluster();
  }
  template <class Source>
  FUSEDRNN_INLINE ResidentRows<Tile, Source> operand(Index steps, const Source& source) const {
    return {buffer(steps), K, int(block.job.at_once), K, source};
  }
  // For what is multiplied when so many steps have run, to every block of the cluster.
  template <class X>
  FUSEDRNN_INLINE void give(Index steps, Index r, Index k, X x) const {
    typename Tile::Factor* const to = buffer(steps) + r * pitch_of<typename Tile::Factor>(K) + k;
    for (unsigned rank = 0; rank < gridDim.x; ++rank) store_to_block(to, rank, Tile::factor(x));
  }
  template <class Meanwhile>
  FUSEDRNN_INLINE void end(Meanwhile meanwhile) const {
    meanwhile();
    sync_cluster();
  }
};

// The weights that multiply what goes forward, h, for a column of the block: gate by gate its units; and what goes
// back, da gate by gate: its units. Null where there are none.
template <class Cell, class S>
FUSEDRNN_INLINE const S* weights_of(const Block<ForwardJob<S>>& block, int column) {
  const auto& job = block.job;
  const int gate = column / int(job.units);
  const Index u = block.first_unit + column % int(job.units);
  return gate >= kRecurrent<Cell> || u >= job.H ? nullptr : job.weight + (gate * job.H + u) * job.H;
}
template <class Cell, class S>
FUSEDRNN_INLINE const S* weights_of(const Block<BackwardJob<S>>& block, int column) {
  const auto& job = block.job;
  const Index u = block.first_unit + column;
  return column >= job.units || u >= job.H ? nullptr : job.weight + u * kRecurrent<Cell> * job.H;
}

// What forward and backward have alike: the product of a step, of K factors and so many columns, and the states.
template <class Cell, class S, class Tile, Weights in, template <class, class> class Exchange, class Job>
struct Loop {
  using T = Compute<S>;
  const Block<Job> block;
  const int K, columns;
  const Layout layout;
  const Shared<T, typename Tile::Factor> shared;
  const Exchange<Job, Tile> exchange;
  States<Cell, T, in> states;

  FUSEDRNN_INLINE Loop(const Job& job, int K, int columns)
      : block(job),
        K(K),
        columns(columns),
        layout(job.rows, columns, Tile::columns, in),
        shared(shared_memory(), layout, columns, K, Exchange<Job, Tile>::kBuffers * job.at_once, job.chunk,
               job.rows * job.units, in),
        exchange{block, shared.operands, K},
        states{shared.h, shared.c} {}

  FUSEDRNN_INLINE T sum(Index r, Index column) const { return total(layout, shared.sums, r, column); }
};

template <class Cell, class S, class Tile, Weights in, template <class, class> class Exchange>
FUSEDRNN_INLINE void all_steps(const ForwardJob<S>& job) {
  using T = Compute<S>;
  constexpr int R = kRecurrent<Cell>;
  Loop<Cell, S, Tile, in, Exchange, ForwardJob<S>> loop(job, int(job.H), R * int(job.units));
  const auto& block = loop.block;
  const auto of = [&](int column) { return weights_of<Cell>(block, column); };
  const auto weights = block_weights<Tile, in>(of, loop.shared.weights, loop.layout, loop.columns, loop.K);
  const auto unit = [&](Index r, Index j) {
    return ForwardUnit<Cell, S>{job, block.first_row + r, block.first_unit + j};
  };
  block.each([&](Index r, Index j, Index i) { loop.states.set(i, {unit(r, j).start_h(), unit(r, j).start_c()}); });
  loop.exchange.begin([&](Index r, Index k) { return job.h0 ? T(job.h0[(block.first_row + r) * job.H + k]) : T(0); });
  for (Index s = 0; s < job.steps.T; ++s) {
    const Index t = time_of(job.steps, s);
    const auto source = [&](Index r) -> const S* {
      const Index b = block.first_row + r;
      if (r >= block.rows || !valid(job.steps, t, b)) return nullptr;
      switch (before(job.steps, t, b)) {
        case Before::start:
          return job.h0 ? job.h0 + b * job.H : nullptr;
        case Before::previous:
          return job.y + ((job.steps.reverse ? t + 1 : t - 1) * job.steps.B + b) * job.H;
        default:
          return nullptr;
      }
    };
    multiply<Tile>(loop.layout, loop.exchange.operand(s, source), weights, loop.shared.sums);
    block.each([&](Index r, Index j, Index i) {
      T products[R];
      for (int a = 0; a < R; ++a) products[a] = loop.sum(r, a * job.units + j);
      State<T> state = loop.states.get(i);
      unit(r, j).step(t, products, 1, state.h, state.c);
      loop.states.set(i, state);
      loop.exchange.give(s + 1, r, block.first_unit + j, state.h);
    });
    loop.exchange.end([&] {
      if (s + 1 < job.steps.T) block.template prefetch_step<ForwardUnit<Cell, S>>(s + 1);
    });
  }
  block.each([&](Index r, Index j, Index n) {
    const Index i = (block.first_row + r) * job.H + block.first_unit + j;
    const State<T> state = loop.states.get(n);
    job.hT[i] = S(state.h);
    if (Cell::has_c) job.cT[i] = S(state.c);
  });
}

template <class Cell, class S, class Tile, Weights in, template <class, class> class Exchange>
FUSEDRNN_INLINE void all_steps(const BackwardJob<S>& job) {
  using T = Compute<S>;
  constexpr int R = kRecurrent<Cell>;
  Loop<Cell, S, Tile, in, Exchange, BackwardJob<S>> loop(job, R * int(job.H), int(job.units));
  const auto& block = loop.block;
  const auto of = [&](int column) { return weights_of<Cell>(block, column); };
  const auto weights = block_weights<Tile, in>(of, loop.shared.weights, loop.layout, loop.columns, loop.K);
  const auto unit = [&](Index r, Index j) {
    return BackwardUnit<Cell, S>{job, block.first_row + r, block.first_unit + j};
  };
  block.each([&](Index r, Index j, Index i) {
    loop.states.set(i, {unit(r, j).start(job.dhT), Cell::has_c ? unit(r, j).start(job.dcT) : T(0)});
  });
  loop.exchange.begin([](Index, Index) { return T(0); });
  for (Index s = job.steps.T - 1; s >= (job.dh0 ? -1 : 0); --s) {  // -1: the initial state
    const Index done = job.steps.T - 1 - s;
    const auto source = [&](Index r) -> const S* {
      const Index b = block.first_row + r;
      if (r >= block.rows || !BackwardUnit<Cell, S>{job, b, 0}.chained(s + 1)) return nullptr;
      const Index next = time_of(job.steps, s + 1);
      return job.da + ((next * job.steps.B + b) * Cell::accumulators + Cell::recurrent.first) * job.H;
    };
    if (done) multiply<Tile>(loop.layout, loop.exchange.operand(done, source), weights, loop.shared.sums);
    block.each([&](Index r, Index j, Index i) {
      const T chain = done && unit(r, j).chained(s + 1) ? loop.sum(r, j) : T(0);
      State<T> state = loop.states.get(i);
      if (s < 0) return unit(r, j).finish(chain, state.h, state.c);
      const Index t = time_of(job.steps, s);
      S da[Cell::accumulators];
      unit(r, j).step(t, chain, state.h, state.c, da, 1);
      loop.states.set(i, state);
      for (int a = 0; a < Cell::accumulators; ++a) unit(r, j).da(t)[a * job.H] = da[a];
      for (int a = 0; a < R; ++a)
        loop.exchange.give(done + 1, r, a * job.H + block.first_unit + j, da[Cell::recurrent.first + a]);
    });
    if (s >= 0)
      loop.exchange.end([&] {
        if (s > 0) block.template prefetch_step<BackwardUnit<Cell, S>>(s - 1);
      });
  }
}

// Which cells can run all steps in one launch. A cell of two phases would need two products and two waits a step;
// recurrent dropout changes what other blocks read of h; layer norm needs sums over all units of a row.
template <class Cell>
constexpr bool kWhole = Cell::phases == 1 && !kRegularized<Cell> && !Cell::layer_norm;

// What kernels.cu calls; nothing for cells that run step by step alone, or where there are no clusters.
template <class Cell, class Tile, Weights in, class Job>
FUSEDRNN_INLINE void by_grid(const Job& job) {
  if constexpr (kWhole<Cell>) all_steps<Cell, typename Job::Number, Tile, in, GridExchange>(job);
}
template <class Cell, class Tile, Weights in, class Job>
FUSEDRNN_INLINE void by_cluster(const Job& job) {
  if constexpr (kWhole<Cell> && kClusters) all_steps<Cell, typename Job::Number, Tile, in, ClusterExchange>(job);
}

}  // namespace cuda
}  // namespace fusedrnn
