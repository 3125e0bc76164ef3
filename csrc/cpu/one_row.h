// One row times weights as they lie. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/tile.h"
#include "simd/transpose.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

// to[unit] += sum over k of x[k] * weight[unit][k], for the 16 units of a block, summed up as by the tile: k in
// ascending order, one FMA each. The weights are transposed in registers. To pack them first, which pays for several
// rows, costs a store and a load of each, two thirds more time in all.
template <class V>
FUSEDRNN_NOINLINE void add_row(const typename V::scalar* weight, Index K, const typename V::scalar* x,
                               typename V::scalar* to) {
  using T = typename V::scalar;
  constexpr int n = cpu::kBlock / V::lanes, side = 16 / int(sizeof(T));
  V sums[n];
#pragma GCC unroll 8
  for (int v = 0; v < n; ++v) sums[v] = V::load(to + v * V::lanes);
  Index k = 0;
  for (; k + side <= K; k += side)
#pragma GCC unroll 8
    for (int v = 0; v < n; ++v) {
      typename V::Vector rows[side];  // squares side by side: of units i, i + side, ...
#pragma GCC unroll 4
      for (int i = 0; i < side; ++i) rows[i] = V::pieces(weight + (v * V::lanes + i) * K + k, side * K);
      transpose_squares<side, V::lanes>(rows);
#pragma GCC unroll 4
      for (int i = 0; i < side; ++i) sums[v] = fma(V::set(x[k + i]), V(rows[i]), sums[v]);
    }
  for (; k < K; ++k)
    for (int v = 0; v < n; ++v) {
      alignas(64) T column[V::lanes];
      for (int i = 0; i < V::lanes; ++i) column[i] = weight[(v * V::lanes + i) * K + k];
      sums[v] = fma(V::set(x[k]), V::load(column), sums[v]);
    }
#pragma GCC unroll 8
  for (int v = 0; v < n; ++v) sums[v].store(to + v * V::lanes);
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
