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

// Nothing for cells that run step by step alone, or where there are no clusters.
template <template <class> class Exchange, int columns, class Job>
FUSEDRNN_INLINE void whole(const Job& job) {
  using Tile = TileOf<S, Precision::FUSEDRNN_PRECISION, columns>;
  if constexpr (kWhole<Cell> && Exchange<S>::there) all_steps<Cell, S, Tile, Exchange>(job);
}
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
#define FUSEDRNN_EACH(Unit, call) \
  each_unit(job.steps.B, job.H, [&](Index b, Index u) { Unit<Cell, S>{job, b, u}.call; })

FUSEDRNN_KERNEL(kThreads) begin_forward(const ForwardJob<S> job) { FUSEDRNN_EACH(ForwardUnit, begin()); }
FUSEDRNN_KERNEL(kThreads) step_forward(const ForwardJob<S> job, Index s) { one_step<ForwardUnit, Cell, S>(job, s); }
FUSEDRNN_KERNEL(kThreads) begin_backward(const BackwardJob<S> job) { FUSEDRNN_EACH(BackwardUnit, begin()); }
FUSEDRNN_KERNEL(kThreads) step_backward(const BackwardJob<S> job, Index s) { one_step<BackwardUnit, Cell, S>(job, s); }
FUSEDRNN_KERNEL(kThreads) finish_backward(const BackwardJob<S> job) { FUSEDRNN_EACH(BackwardUnit, finish()); }
// h, and for a cell of two phases middle: (T, B, H).
FUSEDRNN_KERNEL(kThreads) operands(const BackwardJob<S> job, S* h, S* middle) {
  const Index B = job.steps.B;
  each_unit(job.steps.T * B, job.H,
            [&](Index i, Index u) { BackwardUnit<Cell, S>{job, i % B, u}.operands(i / B, h, middle); });
}

// Of cells with two phases.
FUSEDRNN_KERNEL(kThreads) step_forward2(const ForwardJob<S> job, Index s) { FUSEDRNN_EACH(ForwardUnit, one_step2(s)); }
FUSEDRNN_KERNEL(kThreads) step_backward2(const BackwardJob<S> job, Index s) {
  FUSEDRNN_EACH(BackwardUnit, one_step2(s));
}
#endif

// Of plain cells with one, all steps in one launch: by clusters from sm_90 on, and by all blocks at once. A block of a
// grid has few columns going back, its units: tiles of 8.
#if FUSEDRNN_HAS(1)
FUSEDRNN_KERNEL(kThreads) FUSEDRNN_CLUSTER cluster_forward(const ForwardJob<S> job) { whole<ClusterExchange, 16>(job); }
FUSEDRNN_KERNEL(kThreads) FUSEDRNN_CLUSTER cluster_backward(const BackwardJob<S> job) {
  whole<ClusterExchange, 16>(job);
}
#endif
#if FUSEDRNN_HAS(2)
FUSEDRNN_KERNEL(kThreads) grid_forward(const ForwardJob<S> job) { whole<GridExchange, 16>(job); }
FUSEDRNN_KERNEL(kThreads) grid_backward(const BackwardJob<S> job) { whole<GridExchange, 8>(job); }
#endif
