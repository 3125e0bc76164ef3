// One activation over an array, per level: the entry by which tests and sweeps reach math.h without a kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "log.h"
#include "vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

// which: 0 sigmoid, 1 tanh, 2 exp, 3 log, 4 softplus. Reads n elements of in, writes n elements of out; out may be in.
template <class T>
void apply_activation(int which, const T* in, T* out, int64_t n) {
  using V = Vec<T>;
  for (int64_t i = 0; i < n; i += V::lanes) {
    const V x = V::load(in + i, n - i);
    const V y = which == 0   ? sigmoid(x)
                : which == 1 ? tanh(x)
                : which == 2 ? exp(x)
                : which == 3 ? log(x)
                             : softplus(x);
    y.store(out + i, n - i);
  }
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
