// The time loop forward, for any cell. It knows no gates. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cells/regularized.h"
#include "cpu/layer_norm.h"
#include "cpu/masks.h"
#include "cpu/one_row.h"
#include "cpu/pack.h"
#include "cpu/tile.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::CellShape;
using cpu::ForwardJob;
using cpu::kBlock;
using cpu::Packed;
using cpu::Worker;

// The valid rows of one step: what each reads, and where its results go.
template <class T>
struct ForwardRows {
  Index count = 0;
  const T **x, **h, **c;
  T **h_out, **c_out, **middle, **sums, **saved, **c_state;  // the last three: null where not wanted
  const T** operand;                                         // h as weight_hh meets it
  // Of regularized cells: the rows' numbers, and what zoneout keeps (cpu/masks.h).
  Index* b;
  const T *keep_h, *keep_c;

  static Index bytes(Index B) { return B * Index(10 * sizeof(T*) + sizeof(Index)); }
  ForwardRows(char* memory, Index B) {
    x = reinterpret_cast<const T**>(memory);
    h = x + B, c = h + B;
    h_out = const_cast<T**>(c + B);
    c_out = h_out + B, middle = c_out + B, sums = middle + B, saved = sums + B, c_state = saved + B;
    operand = const_cast<const T**>(c_state + B);
    b = reinterpret_cast<Index*>(operand + B);
  }
};

// Vectors of a block in a tile (with layer norm those of one part), and blocks per panel: an Elman tile takes several
// blocks to fill the registers.
constexpr int tile_vectors(const CellShape& shape) { return shape.layer_norm ? shape.gates : shape.accumulators; }
constexpr int panel_blocks(const CellShape& shape) { return tile_vectors(shape) == 1 ? 4 : 1; }

template <class Cell>
constexpr CellShape shape_of() {
  return {Cell::gates,      Cell::accumulators, Cell::saved, Cell::phases,    Cell::has_c,     Cell::has_direct,
          Cell::layer_norm, Cell::projects,     Cell::input, Cell::recurrent, Cell::recurrent2};
}

// What the time loop needs around a cell, compiled once for all of them: compiling it for each took half of the build.
// O is what the products multiply: V, or Pairs.
template <class V, class O = V>
struct ForwardSteps : Share {
  using T = typename V::scalar;

  const ForwardJob<T>& job;
  const Worker& worker;
  const CellShape& shape;
  const bool regularized;
  ForwardRows<T> rows;
  ForwardRows<T> ahead;   // the rows of several steps, for W x of all
  Index ahead_begin = 0;  // the first of these steps
  // Weights of the blocks from `packed_from` on.
  Packed<T> input, recurrent, recurrent2, projection;
  Index packed_from = 0;
  T* operands = nullptr;  // where the next row of pairs goes

  // Rows that are so few that each accumulator is summed up by itself where weights are as they lie: those of a tile of
  // as many vectors as a block has of an accumulator.
  static constexpr int kFewVectors = kBlock / V::lanes < 4 ? int(kBlock) / V::lanes : 4,
                       kFewRows = max_rows<V>(kFewVectors) < 8 ? max_rows<V>(kFewVectors) : 8;
  static_assert(kOneRow<V> <= cpu::kPanelVectors && 4 <= cpu::kPanelVectors);
  alignas(64) T few[kFewRows * 4 * kBlock];

  // Of a regularized cell.
  Masks<T> masks() const {
    const Index B = job.steps.B, units = job.blocks * kBlock;
    return {job.regularization, worker.region.thread, B, units, h_begin, h_end, block_begin, block_end};
  }

