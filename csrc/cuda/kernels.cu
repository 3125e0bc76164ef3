// The kernels of one cell and dtype: compiled once for each. SPDX-License-Identifier: Apache-2.0
//
// FUSEDRNN_CELL is a type of cells/cells.def, or Regularized<> of one, FUSEDRNN_DTYPE float, double, Half or Bfloat16;
// FUSEDRNN_PRECISION is that of the products within a launch (cuda/tile.h): for double ieee, for Half fp16 and for
// Bfloat16 bf16 alone. Compile without contraction (-fmad=false): every FMA is written out.
#define FUSEDRNN_LEVEL cuda
#define FUSEDRNN_LEVEL_CUDA
#include "simd/inline.h"
// device.h first: it is what the others stand on.
#include "cuda/device.h"

#include "cells/derived.h"
#include "cuda/all_steps.h"
#include "cuda/norm.h"

namespace fusedrnn {
namespace cuda {
using Cell = FUSEDRNN_CELL;
using S = FUSEDRNN_DTYPE;
using Tile = TileOf<S, Precision::FUSEDRNN_PRECISION>::type;
}  // namespace cuda
}  // namespace fusedrnn

using namespace fusedrnn::cuda;
using fusedrnn::Index;

// FUSEDRNN_ONLY, where it is defined: the kernels of one variant, its index in KERNELS of backends/cuda/nvrtc.py.
#if !defined(FUSEDRNN_ONLY)
#define FUSEDRNN_ONLY -1
#endif
#define FUSEDRNN_HAS(variant) (FUSEDRNN_ONLY < 0 || FUSEDRNN_ONLY == variant)

#if FUSEDRNN_HAS(0)
#define FUSEDRNN_EACH(job, call) each_unit(job.steps.B, job.H, [&](Index b, Index u) { call; })

FUSEDRNN_KERNEL(kThreads) begin_forward(const ForwardJob<S> job) {
  FUSEDRNN_EACH(job, (ForwardStep<Cell, S>{job}.begin(b, u)));
}
FUSEDRNN_KERNEL(kThreads) step_forward(const ForwardJob<S> job, Index s) { one_step<Cell>(job, s); }
FUSEDRNN_KERNEL(kThreads) begin_backward(const BackwardJob<S> job) {
  FUSEDRNN_EACH(job, (BackwardStep<Cell, S>{job}.begin(b, u)));
}
FUSEDRNN_KERNEL(kThreads) step_backward(const BackwardJob<S> job, Index s) { one_step<Cell>(job, s); }
FUSEDRNN_KERNEL(kThreads) finish_backward(const BackwardJob<S> job) {
  FUSEDRNN_EACH(job, (BackwardStep<Cell, S>{job}.finish(b, u)));
}
// h, and for a cell of two phases middle: (T, B, H).
FUSEDRNN_KERNEL(kThreads) operands(const BackwardJob<S> job, S* h, S* middle) {
  each_unit(job.steps.T * job.steps.B, job.H,
            [&](Index i, Index u) { BackwardStep<Cell, S>{job}.operands(i, u, h, middle); });
}

// Of cells with two phases.
FUSEDRNN_KERNEL(kThreads) step_forward2(const ForwardJob<S> job, Index s) {
  FUSEDRNN_EACH(job, (ForwardStep<Cell, S>{job}.step2(s, b, u)));
}
FUSEDRNN_KERNEL(kThreads) step_backward2(const BackwardJob<S> job, Index s) {
  FUSEDRNN_EACH(job, (BackwardStep<Cell, S>{job}.step2(s, b, u)));
}

#endif

// Of plain cells with one, all steps in one launch: by all blocks at once, and from sm_90 on by clusters. The names say
// where a block has its weights, if not in shared memory.
#define FUSEDRNN_ALL_STEPS(kernel, ending, weights)                               \
  FUSEDRNN_KERNEL(kThreads) kernel##_forward##ending(const ForwardJob<S> job) {   \
    by_##kernel<Cell, Tile, weights>(job);                                        \
  }                                                                               \
  FUSEDRNN_KERNEL(kThreads) kernel##_backward##ending(const BackwardJob<S> job) { \
    by_##kernel<Cell, Tile, weights>(job);                                        \
  }
#if FUSEDRNN_HAS(1)
FUSEDRNN_ALL_STEPS(cluster, _registers, Weights::registers)
#endif
#if FUSEDRNN_HAS(2)
FUSEDRNN_ALL_STEPS(cluster, , Weights::shared)
#endif
#if FUSEDRNN_HAS(3)
FUSEDRNN_ALL_STEPS(grid, _registers, Weights::registers)
#endif
#if FUSEDRNN_HAS(4)
FUSEDRNN_ALL_STEPS(grid, , Weights::shared)
#endif
