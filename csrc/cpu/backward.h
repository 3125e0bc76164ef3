// The time loop backward, for any cell. SPDX-License-Identifier: Apache-2.0
//
// Steps are walked back in chunks counted from the end. Within a chunk, per step: the chain (da of the later step times
// the recurrent weights, plus what the cell passes on directly), then the upstream gradients, then the cell. The
// chunk's da rows are still in the cache when dx and the weight gradients are made of them, so da never exists for all
// T. Only valid rows take part: they lie one after another in the chunk.
#pragma once
#include "cpu/forward.h"
#include "cpu/tile.h"
#include "cpu/weight_gradients.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::BackwardJob;
using cpu::CellShape;
using cpu::kBlock;
using cpu::Kept;
using cpu::Packed;
using cpu::Worker;

enum class After { product, final_state, nothing };  // where a row's chain comes from

// One valid row of the step at hand.
template <class T>
struct BackwardRow {
  Index b;
  After after;
  T* da;
  const T *saved, *h_prev, *h, *c_prev, *c, *dy, *dh_state, *dc_state;  // null where absent
  const T *keep_h, *keep_c;                                             // of regularized cells; null where absent
};

template <class T>
struct BackwardRows {
  Index *t, *b, *first_of_step;  // of each valid row of the chunk
  BackwardRow<T>* at;            // (B) the step's rows
  const T** da;                  // (B) what the step's product reads of each
  T** latest;                    // (B) each batch row's latest da, or null

  static Index bytes(Index B, Index rows, Index steps) {
    return (2 * rows + steps + 1) * Index(sizeof(Index)) + B * Index(sizeof(BackwardRow<T>) + 2 * sizeof(T*));
  }
  BackwardRows(char* memory, Index B, Index rows, Index steps) {
    t = reinterpret_cast<Index*>(memory);
    b = t + rows, first_of_step = b + rows;
    at = reinterpret_cast<BackwardRow<T>*>(first_of_step + steps + 1);
    latest = reinterpret_cast<T**>(at + B);
    da = const_cast<const T**>(latest + B);
  }
};

// What the time loop backward needs around a cell, compiled once for all of them. O: cpu/forward.h. Rows of da are
// elements of O.
template <class V, class O = V>
struct BackwardSteps : Share {
  using T = typename V::scalar;

  const BackwardJob<T>& job;
  const Worker& worker;
  const CellShape& shape;
  const bool regularized;
  BackwardRows<T> rows;
  WeightGradients<V, O> weights;
  const Index B, units;  // units: blocks * 16
  const Index last;      // of a block of da that is not whole, from an accumulator to the next
  Kept<T> kept;          // what forward saved, or of this chunk if it has to be made again
  Index count = 0;       // valid rows of the chunk
  mutable Prefetch prefetch;

  FUSEDRNN_NOINLINE BackwardSteps(const BackwardJob<T>& job_, const Worker& worker_, const CellShape& shape_,
                                  bool regularized_)
      : Share(job_.steps, job_.blocks, job_.P, worker_),
        job(job_),
        worker(worker_),
        shape(shape_),
        regularized(regularized_),
        rows(job_.scratch + worker_.region.thread * job_.scratch_step, job_.steps.B, job_.chunk_steps * job_.steps.B,
             job_.chunk_steps),
        weights(job_, worker_, shape_),
        B(job_.steps.B),
        units(job_.blocks * kBlock),
        last(job_.narrow ? narrow_units<O>(job_.H) : kBlock),
        kept(job_.kept) {
    for (Index b = 0; b < B; ++b) rows.latest[b] = nullptr;
  }

  Index later(Index t) const { return job.steps.reverse ? t - 1 : t + 1; }
  Index earlier(Index t) const { return job.steps.reverse ? t + 1 : t - 1; }
  T* da_row(Index row) const { return job.da + row * job.da_row; }
  const T* c_row(Index t, Index b) const {
    return kept.has(t) ? kept.c + kept.row(t, b) * job.H : kept.c_boundary + b * job.H;
  }
  const T* saved_row(Index t, Index b) const {
    return kept.saved ? kept.saved + kept.row(t, b) * (shape.saved * job.H) : nullptr;
  }
  const T* h_row(Index t, Index b) const { return job.y + (t * B + b) * job.P; }

