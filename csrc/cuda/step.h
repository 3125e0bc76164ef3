// One step of the recurrence a launch: the products are cuBLAS's, between the launches. A thread has one hidden unit of
// one row. Correct everywhere, and what every other kernel falls back to. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cuda/unit.h"

namespace fusedrnn {
namespace cuda {

// Calls f(b, u) for every row and unit, over all threads of the launch.
template <class F>
FUSEDRNN_INLINE void each_unit(Index B, Index H, F f) {
  const Index step = Index(gridDim.x) * blockDim.x;
  for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; i < B * H; i += step) f(i / H, i % H);
}

template <class Cell, class S>
struct ForwardStep {
  using T = Compute<S>;
  const ForwardJob<S>& job;

  // What the product of step s multiplies: the state before it.
  FUSEDRNN_INLINE void prepare(Index s, Index b, Index u, T h) const {
    if (s >= job.steps.T) return;
    const Index t = time_of(job.steps, s);
    const bool zero = !valid(job.steps, t, b) || before(job.steps, t, b) == Before::nothing;
    job.operand[b * job.H + u] = S(zero ? T(0) : Rules<Cell, T>{job.rules, b, u}.dropped(h));
  }

  FUSEDRNN_INLINE void begin(Index b, Index u) const {
    const ForwardUnit<Cell, S> unit{job, b, u};
    const Index i = b * job.H + u;
    const T h = unit.start_h(), c = unit.start_c();
    job.hT[i] = S(h);
    if (Cell::has_c) job.state_c[i] = c, job.cT[i] = S(c);
    prepare(0, b, u, h);
  }

  FUSEDRNN_INLINE void step(Index s, Index b, Index u) const {
    const Index i = b * job.H + u, t = time_of(job.steps, s);
    T h = T(job.hT[i]), c = Cell::has_c ? job.state_c[i] : T(0);
    ForwardUnit<Cell, S>{job, b, u}.step(t, job.products + b * kRecurrent<Cell> * job.H + u, job.H, h, c);
    if (Cell::phases == 2) {  // h is r*h, or where the row is over the state, which the second phase does not read
      job.operand[i] = S(h);
      return;
    }
    finish(s, b, u, h, c);
  }

  // The state after step s.
  FUSEDRNN_INLINE void finish(Index s, Index b, Index u, T h, T c) const {
    const Index i = b * job.H + u;
    job.hT[i] = S(h);
    if (Cell::has_c) job.state_c[i] = c;
    if (Cell::has_c && s + 1 == job.steps.T) job.cT[i] = S(c);
    prepare(s + 1, b, u, h);
  }

  FUSEDRNN_INLINE void step2(Index s, Index b, Index u) const {
    const Index i = b * job.H + u;
    T h = T(job.hT[i]);
    ForwardUnit<Cell, S>{job, b, u}.step2(time_of(job.steps, s), job.products[i], h);
    finish(s, b, u, h, T(0));
  }
};

template <class Cell, class S>
struct BackwardStep {
  using T = Compute<S>;
  const BackwardJob<S>& job;

  FUSEDRNN_INLINE void begin(Index b, Index u) const {
    const Index i = b * job.H + u;
    const BackwardUnit<Cell, S> unit{job, b, u};
    job.direct[i] = unit.start(job.dhT);
    if (Cell::has_c) job.dc[i] = unit.start(job.dcT);
  }

  FUSEDRNN_INLINE void step(Index s, Index b, Index u) const {
    const Index i = b * job.H + u, t = time_of(job.steps, s);
    const BackwardUnit<Cell, S> unit{job, b, u};
    T direct = job.direct[i], dc = Cell::has_c ? job.dc[i] : T(0);
    unit.step(t, unit.chained(s + 1) ? unit.rules().dropped(job.chain[i]) : T(0), direct, dc, unit.da(t), job.H);
    job.direct[i] = direct;
    if (Cell::has_c) job.dc[i] = dc;
  }

  FUSEDRNN_INLINE void step2(Index s, Index b, Index u) const {
    const Index i = b * job.H + u, t = time_of(job.steps, s);
    const BackwardUnit<Cell, S> unit{job, b, u};
    unit.step2(t, unit.rules().dropped(job.chain[i]), job.direct[i], unit.da(t));
  }

  FUSEDRNN_INLINE void finish(Index b, Index u) const {
    const Index i = b * job.H + u;
    const BackwardUnit<Cell, S> unit{job, b, u};
    unit.finish(unit.chained(0) ? unit.rules().dropped(job.chain[i]) : T(0), job.direct[i],
                Cell::has_c ? job.dc[i] : T(0));
  }

  // What da is multiplied with for the gradient of weight_hh: h before each step; of the second phase r times it.
  FUSEDRNN_INLINE void operands(Index i, Index u, S* h, S* middle) const {  // i: t*B + b
    const Index t = i / job.steps.B, b = i % job.steps.B;
    const BackwardUnit<Cell, S> unit{job, b, u};
    const T value = unit.operand(t);
    const auto rules = unit.rules();
    h[unit.at(t)] = S(rules.dropped(value));
    if (Cell::phases == 2) {
      Vec<T> saved[Cell::saved + 1];
      unit.load_saved(t, saved);
      middle[unit.at(t)] = S(valid(job.steps, t, b) ? rules.dropped(saved[0].v * value) : T(0));
    }
  }
};

}  // namespace cuda
}  // namespace fusedrnn
