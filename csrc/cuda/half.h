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

// What is computed in where arrays hold S.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

}  // namespace cuda
}  // namespace fusedrnn
