// The time loop forward of a cell that is a program. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/machine/norm.h"
#include "cpu/tile.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::MachineForward;
using cpu::MachinePart;
using cpu::MachineSum;
using cpu::Worker;

template <class V>
struct MachineForwardLoop : Share {
  using T = typename V::scalar;

  const MachineForward<T>& job;
  const MachineCall<T>& call;
  const Worker& worker;
  MachineRows<V> rows;
  const T** x;   // of each row of the step
  Index* batch;  // and which row of the batch it is
  Index count = 0;

  MachineForwardLoop(const MachineForward<T>& job_, const Worker& worker_)
      : Share(job_.call.steps, job_.call.blocks, job_.call.P, worker_),
        job(job_),
        call(job_.call),
        worker(worker_),
        rows(job_.call, worker_.region.thread) {
    x = const_cast<const T**>(rows.table + (rows.count() + 1) * call.steps.B);
    batch = reinterpret_cast<Index*>(x + call.steps.B);
    rows.set(cpu::kSaved, call.saved, call.saved_count, false, job.stream);
    for (int o = 1; o < call.operands; ++o)
      rows.set(rows.operand(o), job.computed[o] || call.regularization.dropout, 1, true);
  }

  // The rows of a step, and how many there are.
  FUSEDRNN_NOINLINE void select_rows(Index t) {
    const Masks<T> masks = rows.masks(worker.region.thread, block_begin, block_end, h_begin, h_end);
    count = 0;
    for (Index b = row_begin; b < row_end; ++b) {
      if (!valid(call.steps, t, b)) continue;
      x[count] = call.x.at(t, b);
      rows.select(count, t, b);
      if (call.projects) rows.put(rows.after(0), count, job.unprojected, b * masks.units);
      for (int o = 1; o < call.operands; ++o) {
        if (job.computed[o])
          rows.put(rows.operand(o), count, job.computed[o], b * masks.units);
        else if (call.regularization.dropout)
          rows.put(rows.operand(o), count,
                   const_cast<T*>(masks.operand(count, b, rows.state_before(call.state_of[o], t, b), call.P,
                                                MachineCall<T>::array_of(o))),
                   0);
      }
      batch[count++] = b;
    }
    rows.select_masks(masks, t, batch, count);
  }
  const T* const* operand_rows(int o) const {
    if (o == 0) return x;
    const int state = call.state_of[o];
    return rows.places[state < 0 || call.regularization.dropout ? rows.operand(o) : rows.before(state)].rows;
  }

  // Blocks of a tile, whose sums fill the vector registers.
  Index width(const MachineRound& round) const { return count == 1 ? kOneRow<V> : round.accumulators < 2 ? 4 : 1; }
  Index height(const MachineRound& round) const { return max_rows<V>(round.accumulators < 2 ? 4 : round.widest); }

  // acc[accumulator of the round][m] = bias + products, of `wide` blocks that lie b_step vectors apart.
  FUSEDRNN_NOINLINE void sum_up(const MachineRound& round, Index first, int m, Index block, int wide, Index lane,
                                T* acc, Index b_step) const {
    const int A = round.accumulators;
    for (int w = 0; w < wide; ++w)
      for (int s = 0; s < A; ++s) {
        const V bias = V::load(job.bias + ((block + w) * call.accumulators + round.first + s) * kBlock + lane);
        for (int i = 0; i < m; ++i) bias.store(acc + (w * b_step + s * m + i) * V::lanes);
      }
    for (const MachineSum* sum = job.sums + round.sum_begin; sum != job.sums + round.sum_end; ++sum) {
      Product<T> products[kMaxParts];
      int n = 0;
      for (const MachinePart<T>* part = job.parts + sum->part_begin; part != job.parts + sum->part_end; ++part) {
        const Index k = part->operand ? call.P : call.I, gap = kApart<V> ? k * V::lanes : V::lanes;
        const T* const b = part->weights + block * part->block_step + lane * k * part->count;
        products[n++] = {operand_rows(part->operand) + first,
                         0,
                         1,
                         0,
                         b,
                         kApart<V> ? V::lanes : part->count * V::lanes,
                         A == 1 ? part->block_step : gap,
                         1,
                         k,
                         part->block_step,
                         b_step};
        if (n == kMaxParts || part + 1 == job.parts + sum->part_end) {
          const TileFn<T> tile =
              A > 1 && wide == 2 ? tile_for_two_blocks<V>(sum->count) : tile_for<V>(m, sum->count * wide);
          tile(products, n, acc + (sum->first - round.first) * m * V::lanes);
          n = 0;
        }
      }
    }
  }
  static constexpr int kMaxParts = 4;  // of a pass

  void tile(const MachineRound& round, Frame<V>& frame, Index first, int m, Index block, int wide, Index lane) const {
    const int A = round.accumulators;
    rows.set_tile(frame, first, m, block, wide, lane);
    if (A > 1 && wide > 1) {  // one row: the registers of a block lie together, as the sums of two blocks do
      frame.next = V::lanes, frame.step = call.register_count * V::lanes;
      constexpr int kTogether = kOneRow<V> / 4;
      for (int w = 0; w < wide; w += kTogether)
        sum_up(round, first, m, block + w, wide - w < kTogether ? 1 : kTogether, lane, frame.registers + w * frame.step,
               call.register_count);
    } else if (A) {
      sum_up(round, first, m, block, wide, lane, frame.registers, A * m);
    }
    interpret<V>(round.code, round.count, frame);
  }

