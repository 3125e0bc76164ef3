// LSTM: i, f, o = sigmoid(a), g = tanh(a); c' = f*c + i*g; h' = o*tanh(c'). SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cells/cell.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

struct Lstm {
  static constexpr int gates = 4, accumulators = 4, saved = 4, phases = 1;
  static constexpr bool has_c = true, has_direct = false, reads_h_prev = false, reads_h = false, layer_norm = false;
  static constexpr Part input = {0, 4, {0, 1, 2, 3}}, recurrent = {0, 4, {0, 1, 2, 3}}, recurrent2 = {0, 0, {}};

  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V, V c_prev, V* saved, V& h, V& c) {
    forward_state(a, c_prev, saved, c);
    const V o = saved[3];
    h = o * tanh(c);
  }
  template <class V>
  FUSEDRNN_INLINE static void forward_state(const V* a, V c_prev, V* saved, V& c) {
    const V i = sigmoid(a[0]), f = sigmoid(a[1]), g = tanh(a[2]), o = sigmoid(a[3]);
    c = fma(f, c_prev, i * g);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  // c again from what forward saved, in the same bits.
  template <class V>
  FUSEDRNN_INLINE static V new_c(const V* saved, V c_prev) {
    return fma(saved[1], c_prev, saved[0] * saved[2]);
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const V* saved, V, V, V c_prev, V c, V dh, V dc, V* da, V& dc_prev, V&) {
    const V o = saved[3], one = V::set(1);
    const V tanh_c = tanh(c);  // cheaper than saving it: one polynomial against a load and a store per step
    dc = fma(dh * o, fnma(tanh_c, tanh_c, one), dc);
    backward_state(saved, c_prev, dc, da, dc_prev);
    da[3] = dh * tanh_c * (o * (one - o));
  }
  // dc is the whole gradient of c.
  template <class V>
  FUSEDRNN_INLINE static void backward_state(const V* saved, V c_prev, V dc, V* da, V& dc_prev) {
    const V i = saved[0], f = saved[1], g = saved[2], one = V::set(1);
    da[0] = dc * g * (i * (one - i));
    da[1] = dc * c_prev * (f * (one - f));
    da[2] = dc * i * fnma(g, g, one);
    dc_prev = dc * f;
  }
};

// h' = o*tanh(m), m = LN(c') + bias_c: c' of all units is needed before any h'.
struct LstmLayerNorm {
  static constexpr int gates = 4, accumulators = 8, saved = 8, phases = 1;
  static constexpr bool has_c = true, has_direct = false, reads_h_prev = false, reads_h = false, layer_norm = true;
  static constexpr Part input = {0, 4, {0, 1, 2, 3}}, recurrent = {4, 4, {0, 1, 2, 3}}, recurrent2 = {0, 0, {}};
  FUSEDRNN_INLINE static constexpr int norm_of(int accumulator) { return accumulator / 4; }

  template <class V>
  FUSEDRNN_INLINE static void gates_of(const V* p, V* a) {
    for (int s = 0; s < 4; ++s) a[s] = p[s] + p[s + 4];
  }

  template <class V>
  FUSEDRNN_INLINE static void forward_state(const V* p, V c_prev, V& c, V& o) {
    V a[4], saved[4];
    gates_of(p, a);
    Lstm::forward_state(a, c_prev, saved, c);
    o = saved[3];
  }
  template <class V>
  FUSEDRNN_INLINE static V forward_output(V o, V m) {
    return o * tanh(m);
  }

  // -> gradients of the gate o and of m.
  template <class V>
  FUSEDRNN_INLINE static void backward_output(const V* p, V m, V dh, V& da_o, V& dm) {
    const V o = sigmoid(p[3] + p[7]), u = tanh(m), one = V::set(1);
    da_o = dh * u * (o * (one - o));
    dm = dh * o * fnma(u, u, one);
  }
  template <class V>
  FUSEDRNN_INLINE static void backward_state(const V* p, V c_prev, V dc, V da_o, V* dp, V& dc_prev) {
    V a[4];
    gates_of(p, a);
    const V saved[4] = {sigmoid(a[0]), sigmoid(a[1]), tanh(a[2]), V::zero()};
    Lstm::backward_state(saved, c_prev, dc, dp, dc_prev);
    dp[3] = da_o;
    for (int s = 0; s < 4; ++s) dp[s + 4] = dp[s];
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
