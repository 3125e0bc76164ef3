// The time loop backward of a cell that is a program. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/backward.h"
#include "cpu/machine/forward.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::MachineBackward;
using cpu::MachinePart;

template <class V>
struct MachineBackwardLoop : BackwardSteps<V> {
  using Base = BackwardSteps<V>;
  using T = typename V::scalar;
  using Base::worker, Base::B, Base::units, Base::count;

  const MachineBackward<T>& job;
  MachineCall<T> call;  // its own: of the chunk at hand
  MachineRows<V> places;
  Index time = 0;  // of the rows

  MachineBackwardLoop(const MachineBackward<T>& job_, const Worker& worker_)
      : Base(*job_.base, worker_, *job_.shape, false), job(job_), call(job_.call), places(call, worker_.region.thread) {
    places.set(cpu::kGradients, true, call.accumulators, true);
    places.set(cpu::kSums, job.sums, call.vector_count, true);
    places.set(cpu::kNormGradients, job.norm_gradients, 0, true);
    places.set(cpu::kScalars, job.of_units, call.scalar_count, true);
    for (int s = 0; s < call.states; ++s) places.set(places.direct(s), job.direct[s], 1, true);
    for (int o = 1; o < call.operands; ++o)
      places.set(places.operand(o), call.state_of[o] < 0 && Base::job.need_weights, 1, false);
    if (call.projects) places.set(places.after(0), Base::job.dprojection, 1, true);
  }

  FUSEDRNN_NOINLINE void select_rows(Index t, Index begin, Index end) {
    time = t;
    for (Index i = 0; begin + i < end; ++i) {
      const Index b = this->rows.b[begin + i];
      places.select(i, t, b);
      if (call.projects) places.put(places.after(0), i, this->da_row(begin + i), this->weights.unprojected_at);
      places.put(cpu::kGradients, i, this->da_row(begin + i), 0);
      places.put(cpu::kSums, i, job.sums, b * units * call.vector_count);
      places.put(cpu::kNormGradients, i, job.norm_gradients, b * (job.norm_gradient_count * cpu::kNormGradientNumbers));
      places.put(cpu::kScalars, i, job.of_units, (begin + i) * units * call.scalar_count);
      for (int s = 0; s < call.states; ++s) places.put(places.direct(s), i, job.direct[s], b * units);
      for (int o = 1; o < call.operands; ++o)
        places.put(places.operand(o), i, Base::job.inputs, (begin + i) * Base::job.inputs_row + job.column_of[o]);
      this->rows.at[i].b = b, this->rows.at[i].after = this->chain_of(t, b);
    }
    places.select_masks(
        places.masks(worker.region.thread, this->block_begin, this->block_end, this->h_begin, this->h_end), t,
        this->rows.b + begin, end - begin);
  }

  // acc[wide][m] = the gradient of an operand, from rows of da.
  FUSEDRNN_NOINLINE void operand_gradient(int operand, const T* const* da, Index block, Index lane, int m, int wide,
                                          T* acc) const {
    for (int i = 0; i < m * wide; ++i) V::zero().store(acc + i * V::lanes);
    for (int p = job.part_begin[operand]; p < job.part_begin[operand + 1]; ++p) {
      const MachinePart<T>& part = job.parts[p];
      this->add_part({part.weights, part.block_step}, call.accumulators, part.first, part.count, da, block, lane, m,
                     wide, acc);
    }
  }

  // What reaches the states [from, to) from later steps (`any`: through products too) and from outside, in the
  // registers of their numbers, of blocks [begin, end): then(frame).
  template <class Then>
  FUSEDRNN_INLINE bool incoming(Index n, bool any, bool outside, int from, int to, Index begin, Index end,
                                Then&& then) {
    Frame<V> frame = places.frame(worker.region.thread);
    return this->tiles(n, begin, end, [&](Index first, int m, Index block, int wide, Index lane) {
      places.set_tile(frame, first, m, block, wide, lane);
      if (outside && lane == 0 && from == call.projects) prefetch(frame);
      for (int s = from; s < to; ++s) {
        T* const d = frame.registers + s * m * wide * V::lanes;
        if (any && job.operand_of[s] >= 0)
          operand_gradient(job.operand_of[s], this->rows.da + first, block, lane, m, wide, d);
        state_gradient(s, outside, frame, d);
      }
      then(frame);
    });
  }

  // The gradient of a projected state is kept for the products with weight_hr, but for what zoneout leaves to the state
  // before.
  FUSEDRNN_NOINLINE void keep_projected(const Frame<V>& f) const {
    const T *const *const keep = places.projected_mask(), *from = f.registers;
    for (int w = 0; w < f.wide; ++w)
      for (int i = 0; i < f.rows; ++i, from += V::lanes) {
        const Index r = f.first + i, u = (f.block + w) * kBlock + f.lane;
        V d = V::load(from);
        if (keep) {
          const V kept = V::load(keep[r] + u);
          ((V::set(1) - kept) * d).store(job.direct[0] + this->rows.at[r].b * units + u);
          d = kept * d;
        }
        d.store(places.places[cpu::kGradients].rows[r] + this->weights.dh_at + u);
      }
  }

