// One hidden unit of one row: what a thread does between the products. Forward beside backward; the maths is the
// cell's (cells/), which state goes in is steps.h's. SPDX-License-Identifier: Apache-2.0
//
// `step` is the arithmetic, on a state that the thread has. With one step a launch (begin, one_step) the state lies in
// memory, and the products are cuBLAS's, between the launches: correct everywhere, and what every other kernel falls
// back to.
#pragma once
#include "cuda/masks.h"

namespace fusedrnn {
namespace cuda {

template <class Cell>
constexpr int kInput = Cell::input.count;
template <class Cell>
constexpr int kRecurrent = Cell::recurrent.count;

// Calls f(b, u) for every row and unit, over all threads of the launch.
template <class F>
FUSEDRNN_INLINE void each_unit(Index B, Index H, F f) {
  const Index step = Index(gridDim.x) * blockDim.x;
  for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; i < B * H; i += step) f(i / H, i % H);
}

template <class Cell, class S>
struct ForwardUnit {
  using T = Compute<S>;
  using V = Vec<T>;
  const ForwardJob<S>& job;
  Index b, u;

  FUSEDRNN_INLINE Index here() const { return b * job.H + u; }
  FUSEDRNN_INLINE Index at(Index t) const { return t * job.steps.B * job.H + here(); }
  FUSEDRNN_INLINE Masks<Cell, T> masks() const { return {job.regularization, b, u}; }
  FUSEDRNN_INLINE T* saved(Index t) const {
    return job.saved ? job.saved + t * job.saved_step + b * Cell::saved * job.H + u : nullptr;
  }
  FUSEDRNN_INLINE const T* projected(Index t) const {
    return job.projected + (t * job.steps.B + b) * kInput<Cell> * job.H + u;
  }

  FUSEDRNN_INLINE T start_h() const { return job.h0 ? T(job.h0[here()]) : T(0); }
  FUSEDRNN_INLINE T start_c() const { return Cell::has_c && job.c0 ? T(job.c0[here()]) : T(0); }

  // The state of the row becomes that after step t. `products` are weight_hh times the state before, R of them,
  // `stride` elements from one to the next. A cell of two phases gets h in the second and leaves r*h in h here.
  FUSEDRNN_INLINE void step(Index t, const T* products, Index stride, T& h, T& c) const {
    if (valid(job.steps, t, b)) {
      const bool cut = before(job.steps, t, b) == Before::nothing;
      const T* p = projected(t);
      V a[Cell::accumulators], state_h = cut ? T(0) : h, state_c = cut ? T(0) : c, new_h = V::zero(), new_c = V::zero();
      for (int s = 0; s < Cell::accumulators; ++s) a[s] = job.bias[s * job.H + u];
      for (int s = 0; s < kInput<Cell>; ++s) a[Cell::input.first + s] = a[Cell::input.first + s] + V(p[s * job.H]);
      for (int s = 0; s < kRecurrent<Cell>; ++s)
        a[Cell::recurrent.first + s] = a[Cell::recurrent.first + s] + V(cut ? T(0) : products[s * stride]);
      V save[Cell::saved + 1];
      Cell::forward(a, state_h, state_c, save, new_h, new_c);
      if (Cell::phases == 2)
        new_h = masks().dropped(new_h.v);
      else
        new_h = masks().zoned(MaskKind::zoneout_h, t, new_h, state_h);
      if (Cell::has_c) new_c = masks().zoned(MaskKind::zoneout_c, t, new_c, state_c);
      if (T* kept = saved(t))
        for (int s = 0; s < Cell::saved; ++s) kept[s * job.H] = save[s].v;
      h = T(S(new_h.v));
      if (Cell::has_c) c = new_c.v;
    }
    if (Cell::phases == 1) give(t, h, c);
  }

  // The second phase: `product` is weight_hh times r*h.
  FUSEDRNN_INLINE void step2(Index t, T product, T& h) const {
    if constexpr (Cell::phases == 2) {
      if (valid(job.steps, t, b)) {
        T* p = saved(t);
        V save[Cell::saved], new_h = V::zero();
        for (int s = 0; s < Cell::saved; ++s) save[s] = p[s * job.H];
        const V state_h = before(job.steps, t, b) == Before::nothing ? T(0) : h;
        Cell::forward2(save[Cell::recurrent2.first] + V(product), state_h, save, new_h);
        new_h = masks().zoned(MaskKind::zoneout_h, t, new_h, state_h);
        for (int s = 0; s < Cell::saved; ++s) p[s * job.H] = save[s].v;
        h = T(S(new_h.v));
      }
      give(t, h, T(0));
    }
  }