  FUSEDRNN_NOINLINE ForwardSteps(const ForwardJob<T>& job_, const Worker& worker_, const CellShape& shape_,
                                 bool regularized_)
      : Share(job_.steps, job_.blocks, job_.P, worker_),
        job(job_),
        worker(worker_),
        shape(shape_),
        regularized(regularized_),
        rows(job_.scratch + worker_.region.thread * job_.scratch_step, job_.steps.B),
        ahead(job_.scratch + worker_.region.thread * job_.scratch_step + ForwardRows<T>::bytes(job_.steps.B),
              job_.ahead_steps * job_.steps.B) {
    input = job.input, recurrent = job.recurrent, recurrent2 = job.recurrent2, projection = job.projection;
  }

  T* panel() const { return job.panel + worker.region.thread * job.panel_step; }

  // Packs the weights of a panel, where they were not: of a phase, blocks [block, block + wide).
  FUSEDRNN_NOINLINE void pack_panel(int phase, Index block, int wide) {
    T* to = panel();
    packed_from = block;
    const auto take = [&](const T* weight, Index rows, Index k, const Part& part, Packed<T>& packed) {
      packed = {to, elements<O>(k) * part.count * kBlock};
      pack<O>(PackJob<T>{weight, rows, k, part, to, packed.block_step, block, block + wide});
      to += wide * packed.block_step;
    };
    if (phase == 2 && shape.projects) return take(job.weight_hr, job.P, job.H, cpu::kProjection, projection);
    if (phase == 2) return take(job.weight_hh, job.H, job.P, shape.recurrent2, recurrent2);
    take(job.weight_ih, job.H, job.I, shape.input, input);
    take(job.weight_hh, job.H, job.P, shape.recurrent, recurrent);
  }

  // Sums of a block, [accumulator][vector][row], of few rows and weights as they lie. Those of one accumulator, packed,
  // stay in L1 until they are multiplied.
  FUSEDRNN_NOINLINE void sum_few_rows(Index block) {
    const Index H = job.H;
    const int A = shape.accumulators, m = int(rows.count);
    for (int s = 0; s < A; ++s)
      for (Index lane = 0; lane < kBlock; lane += V::lanes) {
        const V bias = V::load(job.bias + (block * A + s) * kBlock + lane);
        for (int i = 0; i < m; ++i) bias.store(few + (s * kBlock + lane) * m + i * V::lanes);
      }
    const auto add = [&](const T* weight, Index k, const Part& part, const T* const* a) {
      for (int s = 0; s < part.count; ++s) {
        T* const to = few + (part.first + s) * kBlock * m;
        if (V::fused && m == 1 && units_of(H, block) == kBlock) {
          add_row<V>(weight + (part.gate[s] * H + block * kBlock) * k, k, a[0], to);
          continue;
        }
        pack<V>(PackJob<T>{weight, H, k, Part{0, 1, {part.gate[s]}}, panel(), k * kBlock, block, block + 1});
        for (Index lane = 0; lane < kBlock; lane += kFewVectors * V::lanes) {
          const Product<T> p = {a, 0, 1, 0, panel() + lane * k, V::lanes, k * V::lanes, 1, k};
          tile_for<V>(m, kFewVectors)(&p, 1, to + lane * m);
        }
      }
    };
    add(job.weight_ih, job.I, shape.input, rows.x);
    add(job.weight_hh, job.P, shape.recurrent, regularized ? rows.operand : rows.h);
  }

  // Of cells with c.
  T* c_row(Index t, Index b) const {
    return job.kept.has(t) ? job.kept.c + job.kept.row(t, b) * job.H : job.kept.c_boundary + b * job.H;
  }
  T* saved_row(Index t, Index b) const {
    return job.kept.saved ? job.kept.saved + job.kept.row(t, b) * (shape.saved * job.H) : nullptr;
  }
  T* ahead_row(Index s, Index b) const {
    return job.ahead ? job.ahead + ((s - ahead_begin) * job.steps.B + b) * job.blocks * (shape.input.count * kBlock)
                     : nullptr;
  }
  T* h_out(Index t, Index b) const { return job.h_out + t * job.h_out_step + b * job.P; }