  // The gradient of what is projected, in the first register.
  FUSEDRNN_NOINLINE void through_projection(const Frame<V>& f) const {
    for (int k = 0; k < f.rows * f.wide; ++k) V::zero().store(f.registers + k * V::lanes);
    add_product<V>(this->rows.da + f.first, call.P, Base::job.projection, f.block, f.lane, f.rows, f.wide, f.registers);
  }

  // What the program loads, which is far away: it comes while the products are made.
  FUSEDRNN_INLINE void prefetch(const Frame<V>& f) const {
    const auto fetch = [&](int place, int values) {
      T* const* const rows = places.places[place].rows;
      for (int i = 0; rows && i < f.rows; ++i) {
        const char* const from = reinterpret_cast<const char*>(rows[f.first + i] + f.block * (values * kBlock));
        for (Index at = 0; at < f.wide * values * kBlock * Index(sizeof(T)); at += 64) __builtin_prefetch(from + at);
      }
    };
    fetch(cpu::kSaved, call.saved_count);
    for (int s = call.projects; s < call.states; ++s) fetch(places.before(s), 1);
  }

  // d: what comes through products, of a state that is the operand of one.
  FUSEDRNN_NOINLINE void state_gradient(int s, bool outside, const Frame<V>& f, T* d) const {
    const bool chain = job.operand_of[s] >= 0;
    const T *const direct = job.direct[s], *const last = job.dstateT[s], *const dropout = call.regularization.dropout;
    const Sequence<const T> none, dy = outside && !s ? job.dy : none, every = outside ? job.dstates[s] : none;
    const bool regularized = dropout || call.regularization.zoneout_h.acts || call.regularization.zoneout_c.acts;
    // The compiled cells' direct gradient is then a sum, but for a projected state.
    const bool sum = regularized && !(call.projects && s == 0 && direct);
    const Index width = places.width(s);
    for (int w = 0; w < f.wide; ++w)
      for (int i = 0; i < f.rows; ++i, d += V::lanes) {
        const BackwardRow<T>& row = this->rows.at[f.first + i];
        const Index u = (f.block + w) * kBlock + f.lane, in_row = width - u;
        V v = V::zero();
        if (row.after == After::product) {
          if (chain) v = V::load(d);
          if (chain && dropout) v = v * V::load(dropout + row.b * units + u);
          if (direct) v = chain ? v + V::load(direct + row.b * units + u) : V::load(direct + row.b * units + u);
          if (sum) v = v + V::zero();
        } else if (row.after == After::final_state && last) {
          v = V::load(last + row.b * width + u, in_row);
        }
        if (dy.data) v = v + V::load(dy.at(time, row.b) + u, in_row);
        if (every.data) v = v + V::load(every.at(time, row.b) + u, in_row);
        v.store(d);
      }
  }

  bool step(Index t, Index begin, Index end) {
    const Index n = end - begin;
    select_rows(t, begin, end);
    const MachineRound& first_round = call.rounds[0];
    const bool any = this->follow(n);
    if (call.projects) {
      if (!incoming(n, any, true, 0, 1, this->h_begin, this->h_end, [&](const Frame<V>& f) { keep_projected(f); }))
        return false;
      if (!worker.by_rows && !worker.barrier()) return false;
      for (Index i = 0; i < n; ++i) this->rows.da[i] = this->da_row(begin + i) + this->weights.dh_at;
    }
    if (!incoming(n, any, true, call.projects, call.states, this->block_begin, this->block_end, [&](const Frame<V>& f) {
          if (call.projects) through_projection(f);
          interpret<V>(first_round.code, first_round.count, f);
        }))
      return false;
    for (Index i = 0; i < n; ++i) this->rows.da[i] = this->rows.latest[this->rows.at[i].b] = this->da_row(begin + i);
    Frame<V> frame = places.frame(worker.region.thread);
    for (const MachineRound* round = call.rounds + 1; round != call.rounds + call.round_count; ++round) {
      if (!worker.by_rows && !worker.barrier()) return false;
      if (round->norm_count && !MachineNorms<V>{places}.run(*round, n, true, worker)) return false;
      const bool done = this->tiles(n, this->block_begin, this->block_end,
                                    [&](Index first, int m, Index block, int wide, Index lane) {
                                      places.set_tile(frame, first, m, block, wide, lane);
                                      for (int k = 0; k < round->operand_count; ++k)
                                        operand_gradient(round->operands[k], this->rows.da + first, block, lane, m,
                                                         wide, frame.registers + k * m * wide * V::lanes);
                                      interpret<V>(round->code, round->count, frame);
                                    });
      if (!done) return false;
    }
    return true;
  }