  const T* h_before(Index t, Index b) const {
    const Before from = before(job.steps, t, b);
    if (from == Before::previous) return h_row(earlier(t), b);
    return from == Before::start && job.h0 ? job.h0 + b * job.P : job.zeros;
  }
  const T* c_before(Index t, Index b) const {
    const Before from = before(job.steps, t, b);
    if (from == Before::previous) return c_row(earlier(t), b);
    return from == Before::start && job.c0 ? job.c0 + b * job.H : job.zeros;
  }

  // Of a regularized cell.
  Masks<T> masks() const {
    return {job.regularization, worker.region.thread, B, units, h_begin, h_end, block_begin, block_end};
  }

  // The chunk's valid rows, in the order in which they are walked: every thread makes the same list.
  FUSEDRNN_NOINLINE void list_rows(Index s_end, Index s_begin) {
    count = 0;
    Index k = 0;
    for (Index s = s_end - 1; s >= s_begin; --s, ++k) {
      rows.first_of_step[k] = count;
      const Index t = time_of(job.steps, s);
      for (Index b = 0; b < B; ++b)
        if (valid(job.steps, t, b)) rows.t[count] = t, rows.b[count] = b, ++count;
    }
    rows.first_of_step[k] = count;
  }

  // The part of [begin, end) that is this thread's: rows are listed by ascending b within a step.
  FUSEDRNN_NOINLINE void own_rows(Index& begin, Index& end) const {
    while (begin < end && rows.b[begin] < row_begin) ++begin;
    Index last = begin;
    while (last < end && rows.b[last] < row_end) ++last;
    end = last;
  }

  After chain_of(Index t, Index b) const {
    if (t == last_time(job.steps, b)) return After::final_state;
    const bool cut = before(job.steps, later(t), b) == Before::nothing;
    return cut || detached(job.steps, later(t)) ? After::nothing : After::product;
  }

  // acc[wide][m] = what a part's accumulators in m rows of da have for the weights of blocks [block, block+wide).
  FUSEDRNN_INLINE void multiply(const CellShape& shape, const Packed<T>& weights, const Part& part, const T* const* da,
                                Index block, Index lane, int m, int wide, T* acc) const {
    for (int i = 0; i < m * wide; ++i) V::zero().store(acc + i * V::lanes);
    add_part(weights, shape.accumulators, part.first, part.count, da, block, lane, m, wide, acc);
  }
  // Adds it, of accumulators [first, first + in_part) of A. Of the last block of units only the H % 16 that exist.
  FUSEDRNN_INLINE void add_part(const Packed<T>& weights, int A, int first, int in_part, const T* const* da,
                                Index block, Index lane, int m, int wide, T* acc) const {
    const T* b = weights.data + block * weights.block_step + lane * in_part * job.H;
    constexpr Index part = kBlock / kNumbers<O>;  // of a row of da, what a block's units have of an accumulator
    const Index full = job.H / kBlock, rest = elements<O>(job.H % kBlock), block_run = in_part * part,
                begin = first * part, next = last / kNumbers<O>, behind = full * A * part + first * next;
    Product<T> p[2];
    int count = 0;
    if (full)
      p[count++] = in_part == A ? Product<T>{da, begin, 1, 0, b, V::lanes, weights.block_step, 1, full * block_run}
                                : Product<T>{da, begin, 1, A * part, b, V::lanes, weights.block_step, full, block_run};
    if (rest)
      p[count++] = {da, behind, 1, next, b + full * block_run * V::lanes, V::lanes, weights.block_step, in_part, rest};
    prefetch.during<V, O>(p[0], weights, lane);
    tile_for<O>(m, wide)(p, count, acc);
  }