  // A row of n numbers as products read it, in the memory of this thread if that is another one.
  FUSEDRNN_INLINE const T* operand(const T* row, Index n) {
    if constexpr (kNumbers<O> == 1) return row;
    T* const to = operands;
    for (Index k = 0; k < n; k += kBlock, operands += kBlock / kNumbers<O>)
      if constexpr (kNumbers<O> > 1) O::put(V::load(row + k, n - k), operands);
    return to;
  }
  void free_operands() {
    const Index before = worker.by_rows ? row_begin : worker.region.thread * job.steps.B;
    operands = job.operands + before * job.operands_row;
  }

  FUSEDRNN_NOINLINE void select_rows(Index s) {
    if constexpr (kNumbers<O> > 1) free_operands();
    const Steps& steps = job.steps;
    const Index t = time_of(steps, s);
    const Index before_t = steps.reverse ? t + 1 : t - 1, B = steps.B;
    const bool has_c = shape.has_c;
    Index i = 0;
    for (Index b = row_begin; b < row_end; ++b) {
      if (!valid(steps, t, b)) continue;
      rows.x[i] = job.x.at(t, b);
      rows.middle[i] = job.middle ? job.middle + b * job.blocks * kBlock : nullptr;
      rows.h_out[i] = h_out(t, b);
      rows.c_out[i] = has_c ? c_row(t, b) : nullptr;
      rows.sums[i] = ahead_row(s, b);
      rows.saved[i] = saved_row(t, b);
      rows.c_state[i] = has_c && job.c_states ? job.c_states + (t * B + b) * job.H : nullptr;
      switch (before(steps, t, b)) {
        case Before::previous:
          rows.h[i] = job.y + (before_t * B + b) * job.P;
          rows.c[i] = has_c ? c_row(before_t, b) : nullptr;
          break;
        case Before::start:
          rows.h[i] = job.h0 ? job.h0 + b * job.P : job.zeros;
          rows.c[i] = job.c0 ? job.c0 + b * job.H : job.zeros;
          break;
        case Before::nothing:
          rows.h[i] = rows.c[i] = job.zeros;
          break;
      }
      if (regularized) {
        rows.b[i] = b;
        rows.operand[i] = masks().operand(i, b, rows.h[i], job.P);
      }
      if constexpr (kNumbers<O> > 1) {
        if (!job.ahead) rows.x[i] = operand(rows.x[i], job.I);
        rows.operand[i] = operand(regularized ? rows.operand[i] : rows.h[i], job.P);
      }
      ++i;
    }
    rows.count = i;
    if (regularized) {
      rows.keep_h = masks().keep_h(t, rows.b, rows.count);
      rows.keep_c = masks().keep_c(t, rows.b, rows.count);
    }
  }

  // One part's product: rows [first, first+m) times the weights of `wide` blocks, from lane `lane` of each block.
  static FUSEDRNN_INLINE Product<T> product(const CellShape& shape, const Packed<T>& weights, const Part& part,
                                            const T* const* a, Index k, Index block, Index lane) {
    const Index K = elements<O>(k), n = V::lanes;
    const Index gap = panel_blocks(shape) > 1 ? weights.block_step : kApart<O> ? K * n : n;
    return {a,
            0,
            1,
            0,
            weights.data + block * weights.block_step + lane * K * part.count,
            kApart<O> ? n : part.count * n,
            gap,
            1,
            K,
            weights.block_step,
            tile_vectors(shape)};
  }

  static FUSEDRNN_INLINE auto tile_of(const CellShape& shape, int m, const Part& part, int wide) {
    if constexpr (kOneRow<O> == 8)
      if (panel_blocks(shape) == 1 && wide == 2) return tile_for_two_blocks<O>(part.count);
    return tile_for<O>(m, part.count * wide);
  }

  // acc[wide][A][m] = bias.
  FUSEDRNN_INLINE void start(const CellShape& shape, Index block, int wide, int m, Index lane, T* acc) const {
    const int A = shape.accumulators;
    for (int n = 0; n < wide * A; ++n) {
      const V bias = V::load(job.bias + (block * A + n) * kBlock + lane);
      for (int i = 0; i < m; ++i) bias.store(acc + (n * m + i) * V::lanes);
    }
  }

