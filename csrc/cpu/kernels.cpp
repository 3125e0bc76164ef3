// The kernels of one instruction set and dtype: compiled once for each. SPDX-License-Identifier: Apache-2.0
//
// Everything here lives in a namespace of its own level and uses nothing of the standard library: inline code compiled
// for a wide instruction set must never be linked into a call on a machine that lacks it.
#include "cpu/kernels.h"

#include "cells/derived.h"
#include "cells/regularized.h"
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/machine/backward.h"
#include "cpu/machine/forward.h"
#include "cpu/pack.h"
#include "simd/activation_table.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {
namespace {

using T = FUSEDRNN_DTYPE;

template <class Cell>
bool run_forward(const ForwardJob<T>& job, const Worker& worker) {
  return ForwardLoop<Cell, Vec<T>>(job, worker).run();
}

template <class Cell>
bool run_backward(const BackwardJob<T>& job, const Worker& worker) {
  return BackwardLoop<Cell, Vec<T>>(job, worker).run();
}

bool machine_forward(const MachineForward<T>& job, const Worker& worker) {
  return MachineForwardLoop<Vec<T>>(job, worker).run();
}
bool machine_backward(const MachineBackward<T>& job, const Worker& worker) {
  return MachineBackwardLoop<Vec<T>>(job, worker).run();
}

Index forward_scratch(Index B, Index ahead_steps) {
  return ForwardRows<T>::bytes(B) + ForwardRows<T>::bytes(ahead_steps * B);
}
Index backward_scratch(Index B, Index chunk_steps) { return BackwardRows<T>::bytes(B, B * chunk_steps, chunk_steps); }

T sum(const T* in, Index n) {
  using V = Vec<T>;
  constexpr int kAtOnce = 8;  // or each addition would wait for the one before
  V sums[kAtOnce];
  for (V& s : sums) s = V::zero();
  for (; n >= kAtOnce * V::lanes; n -= kAtOnce * V::lanes, in += kAtOnce * V::lanes)
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) sums[i] = sums[i] + V::load(in + i * V::lanes);
  for (int i = 1; i < kAtOnce; ++i) sums[0] = sums[0] + sums[i];
  alignas(64) T lanes[V::lanes], all = T(0);
  sums[0].store(lanes);
  for (T lane : lanes) all += lane;
  return all;
}

#define FUSEDRNN_TEXT2(x) #x
#define FUSEDRNN_TEXT(x) FUSEDRNN_TEXT2(x)
const cpu::Kernels<T> table = {
    FUSEDRNN_TEXT(FUSEDRNN_LEVEL),
    1,
    &forward_scratch,
    &backward_scratch,
    &pack<Vec<T>, T>,
    &pack_transposed<Vec<T>, T>,
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
    &draw_mask<T>,
    &apply_activation<T>,
    &machine_forward,
    &machine_backward,
    &sum,
    nullptr,
    nullptr,
};

}  // namespace
}  // namespace FUSEDRNN_LEVEL

namespace cpu {
#define FUSEDRNN_JOIN2(a, b) a##b
#define FUSEDRNN_JOIN(a, b) FUSEDRNN_JOIN2(a, b)
const Kernels<FUSEDRNN_DTYPE>* FUSEDRNN_JOIN(kernels_, FUSEDRNN_LEVEL)(FUSEDRNN_DTYPE) {
  return &FUSEDRNN_LEVEL::table;
}
}  // namespace cpu
}  // namespace fusedrnn