  // Blocks per panel. Four of large weights would leave no room in the cache for the rows they meet.
  int width() const {
    const Index panel = job.blocks * (4 * shape.accumulators * kBlock * kBlock) / kNumbers<O>;
    return panel * Index(sizeof(T)) < kLargePanel ? 4 : 3;
  }
  static constexpr Index kLargePanel = 512 << 10;

  // then(first row, rows, first block, blocks, lane) for tiles of rows and of the blocks [begin, end).
  template <class Then>
  bool tiles(Index n_rows, Index begin, Index end, Then&& then) const {
    const Tiling row_tiles(n_rows, max_rows<O>(width())), panels(end - begin, n_rows == 1 ? kOneRow<O> : width());
    const Index outer = job.rows_outside ? row_tiles.pieces : panels.pieces,
                inner = job.rows_outside ? panels.pieces : row_tiles.pieces;
    for (Index o = 0; o < outer; ++o) {
      for (Index n = 0; n < inner; ++n) {
        const Index i = job.rows_outside ? o : n, j = job.rows_outside ? n : o;
        const Index first = row_tiles.begin(i), block = begin + panels.begin(j);
        const int m = int(row_tiles.begin(i + 1) - first), wide = int(begin + panels.begin(j + 1) - block);
        if (job.prefetch) prefetch = Prefetch::after(panels, j, begin, i, row_tiles.pieces);
        for (Index lane = 0; lane < kBlock; lane += V::lanes) then(first, m, block, wide, lane);
      }
      if (!worker.poll()) return false;
    }
    prefetch = {};
    return true;
  }

  FUSEDRNN_INLINE BackwardRow<T> row_at(const CellShape& shape, Index t, Index b, T* da) const {
    const auto in = [&](const Sequence<const T>& all) { return all.data ? all.at(t, b) : nullptr; };
    return {b,
            chain_of(t, b),
            da,
            saved_row(t, b),
            h_before(t, b),
            h_row(t, b),
            shape.has_c ? c_before(t, b) : nullptr,
            shape.has_c ? c_row(t, b) : nullptr,
            in(job.dy),
            in(job.dh_states),
            in(job.dc_states),
            nullptr,
            nullptr};
  }

  // The gradient of c that reaches a row from the later step.
  FUSEDRNN_INLINE V dc_of(const BackwardRow<T>& row, Index u) const {
    if (row.after == After::product) return V::load(job.dc + row.b * units + u);
    if (row.after == After::final_state && job.dcT) return V::load(job.dcT + row.b * job.H + u, job.H - u);
    return V::zero();
  }

  // The rows of da that the chain of the n rows of rows.at multiplies; false: none does.
  FUSEDRNN_INLINE bool follow(Index n) const {
    bool any = false;
    for (Index i = 0; i < n; ++i) {
      const bool follows = rows.at[i].after == After::product;
      rows.da[i] = follows ? rows.latest[rows.at[i].b] : job.zeros;
      any |= follows;
    }
    return any;
  }

  // The gradient that reaches the n rows of rows.at from later steps, for every vector of h of this thread: then(row,
  // u, dh, dc), without dc where h is projected, whose units are not those of c. Selection, never multiplication: what
  // a cut or a row's end leaves out is never read.
  template <class Then>
  FUSEDRNN_INLINE bool chains(const CellShape& shape, bool regularized, Index n, Then&& then) const {
    const bool any = follow(n);
    return tiles(n, h_begin, h_end, [&](Index first, int m, Index block, int wide, Index lane) {
      if (!shape.layer_norm) wide = blocks_with(lane, job.P, block, wide);  // norms read whole rows
      if (!wide) return;
      alignas(64) T acc[kMaxTile * V::lanes];
      if (any) multiply(shape, job.recurrent, shape.recurrent, rows.da + first, block, lane, m, wide, acc);
      for (int i = 0; i < m; ++i)
        for (int w = 0; w < wide; ++w) {
          const BackwardRow<T>& row = rows.at[first + i];
          const Index u = (block + w) * kBlock + lane, b = row.b;
          V dh = V::zero();
          if (row.after == After::product) {
            dh = V::load(acc + (w * m + i) * V::lanes);
            if (regularized) dh = masks().dropped(b, u, dh);
            if (shape.has_direct) dh = dh + V::load(job.direct + b * units + u);
          } else if (row.after == After::final_state) {
            if (job.dhT) dh = V::load(job.dhT + b * job.P + u, job.P - u);
          }
          then(row, u, dh, shape.has_c && !shape.projects ? dc_of(row, u) : V::zero());
        }
    });
  }