  bool run_round(const MachineRound& round) const {
    if (round.norm_count && !MachineNorms<V>{rows}.run(round, count, false, worker)) return false;
    Frame<V> frame = rows.frame(worker.region.thread);
    const Index blocks = block_end - block_begin;
    if (count == 1 && blocks <= kOneRow<V>) {  // one tile: the divisions below would take as long as a part of it
      for (Index lane = 0; lane < kBlock && blocks; lane += V::lanes)
        tile(round, frame, 0, 1, block_begin, int(blocks), lane);
      return worker.poll() && (worker.by_rows || worker.barrier());
    }
    const Tiling tiles(count, height(round)), panels(blocks, width(round));
    const auto tile_at = [&](Index first, int m, Index block, int wide) {
      for (Index lane = 0; lane < kBlock; lane += V::lanes) tile(round, frame, first, m, block, wide, lane);
    };
    return each_tile(worker, call.rows_outside, tiles, panels, block_begin, tile_at) &&
           (worker.by_rows || worker.barrier());
  }

  // The projected state of a step, of what its programs have left.
  FUSEDRNN_NOINLINE bool project(Index t) const {
    constexpr int kWide = 4;
    const Tiling tiles(count, max_rows<V>(kWide)), panels(h_end - h_begin, count == 1 ? kOneRow<V> : kWide);
    const T *const *const from = rows.places[rows.after(0)].rows, *const *const keep = rows.projected_mask();
    const auto tile_at = [&](Index first, int m, Index block, int wide) {
      for (Index lane = 0; lane < kBlock; lane += V::lanes) {
        alignas(64) T acc[kMaxTile * V::lanes];
        for (int k = 0; k < m * wide; ++k) V::zero().store(acc + k * V::lanes);
        add_product<V>(from + first, call.H, job.projection, block, lane, m, wide, acc);
        for (int w = 0; w < wide; ++w) {
          const Index u = (block + w) * kBlock + lane, in_row = call.P - u;
          for (int i = 0; i < m; ++i) {
            V h = V::load(acc + (w * m + i) * V::lanes);
            if (keep) {
              const V kept = V::load(keep[first + i] + u);
              const V before = V::load(rows.places[rows.before(0)].rows[first + i] + u, in_row);
              h = fma(kept, h, (V::set(1) - kept) * before);
            }
            h.store(rows.new_row(0, t, batch[first + i]) + u, in_row);
          }
        }
      }
    };
    return each_tile(worker, false, tiles, panels, h_begin, tile_at) && (worker.by_rows || worker.barrier());
  }

  // Padding of y and of the states of every step, and the final states, of this thread's share of the rows.
  FUSEDRNN_NOINLINE void finish() const {
    const Steps& steps = call.steps;
    const Index n = worker.region.threads, i = worker.region.thread;
    for (Index b = steps.B * i / n; b < steps.B * (i + 1) / n; ++b) {
      const Index length = length_of(steps, b);
      for (Index t = length; t < steps.T; ++t) __builtin_memset(rows.state_row(0, t, b), 0, size_t(call.P) * sizeof(T));
      for (int s = 0; s < call.states; ++s) {
        const Index width = rows.width(s);
        const size_t bytes = size_t(width) * sizeof(T);
        const T* const start = rows.start_row(s, b);
        const T* const last = length ? rows.state_row(s, last_time(steps, b), b) : start;
        T* const final_state = job.stateT[s] + b * width;
        if (final_state != last) __builtin_memcpy(final_state, last, bytes);  // it may be where y is, of one step
        if (!job.states[s]) continue;
        const T* const held = steps.reverse ? start : last;  // in reverse padding comes before the first step
        for (Index t = 0; t < steps.T; ++t)
          __builtin_memcpy(job.states[s] + (t * steps.B + b) * width, t < length ? rows.state_row(s, t, b) : held,
                           bytes);
      }
    }
  }

  // The states but y before step s, if a chunk begins there: chunks are counted from the end.
  FUSEDRNN_NOINLINE void keep_boundary(Index s) const {
    const Steps& steps = call.steps;
    const Index left = steps.T - s, t = time_of(steps, s - 1), H = call.H;
    if (!left || left % job.chunk_steps) return;
    T* to = job.boundary_states + (left / job.chunk_steps - 1) * (call.states - 1) * steps.B * H;
    const Index first = block_begin * kBlock, end = block_end < call.blocks ? block_end * kBlock : H;
    for (int k = 1; k < call.states; ++k, to += steps.B * H)
      for (Index b = row_begin; b < row_end; ++b)
        if (valid(steps, t, b))
          __builtin_memcpy(to + b * H + first, rows.state_row(k, t, b) + first, size_t(end - first) * sizeof(T));
  }

  // Steps [begin, end).
  FUSEDRNN_NOINLINE bool walk(Index begin, Index end) {
    for (Index s = begin; s < end; ++s) {
      const Index t = time_of(call.steps, s);
      select_rows(t);
      for (int r = 0; r < call.round_count; ++r)
        if (!run_round(call.rounds[r])) return false;
      if (call.projects && !project(t)) return false;
      if (job.boundary_states) keep_boundary(s + 1);
    }
    if constexpr (V::whole_lines)
      if (job.stream) V::fence();
    return worker.barrier();
  }

  bool run() {
    if (!walk(0, call.steps.T)) return false;
    finish();
    return true;
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
