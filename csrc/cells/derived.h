// The cells, by generate_cells.py from python/fusedrnn/cells/builtin.py. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cells/cell.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

struct RnnTanh {
  static constexpr int gates = 1, accumulators = 1, saved = 0, phases = 1;
  static constexpr bool has_c = false, has_direct = false, reads_h_prev = false, reads_h = true, layer_norm = false;
  static constexpr Part input = {0, 1, {0}}, recurrent = {0, 1, {0}}, recurrent2 = {0, 0, {}};
  static constexpr bool projects = false;
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V, V, V*, V& h, V&) {
    const V v1 = tanh(a[0]);
    h = v1;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V*, V, V h, V, V, V dh, V, V* da, V&, V&) {
    const V v1 = fnma(h, h, V::set(1));
    const V v2 = dh * v1;
    da[0] = v2;
  }
};

struct RnnRelu {
  static constexpr int gates = 1, accumulators = 1, saved = 0, phases = 1;
  static constexpr bool has_c = false, has_direct = false, reads_h_prev = false, reads_h = true, layer_norm = false;
  static constexpr Part input = {0, 1, {0}}, recurrent = {0, 1, {0}}, recurrent2 = {0, 0, {}};
  static constexpr bool projects = false;
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V, V, V*, V& h, V&) {
    const V v1 = relu(a[0]);
    h = v1;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V*, V, V h, V, V, V dh, V, V* da, V&, V&) {
    const auto v1 = greater_equal(V::set(0), h);
    const V v2 = zero_where(v1, dh);
    da[0] = v2;
  }
};

struct Lstm {
  static constexpr int gates = 4, accumulators = 4, saved = 4, phases = 1;
  static constexpr bool has_c = true, has_direct = false, reads_h_prev = false, reads_h = false, layer_norm = false;
  static constexpr Part input = {0, 4, {0, 1, 2, 3}}, recurrent = {0, 4, {0, 1, 2, 3}}, recurrent2 = {0, 0, {}};
  static constexpr bool projects = false;
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V, V c_prev, V* saved, V& h, V& c) {
    const V v1 = sigmoid(a[1]);
    const V v2 = sigmoid(a[0]);
    const V v3 = tanh(a[2]);
    const V v4 = v2 * v3;
    const V v5 = fma(v1, c_prev, v4);
    const V v6 = sigmoid(a[3]);
    const V v7 = tanh(v5);
    const V v8 = v6 * v7;
    saved[0] = v1;
    saved[1] = v2;
    saved[2] = v3;
    saved[3] = v6;
    h = v8;
    c = v5;
  }
  template <class V>
  FUSEDRNN_INLINE static V new_c(const V* saved, V c_prev) {
    const V v1 = saved[1] * saved[2];
    const V v2 = fma(saved[0], c_prev, v1);
    return v2;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V* saved, V, V, V c_prev, V c, V dh, V dc, V* da, V& dc_prev, V&) {
    const V v1 = tanh(c);
    const V v2 = dh * v1;
    const V v3 = dh * saved[3];
    const V v4 = fnma(v1, v1, V::set(1));
    const V v5 = V::set(1) - saved[3];
    const V v6 = saved[3] * v5;
    const V v7 = v2 * v6;
    const V v8 = fma(v3, v4, dc);
    const V v9 = v8 * saved[2];
    const V v10 = v8 * saved[1];
    const V v11 = fnma(saved[2], saved[2], V::set(1));
    const V v12 = v10 * v11;
    const V v13 = V::set(1) - saved[1];
    const V v14 = saved[1] * v13;
    const V v15 = v9 * v14;
    const V v16 = v8 * c_prev;
    const V v17 = v8 * saved[0];
    const V v18 = V::set(1) - saved[0];
    const V v19 = saved[0] * v18;
    const V v20 = v16 * v19;
    da[0] = v15;
    da[1] = v20;
    da[2] = v12;
    da[3] = v7;
    dc_prev = v17;
  }
};

struct GruResetAfter {
  static constexpr int gates = 3, accumulators = 4, saved = 4, phases = 1;
  static constexpr bool has_c = false, has_direct = true, reads_h_prev = true, reads_h = false, layer_norm = false;
  static constexpr Part input = {0, 3, {2, 0, 1}}, recurrent = {1, 3, {0, 1, 2}}, recurrent2 = {0, 0, {}};
  static constexpr bool projects = false;
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V h_prev, V, V* saved, V& h, V&) {
    const V v1 = sigmoid(a[1]);
    const V v2 = sigmoid(a[2]);
    const V v3 = fma(v1, a[3], a[0]);
    const V v4 = tanh(v3);
    const V v5 = h_prev - v4;
    const V v6 = fma(v2, v5, v4);
    saved[0] = v1;
    saved[1] = v2;
    saved[2] = a[3];
    saved[3] = v4;
    h = v6;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V* saved, V h_prev, V, V, V, V dh, V, V* da, V&, V& direct) {
    const V v1 = h_prev - saved[3];
    const V v2 = dh * v1;
    const V v3 = dh * saved[1];
    const V v4 = V::set(1) - saved[1];
    const V v5 = dh * v4;
    const V v6 = fnma(saved[3], saved[3], V::set(1));
    const V v7 = v5 * v6;
    const V v8 = v7 * saved[2];
    const V v9 = v7 * saved[0];
    const V v10 = saved[1] * v4;
    const V v11 = v2 * v10;
    const V v12 = V::set(1) - saved[0];
    const V v13 = saved[0] * v12;
    const V v14 = v8 * v13;
    da[0] = v7;
    da[1] = v14;
    da[2] = v11;
    da[3] = v9;
    direct = v3;
  }
};