  // Where unit u's first of n vectors lies in a row of [block][n][16].
  static Index offset(Index u, int n) { return u / kBlock * (n * kBlock) + u % kBlock; }

  // Rows that the next chunk still needs are about to be overwritten: keep this thread's part of them.
  void keep_boundary() {
    constexpr Index part = kBlock / kNumbers<O>;
    const Index begin = block_begin * shape.accumulators * part,
                bytes = (block_end - block_begin) * shape.accumulators * part * Index(sizeof(T));
    for (Index b = row_begin; b < row_end; ++b) {
      T* boundary = job.boundary + b * job.da_row;
      if (!rows.latest[b] || rows.latest[b] == boundary) continue;
      __builtin_memcpy(boundary + begin, rows.latest[b] + begin, size_t(bytes));
      rows.latest[b] = boundary;
    }
  }

  // [1 | x | h_prev | middle] of this thread's share of the chunk's rows.
  void gather_inputs() {
    if constexpr (kNumbers<O> > 1) return gather_pairs();
    const Index n = worker.region.threads, i = worker.region.thread;
    for (Index r = count * i / n; r < count * (i + 1) / n; ++r) {
      const Index t = rows.t[r], b = rows.b[r];
      T* row = job.inputs + r * job.inputs_row;
      const T* h_prev = h_before(t, b);
      row[0] = T(1);
      __builtin_memcpy(row + 1, job.x.at(t, b), size_t(job.I) * sizeof(T));
      __builtin_memcpy(row + 1 + job.I, h_prev, size_t(job.P) * sizeof(T));
      if (shape.phases == 2) {
        const T* saved = saved_row(t, b);  // r comes first
        for (Index u = 0; u < job.P; ++u) row[1 + job.I + job.P + u] = saved[offset(u, shape.saved)] * h_prev[u];
      }
      if (regularized)
        if (const T* dropout = masks().dropout(b))
          for (int part = 0; part < shape.phases; ++part)
            for (Index u = 0; u < job.P; ++u) row[1 + job.I + part * job.P + u] *= dropout[u];
    }
  }

  // The same of two rows at once, pairs of theirs. An odd one is with zeros.
  void gather_pairs() {
    const Index n = worker.region.threads, i = worker.region.thread, pairs = elements<O>(count);
    for (Index p = pairs * i / n; p < pairs * (i + 1) / n; ++p) {
      T* const row = job.inputs + p * job.inputs_row;
      const Index r = 2 * p, t = rows.t[r], b = rows.b[r];
      const bool two = r + 1 < count;
      const Index next_t = two ? rows.t[r + 1] : t, next_b = two ? rows.b[r + 1] : b;
      // Numbers, times those of r and of the mask where these are given.
      const auto pair = [&](const T* from, const T* next, const T* mask, const T* next_mask, const T* r,
                            const T* next_r, Index k, T* to) {
        for (Index u = 0; u < k; u += V::lanes) {
          V x = V::load(from + u, k - u), y = two ? V::load(next + u, k - u) : V::zero();
          const Index at = offset(u, shape.saved);
          if (r) x = V::load(r + at, k - u) * x, y = V::load(next_r + at, k - u) * y;
          if (mask) x = x * V::load(mask + u, k - u), y = y * V::load(next_mask + u, k - u);
          O::zip(x, y).store(to + u, k - u);
        }
      };
      O::zip(V::set(1), V::set(two)).store(row, 1);
      pair(job.x.at(t, b), job.x.at(next_t, next_b), nullptr, nullptr, nullptr, nullptr, job.I, row + 1);
      const T *mask = regularized ? masks().dropout(b) : nullptr, *other = mask ? masks().dropout(next_b) : nullptr;
      const T *h = h_before(t, b), *next_h = h_before(next_t, next_b);
      pair(h, next_h, mask, other, nullptr, nullptr, job.P, row + 1 + job.I);
      if (shape.phases == 2)  // r comes first in what is saved
        pair(h, next_h, mask, other, saved_row(t, b), saved_row(next_t, next_b), job.P, row + 1 + job.I + job.P);
    }
  }

