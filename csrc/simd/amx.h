// Pairs of bfloat16 in the tiles of AMX. SPDX-License-Identifier: Apache-2.0
//
// A tile has up to 16 rows of 64 bytes. Tiles 0 to 3 hold the sums of up to 16 rows and 4 vectors, tile 4 pairs of the
// rows, tiles 5 to 7 pairs of the vectors. Of 16 pairs, TDPBF16PS sums up the products of the first numbers in order
// from zero, those of the second numbers too, and adds both to the sum. Rounding and subnormals are as in Pairs.
#pragma once
#include "simd/pairs.h"
#include "simd/transpose.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

// What LDTILECFG reads: all eight tiles, for sums of m rows.
struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];

  constexpr TileShape(int m_) : TileShape(uint8_t(m_)) {}
  constexpr TileShape(uint8_t m) : rows{m, m, m, m, m, 16, 16, 16} {}
};
constexpr TileShape kTileShapes[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

struct AmxPairs : Pairs {
  static constexpr int tile_rows = 16, tile_pairs = 16, vectors = 4;

  // Of sums, for what follows. Other code may have changed it; to set it takes much longer than to look.
  static FUSEDRNN_INLINE void set_rows(int m) {
    TileShape now(m);
    _tile_storeconfig(&now);
    asm volatile("" : "=m"(now));  // GCC's intrinsic says that it writes 8 bytes
    const TileShape& wanted = kTileShapes[m - 1];
    if (_mm512_cmpneq_epi32_mask(_mm512_loadu_si512(&now), _mm512_loadu_si512(&wanted))) _tile_loadconfig(&wanted);
  }
  // After the last product: a thread with tiles costs more to switch.
  static FUSEDRNN_INLINE void release() { _tile_release(); }

  // The sums of n vectors, [vector][row][16], of which one vector takes `gap` floats.
  static FUSEDRNN_INLINE void load_sums(int n, const float* sums, int64_t gap) {
    stored();
    _tile_loadd(0, sums, 64);
    if (n > 1) _tile_loadd(1, sums + gap, 64);
    if (n > 2) _tile_loadd(2, sums + 2 * gap, 64);
    if (n > 3) _tile_loadd(3, sums + 3 * gap, 64);
  }
  static FUSEDRNN_INLINE void store_sums(int n, float* sums, int64_t gap) {
    _tile_stored(0, sums, 64);
    if (n > 1) _tile_stored(1, sums + gap, 64);
    if (n > 2) _tile_stored(2, sums + 2 * gap, 64);
    if (n > 3) _tile_stored(3, sums + 3 * gap, 64);
    stored();
  }
  // Adds 16 pairs of each row, rows so many bytes apart, times those of n vectors: 16 of 16 numbers, k_step floats
  // apart.
  static FUSEDRNN_INLINE void multiply(int n, const float* rows, int64_t row_bytes, const float* b, int64_t k_step,
                                       int64_t gap) {
    const int64_t k_bytes = k_step * int64_t(sizeof(float));
    stored();
    _tile_loadd(4, rows, row_bytes);
    _tile_loadd(5, b, k_bytes);
    _tile_dpbf16ps(0, 4, 5);
    if (n > 1) {
      _tile_loadd(6, b + gap, k_bytes);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (n > 2) {
      _tile_loadd(7, b + 2 * gap, k_bytes);
      _tile_dpbf16ps(2, 4, 7);
    }
    if (n > 3) {
      _tile_loadd(5, b + 3 * gap, k_bytes);
      _tile_dpbf16ps(3, 4, 5);
    }
  }

  // to = the first 16 of so many rows, transposed: of each column 16 pairs, zeros behind the last row.
  static FUSEDRNN_NOINLINE void transpose_rows(const float* from, int64_t step, int64_t rows, int64_t columns,
                                               float* to) {
    alignas(64) float square[tile_pairs * lanes];
    for (int64_t k = 0; k < tile_pairs; ++k)
      (k < rows ? V::load(from + k * step, columns) : V::zero()).store(square + k * lanes);
    transpose(square, lanes, to, lanes);
  }

 private:
  // GCC's intrinsics do not say which memory they read.
  static FUSEDRNN_INLINE void stored() { asm volatile("" ::: "memory"); }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