struct GruResetBefore {
  static constexpr int gates = 3, accumulators = 3, saved = 3, phases = 2;
  static constexpr bool has_c = false, has_direct = true, reads_h_prev = true, reads_h = false, layer_norm = false;
  static constexpr Part input = {0, 3, {0, 1, 2}}, recurrent = {0, 2, {0, 1}}, recurrent2 = {2, 1, {2}};
  static constexpr bool projects = false;
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V h_prev, V, V* saved, V& middle, V&) {
    const V v1 = sigmoid(a[0]);
    const V v2 = sigmoid(a[1]);
    const V v3 = v1 * h_prev;
    saved[0] = v1;
    saved[1] = v2;
    saved[2] = a[2];
    middle = v3;
  }
  template <class V>
  FUSEDRNN_INLINE static void forward2(V a, V h_prev, V* saved, V& h) {
    const V v1 = tanh(a);
    const V v2 = h_prev - v1;
    const V v3 = fma(saved[1], v2, v1);
    saved[2] = v1;
    h = v3;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V* saved, V h_prev, V, V, V, V dh, V, V* da, V&, V& direct) {
    const V v1 = h_prev - saved[2];
    const V v2 = dh * v1;
    const V v3 = dh * saved[1];
    const V v4 = V::set(1) - saved[1];
    const V v5 = dh * v4;
    const V v6 = fnma(saved[2], saved[2], V::set(1));
    const V v7 = v5 * v6;
    const V v8 = saved[1] * v4;
    const V v9 = v2 * v8;
    da[1] = v9;
    da[2] = v7;
    direct = v3;
    da[0] = V::zero();
  }
  template <class V>
  FUSEDRNN_INLINE static void backward2(const V* saved, V h_prev, V dmiddle, V& da_late, V& direct) {
    const V v1 = dmiddle * h_prev;
    const V v2 = V::set(1) - saved[0];
    const V v3 = saved[0] * v2;
    const V v4 = v1 * v3;
    const V v5 = fma(dmiddle, saved[0], direct);
    da_late = v4;
    direct = v5;
  }
};

struct RnnTanhLayerNorm {
  static constexpr int gates = 1, accumulators = 2, saved = 2, phases = 1;
  static constexpr bool has_c = false, has_direct = false, reads_h_prev = false, reads_h = true, layer_norm = true;
  static constexpr Part input = {0, 1, {0}}, recurrent = {1, 1, {0}}, recurrent2 = {0, 0, {}};
  FUSEDRNN_INLINE static constexpr int norm_of(int s) { return s <= 0 ? 0 : 1; }
  static constexpr bool projects = false;
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* p, V, V& h) {
    const V v1 = p[0] + p[1];
    const V v2 = tanh(v1);
    h = v2;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V*, V, V h, V dh, V* dp, V&) {
    const V v1 = fnma(h, h, V::set(1));
    const V v2 = dh * v1;
    dp[0] = v2;
    dp[1] = v2;
  }
};

struct RnnReluLayerNorm {
  static constexpr int gates = 1, accumulators = 2, saved = 2, phases = 1;
  static constexpr bool has_c = false, has_direct = false, reads_h_prev = false, reads_h = true, layer_norm = true;
  static constexpr Part input = {0, 1, {0}}, recurrent = {1, 1, {0}}, recurrent2 = {0, 0, {}};
  FUSEDRNN_INLINE static constexpr int norm_of(int s) { return s <= 0 ? 0 : 1; }
  static constexpr bool projects = false;
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* p, V, V& h) {
    const V v1 = p[0] + p[1];
    const V v2 = relu(v1);
    h = v2;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V*, V, V h, V dh, V* dp, V&) {
    const auto v1 = greater_equal(V::set(0), h);
    const V v2 = zero_where(v1, dh);
    dp[0] = v2;
    dp[1] = v2;
  }
};