  // Where the input's accumulators of tile row i lie in acc, and in a row of job.ahead: then(acc, row).
  template <class Then>
  FUSEDRNN_INLINE void each_ahead(T* const* to, Index block, int wide, int m, Index lane, T* acc, Then&& then) const {
    for (int w = 0; w < wide; ++w)
      for (int s = 0; s < shape.input.count; ++s)
        for (int i = 0; i < m; ++i)
          then(acc + ((w * shape.accumulators + shape.input.first + s) * m + i) * V::lanes,
               to[i] + ((block + w) * shape.input.count + s) * kBlock + lane);
  }
  // Whether a product over k numbers, of this block, reads the weights whose accumulators lie side by side: where that
  // saves more than moving the sums costs. One row alone would wait for its sums as long.
  FUSEDRNN_INLINE bool is_narrow(const Part& part, Index k, Index block) const {
    const Index units = narrow_units<O>(job.H);
    return job.narrow && units < kBlock && block == job.H / kBlock && rows.count > 1 &&
           (part.count - narrow_vectors<O>(units, part.count)) * k >= 64;
  }
  FUSEDRNN_INLINE Product<T> narrow_product(const Packed<T>& weights, const Part& part, const T* const* a,
                                            Index k) const {
    const Index n = V::lanes, vectors = narrow_vectors<O>(narrow_units<O>(job.H), part.count);
    const T* const b = weights.data + job.blocks * weights.block_step;
    return {a, 0, 1, 0, b, kApart<O> ? n : vectors * n, kApart<O> ? k * n : n, 1, k};
  }
  // Adds such products to acc[A][m], of one part.
  FUSEDRNN_NOINLINE void add_narrow(const Product<T>* products, int count, const Part& part, int m, T* acc) const {
    constexpr Index n = V::lanes;
    const Index units = narrow_units<O>(job.H);
    const int vectors = narrow_vectors<O>(units, part.count);
    alignas(64) T sums[(kMaxTile + 1) * n];
    const auto each = [&](auto&& then) {
      for (int v = 0, s = 0; v < vectors; ++v, s += int(n / units))
        for (int i = 0; i < m; ++i)
          for (Index at = 0; at < n && s + at / units < part.count; at += units)
            then(acc + ((part.first + s + at / units) * m + i) * n, sums + (v * m + i) * n + at);
    };
    // Whole vectors, each over what the one before has stored beyond its units.
    each([](const T* sum, T* to) { V::load(sum).store(to); });
    tile_for<O>(m, vectors)(products, count, sums);
    each([](T* sum, const T* from) { V::load(from).store(sum); });
  }

  // W x of rows, made before, to where the tile sums it up.
  void load_ahead(T* const* from, Index block, int wide, int m, Index lane, T* acc) const {
    each_ahead(from, block, wide, m, lane, acc, [](T* sum, const T* row) { V::load(row).store(sum); });
  }

  // bias + W x of steps [begin, end): few rows a step would read W from afar once a step.
  FUSEDRNN_NOINLINE bool sum_ahead(Index begin, Index end) {
    ahead_begin = begin;
    if constexpr (kNumbers<O> > 1) free_operands();
    Index n = 0;
    for (Index s = begin; s < end; ++s) {
      const Index t = time_of(job.steps, s);
      for (Index b = row_begin; b < row_end; ++b)
        if (valid(job.steps, t, b)) ahead.x[n] = job.x.at(t, b), ahead.sums[n++] = ahead_row(s, b);
    }
    if constexpr (kNumbers<O> > 1)
      for (Index i = 0; i < n; ++i) ahead.x[i] = operand(ahead.x[i], job.I);
    const Tiling tiles(n, max_rows<O>(tile_vectors(shape) * panel_blocks(shape))),
        panels(block_end - block_begin, panel_blocks(shape));
    return each_tile(worker, false, tiles, panels, block_begin, [&](Index first, int m, Index block, int wide) {
      for (Index lane = 0; lane < kBlock; lane += V::lanes) {
        alignas(64) T acc[kMaxTile * V::lanes];
        const int there = blocks_with(lane, job.H, block, wide);
        if (!there) break;
        start(shape, block, there, m, lane, acc);
        const Product<T> p = product(shape, input, shape.input, ahead.x + first, job.I, block, lane);
        tile_of(shape, m, shape.input, there)(&p, 1, acc + shape.input.first * m * V::lanes);
        each_ahead(ahead.sums + first, block, there, m, lane, acc,
                   [](const T* sum, T* row) { V::load(sum).store(row); });
      }
    });
  }

