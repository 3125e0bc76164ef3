// LSTM: i, f, o = sigmoid(a), g = tanh(a); c' = f*c + i*g; h' = o*tanh(c'). SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cells/cell.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

struct Lstm {
  static constexpr int gates = 4, accumulators = 4, saved = 4, phases = 1;
  static constexpr bool has_c = true, has_direct = false, reads_h_prev = false, reads_h = false;
  static constexpr Part input = {0, 4, {0, 1, 2, 3}}, recurrent = {0, 4, {0, 1, 2, 3}}, recurrent2 = {0, 0, {}};

  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V, V c_prev, V* saved, V& h, V& c) {
    const V i = sigmoid(a[0]), f = sigmoid(a[1]), g = tanh(a[2]), o = sigmoid(a[3]);
    c = fma(f, c_prev, i * g);
    h = o * tanh(c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  // c again from what forward saved, in the same bits.
  template <class V>
  FUSEDRNN_INLINE static V new_c(const V* saved, V c_prev) {
    return fma(saved[1], c_prev, saved[0] * saved[2]);
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const V* saved, V, V, V c_prev, V c, V dh, V dc, V* da, V& dc_prev, V&) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], one = V::set(1);
    const V tanh_c = tanh(c);  // cheaper than saving it: one polynomial against a load and a store per step
    dc = fma(dh * o, fnma(tanh_c, tanh_c, one), dc);
    da[0] = dc * g * (i * (one - i));
    da[1] = dc * c_prev * (f * (one - f));
    da[2] = dc * i * fnma(g, g, one);
    da[3] = dh * tanh_c * (o * (one - o));
    dc_prev = dc * f;
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
