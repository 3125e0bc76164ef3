// Where the values of the rows of one step lie: forward and backward alike. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/kernels.h"
#include "cpu/machine/interpreter.h"
#include "cpu/masks.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::MachineCall;

template <class V>
struct MachineRows {
  using T = typename V::scalar;
  static constexpr int kMaxPlaces = 128;

  const MachineCall<T>& call;
  Place<T> places[kMaxPlaces] = {};
  T** table;  // the pointers of all places
  Index* at;  // of each row of the step, t * B + b

  FUSEDRNN_NOINLINE MachineRows(const MachineCall<T>& call_, Index thread)
      : call(call_), table(reinterpret_cast<T**>(call_.tables + thread * call_.tables_step)) {
    at = reinterpret_cast<Index*>(table + count() * call.steps.B);
    set(cpu::kSaved, call.saved, call.saved_count, false);
    set(cpu::kCarried, call.carried, call.carried_count, true);
    set(cpu::kDropout, call.regularization.dropout, 1, true);
    set(cpu::kKeepH, call.regularization.zoneout_h.acts, 1, true);
    set(cpu::kKeepC, call.regularization.zoneout_c.acts, 1, true);
    set(cpu::kNorms, call.norms, 0, true);
    for (int s = 0; s < call.states; ++s) set(before(s), true, 1, false), set(after(s), true, 1, false);
  }

  int before(int s) const { return cpu::kStates + s; }
  int after(int s) const { return cpu::kStates + call.states + s; }
  int direct(int s) const { return cpu::kStates + 2 * call.states + s; }
  int operand(int o) const { return cpu::kStates + 3 * call.states + o - 1; }
  int count() const { return cpu::kStates + 3 * call.states + call.operands - 1; }

  void set(int place, bool wanted, int values, bool whole, bool stream = false) {
    places[place] = {wanted ? table + place * call.steps.B : nullptr, values, whole, stream};
  }
  void put(int place, Index i, T* memory, Index offset) {
    if (places[place].rows) places[place].rows[i] = memory + offset;
  }

  Index width(int s) const { return s ? call.H : call.P; }
  T* state_row(int s, Index t, Index b) const {
    return call.state[s] + ((s ? (t - call.first) & call.states_kept : t) * call.steps.B + b) * width(s);
  }
  // Where the state after a step goes.
  T* new_row(int s, Index t, Index b) const {
    return s || !call.y_again ? state_row(s, t, b) : call.y_again + b * call.P;
  }
  const T* previous_row(int s, Index t, Index b) const {
    if (s && t == call.boundary_time) return call.boundary + ((s - 1) * call.steps.B + b) * call.H;
    return state_row(s, t, b);
  }
  const T* start_row(int s, Index b) const {
    return call.state0[s] ? call.state0[s] + b * width(s) : call.start + s * call.H;
  }
  const T* state_before(int s, Index t, Index b) const {
    switch (fusedrnn::FUSEDRNN_LEVEL::before(call.steps, t, b)) {
      case Before::previous:
        return previous_row(s, call.steps.reverse ? t + 1 : t - 1, b);
      case Before::start:
        return start_row(s, b);
      default:
        return call.start + s * call.H;
    }
  }

  // Row i of the step is row b of the batch. Programs load from states before and never store there.
  void select(Index i, Index t, Index b) {
    at[i] = t * call.steps.B + b;
    const Index kept = ((t - call.first) & call.saved_kept) * call.steps.B + b;
    put(cpu::kSaved, i, call.saved, kept * (call.saved_count * call.H));
    put(cpu::kNorms, i, call.norms, kept * (call.norm_count * cpu::kNormNumbers));
    put(cpu::kCarried, i, call.carried, b * (call.carried_count * call.blocks * kBlock));
    for (int s = 0; s < call.states; ++s) {
      put(before(s), i, const_cast<T*>(state_before(s, t, b)), 0);
      put(after(s), i, new_row(s, t, b), 0);
    }
  }
  // Of the blocks [begin, end); of a projected state [p_begin, p_end).
  Masks<T> masks(Index thread, Index begin, Index end, Index p_begin, Index p_end) const {
    const bool h = call.projected_mask == cpu::kKeepH, c = call.projected_mask == cpu::kKeepC;
    return {call.regularization, thread,          call.steps.B,        call.blocks * kBlock,
            h ? p_begin : begin, h ? p_end : end, c ? p_begin : begin, c ? p_end : end};
  }
  // What zoneout keeps of the projected state, of each row; null: all.
  const T* const* projected_mask() const { return call.projected_mask ? places[call.projected_mask].rows : nullptr; }
  // Draws the masks of the n rows b of a step.
  void select_masks(const Masks<T>& masks, Index t, const Index* b, Index n) {
    const T *const keep_h = masks.keep_h(t, b, n), *const keep_c = masks.keep_c(t, b, n);
    for (Index i = 0; i < n; ++i) {
      put(cpu::kDropout, i, const_cast<T*>(masks.dropout(b[i])), 0);
      put(cpu::kKeepH, i, const_cast<T*>(keep_h), i * masks.units);
      put(cpu::kKeepC, i, const_cast<T*>(keep_c), i * masks.units);
    }
  }

  Frame<V> frame(Index thread) const {
    Frame<V> f{};
    f.H = call.H, f.blocks = call.blocks, f.places = places, f.vectors = call.vectors, f.constants = call.constants;
    f.scalars = call.scalars, f.at = at;
    f.registers = call.registers + thread * call.registers_step;
    return f;
  }
  // Registers one after the other.
  static FUSEDRNN_INLINE void set_tile(Frame<V>& f, Index first, int m, Index block, int wide, Index lane) {
    f.first = first, f.rows = m, f.block = block, f.wide = wide, f.lane = lane;
    f.next = m * wide * V::lanes, f.step = V::lanes;
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