  // dx of this thread's share of the chunk's rows, by multiply(da, block, lane, m, wide, acc).
  template <class Multiply>
  bool input_gradients(Multiply&& multiply) {
    const Index n = worker.region.threads, share_begin = count * worker.region.thread / n,
                share = count * (worker.region.thread + 1) / n - share_begin;
    const Tiling panels(blocks_of(job.I), width()), row_tiles(share, max_rows<O>(panels.pieces ? panels.begin(1) : 1));
    return each_tile(worker, job.rows_outside, row_tiles, panels, 0, [&](Index first, int m, Index block, int wide) {
      first += share_begin;
      const T* da[kMaxTile];
      for (int r = 0; r < m; ++r) da[r] = da_row(first + r);
      for (Index lane = 0; lane < kBlock; lane += V::lanes) {
        const int there = blocks_with(lane, job.I, block, wide);
        if (!there) break;
        alignas(64) T acc[kMaxTile * V::lanes];
        multiply(da, block, lane, m, there, acc);
        for (int r = 0; r < m; ++r)
          for (int w = 0; w < there; ++w) {
            const Index column = (block + w) * kBlock + lane;
            T* row = job.dx + (rows.t[first + r] * B + rows.b[first + r]) * job.I;
            V::load(acc + (w * m + r) * V::lanes).store(row + column, job.I - column);
          }
      }
    });
  }

  // The chunks of steps, the last first, by the loop's replay(first step, end), step(time, first row, end) and
  // gradients(whether the chunk is the first).
  template <class Loop>
  FUSEDRNN_INLINE bool walk_back(Loop& loop) {
    Index s_end = job.steps.T;
    do {
      const Index s_begin = s_end > job.chunk_steps ? s_end - job.chunk_steps : 0;
      list_rows(s_end, s_begin);
      if (!loop.replay(s_begin, s_end)) return false;
      for (Index s = s_end - 1, k = 0; s >= s_begin; --s, ++k) {
        Index begin = rows.first_of_step[k], end = rows.first_of_step[k + 1];
        own_rows(begin, end);
        if (!loop.step(time_of(job.steps, s), begin, end)) return false;
        if (!worker.by_rows && !worker.barrier()) return false;
      }
      if (!loop.gradients(s_end == job.steps.T)) return false;
      s_end = s_begin;
    } while (s_end > 0);
    return true;
  }

  // This thread's rows of the batch, before their first step; -> how many.
  FUSEDRNN_NOINLINE Index select_initial() const {
    Index n = 0;
    for (Index b = row_begin; b < row_end; ++b) {
      const bool empty = length_of(job.steps, b) == 0;
      const bool cut = !empty && before(job.steps, first_time(job.steps, b), b) == Before::nothing;
      rows.at[n] = {};
      rows.at[n].b = b;
      rows.at[n++].after = empty ? After::final_state : cut ? After::nothing : After::product;
    }
    return n;
  }

