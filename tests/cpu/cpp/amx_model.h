// The instructions of AMX in plain C++, after the pseudo-code in Intel's manual, in place of the compiler's intrinsics:
// g++ -include amx_model.h. Arithmetic is that of the kernels' control word. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <immintrin.h>

namespace amx_model {

struct Tiles {
  unsigned char palette, start_row, reserved[14];
  unsigned short bytes[16];
  unsigned char rows[16];
  unsigned char of[8][16][64];
};
inline thread_local Tiles tiles;

inline void need(bool right) {
  if (!right) __builtin_trap();  // where the processor raises an exception
}
inline void load_config(const void* from) {
  __builtin_memcpy(static_cast<void*>(&tiles), from, 64);
  need(tiles.palette == 1 && tiles.start_row == 0);
  for (int t = 0; t < 8; ++t) need(tiles.rows[t] > 0 && tiles.rows[t] <= 16 && tiles.bytes[t] == 64);
  __builtin_memset(tiles.of, 0, sizeof tiles.of);
}
inline void store_config(void* to) { __builtin_memcpy(to, static_cast<const void*>(&tiles), 64); }
inline void release() { tiles = {}; }
inline void load(int t, const void* from, long stride) {
  need(tiles.palette == 1);
  __builtin_memset(tiles.of[t], 0, sizeof tiles.of[t]);
  for (int r = 0; r < tiles.rows[t]; ++r)
    __builtin_memcpy(tiles.of[t][r], static_cast<const char*>(from) + r * stride, 64);
}
inline void store(int t, void* to, long stride) {
  need(tiles.palette == 1);
  for (int r = 0; r < tiles.rows[t]; ++r) __builtin_memcpy(static_cast<char*>(to) + r * stride, tiles.of[t][r], 64);
}
inline float number(const unsigned char* row, int k) {
  const unsigned bits = unsigned(row[2 * k + 1]) << 24 | unsigned(row[2 * k]) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline void multiply(int c, int a, int b) {
  need(tiles.palette == 1 && tiles.rows[c] == tiles.rows[a] && tiles.rows[b] == 16);
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < 16; ++n) {
      float first = 0, second = 0, sum;
      for (int k = 0; k < 16; ++k) {
        first = __builtin_fmaf(number(tiles.of[a][m], 2 * k), number(tiles.of[b][k], 2 * n), first);
        second = __builtin_fmaf(number(tiles.of[a][m], 2 * k + 1), number(tiles.of[b][k], 2 * n + 1), second);
      }
      __builtin_memcpy(&sum, tiles.of[c][m] + 4 * n, 4);
      sum += first + second;
      __builtin_memcpy(tiles.of[c][m] + 4 * n, &sum, 4);
    }
}

}  // namespace amx_model

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_model::load_config
#define _tile_storeconfig amx_model::store_config
#define _tile_release amx_model::release
#define _tile_loadd amx_model::load
#define _tile_stored amx_model::store
#define _tile_dpbf16ps amx_model::multiply
