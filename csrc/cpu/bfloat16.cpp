// The kernels with products in bfloat16, of float32 arrays. SPDX-License-Identifier: Apache-2.0
//
// A level of its own beside avx512: the same loops, which multiply pairs (simd/pairs.h). h is rounded in every step;
// sums, gates, c, what is saved and the sums of the weights' gradients are float32.
#include "cells/derived.h"
#include "cells/regularized.h"
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/pack.h"
#include "simd/pairs.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <>
constexpr int kNumbers<Pairs> = 2;

namespace {

using V = Vec<float>;

template <class Cell>
bool run_forward(const ForwardJob<float>& job, const Worker& worker) {
  return ForwardLoop<Cell, V, Pairs>(job, worker).run();
}

template <class Cell>
bool run_backward(const BackwardJob<float>& job, const Worker& worker) {
  return BackwardLoop<Cell, V, Pairs>(job, worker).run();
}

Index forward_scratch(Index B, Index ahead_steps) {
  return ForwardRows<float>::bytes(B) + ForwardRows<float>::bytes(ahead_steps * B);
}
Index backward_scratch(Index B, Index chunk_steps) {
  return BackwardRows<float>::bytes(B, B * chunk_steps, chunk_steps);
}

void to_float(const cpu::Bfloat16* in, float* out, Index n) {
  for (Index k = 0; k < n; k += V::lanes) Pairs::widen(in + k, n - k).store(out + k, n - k);
}
void to_bfloat16(const float* in, cpu::Bfloat16* out, Index n) {
  for (Index k = 0; k < n; k += V::lanes) Pairs::put(V::load(in + k, n - k), out + k, n - k);
}

const cpu::Kernels<float> table = {
    "avx512_bf16",
    kNumbers<Pairs>,
    &forward_scratch,
    &backward_scratch,
    &pack<Pairs, float>,
    &pack_transposed<Pairs, float>,
    {
#define X(id, type) shape_of<type>(),
#include "cells/cells.def"
#undef X
    },
    {
#define X(id, type) &run_forward<type>,
#include "cells/cells.def"
#undef X
    },
    {
#define X(id, type) &run_backward<type>,
#include "cells/cells.def"
#undef X
    },
    {
#define X(id, type) shape_of<Regularized<type>>(),
#include "cells/cells.def"
#undef X
    },
    {
#define X(id, type) &run_forward<Regularized<type>>,
#include "cells/cells.def"
#undef X
    },
    {
#define X(id, type) &run_backward<Regularized<type>>,
#include "cells/cells.def"
#undef X
    },
    &draw_mask<float>,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    &to_float,
    &to_bfloat16,
};

}  // namespace
}  // namespace FUSEDRNN_LEVEL

namespace cpu {
const Kernels<float>* kernels_bfloat16() { return &FUSEDRNN_LEVEL::table; }
}  // namespace cpu
}  // namespace fusedrnn