  // Padding of y and of the all-step states, and the final states, for this thread's rows.
  FUSEDRNN_NOINLINE void finish() {
    const Steps& steps = job.steps;
    const Index B = steps.B, P = job.P, H = job.H, n = worker.region.threads, i = worker.region.thread;
    const auto copy = [](T* to, const T* from, Index count) {
      if (to != from) __builtin_memcpy(to, from, size_t(count) * sizeof(T));
    };
    for (Index b = B * i / n; b < B * (i + 1) / n; ++b) {
      const Index length = length_of(steps, b), last = length ? last_time(steps, b) : 0;
      const T* h = length ? job.y + (last * B + b) * P : job.h0 ? job.h0 + b * P : job.zeros;
      const T* c = !shape.has_c ? nullptr : length ? c_row(last, b) : job.c0 ? job.c0 + b * H : job.zeros;
      for (Index t = length; t < steps.T; ++t) __builtin_memset(h_out(t, b), 0, size_t(P) * sizeof(T));
      copy(job.hT + b * P, h, P);  // behind y, which may be the same of one step
      if (shape.has_c) copy(job.cT + b * H, c, H);
      // In reverse the padding comes before the first step: there the initial state is held.
      const T* held_h = steps.reverse ? (job.h0 ? job.h0 + b * P : job.zeros) : h;
      const T* held_c = steps.reverse ? (job.c0 ? job.c0 + b * H : job.zeros) : c;
      if (job.h_states)
        for (Index t = 0; t < steps.T; ++t)
          copy(job.h_states + (t * B + b) * P, t < length ? job.y + (t * B + b) * P : held_h, P);
      if (job.c_states)
        for (Index t = length; t < steps.T; ++t) copy(job.c_states + (t * B + b) * H, held_c, H);
    }
  }

  // c before step s, if a chunk begins there: chunks are counted from the end.
  FUSEDRNN_NOINLINE void keep_boundary(Index s) {
    const Index left = job.steps.T - s, t = time_of(job.steps, s - 1), H = job.H;
    if (!left || left % job.chunk_steps) return;
    T* boundary = job.boundary_states + (left / job.chunk_steps - 1) * job.steps.B * H;
    const Index first = block_begin * kBlock, end = block_end < job.blocks ? block_end * kBlock : H;
    for (Index b = row_begin; b < row_end; ++b)
      if (valid(job.steps, t, b))
        __builtin_memcpy(boundary + b * H + first, job.kept.c + b * H + first, size_t(end - first) * sizeof(T));
  }
};

template <class Cell, class V, class O = V>
struct ForwardLoop : ForwardSteps<V, O> {
  using Base = ForwardSteps<V, O>;
  using T = typename V::scalar;
  using CellType = Cell;
  using Vector = V;
  using Operand = O;
  using Base::input, Base::recurrent, Base::recurrent2, Base::packed_from;
  using Base::job, Base::worker, Base::rows, Base::block_begin, Base::block_end, Base::masks;
  static constexpr int A = Cell::accumulators;
  static constexpr CellShape shape = shape_of<Cell>();
  static constexpr int kWide = panel_blocks(shape);
  static constexpr int kRows = max_rows<O>(tile_vectors(shape) * kWide);
  static constexpr int kPhases = Cell::phases + Cell::projects;
  static constexpr bool kOperands = kRegularized<Cell> || kNumbers<O> > 1;  // of h, which are not h itself
  Prefetch prefetch;

