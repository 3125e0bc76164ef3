// A square of a matrix, transposed. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

// to = 16 rows of 16 of from, transposed. Each of the four rounds interleaves rows i and i + 8: the next bit of a row's
// number becomes a bit of the column's.
template <class T>
FUSEDRNN_INLINE void transpose(const T* from, Index from_row, T* to, Index to_row) {
  constexpr int n = 16;
  typedef T Row __attribute__((vector_size(n * sizeof(T))));
  Row a[n], b[n];
  for (int i = 0; i < n; ++i) __builtin_memcpy(&a[i], from + i * from_row, sizeof(Row));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      b[2 * i + 1] =
          __builtin_shufflevector(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < n; ++i) a[i] = b[i];
  }
  for (int i = 0; i < n; ++i) __builtin_memcpy(to + i * to_row, &a[i], sizeof(Row));
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
