// The product of cpu/tile.h by the tiles of AMX. SPDX-License-Identifier: Apache-2.0
//
// It reads the same weights and rows. Each run of k is cut into chunks of 16 pairs, the last one filled up with zeros.
// The sum of an output is over chunks in order, whatever the number of rows, so here too it never depends on them.
#pragma once
#include "cpu/tile.h"
#include "simd/amx.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <>
constexpr int kNumbers<AmxPairs> = 2;
template <>
constexpr bool kByColumns<AmxPairs> = true;
template <>
constexpr int kOneRow<AmxPairs> = AmxPairs::vectors;
template <>
constexpr int max_rows<AmxPairs>(int) {
  return AmxPairs::tile_rows;
}

struct AmxProduct {
  using V = Vec<float>;
  static constexpr Index kChunk = AmxPairs::tile_pairs, kTile = kChunk * V::lanes;
  const int m, n;  // rows and vectors

  FUSEDRNN_NOINLINE void operator()(const Product<float>* products, int count, float* acc) const {
    alignas(64) float rows[kTile], vectors[AmxPairs::vectors * kTile];
    AmxPairs::set_rows(m);
    AmxPairs::load_sums(n, acc, m * V::lanes);
    for (const Product<float>* p = products; p < products + count; ++p) {
      const Index row_bytes = m == 1 ? 0 : at(*p, 1) - at(*p, 0);
      bool apart = p->a_step != 1;  // or rows that are not all as far apart, as a tile is loaded
      for (int i = 2; i < m; ++i) apart |= at(*p, i) != at(*p, 0) + i * row_bytes;
      for (Index r = 0; r < p->runs; ++r)
        for (Index k = 0; k < p->run; k += kChunk) {
          const Index begin = p->a_begin + r * p->a_run + k * p->a_step, pairs = p->run - k;
          const float *a = p->a[0] + begin, *b = p->b + (r * p->run + k) * p->b_step;
          Index row = row_bytes, step = p->b_step, gap = p->b_gap;
          if (apart || pairs < kChunk) copy_rows(*p, begin, pairs, rows), a = rows, row = 64;
          if (pairs < kChunk) {
            for (int v = 0; v < n; ++v)
              for (Index i = 0; i < kChunk; ++i)
                (i < pairs ? V::load(b + v * gap + i * step) : V::zero()).store(vectors + v * kTile + i * V::lanes);
            b = vectors, step = V::lanes, gap = kTile;
          }
          AmxPairs::multiply(n, a, row, b, step, gap);
        }
    }
    AmxPairs::store_sums(n, acc, m * V::lanes);
  }

 private:
  static intptr_t at(const Product<float>& p, int row) { return reinterpret_cast<intptr_t>(p.a[row]); }

  // A chunk of each row, of so many pairs. Where these are apart, the rows are neighbouring columns: weight gradients.
  void copy_rows(const Product<float>& p, Index begin, Index pairs, float* to) const {
    if (p.a_step == 1)
      for (int i = 0; i < m; ++i) V::load(p.a[i] + begin, pairs).store(to + i * V::lanes);
    else
      AmxPairs::transpose_rows(p.a[0] + begin, p.a_step, pairs, m, to);
  }
};

template <>
FUSEDRNN_INLINE auto tile_for<AmxPairs>(int rows, int n) {
  return AmxProduct{rows, n};
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
