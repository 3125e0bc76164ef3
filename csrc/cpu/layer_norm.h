// Layer norm, row by row: forward beside backward, for any cell. SPDX-License-Identifier: Apache-2.0
//
// A row's mean and variance need the bare products of all its units, so the tile's sums go to memory first (to the
// tape, where backward finds them and makes x again: two passes over a row in the nearest cache against twice the
// tape). Threads have whole rows. The arithmetic is in cells/row_norm.h.
#pragma once
#include "cells/regularized.h"
#include "cells/row_norm.h"
#include "cpu/tile.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::kBlock;

// then(u, k, in_row) for every vector of units: its first unit, its place in a sum, and how many of its units exist, if
// those are fewer than lanes.
template <class V, class Then>
FUSEDRNN_INLINE void each_vector(Index H, Then&& then) {
  for (Index block = 0; block < H; block += kBlock)
#pragma GCC unroll 8
    for (int k = 0; k < int(kBlock / V::lanes); ++k) {
      const Index u = block + k * V::lanes;
      then(u, k, H - u);
    }
}

// A row as one thread has it: [block][accumulator][16], in the tape the last block with only the units there are.
template <class V_>
struct RowUnits {
  using V = V_;
  using T = typename V::scalar;
  const Index H;

  static FUSEDRNN_INLINE float root(float x) { return __builtin_sqrtf(x); }
  static FUSEDRNN_INLINE double root(double x) { return __builtin_sqrt(x); }
  // The order depends on no lane width: one part for each place in a block of 16, blocks in ascending order, then the
  // 16 parts by halves.
  struct Sum {
    V part[kBlock / V::lanes];
    Sum() {
      for (V& p : part) p = V::zero();
    }
    FUSEDRNN_INLINE void add(int k, V v) { part[k] = part[k] + v; }
    FUSEDRNN_INLINE void add_product(int k, V a, V b) { part[k] = fma(a, b, part[k]); }
    T total() const {
      alignas(64) T t[kBlock];
      for (int k = 0; k < int(kBlock / V::lanes); ++k) part[k].store(t + k * V::lanes);
      for (int n = kBlock / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) t[i] += t[i + n];
      return t[0];
    }
  };
  template <int count>
  static FUSEDRNN_INLINE void totals(const Sum* sums, T* out) {
    for (int n = 0; n < count; ++n) out[n] = sums[n].total();
  }
  struct Number {
    alignas(64) T of[V::lanes];
    Number() = default;
    FUSEDRNN_INLINE explicit Number(T x) { V::set(x).store(of); }
    FUSEDRNN_INLINE V in(Index in_row) const { return V::load(of, in_row); }
    FUSEDRNN_INLINE V all() const { return V::set(of[0]); }
  };

  template <class Then>
  FUSEDRNN_INLINE void each(Then&& then) const {
    each_vector<V>(H, then);
  }
  static FUSEDRNN_INLINE Index at(Index u, int s, int A) { return u / kBlock * (A * kBlock) + s * kBlock + u % kBlock; }
  FUSEDRNN_INLINE V load(const T* row, Index u, int s, int A) const {
    return V::load(row + u / kBlock * (A * kBlock) + s * units_of(H, u / kBlock) + u % kBlock, H - u);
  }
};

// Of a regularized cell, behind a row's products: the candidate that backward reads.
template <class Cell, class T>
T* candidate_of(T* saved, Index H) {
  return saved + H * Cell::accumulators;
}

// One row of a step, from its bare products.
template <class Loop>
void normed_row(const Loop& loop, Index i) {
  using V = typename Loop::Vector;
  using Cell = typename Loop::CellType;
  using Maths = typename Plain<Cell>::type;
  using O = typename Loop::Operand;
  using T = typename V::scalar;
  const auto& job = loop.job;
  const auto& weights = job.norm;
  const Index H = job.H;
  const T *const h_prev = loop.rows.h[i], *const c_prev = loop.rows.c[i];
  T *const h_out = loop.rows.h_out[i], *const c_out = loop.rows.c_out[i], *const c_state = loop.rows.c_state[i];
  [[maybe_unused]] T* const candidate = candidate_of<Cell>(loop.rows.saved[i], H);
  const RowNorm<Maths, RowUnits<V>> norm(loop.rows.saved[i], H);
  each_vector<V>(H, [&](Index u, int, Index in_row) {
    V p[Cell::accumulators], h;
    norm.parts(weights.gain, weights.bias, u, p);
    if constexpr (Cell::has_c) {
      const V before = V::load(c_prev + u, in_row);
      V c;
      Cell::forward_state(p, before, c, h);  // h is o for now
      if constexpr (kRegularized<Cell>) {
        c.store(candidate + u, in_row);
        c = loop.zoned(loop.rows.keep_c, i, u, c, before);
      }
      c.store(c_out + u, in_row);
      if (c_state) c.store(c_state + u, in_row);
    } else {
      const V before = Cell::reads_h_prev ? V::load(h_prev + u, in_row) : V::zero();
      Maths::forward(p, before, h);
      if constexpr (kRegularized<Cell>) {
        if constexpr (Maths::reads_h) h.store(candidate + u, in_row);
        h = loop.zoned(loop.rows.keep_h, i, u, h, before);
      }
      h = rounded<O>(h);
    }
    h.store(h_out + u, in_row);
  });
  if constexpr (Cell::has_c) {
    const RowNorm<CellState, RowUnits<V>> state(kRegularized<Cell> ? candidate : c_out, H);
    each_vector<V>(H, [&](Index u, int, Index in_row) {
      V m;
      state.parts(weights.gain_c, weights.bias_c, u, &m);
      V h = Cell::forward_output(V::load(h_out + u, in_row), m);
      if constexpr (kRegularized<Cell>) h = loop.zoned(loop.rows.keep_h, i, u, h, V::load(h_prev + u, in_row));
      rounded<O>(h).store(h_out + u, in_row);
    });
  }
}

