// A step of a cell with layer norm: a block has a row, whose mean and variance need the bare products of all its units.
// SPDX-License-Identifier: Apache-2.0
//
// Forward saves the bare products, and backward makes x again. A thread has the same units in every pass over a row, so
// only the sums go between threads. The arithmetic is in cells/row_norm.h.
#pragma once
#include "cells/row_norm.h"
#include "cuda/unit.h"

namespace fusedrnn {
namespace cuda {

template <class F>
FUSEDRNN_INLINE void each_unit_of_row(Index H, F f) {
  for (Index u = threadIdx.x; u < H; u += kThreads) f(u);
}

// A row [accumulator][unit] as the threads of a block have it, each some of its units.
template <class T>
struct RowUnits {
  using V = Vec<T>;
  const Index H;

  static FUSEDRNN_INLINE T root(T x) { return square_root(x); }
  struct Sum {
    T of = T(0);
    FUSEDRNN_INLINE void add(int, V v) { of += v.v; }
    FUSEDRNN_INLINE void add_product(int, V a, V b) { of = Native<T>::fma(a.v, b.v, of); }
  };
  // In every thread what all threads of the block have of each, in an order that depends on nothing.
  template <int count>
  static FUSEDRNN_INLINE void totals(const Sum* sums, T* out) {
    auto* const of_warps = reinterpret_cast<T(*)[count]>(shared_memory());
    sync_block();  // what was there before has been read
    for (int n = 0; n < count; ++n) {
      T sum = sums[n].of;
      for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += from_lane(sum, mask);
      if (lane() == 0) of_warps[threadIdx.x / kWarp][n] = sum;
    }
    sync_block();
    for (int n = 0; n < count; ++n) {
      out[n] = T(0);
      for (int warp = 0; warp < kWarps; ++warp) out[n] += of_warps[warp][n];
    }
  }
  struct Number {
    T x;
    Number() = default;
    FUSEDRNN_INLINE explicit Number(T x) : x(x) {}
    FUSEDRNN_INLINE V in(Index) const { return x; }
    FUSEDRNN_INLINE V all() const { return x; }
  };