  // What others read of the step.
  FUSEDRNN_INLINE void give(Index t, T h, T c) const {
    job.y[at(t)] = S(valid(job.steps, t, b) ? h : T(0));
    if (job.h_states) job.h_states[at(t)] = S(h);
    if (Cell::has_c && job.c_states) job.c_states[at(t)] = S(c);
    if (Cell::has_c && job.c) job.c[at(t)] = c;
  }
  FUSEDRNN_INLINE void give_last(T h, T c) const {
    job.hT[here()] = S(h);
    if (Cell::has_c) job.cT[here()] = S(c);
  }

  // What step t reads beside products and state.
  FUSEDRNN_INLINE void prefetch_step(Index t) const {
    for (int s = 0; s < kInput<Cell>; ++s) prefetch(projected(t) + s * job.H);
  }

  // --- one step a launch ---
  FUSEDRNN_INLINE void begin() const { keep(start_h(), start_c()); }
  FUSEDRNN_INLINE void one_step(Index s) const {
    T h = T(job.hT[here()]), c = Cell::has_c ? job.state_c[here()] : T(0);
    step(time_of(job.steps, s), job.products + b * kRecurrent<Cell> * job.H + u, job.H, h, c);
    if (Cell::phases == 2)  // h is r*h, or where the row is over the state, which the second phase does not read
      job.operand[here()] = S(h);
    else
      keep(h, c);
  }
  FUSEDRNN_INLINE void one_step2(Index s) const {
    T h = T(job.hT[here()]);
    step2(time_of(job.steps, s), job.products[here()], h);
    keep(h, T(0));
  }
  // The state as it stands, and as the next product takes it.
  FUSEDRNN_INLINE void keep(T h, T c) const {
    give_last(h, c);
    if (Cell::has_c) job.state_c[here()] = c;
    job.operand[here()] = S(masks().dropped(h));
  }
};

template <class Cell, class S>
struct BackwardUnit {
  using T = Compute<S>;
  using V = Vec<T>;
  const BackwardJob<S>& job;
  Index b, u;

  FUSEDRNN_INLINE Index here() const { return b * job.H + u; }
  FUSEDRNN_INLINE Index at(Index t) const { return t * job.steps.B * job.H + here(); }
  FUSEDRNN_INLINE Masks<Cell, T> masks() const { return {job.regularization, b, u}; }
  FUSEDRNN_INLINE T start(const S* state0) const { return state0 ? T(state0[here()]) : T(0); }
  FUSEDRNN_INLINE S* da(Index t) const { return job.da + (t * job.steps.B + b) * Cell::accumulators * job.H + u; }
  FUSEDRNN_INLINE const T* saved(Index t) const { return job.saved + (t * job.steps.B + b) * Cell::saved * job.H + u; }
  FUSEDRNN_INLINE Index time_before(Index t) const { return job.steps.reverse ? t + 1 : t - 1; }

  // Whether a gradient goes from step t to the state before it, also where that is the initial state.
  FUSEDRNN_INLINE bool linked(Index t) const {
    const Before from = before(job.steps, t, b);
    return from == Before::start || (from == Before::previous && !detached(job.steps, t));
  }
  // Whether weight_hh^T da of step s, in the order of the recurrence, is part of the gradient of the state before it.
  FUSEDRNN_INLINE bool chained(Index s) const {
    if (s >= job.steps.T) return false;
    const Index t = time_of(job.steps, s);
    return valid(job.steps, t, b) && linked(t);
  }

  template <class Number>  // S or T
  FUSEDRNN_INLINE V previous(Index t, const Number* states, const S* state0) const {
    switch (before(job.steps, t, b)) {
      case Before::start:
        return start(state0);
      case Before::previous:
        return T(states[at(time_before(t))]);
      default:
        return V::zero();
    }
  }

  // Step t. `chain` is weight_hh^T da, through dropout, of the step that follows in time of the recurrence, where there
  // is one; `direct` and `dc` are what else came from it, and become what goes on. da is written to `out`, `stride`
  // elements from one accumulator to the next.
  FUSEDRNN_INLINE void step(Index t, T chain, T& direct, T& dc, S* out, Index stride) const {
    T dh = direct + chain;
    if (!valid(job.steps, t, b)) {
      for (int s = 0; s < Cell::accumulators; ++s) out[s * stride] = S(T(0));
      direct = dh;
      return;
    }
    add_upstream(t, dh, dc);
    V saved[Cell::saved + 1], da[Cell::accumulators], dc_before = V::zero(), direct_before = V::zero();
    load_saved(t, saved);
    const V h_prev = Cell::reads_h_prev ? previous(t, job.y, job.h0) : V::zero();
    const V h = Cell::reads_h ? V(T(job.y[at(t)])) : V::zero();
    const V c_prev = Cell::has_c ? previous(t, job.c, job.c0) : V::zero();
    const V c = Cell::has_c ? V(job.c[at(t)]) : V::zero();
    V new_dh = dh, new_dc = dc;
    const V past_h = masks().past(MaskKind::zoneout_h, t, new_dh);
    const V past_c = Cell::has_c ? masks().past(MaskKind::zoneout_c, t, new_dc) : V::zero();
    Cell::backward(saved, h_prev, h, c_prev, c, new_dh, new_dc, da, dc_before, direct_before);
    direct_before = direct_before + past_h, dc_before = dc_before + past_c;
    for (int s = 0; s < Cell::accumulators; ++s) out[s * stride] = S(da[s].v);
    const bool goes_on = linked(t);
    direct = Cell::has_direct && goes_on ? direct_before.v : T(0);
    dc = Cell::has_c && goes_on ? dc_before.v : T(0);
  }