// A step of all rows of the loop's thread: the tiles of both parts, then the rows.
template <class Loop>
bool normed_step(const Loop& loop) {
  using V = typename Loop::Vector;
  using Cell = typename Loop::CellType;
  using T = typename V::scalar;
  const auto& job = loop.job;
  const auto products = [&](const auto& weights, const Part& part, const T* const* a, Index k, Index first, int m,
                            Index block, int wide, Index lane) {
    alignas(64) T acc[kMaxTile * V::lanes];
    for (int n = 0; n < wide * part.count * m; ++n) V::zero().store(acc + n * V::lanes);
    const Product<T> p = Loop::product(Loop::shape, weights, part, a + first, k, block, lane);
    Loop::tile_of(Loop::shape, m, part, wide)(&p, 1, acc);
    for (int w = 0; w < wide; ++w) {
      const Index units = units_of(job.H, block + w), in_row = job.H - (block + w) * kBlock - lane;
      for (int s = 0; s < part.count; ++s)
        for (int i = 0; i < m; ++i) {
          T* const row = loop.rows.saved[first + i] + (block + w) * (Cell::accumulators * kBlock) + lane;
          V::load(acc + ((w * part.count + s) * m + i) * V::lanes).store(row + (part.first + s) * units, in_row);
        }
    }
  };
  const Tiling tiles(loop.rows.count, Loop::kRows), panels(job.blocks, loop.width(1));
  const bool done =
      each_tile(loop.worker, job.rows_outside, tiles, panels, 0, [&](Index first, int m, Index block, int wide) {
        for (Index lane = 0; lane < kBlock; lane += V::lanes) {
          products(job.input, Cell::input, loop.rows.x, job.I, first, m, block, wide, lane);
          products(job.recurrent, Cell::recurrent, Loop::kOperands ? loop.rows.operand : loop.rows.h, job.P, first, m,
                   block, wide, lane);
        }
        if (job.rows_outside && block + wide == job.blocks)  // while their products are in the nearest cache
          for (Index i = first; i < first + m; ++i) normed_row(loop, i);
      });
  if (!done || job.rows_outside) return done;
  for (Index i = 0; i < loop.rows.count; ++i) {
    normed_row(loop, i);
    if ((i & 15) == 0 && !loop.worker.poll()) return false;
  }
  return true;
}

template <class V>
FUSEDRNN_INLINE void add_to(typename V::scalar* sum, V v) {
  (V::load(sum) + v).store(sum);
}