  ForwardLoop(const ForwardJob<T>& job_, const Worker& worker_) : Base(job_, worker_, shape, kRegularized<Cell>) {}

  // `whole`: of a block with all its units, which begins with a cache line.
  static FUSEDRNN_INLINE void keep(V v, T* to, Index in_row, [[maybe_unused]] bool whole,
                                   [[maybe_unused]] bool stream) {
    if constexpr (V::whole_lines)
      if (stream && whole) return v.stream(to);
    v.store(to, in_row);
  }

  // Products of phase 1: acc[wide][A][m] = bias + W x + W h.
  FUSEDRNN_INLINE void multiply(Index first, int m, Index block, int wide, Index lane, T* acc) {
    this->start(shape, block, wide, m, lane, acc);
    constexpr bool together = Cell::input.first == Cell::recurrent.first && Cell::input.count == Cell::recurrent.count;
    const bool narrow_h = this->is_narrow(Cell::recurrent, together ? job.I + job.P : job.P, block),
               narrow_x = together ? narrow_h : this->is_narrow(Cell::input, job.I, block);
    const auto product = [&](bool narrow, const Packed<T>& weights, const Part& part, const T* const* a, Index k) {
      return narrow ? this->narrow_product(weights, part, a, k)
                    : Base::product(shape, weights, part, a, k, block - packed_from, lane);
    };
    const auto add = [&](bool narrow, const Product<T>* products, int count, const Part& part) {
      if (narrow)
        this->add_narrow(products, count, part, m, acc);
      else
        Base::tile_of(shape, m, part, wide)(products, count, acc + part.first * m * V::lanes);
    };
    Product<T> products[2] = {
        product(narrow_x, input, Cell::input, rows.x + first, job.I),
        product(narrow_h, recurrent, Cell::recurrent, (kOperands ? rows.operand : rows.h) + first, job.P)};
    prefetch.during<V, O>(products[0], input, lane);
    prefetch.during<V, O>(products[1], recurrent, lane);
    if (job.ahead) {
      this->load_ahead(rows.sums + first, block, wide, m, lane, acc);
      add(narrow_h, products + 1, 1, Cell::recurrent);
    } else if constexpr (together) {
      add(narrow_h, products, 2, Cell::input);
    } else {
      add(narrow_x, products, 1, Cell::input);
      add(narrow_h, products + 1, 1, Cell::recurrent);
    }
  }

