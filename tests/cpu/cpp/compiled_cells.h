// What test_compiled_cells.py needs around the generated functions of cells. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/tile.h"
#include "simd/log.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <class V>
FUSEDRNN_INLINE V absolute(V x) {
  return abs(x);
}
template <class V>
FUSEDRNN_INLINE V sqrt(V x) {
  typename V::scalar lanes[V::lanes];
  x.store(lanes);
  for (auto& lane : lanes) lane = sizeof lane == 4 ? __builtin_sqrtf(float(lane)) : __builtin_sqrt(lane);
  return V::load(lanes);
}
template <class V>
FUSEDRNN_INLINE V maximum(V a, V b) {
  return select(greater(b, a), b, a);
}
template <class V>
FUSEDRNN_INLINE V minimum(V a, V b) {
  return select(greater(a, b), b, a);
}

constexpr int kMost = 256;

// Of n numbers of each value: whole vectors.
template <class Function, class T>
void each_vector(const T* const* in, int inputs, T* const* out, int outputs, long n) {
  using V = Vec<T>;
  V a[kMost], found[kMost], none{};
  for (long at = 0; at < n; at += V::lanes) {
    for (int k = 0; k < inputs; ++k) a[k] = V::load(in[k] + at);
    Function::forward(a, none, none, found, none, none);
    for (int k = 0; k < outputs; ++k) found[k].store(out[k] + at);
  }
}

template <class T>
T fused(T a, T b, T c) {
  return sizeof(T) == 4 ? __builtin_fmaf(float(a), float(b), float(c)) : __builtin_fma(a, b, c);
}

// sums[M][N] += a[M][K] b[K][N]: k in ascending order, each product added by an FMA.
template <class T>
void multiply(T* sums, const T* a, const T* b, long M, long K, long N) {
  for (long m = 0; m < M; ++m)
    for (long k = 0; k < K; ++k)
      for (long n = 0; n < N; ++n) sums[m * N + n] = fused(a[m * K + k], b[k * N + n], sums[m * N + n]);
}
template <class T>
void add_products(T* sums, const T* a, const T* b, long n) {
  for (long k = 0; k < n; ++k) sums[k] = fused(a[k], b[k], sums[k]);
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn

using namespace fusedrnn::FUSEDRNN_LEVEL;
#define FOR_EACH_TYPE(T)                                                                  \
  extern "C" void multiply_##T(T* sums, const T* a, const T* b, long M, long K, long N) { \
    multiply(sums, a, b, M, K, N);                                                        \
  }                                                                                       \
  extern "C" void add_products_##T(T* sums, const T* a, const T* b, long n) { add_products(sums, a, b, n); }
FOR_EACH_TYPE(float)
FOR_EACH_TYPE(double)