  // The gradient of the initial state: one more product, no cell.
  FUSEDRNN_NOINLINE bool initial_state() {
    const Index n = select_initial();
    const auto c = [&](const BackwardRow<T>& row, Index u, V dc) { dc.store(job.dc0 + row.b * job.H + u, job.H - u); };
    if (shape.projects && job.dc0)
      for (Index i = 0; i < n; ++i)
        for (Index u = block_begin * kBlock; u < block_end * kBlock; u += V::lanes)
          c(rows.at[i], u, dc_of(rows.at[i], u));
    return chains(shape, regularized, n, [&](const BackwardRow<T>& row, Index u, V dh, V dc) {
      if (job.dh0) dh.store(job.dh0 + row.b * job.P + u, job.P - u);
      if (shape.has_c && !shape.projects && job.dc0) c(row, u, dc);
    });
  }

  FUSEDRNN_NOINLINE void zero_padding() const {
    const Index n = worker.region.threads, i = worker.region.thread;
    for (Index b = B * i / n; b < B * (i + 1) / n; ++b)
      for (Index t = length_of(job.steps, b); t < job.steps.T; ++t)
        __builtin_memset(job.dx + (t * B + b) * job.I, 0, size_t(job.I) * sizeof(T));
  }

  // dx and the chunk's part of the weight gradients, of its rows of da.
  FUSEDRNN_NOINLINE bool gradients(bool first_chunk) {
    keep_boundary();
    if (job.need_weights) gather_inputs();
    if (!worker.barrier()) return false;
    const auto of_x = [&](const T* const* da, Index block, Index lane, int m, int wide, T* acc) {
      multiply(shape, job.input, shape.input, da, block, lane, m, wide, acc);
    };
    if (job.dx && !input_gradients(of_x)) return false;
    if (!weights.add(count, first_chunk)) return false;
    return worker.barrier();
  }
};

template <class Cell, class V, class O = V>
struct BackwardLoop : BackwardSteps<V, O> {
  using Base = BackwardSteps<V, O>;
  using T = typename V::scalar;
  using CellType = Cell;
  using Vector = V;
  using Operand = O;
  using Base::block_begin, Base::block_end;
  using Base::job, Base::worker, Base::rows, Base::B, Base::units, Base::masks, Base::offset;
  static constexpr int A = Cell::accumulators;
  static constexpr CellShape shape = shape_of<Cell>();

  BackwardLoop(const BackwardJob<T>& job_, const Worker& worker_) : Base(job_, worker_, shape, kRegularized<Cell>) {
    if constexpr (Cell::layer_norm)
      if (job.norm_sums)
        __builtin_memset(job.norm_sums + this->row_begin * units * kNormSums<Cell>, 0,
                         size_t((this->row_end - this->row_begin) * units * kNormSums<Cell>) * sizeof(T));
  }

  bool step(Index t, Index begin, Index end) {
    const Index n = end - begin;
    for (Index i = 0; i < n; ++i) rows.at[i] = this->row_at(shape, t, rows.b[begin + i], this->da_row(begin + i));
    if constexpr (kRegularized<Cell>) {
      const T *keep_h = masks().keep_h(t, rows.b + begin, n), *keep_c = masks().keep_c(t, rows.b + begin, n);
      for (Index i = 0; i < n; ++i) {
        rows.at[i].keep_h = keep_h ? keep_h + i * units : nullptr;
        rows.at[i].keep_c = keep_c ? keep_c + i * units : nullptr;
      }
    }
    const bool done = this->chains(shape, kRegularized<Cell>, n, [&](const BackwardRow<T>& row, Index u, V dh, V dc) {
      if constexpr (Cell::projects)
        projected_at(row, u, dh);
      else
        cell_at(row, u, dh, dc);
    });
    if (!done) return false;
    if constexpr (Cell::projects) {
      if (!worker.by_rows && !worker.barrier()) return false;
      if (!through_projection(n)) return false;
    }
    if constexpr (Cell::layer_norm)
      for (Index i = 0; i < n; ++i) {
        normed_row_backward(*this, rows.at[i]);
        if ((i & 15) == 0 && !worker.poll()) return false;
      }
    for (Index i = 0; i < n; ++i) rows.latest[rows.at[i].b] = rows.at[i].da;
    if constexpr (Cell::phases == 2) {
      if (!worker.by_rows && !worker.barrier()) return false;
      for (Index i = 0; i < n; ++i) rows.da[i] = rows.at[i].da;
      return this->tiles(n, block_begin, block_end, [&](Index first, int m, Index block, int wide, Index lane) {
        wide = blocks_with(lane, job.H, block, wide);
        if (!wide) return;
        alignas(64) T acc[kMaxTile * V::lanes];
        this->multiply(shape, job.recurrent2, Cell::recurrent2, rows.da + first, block, lane, m, wide, acc);
        for (int i = 0; i < m; ++i)
          for (int w = 0; w < wide; ++w)
            cell2_at(rows.at[first + i], (block + w) * kBlock + lane, V::load(acc + (w * m + i) * V::lanes));
      });
    }
    return true;
  }

