// Philox4x32-10, a random generator without a state: its words are a function of a counter and a key, so whoever needs
// one draws it, and again when it is needed again. Salmon et al. 2011; in Python: fusedrnn.masks.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

// The four words of each of N counters (c0[n], c1[n], c2, c3), one counter after the other. Lanes are independent: the
// compiler makes vectors of them, and many of them hide how long a product takes.
template <int N>
FUSEDRNN_INLINE void philox(uint64_t key, const uint32_t* c0, const uint32_t* c1, uint32_t c2, uint32_t c3,
                            uint32_t* words) {
  uint32_t a[N], b[N], c[N], d[N];
  for (int n = 0; n < N; ++n) a[n] = c0[n], b[n] = c1[n], c[n] = c2, d[n] = c3;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int n = 0; n < N; ++n) {
      const uint64_t p = uint64_t(0xD2511F53) * a[n], q = uint64_t(0xCD9E8D57) * c[n];
      a[n] = uint32_t(q >> 32) ^ b[n] ^ k0, b[n] = uint32_t(q);
      c[n] = uint32_t(p >> 32) ^ d[n] ^ k1, d[n] = uint32_t(p);
    }
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  for (int n = 0; n < N; ++n)
    words[4 * n] = a[n], words[4 * n + 1] = b[n], words[4 * n + 2] = c[n], words[4 * n + 3] = d[n];
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