// One row of a step, back. The gradients of h and c wait in the first accumulators of its da (dh, dc), and are replaced
// by those of the bare products. Of a regularized cell they are those of the candidates, and what goes past them to the
// state before waits in `direct` and `dc`.
template <class Loop, class Row>
void normed_row_backward(const Loop& loop, const Row& row) {
  using V = typename Loop::Vector;
  using Cell = typename Loop::CellType;
  using Maths = typename Plain<Cell>::type;
  using T = typename V::scalar;
  constexpr int A = Cell::accumulators, N = kNormSums<Cell>;
  const auto& job = loop.job;
  const auto& weights = job.norm;
  const Index H = job.H, units = job.blocks * kBlock;
  using Norm = RowNorm<Maths, RowUnits<V>>;
  const Norm norm(row.saved, H);
  [[maybe_unused]] const T* const candidate = candidate_of<Cell>(row.saved, H);
  T* const da = row.da;
  T* const sums = job.norm_sums ? job.norm_sums + row.b * units * N : nullptr;
  const auto sum_at = [&](Index u, int n) { return sums + u / kBlock * (N * kBlock) + n * kBlock + u % kBlock; };

  if constexpr (Cell::has_c) {  // through h and the norm of c: da of gate o and the whole gradient of c
    const RowNorm<CellState, RowUnits<V>> state(kRegularized<Cell> ? candidate : row.c, H);
    RowNormBackward<CellState, RowUnits<V>> back(state);
    each_vector<V>(H, [&](Index u, int k, Index) {
      V p[A], m, da_o, dm;
      norm.parts(weights.gain, weights.bias, u, p);
      state.parts(weights.gain_c, weights.bias_c, u, &m);
      Cell::backward_output(p, m, V::load(da + norm.at(u, 0)), da_o, dm);
      const V x = state.x(u, 0), dx = dm * V::load(weights.gain_c + u);
      if (sums) add_to(sum_at(u, 2 * A), dm * x), add_to(sum_at(u, 2 * A + 1), dm);
      back.add(0, k, dx, x);
      dx.store(da + norm.at(u, 0));
      da_o.store(da + norm.at(u, 2));
    });
    back.finish();
    each_vector<V>(H, [&](Index u, int, Index) {
      T* const dc = da + norm.at(u, 1);
      (V::load(dc) + back.da(u, 0, V::load(da + norm.at(u, 0)))).store(dc);
    });
  }

  RowNormBackward<Maths, RowUnits<V>> back(norm);
  each_vector<V>(H, [&](Index u, int k, Index in_row) {
    V p[A], dp[A], dc_prev = V::zero(), direct = V::zero();
    norm.parts(weights.gain, weights.bias, u, p);
    if constexpr (Cell::has_c) {
      Cell::backward_state(p, V::load(row.c_prev + u, in_row), V::load(da + norm.at(u, 1)), V::load(da + norm.at(u, 2)),
                           dp, dc_prev);
      if constexpr (kRegularized<Cell>) dc_prev = dc_prev + V::load(job.dc + row.b * units + u);
      dc_prev.store(job.dc + row.b * units + u);
    } else {
      const T* const h = kRegularized<Cell> ? candidate : row.h;
      Maths::backward(p, Cell::reads_h_prev ? V::load(row.h_prev + u, in_row) : V::zero(),
                      Maths::reads_h ? V::load(h + u, in_row) : V::zero(), V::load(da + norm.at(u, 0)), dp, direct);
    }
    if constexpr (kRegularized<Cell>) direct = direct + V::load(job.direct + row.b * units + u);
    if (Cell::has_direct) direct.store(job.direct + row.b * units + u);
#pragma GCC unroll 8
    for (int s = 0; s < A; ++s) {
      const V x = norm.x(u, s), dx = dp[s] * V::load(weights.gain + norm.at(u, s));
      if (sums) add_to(sum_at(u, s), dp[s] * x), add_to(sum_at(u, A + s), dp[s]);
      back.add(s, k, dx, x);
      dx.store(da + norm.at(u, s));
    }
  });
  back.finish();
  each_vector<V>(H, [&](Index u, int, Index) {
#pragma GCC unroll 8
    for (int s = 0; s < A; ++s) {
      const Index at = norm.at(u, s);  // pairs are put where nothing is read any more
      put_operand<typename Loop::Operand>(back.da(u, s, V::load(da + at)), da, at);
    }
  });
}

// The sums of all rows of the batch, in ascending order, of this thread's share of the blocks.
template <class Loop>
void unpack_norm_sums(const Loop& loop) {
  using V = typename Loop::Vector;
  using Cell = typename Loop::CellType;
  using T = typename V::scalar;
  constexpr int A = Cell::accumulators, N = kNormSums<Cell>;
  const auto& job = loop.job;
  const Index n = loop.worker.region.threads, i = loop.worker.region.thread;
  for (Index block = job.blocks * i / n; block < job.blocks * (i + 1) / n; ++block) {
    const Index first = block * kBlock, lanes = units_of(job.H, block);
    const auto unpack = [&](T* out, int sum) {
      if (!out) return;
      for (Index lane = 0; lane < kBlock; lane += V::lanes) {
        V all = V::zero();
        for (Index b = 0; b < job.steps.B; ++b)
          all = all + V::load(job.norm_sums + ((b * job.blocks + block) * N + sum) * kBlock + lane);
        all.store(out + first + lane, lanes - lane);
      }
    };
    const auto unpack_part = [&](const Part& part, T* dgain, T* dbias) {
      for (int s = 0; s < part.count; ++s) {
        unpack(dgain ? dgain + part.gate[s] * job.H : nullptr, part.first + s);
        unpack(dbias ? dbias + part.gate[s] * job.H : nullptr, A + part.first + s);
      }
    };
    unpack_part(Cell::input, job.dgain_ih, job.dbias_ih);
    unpack_part(Cell::recurrent, job.dgain_hh, job.dbias_hh);
    if (Cell::has_c) unpack(job.dgain_c, 2 * A), unpack(job.dbias_c, 2 * A + 1);
  }
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