  // The gradients of what the step's rows project, then the cell on them.
  bool through_projection(Index n) const {
    for (Index i = 0; i < n; ++i) rows.da[i] = rows.at[i].da + this->weights.dh_operand_at;
    return this->tiles(n, block_begin, block_end, [&](Index first, int m, Index block, int wide, Index lane) {
      wide = blocks_with(lane, job.H, block, wide);
      if (!wide) return;
      alignas(64) T acc[kMaxTile * V::lanes];
      for (int k = 0; k < m * wide; ++k) V::zero().store(acc + k * V::lanes);
      add_product<O>(rows.da + first, job.P, job.projection, block, lane, m, wide, acc);
      for (int i = 0; i < m; ++i)
        for (int w = 0; w < wide; ++w) {
          const BackwardRow<T>& row = rows.at[first + i];
          const Index u = (block + w) * kBlock + lane;
          V dc = this->dc_of(row, u);
          const V dc_before = add_upstream_c(row, u, dc);
          gates_at(row, u, V::load(acc + (w * m + i) * V::lanes), dc, V::zero(), dc_before);
        }
    });
  }

  // One vector of a projected h of one row: its gradient is kept for the products with weight_hr and its gradient.
  FUSEDRNN_INLINE void projected_at(const BackwardRow<T>& row, Index u, V dh) const {
    const V dh_before = add_upstream_h(row, u, dh);
    dh.store(row.da + this->weights.dh_at + u);
    if constexpr (kNumbers<O> > 1) put_operand<O>(dh, row.da + this->weights.dh_operand_at, u);
    if constexpr (kRegularized<Cell>) dh_before.store(job.direct + row.b * units + u);
  }

  // What comes in beside the chain; -> of zoneout, what goes past the cell to the state before.
  FUSEDRNN_INLINE V add_upstream_h(const BackwardRow<T>& row, Index u, V& dh) const {
    const Index in_row = job.P - u;
    if (row.dy) dh = dh + V::load(row.dy + u, in_row);
    if (row.dh_state) dh = dh + V::load(row.dh_state + u, in_row);
    if constexpr (kRegularized<Cell>)
      if (row.keep_h) return Cell::zoneout_backward(V::load(row.keep_h + u), dh);
    return V::zero();
  }
  FUSEDRNN_INLINE V add_upstream_c(const BackwardRow<T>& row, Index u, V& dc) const {
    if (Cell::has_c && row.dc_state) dc = dc + V::load(row.dc_state + u, job.H - u);
    if constexpr (kRegularized<Cell>)
      if (row.keep_c) return Cell::zoneout_backward(V::load(row.keep_c + u), dc);
    return V::zero();
  }

  // One vector of units of one row: the upstream gradients, then the cell.
  FUSEDRNN_INLINE void cell_at(const BackwardRow<T>& row, Index u, V dh, V dc) const {
    const V dh_before = add_upstream_h(row, u, dh), dc_before = add_upstream_c(row, u, dc);
    if constexpr (Cell::layer_norm) {  // needs all units: normed_row_backward
      if constexpr (kRegularized<Cell>) {
        dh_before.store(job.direct + row.b * units + u);
        if (Cell::has_c) dc_before.store(job.dc + row.b * units + u);
      }
      dh.store(row.da + offset(u, A));
      if (Cell::has_c) dc.store(row.da + offset(u, A) + kBlock);
    } else {
      gates_at(row, u, dh, dc, dh_before, dc_before);
    }
  }