  // Tile of phase 1: accumulators of rows [first, first+m) and blocks [block, block+wide), then the cell on them.
  void phase1(Index first, int m, Index block, int wide, Index lane) {
    alignas(64) T acc[kMaxTile * V::lanes];
    if (few_rows(1)) {
      const T* const sums = this->few + lane * rows.count + first * V::lanes;
      for (int s = 0; s < A; ++s)
        for (int i = 0; i < m; ++i)
          V::load(sums + s * kBlock * rows.count + i * V::lanes).store(acc + (s * m + i) * V::lanes);
    } else {
      multiply(first, m, block, wide, lane, acc);
    }
    // Local: a store could change whatever is reached through a pointer, and it would be read again for every vector.
    const T *const *h_prevs = rows.h + first, *const *c_prevs = rows.c + first;
    T *const *h_outs = (kPhases == 2 ? rows.middle : rows.h_out) + first, *const *c_outs = rows.c_out + first,
             *const *saveds = rows.saved + first, *const *c_states = rows.c_state + first;
    const Index H = job.H;
    const bool stream = job.stream;
    for (int w = 0; w < wide; ++w) {
      const Index u = (block + w) * kBlock + lane, in_row = H - u, units = units_of(H, block + w);
      const Index at = (block + w) * (Cell::saved * kBlock) + lane;
      for (int i = 0; i < m; ++i) {
        V a[A], saved[Cell::saved + 1], h, c;
        for (int s = 0; s < A; ++s) a[s] = V::load(acc + ((w * A + s) * m + i) * V::lanes);
        const V h_prev = Cell::reads_h_prev ? V::load(h_prevs[i] + u, in_row) : V::zero();
        const V c_prev = Cell::has_c ? V::load(c_prevs[i] + u, in_row) : V::zero();
        Cell::forward(a, h_prev, c_prev, saved, h, c);
        if constexpr (kRegularized<Cell>) {
          if constexpr (Cell::phases == 2)
            h = masks().dropped(rows.b[first + i], u, h);
          else if constexpr (!Cell::projects)
            h = zoned(rows.keep_h, first + i, u, h, h_prev);
          if constexpr (Cell::has_c) c = zoned(rows.keep_c, first + i, u, c, c_prev);
        }
        if (T* out = saveds[i])
          for (int s = 0; s < Cell::saved; ++s) keep(saved[s], out + at + s * units, in_row, units == kBlock, stream);
        if (Cell::has_c) {
          c.store(c_outs[i] + u, in_row);
          if (c_states[i]) c.store(c_states[i] + u, in_row);
        }
        if constexpr (kPhases == 2 && kNumbers<O> > 1)  // a pair may hold a unit that does not exist, which may be NaN
          put_operand<O>(O::first(h, in_row), h_outs[i], u);
        else if constexpr (kPhases == 2)
          put_operand<O>(h, h_outs[i], u);
        else
          rounded<O>(h).store(h_outs[i] + u, in_row);
      }
    }
  }

  // Of a regularized cell: the state by zoneout, where that acts.
  FUSEDRNN_INLINE V zoned(const T* keep, Index i, Index u, V candidate, V before) const {
    return keep ? Cell::zoneout(V::load(keep + i * job.blocks * kBlock + u), candidate, before) : candidate;
  }

  // Tile of phase 2: one more product into one accumulator, which waits among the saved values.
  void phase2(Index first, int m, Index block, int wide, Index lane) {
    if constexpr (Cell::phases == 2) {
      constexpr int slot = Cell::recurrent2.first;
      const Index H = job.H, at = block * (Cell::saved * kBlock) + lane;
      alignas(64) T acc[kMaxTile * V::lanes];
      for (int w = 0; w < wide; ++w)
        for (int i = 0; i < m; ++i)
          V::load(rows.saved[first + i] + at + w * (Cell::saved * kBlock) + slot * units_of(H, block + w),
                  H - (block + w) * kBlock - lane)
              .store(acc + (w * m + i) * V::lanes);
      add_product<O>(rows.middle + first, job.P, recurrent2, block - packed_from, lane, m, wide, acc);
      for (int w = 0; w < wide; ++w) {
        const Index u = (block + w) * kBlock + lane, in_row = H - u, units = units_of(H, block + w);
        for (int i = 0; i < m; ++i) {
          T* row = rows.saved[first + i] + at + w * (Cell::saved * kBlock);
          V saved[Cell::saved], h;
          for (int s = 0; s < Cell::saved; ++s) saved[s] = V::load(row + s * units, in_row);
          const V h_prev = V::load(rows.h[first + i] + u, in_row);
          Cell::forward2(V::load(acc + (w * m + i) * V::lanes), h_prev, saved, h);
          if constexpr (kRegularized<Cell>) h = zoned(rows.keep_h, first + i, u, h, h_prev);
          saved[slot].store(row + slot * units, in_row);
          rounded<O>(h).store(rows.h_out[first + i] + u, in_row);
        }
      }
    }
  }

