// GRU: r, z = sigmoid(a); h' = (1-z)*n + z*h. SPDX-License-Identifier: Apache-2.0
//   reset after:  n = tanh(n_x + r*q), q = weight_hn h + bias_hn   (PyTorch, cuDNN)
//   reset before: n = tanh(n_x + weight_hn (r*h))                  (two phases: all of r*h is needed before any n)
#pragma once
#include "cells/cell.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

struct GruResetAfter {
  // Accumulators n_x, r, z, q: the input part feeds the first three, the recurrent part the last three.
  static constexpr int gates = 3, accumulators = 4, saved = 4, phases = 1;
  static constexpr bool has_c = false, has_direct = true, reads_h_prev = true, reads_h = false, layer_norm = false;
  static constexpr Part input = {0, 3, {2, 0, 1}}, recurrent = {1, 3, {0, 1, 2}}, recurrent2 = {0, 0, {}};

  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V h_prev, V, V* saved, V& h, V&) {
    const V r = sigmoid(a[1]), z = sigmoid(a[2]), q = a[3], n = tanh(fma(r, q, a[0]));
    h = fma(z, h_prev - n, n);
    saved[0] = n, saved[1] = r, saved[2] = z, saved[3] = q;
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const V* saved, V h_prev, V, V, V, V dh, V, V* da, V&, V& direct) {
    const V n = saved[0], r = saved[1], z = saved[2], q = saved[3], one = V::set(1);
    const V dn = dh * (one - z) * fnma(n, n, one);
    da[0] = dn;
    da[1] = dn * q * (r * (one - r));
    da[2] = dh * (h_prev - n) * (z * (one - z));
    da[3] = dn * r;
    direct = dh * z;
  }
};

// r and z are normalised together, n by itself.
struct GruResetAfterLayerNorm {
  // Accumulators r, z, n of the input part, then of the recurrent part.
  static constexpr int gates = 3, accumulators = 6, saved = 6, phases = 1;
  static constexpr bool has_c = false, has_direct = true, reads_h_prev = true, reads_h = false, layer_norm = true;
  static constexpr Part input = {0, 3, {0, 1, 2}}, recurrent = {3, 3, {0, 1, 2}}, recurrent2 = {0, 0, {}};
  FUSEDRNN_INLINE static constexpr int norm_of(int accumulator) { return accumulator / 3 * 2 + accumulator % 3 / 2; }

  // The plain cell's saved values, from its accumulators n_x, r, z, q.
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* p, V h_prev, V* saved, V& h) {
    const V a[4] = {p[2], p[0] + p[3], p[1] + p[4], p[5]};
    V c;
    GruResetAfter::forward(a, h_prev, V::zero(), saved, h, c);
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V* p, V h_prev, V, V dh, V* dp, V& direct) {
    V saved[4], h, da[4], dc;
    forward(p, h_prev, saved, h);
    GruResetAfter::backward(saved, h_prev, h, V::zero(), V::zero(), dh, V::zero(), da, dc, direct);
    dp[0] = dp[3] = da[1], dp[1] = dp[4] = da[2], dp[2] = da[0], dp[5] = da[3];
  }
};

struct GruResetBefore {
  // Accumulators r, z, n; the second recurrent part, of r*h, feeds n.
  static constexpr int gates = 3, accumulators = 3, saved = 3, phases = 2;
  static constexpr bool has_c = false, has_direct = true, reads_h_prev = true, reads_h = false, layer_norm = false;
  static constexpr Part input = {0, 3, {0, 1, 2}}, recurrent = {0, 2, {0, 1}}, recurrent2 = {2, 1, {2}};

  // Phase 1: r and z; `middle` is what the second recurrent part multiplies. n_x waits in saved[2].
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V h_prev, V, V* saved, V& middle, V&) {
    saved[0] = sigmoid(a[0]), saved[1] = sigmoid(a[1]), saved[2] = a[2];
    middle = saved[0] * h_prev;
  }
  // Phase 2: a is the accumulator of n, complete.
  template <class V>
  FUSEDRNN_INLINE static void forward2(V a, V h_prev, V* saved, V& h) {
    const V z = saved[1], n = tanh(a);
    saved[2] = n;
    h = fma(z, h_prev - n, n);
  }

  // Phase 1: da of z and n. da[0] waits for d(r*h).
  template <class V>
  FUSEDRNN_INLINE static void backward(const V* saved, V h_prev, V, V, V, V dh, V, V* da, V&, V& direct) {
    const V z = saved[1], n = saved[2], one = V::set(1);
    da[0] = V::zero();
    da[1] = dh * (h_prev - n) * (z * (one - z));
    da[2] = dh * (one - z) * fnma(n, n, one);
    direct = dh * z;
  }
  // Phase 2: dmiddle = d(r*h) = weight_hn^T da_n.
  template <class V>
  FUSEDRNN_INLINE static void backward2(const V* saved, V h_prev, V dmiddle, V& da_r, V& direct) {
    const V r = saved[0];
    da_r = dmiddle * h_prev * (r * (V::set(1) - r));
    direct = fma(dmiddle, r, direct);
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
