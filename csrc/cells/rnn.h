// Elman cell: h' = tanh(a) or relu(a), a = weight_ih x + weight_hh h + bias. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cells/cell.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

struct RnnBase {
  static constexpr int gates = 1, accumulators = 1, saved = 0, phases = 1;
  static constexpr bool has_c = false, has_direct = false, reads_h_prev = false, reads_h = true, layer_norm = false;
  static constexpr Part input = {0, 1, {0}}, recurrent = {0, 1, {0}}, recurrent2 = {0, 0, {}};
};

struct RnnTanh : RnnBase {
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V, V, V*, V& h, V&) {
    h = tanh(a[0]);
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V*, V, V h, V, V, V dh, V, V* da, V&, V&) {
    da[0] = dh * fnma(h, h, V::set(1));
  }
};

struct RnnRelu : RnnBase {
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V, V, V*, V& h, V&) {
    h = relu(a[0]);
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V*, V, V h, V, V, V dh, V, V* da, V&, V&) {
    da[0] = zero_where(greater_equal(V::zero(), h), dh);  // not where h is NaN
  }
};

// Input part and recurrent part are normalised apart.
template <class Rnn>
struct RnnLayerNorm {
  static constexpr int gates = 1, accumulators = 2, saved = 2, phases = 1;
  static constexpr bool has_c = false, has_direct = false, reads_h_prev = false, reads_h = true, layer_norm = true;
  static constexpr Part input = {0, 1, {0}}, recurrent = {1, 1, {0}}, recurrent2 = {0, 0, {}};
  FUSEDRNN_INLINE static constexpr int norm_of(int accumulator) { return accumulator; }

  template <class V>
  FUSEDRNN_INLINE static void forward(const V* p, V, V*, V& h) {
    const V a = p[0] + p[1];
    V c;
    Rnn::forward(&a, V::zero(), V::zero(), &c, h, c);
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V*, V, V h, V dh, V* dp, V&) {
    V none;
    Rnn::backward(&h, V::zero(), h, V::zero(), V::zero(), dh, V::zero(), dp, none, none);
    dp[1] = dp[0];
  }
};
using RnnTanhLayerNorm = RnnLayerNorm<RnnTanh>;
using RnnReluLayerNorm = RnnLayerNorm<RnnRelu>;

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