  FUSEDRNN_INLINE void load_saved(const BackwardRow<T>& row, Index u, V* saved) const {
    const Index step = units_of(job.H, u / kBlock);
    for (int s = 0; s < Cell::saved; ++s) saved[s] = V::load(row.saved + offset(u, Cell::saved) + s * step, job.H - u);
  }

  FUSEDRNN_INLINE void gates_at(const BackwardRow<T>& row, Index u, V dh, V dc, V dh_before, V dc_before) const {
    const Index in_row = job.H - u;
    V saved[Cell::saved + 1], da[A], dc_prev = V::zero(), direct = V::zero();
    load_saved(row, u, saved);
    const V h_prev = Cell::reads_h_prev ? V::load(row.h_prev + u, in_row) : V::zero();
    const V h = Cell::reads_h ? V::load(row.h + u, in_row) : V::zero();
    const V c_prev = Cell::has_c ? V::load(row.c_prev + u, in_row) : V::zero();
    const V c = Cell::has_c ? V::load(row.c + u, in_row) : V::zero();
    Cell::backward(saved, h_prev, h, c_prev, c, dh, dc, da, dc_prev, direct);
    if constexpr (kRegularized<Cell>) direct = direct + dh_before, dc_prev = dc_prev + dc_before;
    const Index step = units_of(job.H, u / kBlock) < kBlock ? this->last : kBlock;
    // In ascending order: a whole vector is stored over what comes behind it.
    for (int s = 0; s < A; ++s) put_operand<O>(da[s], row.da, offset(u, A) + s * step);
    if (Cell::has_c) dc_prev.store(job.dc + row.b * units + u);
    if (Cell::has_direct && !Cell::projects) direct.store(job.direct + row.b * units + u);
    if constexpr (Cell::projects)
      if (job.dprojection) Cell::new_h(saved, c_prev, c).store(row.da + this->weights.unprojected_at + u);
  }

  FUSEDRNN_INLINE void cell2_at(const BackwardRow<T>& row, Index u, V dmiddle) const {
    if constexpr (Cell::phases == 2) {
      V saved[Cell::saved], da_r, direct = V::load(job.direct + row.b * units + u);
      load_saved(row, u, saved);
      if constexpr (kRegularized<Cell>) dmiddle = masks().dropped(row.b, u, dmiddle);
      Cell::backward2(saved, V::load(row.h_prev + u, job.H - u), dmiddle, da_r, direct);
      if constexpr (kNumbers<O> > 1)
        put_operand<O>(da_r, row.da, offset(u, A));
      else
        da_r.store(row.da + offset(u, A), job.H - u);  // the other accumulators may be next to it
      direct.store(job.direct + row.b * units + u);
    }
  }

  // Runs forward again over a chunk, from the state before it, where it was not saved.
  bool replay(Index s_begin, Index s_end) {
    if (!job.replay) return true;
    this->kept.first = job.steps.reverse ? job.steps.T - s_end : s_begin;
    this->kept.count = s_end - s_begin;
    this->kept.c_boundary = const_cast<T*>(job.boundary_states) + (job.steps.T - s_end) / job.chunk_steps * B * job.H;
    ForwardJob<T> again = *job.replay;
    again.kept = this->kept;
    return ForwardLoop<Cell, V, O>(again, worker).walk(s_begin, s_end);
  }

  bool run() {
    if (!this->walk_back(*this)) return false;
    if ((job.dh0 || job.dc0) && !this->initial_state()) return false;
    if (job.dx && job.steps.lengths) this->zero_padding();
    if constexpr (Cell::layer_norm)
      if (job.norm_sums) unpack_norm_sums(*this);
    this->weights.unpack();
    return true;
  }
};
}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