  // [1 | x | operands] of this thread's share of the chunk's rows; what the cell computes its programs put there.
  FUSEDRNN_NOINLINE void gather() const {
    const Index n = worker.region.threads, i = worker.region.thread;
    for (Index r = count * i / n; r < count * (i + 1) / n; ++r) {
      const Index t = this->rows.t[r], b = this->rows.b[r];
      T* const row = Base::job.inputs + r * Base::job.inputs_row;
      row[0] = T(1);
      __builtin_memcpy(row + 1, call.x.at(t, b), size_t(call.I) * sizeof(T));
      for (int o = 1; o < call.operands; ++o)
        if (call.state_of[o] >= 0)
          __builtin_memcpy(row + job.column_of[o], places.state_before(call.state_of[o], t, b),
                           size_t(call.P) * sizeof(T));
      if (const T* dropout = call.regularization.dropout)
        for (int o = 1; o < call.operands; ++o)
          for (Index u = 0; call.state_of[o] >= 0 && u < call.P; ++u)
            row[job.column_of[o] + u] *= dropout[b * units + u];
    }
  }

  // Row scalars of this thread's share of the chunk's rows: each block's 16 units by halves, then the blocks in order.
  FUSEDRNN_NOINLINE void sum_units() const {
    const Index n = worker.region.threads, i = worker.region.thread;
    for (Index r = count * i / n; r < count * (i + 1) / n; ++r)
      for (int s = 0; s < call.scalar_count; ++s) {
        if (!job.dscalars[s]) continue;
        T all = 0;
        for (Index block = 0; block < call.blocks; ++block) {
          const T* const from = job.of_units + ((r * call.blocks + block) * call.scalar_count + s) * kBlock;
          const Index there = units_of(call.H, block);
          T unit[kBlock];
          for (Index u = 0; u < kBlock; ++u) unit[u] = u < there ? from[u] : T(0);
          for (Index half = kBlock / 2; half; half /= 2)
            for (Index u = 0; u < half; ++u) unit[u] += unit[u + half];
          all += unit[0];
        }
        job.dscalars[s][this->rows.t[r] * B + this->rows.b[r]] = all;
      }
  }

  bool gradients(bool first_chunk) {
    this->keep_boundary();
    if (Base::job.need_weights) gather();
    if (!worker.barrier()) return false;
    if (job.of_units) sum_units();
    const auto of_x = [&](const T* const* da, Index block, Index lane, int m, int wide, T* acc) {
      operand_gradient(0, da, block, lane, m, wide, acc);
    };
    if (Base::job.dx && !this->input_gradients(of_x)) return false;
    if (!this->weights.add(count, first_chunk)) return false;
    return worker.barrier();
  }

  // Of the initial states: the chain once more, and no program.
  FUSEDRNN_NOINLINE bool initial_states() {
    const Index n = this->select_initial();
    const bool any = this->follow(n);
    const auto store = [&](int from, int to, Index begin, Index end) {
      return incoming(n, any, false, from, to, begin, end, [&](const Frame<V>& f) {
        for (int s = from; s < to; ++s) {
          if (!job.dstate0[s]) continue;
          const T* d = f.registers + s * f.rows * f.wide * V::lanes;
          const Index width = places.width(s);
          for (int w = 0; w < f.wide; ++w)
            for (int i = 0; i < f.rows; ++i, d += V::lanes) {
              const Index u = (f.block + w) * kBlock + f.lane;
              V::load(d).store(job.dstate0[s] + this->rows.at[f.first + i].b * width + u, width - u);
            }
        }
      });
    };
    if (call.projects && !store(0, 1, this->h_begin, this->h_end)) return false;
    return store(call.projects, call.states, this->block_begin, this->block_end);
  }

  // The sums of all rows of the batch, in ascending order, of this thread's share of the blocks.
  FUSEDRNN_NOINLINE void unpack_sums() const {
    const Index n = worker.region.threads, i = worker.region.thread;
    for (Index block = call.blocks * i / n; block < call.blocks * (i + 1) / n; ++block)
      for (int v = 0; v < call.vector_count; ++v)
        for (Index lane = 0; lane < kBlock && job.dvectors[v]; lane += V::lanes) {
          V all = V::zero();
          for (Index b = 0; b < B; ++b)
            all = all + V::load(job.sums + ((b * call.blocks + block) * call.vector_count + v) * kBlock + lane);
          const Index u = block * kBlock + lane;
          all.store(job.dvectors[v] + u, call.H - u);
        }
  }

  // Runs forward again over a chunk, from the states before it, where they were not saved.
  bool replay(Index s_begin, Index s_end) {
    if (!job.replay) return true;
    call.first = call.steps.reverse ? call.steps.T - s_end : s_begin;
    call.boundary_time = call.steps.reverse ? call.steps.T - s_begin : s_begin - 1;
    call.boundary =
        job.boundary_states + (call.steps.T - s_end) / Base::job.chunk_steps * (call.states - 1) * B * call.H;
    MachineForward<T> again = *job.replay;
    again.call.first = call.first, again.call.boundary_time = call.boundary_time, again.call.boundary = call.boundary;
    return MachineForwardLoop<V>(again, worker).walk(s_begin, s_end);
  }

  bool run() {
    if (!this->walk_back(*this)) return false;
    if (!initial_states()) return false;
    if (Base::job.dx && call.steps.lengths) this->zero_padding();
    if (job.sums) unpack_sums();
    this->weights.unpack();
    return true;
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