struct LstmLayerNorm {
  static constexpr int gates = 4, accumulators = 8, saved = 8, phases = 1;
  static constexpr bool has_c = true, has_direct = false, reads_h_prev = false, reads_h = false, layer_norm = true;
  static constexpr Part input = {0, 4, {0, 1, 2, 3}}, recurrent = {4, 4, {0, 1, 2, 3}}, recurrent2 = {0, 0, {}};
  FUSEDRNN_INLINE static constexpr int norm_of(int s) { return s <= 3 ? 0 : 1; }
  static constexpr bool projects = false;
  template <class V>
  FUSEDRNN_INLINE static void forward_state(const V* p, V c_prev, V& c, V& o) {
    const V v1 = p[0] + p[4];
    const V v2 = p[1] + p[5];
    const V v3 = p[2] + p[6];
    const V v4 = p[3] + p[7];
    const V v5 = sigmoid(v2);
    const V v6 = sigmoid(v1);
    const V v7 = tanh(v3);
    const V v8 = v6 * v7;
    const V v9 = fma(v5, c_prev, v8);
    const V v10 = sigmoid(v4);
    c = v9;
    o = v10;
  }
  template <class V>
  FUSEDRNN_INLINE static V forward_output(V o, V m) {
    const V v1 = tanh(m);
    const V v2 = o * v1;
    return v2;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward_output(const V* p, V m, V dh, V& da_o, V& dm) {
    const V v1 = p[3] + p[7];
    const V v2 = sigmoid(v1);
    const V v3 = tanh(m);
    const V v4 = dh * v3;
    const V v5 = dh * v2;
    const V v6 = fnma(v3, v3, V::set(1));
    const V v7 = v5 * v6;
    const V v8 = V::set(1) - v2;
    const V v9 = v2 * v8;
    const V v10 = v4 * v9;
    da_o = v10;
    dm = v7;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward_state(const V* p, V c_prev, V dc, V da_o, V* dp, V& dc_prev) {
    const V v1 = p[0] + p[4];
    const V v2 = p[1] + p[5];
    const V v3 = p[2] + p[6];
    const V v4 = sigmoid(v2);
    const V v5 = sigmoid(v1);
    const V v6 = tanh(v3);
    const V v7 = dc * v6;
    const V v8 = dc * v5;
    const V v9 = fnma(v6, v6, V::set(1));
    const V v10 = v8 * v9;
    const V v11 = V::set(1) - v5;
    const V v12 = v5 * v11;
    const V v13 = v7 * v12;
    const V v14 = dc * c_prev;
    const V v15 = dc * v4;
    const V v16 = V::set(1) - v4;
    const V v17 = v4 * v16;
    const V v18 = v14 * v17;
    dp[0] = v13;
    dp[1] = v18;
    dp[2] = v10;
    dp[3] = da_o;
    dp[4] = v13;
    dp[5] = v18;
    dp[6] = v10;
    dp[7] = da_o;
    dc_prev = v15;
  }
};

struct GruResetAfterLayerNorm {
  static constexpr int gates = 3, accumulators = 6, saved = 6, phases = 1;
  static constexpr bool has_c = false, has_direct = true, reads_h_prev = true, reads_h = false, layer_norm = true;
  static constexpr Part input = {0, 3, {0, 1, 2}}, recurrent = {3, 3, {0, 1, 2}}, recurrent2 = {0, 0, {}};
  FUSEDRNN_INLINE static constexpr int norm_of(int s) { return s <= 1 ? 0 : s <= 2 ? 1 : s <= 4 ? 2 : 3; }
  static constexpr bool projects = false;
  template <class V>
  FUSEDRNN_INLINE static void forward(const V* p, V h_prev, V& h) {
    const V v1 = p[0] + p[3];
    const V v2 = p[1] + p[4];
    const V v3 = sigmoid(v1);
    const V v4 = sigmoid(v2);
    const V v5 = fma(v3, p[5], p[2]);
    const V v6 = tanh(v5);
    const V v7 = h_prev - v6;
    const V v8 = fma(v4, v7, v6);
    h = v8;
  }
  template <class V>
  FUSEDRNN_INLINE static void backward(const V* p, V h_prev, V, V dh, V* dp, V& direct) {
    const V v1 = p[0] + p[3];
    const V v2 = p[1] + p[4];
    const V v3 = sigmoid(v1);
    const V v4 = sigmoid(v2);
    const V v5 = fma(v3, p[5], p[2]);
    const V v6 = tanh(v5);
    const V v7 = h_prev - v6;
    const V v8 = dh * v7;
    const V v9 = dh * v4;
    const V v10 = V::set(1) - v4;
    const V v11 = dh * v10;
    const V v12 = fnma(v6, v6, V::set(1));
    const V v13 = v11 * v12;
    const V v14 = v13 * p[5];
    const V v15 = v13 * v3;
    const V v16 = v4 * v10;
    const V v17 = v8 * v16;
    const V v18 = V::set(1) - v3;
    const V v19 = v3 * v18;
    const V v20 = v14 * v19;
    dp[0] = v20;
    dp[1] = v17;
    dp[2] = v13;
    dp[3] = v20;
    dp[4] = v17;
    dp[5] = v15;
    direct = v9;
  }
};

struct LstmProjected : Lstm {
  static constexpr bool projects = true;
  template <class V>
  FUSEDRNN_INLINE static V new_h(const V* saved, V, V c) {
    const V v1 = tanh(c);
    const V v2 = saved[3] * v1;
    return v2;
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
