// Numbers of 16 bits: what arrays may hold. Sums, cell states and everything between loads and stores are float.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cuda/device.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace cuda {

struct Half {
  uint16_t bits;
  Half() = default;
  FUSEDRNN_INLINE explicit Half(float x) : bits(to_fp16(x)) {}
  FUSEDRNN_INLINE operator float() const { return of_fp16(bits); }
};

struct Bfloat16 {
  uint16_t bits;
  Bfloat16() = default;
  FUSEDRNN_INLINE explicit Bfloat16(float x) : bits(to_bf16(x)) {}
  FUSEDRNN_INLINE operator float() const { return of_bf16(bits); }
};

template <bool first, class A, class B>
struct Choose {
  using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using type = B;
};

// What is computed in where arrays hold S.
template <class S>
using Compute = typename Choose<sizeof(S) == sizeof(double), double, float>::type;

}  // namespace cuda
}  // namespace fusedrnn
