// The kernels of one cell and dtype: compiled once for each. SPDX-License-Identifier: Apache-2.0
//
// FUSEDRNN_CELL is a type of cells/cells.def, or Regularized<> of one, FUSEDRNN_DTYPE float, double, Half or Bfloat16;
// FUSEDRNN_PRECISION is that of the products within a launch (cuda/tile.h): for double ieee, for Half fp16 and for
// Bfloat16 bf16 alone. Compile without contraction
// (-fmad=false): every FMA is written out.
#define FUSEDRNN_LEVEL cuda
#define FUSEDRNN_LEVEL_CUDA
#include "simd/inline.h"
// device.h first: it is what the others stand on.
#include "cuda/device.h"

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/cluster.h"
#include "cuda/grid.h"
#include "cuda/norm.h"

namespace fusedrnn {
namespace cuda {
using Cell = FUSEDRNN_CELL;
using S = FUSEDRNN_DTYPE;
#if !defined(FUSEDRNN_PRECISION)
#define FUSEDRNN_PRECISION ieee
#endif
using Tile = TileOf<S, Precision::FUSEDRNN_PRECISION>::type;
}  // namespace cuda
}  // namespace fusedrnn

using namespace fusedrnn::cuda;
using fusedrnn::Index;

#define FUSEDRNN_EACH(job, call) each_unit(job.steps.B, job.H, [&](Index b, Index u) { call; })

FUSEDRNN_KERNEL(kThreads) begin_forward(const ForwardJob<S> job) {
  FUSEDRNN_EACH(job, (ForwardStep<Cell, S>{job}.begin(b, u)));
}
FUSEDRNN_KERNEL(kThreads) step_forward(const ForwardJob<S> job, Index s) { StepKernels<Cell>::forward(job, s); }
FUSEDRNN_KERNEL(kThreads) begin_backward(const BackwardJob<S> job) {
  FUSEDRNN_EACH(job, (BackwardStep<Cell, S>{job}.begin(b, u)));
}
FUSEDRNN_KERNEL(kThreads) step_backward(const BackwardJob<S> job, Index s) { StepKernels<Cell>::backward(job, s); }
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

// Of plain cells with one; `streamed`: where the weights of a block do not fit its shared memory.
FUSEDRNN_KERNEL(kThreads) grid_forward(const ForwardJob<S> job) { GridKernels<Cell>::forward<Tile, true>(job); }
FUSEDRNN_KERNEL(kThreads) grid_backward(const BackwardJob<S> job) { GridKernels<Cell>::backward<Tile, true>(job); }
FUSEDRNN_KERNEL(kThreads) grid_forward_streamed(const ForwardJob<S> job) {
  GridKernels<Cell>::forward<Tile, false>(job);
}
FUSEDRNN_KERNEL(kThreads) grid_backward_streamed(const BackwardJob<S> job) {
  GridKernels<Cell>::backward<Tile, false>(job);
}

// Of plain cells with one phase, from sm_90 on; the blocks of a tile of the batch are a cluster.
FUSEDRNN_KERNEL(kThreads) cluster_forward(const ForwardJob<S> job) { ClusterKernels<Cell>::forward<Tile>(job); }
FUSEDRNN_KERNEL(kThreads) cluster_backward(const BackwardJob<S> job) { ClusterKernels<Cell>::backward<Tile>(job); }