  template <class F>
  FUSEDRNN_INLINE void each(F f) const {
    each_unit_of_row(H, [&](Index u) { f(u, 0, H - u); });
  }
  FUSEDRNN_INLINE Index at(Index u, int s, int) const { return s * H + u; }
  FUSEDRNN_INLINE V load(const T* row, Index u, int s, int) const { return row[s * H + u]; }
};

// Row b at step s.
template <class Cell, class S>
FUSEDRNN_INLINE void normed_step(const ForwardJob<S>& job, Index s, Index b) {
  using T = Compute<S>;
  using V = Vec<T>;
  using Maths = typename Plain<Cell>::type;
  constexpr int A = Cell::accumulators;
  const Index H = job.H, t = time_of(job.steps, s);
  const auto unit = [&](Index u) { return ForwardUnit<Cell, S>{job, b, u}; };
  const auto finish = [&](Index u, T h, T c) { unit(u).keep(h, c), unit(u).give(t, h, c); };
  T* const state_c = Cell::has_c ? job.state_c + b * H : nullptr;
  if (!valid(job.steps, t, b)) {
    each_unit_of_row(H, [&](Index u) { finish(u, T(job.hT[b * H + u]), Cell::has_c ? state_c[u] : T(0)); });
    return;
  }
  const bool cut = before(job.steps, t, b) == Before::nothing;
  const auto h_before = [&](Index u) -> V { return cut ? T(0) : T(job.hT[b * H + u]); };
  T *const row = unit(0).saved(t), *const candidates = row + A * H;  // of a regularized cell, what backward reads
  each_unit_of_row(H, [&](Index u) {
    const T *input = unit(u).projected(t), *recurrent = job.products + b * kRecurrent<Cell> * H + u;
    for (int a = 0; a < kInput<Cell>; ++a) row[(Cell::input.first + a) * H + u] = input[a * H];
    for (int a = 0; a < kRecurrent<Cell>; ++a) row[(Cell::recurrent.first + a) * H + u] = cut ? T(0) : recurrent[a * H];
  });
  const RowNorm<Cell, RowUnits<T>> norm(row, H);
  if constexpr (Cell::has_c) {
    T* const candidate = kRegularized<Cell> ? candidates : state_c;
    const auto gates = [&](Index u, V c_before, V& c, V& o) {
      V p[A];
      norm.parts(job.gain, job.bias, u, p);
      Cell::forward_state(p, c_before, c, o);
    };
    each_unit_of_row(H, [&](Index u) {
      const V c_before = cut ? T(0) : state_c[u];
      V c, o;
      gates(u, c_before, c, o);
      state_c[u] = unit(u).masks().zoned(MaskKind::zoneout_c, t, c, c_before).v;
      candidate[u] = c.v;
    });
    const RowNorm<CellState, RowUnits<T>> norm_c(candidate, H);
    each_unit_of_row(H, [&](Index u) {
      V c, o, m;
      gates(u, V::zero(), c, o);  // for o, which no c enters
      norm_c.parts(job.gain_c, job.bias_c, u, &m);
      const V h = unit(u).masks().zoned(MaskKind::zoneout_h, t, Cell::forward_output(o, m), h_before(u));
      finish(u, T(S(h.v)), state_c[u]);
    });
  } else {
    each_unit_of_row(H, [&](Index u) {
      V p[A], h;
      norm.parts(job.gain, job.bias, u, p);
      Maths::forward(p, h_before(u), h);
      if constexpr (kRegularized<Cell> && Maths::reads_h) candidates[u] = h.v;
      finish(u, T(S(unit(u).masks().zoned(MaskKind::zoneout_h, t, h, h_before(u)).v)), T(0));
    });
  }
}
template <class Cell, class S>
FUSEDRNN_INLINE void normed_step(const BackwardJob<S>& job, Index s, Index b) {
  using T = Compute<S>;
  using V = Vec<T>;
  using Maths = typename Plain<Cell>::type;
  constexpr int A = Cell::accumulators;
  const Index H = job.H, t = time_of(job.steps, s);
  const auto unit = [&](Index u) { return BackwardUnit<Cell, S>{job, b, u}; };
  T *const direct = job.direct + b * H, *const dc = job.dc + b * H;
  S* const da = unit(0).da(t);
  if (!valid(job.steps, t, b)) {
    each_unit_of_row(H, [&](Index u) {
      direct[u] += unit(u).chain(s + 1);
      for (int a = 0; a < A; ++a) da[a * H + u] = S(T(0));
    });
    return;
  }
  const bool goes_on = unit(0).linked(t);
  // What a row needs between passes, [A][unit]: of the first dh; with c of the second dc, of the third da of gate o.
  T *const kept = job.row + b * A * H, *const kept_dc = kept + H, *const kept_o = kept + 2 * H;
  T* const sums = job.norm_sums + b * kNormSums<Cell> * H;
  const auto add = [&](int n, Index u, V x) { sums[n * H + u] += x.v; };
  const T* const row = unit(0).saved(t);
  [[maybe_unused]] const T* const candidates = row + A * H;
  const RowNorm<Cell, RowUnits<T>> norm(row, H);
  each_unit_of_row(H, [&](Index u) {
    T all_dh = direct[u] + unit(u).chain(s + 1), all_dc = Cell::has_c ? dc[u] : T(0);
    unit(u).add_upstream(t, all_dh, all_dc);
    V dh = all_dh, dc_new = all_dc;
    direct[u] = unit(u).masks().past(MaskKind::zoneout_h, t, dh).v;
    kept[u] = dh.v;
    if constexpr (Cell::has_c) {
      dc[u] = unit(u).masks().past(MaskKind::zoneout_c, t, dc_new).v;
      kept_dc[u] = dc_new.v;
    }
  });
  if constexpr (Cell::has_c) {  // through h and the norm of c: da of gate o and the whole gradient of c
    const RowNorm<CellState, RowUnits<T>> norm_c(kRegularized<Cell> ? candidates : job.c + unit(0).at(t), H);
    RowNormBackward<CellState, RowUnits<T>> back(norm_c);
    each_unit_of_row(H, [&](Index u) {
      V p[A], m, da_o, dm;
      norm.parts(job.gain, job.bias, u, p);
      norm_c.parts(job.gain_c, job.bias_c, u, &m);
      Cell::backward_output(p, m, V(kept[u]), da_o, dm);
      const V x = norm_c.x(u, 0), dx = dm * V(job.gain_c[u]);
      add(2 * A, u, dm * x), add(2 * A + 1, u, dm);
      back.add(0, 0, dx, x);
      kept[u] = dx.v;
      kept_o[u] = da_o.v;
    });
    back.finish();
    each_unit_of_row(H, [&](Index u) { kept_dc[u] += back.da(u, 0, V(kept[u])).v; });
  }
  RowNormBackward<Cell, RowUnits<T>> back(norm);
  each_unit_of_row(H, [&](Index u) {
    V p[A], dp[A], dc_before = V::zero(), past = V::zero();
    norm.parts(job.gain, job.bias, u, p);
    if constexpr (Cell::has_c) {
      Cell::backward_state(p, unit(u).previous(t, job.c, job.c0), V(kept_dc[u]), V(kept_o[u]), dp, dc_before);
      dc[u] = goes_on ? dc[u] + dc_before.v : T(0);
    } else {
      const V h_before = Cell::reads_h_prev ? unit(u).previous(t, job.y, job.h0) : V::zero();
      V h = V::zero();
      if constexpr (Maths::reads_h) h = kRegularized<Cell> ? candidates[u] : T(job.y[unit(u).at(t)]);
      Maths::backward(p, h_before, h, V(kept[u]), dp, past);
    }
    direct[u] = Cell::has_direct && goes_on ? direct[u] + past.v : T(0);
    for (int a = 0; a < A; ++a) {
      const V x = norm.x(u, a), dx = dp[a] * V(job.gain[a * H + u]);
      add(a, u, dp[a] * x), add(A + a, u, dp[a]);
      back.add(a, 0, dx, x);
      kept[a * H + u] = dx.v;
    }
  });
  back.finish();
  each_unit_of_row(H, [&](Index u) {
    for (int a = 0; a < A; ++a) da[a * H + u] = S(back.da(u, a, V(kept[a * H + u])).v);
  });
}

// What kernels.cu calls: every unit by itself, or row by row.
template <template <class, class> class Unit, class Cell, class S, class Job>
FUSEDRNN_INLINE void one_step(const Job& job, Index s) {
  if constexpr (Cell::layer_norm)
    for (Index b = blockIdx.x; b < job.steps.B; b += gridDim.x) normed_step<Cell>(job, s, b);
  else
    each_unit(job.steps.B, job.H, [&](Index b, Index u) { Unit<Cell, S>{job, b, u}.one_step(s); });
}

}  // namespace cuda
}  // namespace fusedrnn