  // Tile of the projection: h from what phase 1 has left.
  void project_tile(Index first, int m, Index block, int wide, Index lane) {
    alignas(64) T acc[kMaxTile * V::lanes];
    for (int n = 0; n < wide * m; ++n) V::zero().store(acc + n * V::lanes);
    add_product<O>(rows.middle + first, job.H, this->projection, block - packed_from, lane, m, wide, acc);
    for (int w = 0; w < wide; ++w) {
      const Index u = (block + w) * kBlock + lane, in_row = job.P - u;
      for (int i = 0; i < m; ++i) {
        V h = V::load(acc + (w * m + i) * V::lanes);
        if constexpr (kRegularized<Cell>)
          h = zoned(rows.keep_h, first + i, u, h, V::load(rows.h[first + i] + u, in_row));
        rounded<O>(h).store(rows.h_out[first + i] + u, in_row);
      }
    }
  }

  // Whether the sums are those of sum_few_rows.
  bool few_rows(int phase) const {
    return kNumbers<O> == 1 && phase == 1 && rows.count <= Base::kFewRows && job.weight_hh;
  }

  // Blocks per tile: in phase 2, with one accumulator, as many as a tile of phase 1 has vectors.
  Index width(int phase) const {
    if (few_rows(phase)) return 1;
    if (rows.count > 1) return phase == 1 ? kWide : A * kWide;
    return kWide == 1 && phase == 1 ? kOneRow<O> / 4 : kOneRow<O>;
  }

  bool step(int phase) {
    const bool of_h = Cell::projects && phase == 2;
    const Index begin = of_h ? this->h_begin : block_begin, end = of_h ? this->h_end : block_end;
    const Tiling tiles(rows.count, kRows), panels(end - begin, width(phase));
    const Index outer = job.rows_outside ? tiles.pieces : panels.pieces,
                inner = job.rows_outside ? panels.pieces : tiles.pieces;
    for (Index o = 0; o < outer; ++o) {  // not each_tile: through its lambda gru's forward takes 4 % longer
      for (Index n = 0; n < inner; ++n) {
        const Index i = job.rows_outside ? o : n, j = job.rows_outside ? n : o;
        const Index first = tiles.begin(i), block = begin + panels.begin(j);
        const int m = int(tiles.begin(i + 1) - first), wide = int(begin + panels.begin(j + 1) - block);
        if (job.prefetch) prefetch = Prefetch::after(panels, j, begin, i, tiles.pieces);
        if constexpr (!Cell::layer_norm)
          if (job.weight_hh && n == 0)
            few_rows(phase) ? this->sum_few_rows(block) : this->pack_panel(phase, block, wide);
        for (Index lane = 0; lane < kBlock; lane += V::lanes) {
          const int there = blocks_with(lane, of_h ? job.P : job.H, block, wide);
          if (!there) break;
          if (phase == 1)
            phase1(first, m, block, there, lane);
          else if constexpr (Cell::projects)
            project_tile(first, m, block, there, lane);
          else
            phase2(first, m, block, there, lane);
        }
      }
      if (!worker.poll()) return false;
    }
    return true;
  }

  // Steps [begin, end) of the recurrence. Not inlined: run() and the backward loop share one copy.
  FUSEDRNN_NOINLINE bool walk(Index begin, Index end) {
    for (Index s = begin; s < end; ++s) {
      if constexpr (!Cell::layer_norm)
        if (job.ahead && (s - begin) % job.ahead_steps == 0 &&
            !this->sum_ahead(s, s + job.ahead_steps < end ? s + job.ahead_steps : end))
          return false;
      this->select_rows(s);
      for (int phase = 1; phase <= kPhases; ++phase) {
        if constexpr (Cell::layer_norm) {
          if (!normed_step(*this)) return false;
        } else {
          if (!step(phase)) return false;
        }
        if (!worker.by_rows && !worker.barrier()) return false;
      }
      if (job.boundary_states) this->keep_boundary(s + 1);
    }
    if constexpr (V::whole_lines)
      if (job.stream) V::fence();
    return worker.barrier();
  }

  bool run() {
    if (!walk(0, job.steps.T)) return false;
    this->finish();
    return true;
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
