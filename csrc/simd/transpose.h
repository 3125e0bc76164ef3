// A square of a matrix, transposed. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <int... lanes>
struct Lanes {};
template <int n, int... lanes>
struct FirstLanes : FirstLanes<n - 1, n - 1, lanes...> {};
template <int... lanes>
struct FirstLanes<0, lanes...> {
  using type = Lanes<lanes...>;
};

// Rows whose numbers differ in the bit `d` alone exchange the lanes whose numbers do.
template <int n, int d, class Row, int... lane>
FUSEDRNN_INLINE void exchange(Row& a, Row& b, Lanes<lane...>) {
  const Row low = __builtin_shufflevector(a, b, (lane & d ? n + lane - d : lane)...);
  b = __builtin_shufflevector(a, b, (lane & d ? n + lane : lane + d)...);
  a = low;
}

template <int n, int d, class Row>
FUSEDRNN_INLINE void exchange_all(Row* rows) {
  if constexpr (d > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      if (!(i & d)) exchange<n, d>(rows[i], rows[i + d], typename FirstLanes<n>::type());
    exchange_all<n, d / 2>(rows);
  }
}

// Of two vectors of squares of n x n side by side, the low or the high halves of rows, lane by lane in turns.
template <int n, int lanes, bool high, class Row, int... lane>
FUSEDRNN_INLINE Row zip(Row a, Row b, Lanes<lane...>) {
  return __builtin_shufflevector(a, b, (lane / n * n + high * n / 2 + lane % n / 2 + lane % 2 * lanes)...);
}

// Squares of n x n side by side, each transposed: vector i has row i of each.
template <int n, int lanes, class Row>
FUSEDRNN_INLINE void transpose_squares(Row* rows) {
  using All = typename FirstLanes<lanes>::type;
  for (int d = 1; d < n; d *= 2) {
    Row zipped[n];
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; ++i) {
      zipped[2 * i] = zip<n, lanes, false>(rows[i], rows[i + n / 2], All());
      zipped[2 * i + 1] = zip<n, lanes, true>(rows[i], rows[i + n / 2], All());
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) rows[i] = zipped[i];
  }
}

#if defined(FUSEDRNN_LEVEL_AVX2)
template <int n, int lanes, class N>
FUSEDRNN_INLINE void transpose_squares(Two<N>* rows) {
  typename N::Vector low[n], high[n];
  for (int i = 0; i < n; ++i) low[i] = rows[i].low, high[i] = rows[i].high;
  transpose_squares<n, lanes / 2>(low), transpose_squares<n, lanes / 2>(high);
  for (int i = 0; i < n; ++i) rows[i] = {low[i], high[i]};
}
#endif

// to = 16 rows of 16 of from, transposed, in squares of vectors of 32 bytes where there are any: wider ones have no
// faster exchanges, and vectors that the instruction set lacks are taken apart element by element.
template <class T>
FUSEDRNN_INLINE void transpose(const T* from, Index from_row, T* to, Index to_row, Index to_next = Vec<T>::lanes) {
  constexpr int side = 16, lanes = Vec<T>::lanes, bytes = Vec<T>::lanes * int(sizeof(T)) > 16 ? 32 : 16,
                n = bytes / int(sizeof(T));
  typedef T Row __attribute__((vector_size(bytes)));
  for (int i = 0; i < side; i += n)
    for (int j = 0; j < side; j += n) {
      Row rows[n];
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) __builtin_memcpy(&rows[k], from + (i + k) * from_row + j, sizeof(Row));
      exchange_all<n, n / 2>(rows);
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k)
        __builtin_memcpy(to + (j + k) * to_row + i / lanes * to_next + i % lanes, &rows[k], sizeof(Row));
    }
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