  FUSEDRNN_INLINE void add_upstream(Index t, T& dh, T& dc) const {
    if (job.dy) dh += T(job.dy[at(t)]);
    if (job.dh_states) dh += T(job.dh_states[at(t)]);
    if (Cell::has_c && job.dc_states) dc += T(job.dc_states[at(t)]);
  }
  FUSEDRNN_INLINE void load_saved(Index t, V* saved) const {
    const T* p = this->saved(t);
    for (int s = 0; s < Cell::saved; ++s) saved[s] = p[s * job.H];
  }

  // The second phase: `dmiddle` is d(r*h), through dropout.
  FUSEDRNN_INLINE void step2(Index t, T dmiddle, T& direct, S* out) const {
    if constexpr (Cell::phases == 2) {
      if (!valid(job.steps, t, b)) return;
      V saved[Cell::saved + 1], da_r = V::zero(), direct_before = direct;
      load_saved(t, saved);
      Cell::backward2(saved, previous(t, job.y, job.h0), V(dmiddle), da_r, direct_before);
      out[0] = S(da_r.v);
      direct = linked(t) ? direct_before.v : T(0);
    }
  }

  // What reaches the initial state; chain is of step 0.
  FUSEDRNN_INLINE void finish(T chain, T direct, T dc) const {
    job.dh0[here()] = S(direct + chain);
    if (Cell::has_c) job.dc0[here()] = S(dc);
  }

  // What step t reads beside products and state, and the step before it has not brought already.
  FUSEDRNN_INLINE void prefetch_step(Index t) const {
    for (int s = 0; s < Cell::saved; ++s) prefetch(saved(t) + s * job.H);
    if (job.dy) prefetch(job.dy + at(t));
    const Index from = time_before(t);
    if (from >= 0 && from < job.steps.T) {
      if (Cell::has_c) prefetch(job.c + at(from));
      if (Cell::reads_h_prev) prefetch(job.y + at(from));
    }
    if (Cell::reads_h) prefetch(job.y + at(t));
  }

  // --- one step a launch ---
  FUSEDRNN_INLINE void begin() const {
    job.direct[here()] = start(job.dhT);
    if (Cell::has_c) job.dc[here()] = start(job.dcT);
  }
  // weight_hh^T da of step s, through dropout.
  FUSEDRNN_INLINE T chain(Index s) const { return chained(s) ? masks().dropped(job.chain[here()]) : T(0); }
  FUSEDRNN_INLINE void one_step(Index s) const {
    const Index t = time_of(job.steps, s);
    T dc = Cell::has_c ? job.dc[here()] : T(0);
    step(t, chain(s + 1), job.direct[here()], dc, da(t), job.H);
    if (Cell::has_c) job.dc[here()] = dc;
  }
  FUSEDRNN_INLINE void one_step2(Index s) const {
    const Index t = time_of(job.steps, s);
    step2(t, masks().dropped(job.chain[here()]), job.direct[here()], da(t));
  }
  FUSEDRNN_INLINE void finish() const { finish(chain(0), job.direct[here()], Cell::has_c ? job.dc[here()] : T(0)); }

  // What da is multiplied with for the gradient of weight_hh: h before step t, zero at padding; of the second phase r
  // times it.
  FUSEDRNN_INLINE void operands(Index t, S* h, S* middle) const {
    const T value = valid(job.steps, t, b) ? previous(t, job.y, job.h0).v : T(0);
    h[at(t)] = S(masks().dropped(value));
    if (Cell::phases == 2) {
      V saved[Cell::saved + 1];
      load_saved(t, saved);
      middle[at(t)] = S(valid(job.steps, t, b) ? masks().dropped(saved[0].v * value) : T(0));
    }
  }
};

}  // namespace cuda
}  // namespace fusedrnn
