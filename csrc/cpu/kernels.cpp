// The kernels of one instruction set and dtype: compiled once for each. SPDX-License-Identifier: Apache-2.0
//
// Everything here lives in a namespace of its own level and uses nothing of the standard library: inline code compiled
// for a wide instruction set must never be linked into a call on a machine that lacks it.
//
// The levels avx512_bf16 and amx_bf16 have products in bfloat16, of float32 arrays: the same loops, which multiply
// pairs. h is rounded in every step; sums, gates, c, what is saved and the sums of the weights' gradients are float32.
#include "cpu/kernels.h"

#include "cells/derived.h"
#include "cells/regularized.h"
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/pack.h"
#if defined(FUSEDRNN_LEVEL_AMX_BF16)
#include "cpu/amx.h"
#elif defined(FUSEDRNN_LEVEL_AVX512_BF16)
#include "simd/pairs.h"
#else
#include "cpu/machine/backward.h"
#include "cpu/machine/forward.h"
#include "simd/activation_table.h"
#endif

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

#if defined(FUSEDRNN_LEVEL_AVX512_BF16)
template <>
constexpr int kNumbers<Pairs> = 2;
#endif

namespace {

using T = FUSEDRNN_DTYPE;
using V = Vec<T>;

#if defined(FUSEDRNN_LEVEL_AMX_BF16)
using O = AmxPairs;
#elif defined(FUSEDRNN_LEVEL_AVX512_BF16)
using O = Pairs;
#else
using O = V;
#endif

#if defined(FUSEDRNN_LEVEL_AVX512_BF16) || defined(FUSEDRNN_LEVEL_AMX_BF16)
void to_float(const cpu::Bfloat16* in, T* out, Index n) {
  for (Index k = 0; k < n; k += V::lanes) O::widen(in + k, n - k).store(out + k, n - k);
}
void to_bfloat16(const T* in, cpu::Bfloat16* out, Index n) {
  for (Index k = 0; k < n; k += V::lanes) O::put(V::load(in + k, n - k), out + k, n - k);
}
#else
bool machine_forward(const MachineForward<T>& job, const Worker& worker) {
  return MachineForwardLoop<V>(job, worker).run();
}
bool machine_backward(const MachineBackward<T>& job, const Worker& worker) {
  return MachineBackwardLoop<V>(job, worker).run();
}

T sum(const T* in, Index n) {
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
#endif

Index forward_scratch(Index B, Index ahead_steps) {
  return ForwardRows<T>::bytes(B) + ForwardRows<T>::bytes(ahead_steps * B);
}
Index backward_scratch(Index B, Index chunk_steps) { return BackwardRows<T>::bytes(B, B * chunk_steps, chunk_steps); }

FUSEDRNN_INLINE bool leave(bool done) {
#if defined(FUSEDRNN_LEVEL_AMX_BF16)
  O::release();
#endif
  return done;
}
template <class Cell>
bool run_forward(const ForwardJob<T>& job, const Worker& worker) {
  return leave(ForwardLoop<Cell, V, O>(job, worker).run());
}
template <class Cell>
bool run_backward(const BackwardJob<T>& job, const Worker& worker) {
  return leave(BackwardLoop<Cell, V, O>(job, worker).run());
}
template <class Cell>
constexpr cpu::CellKernels<T> kernels_of() {
  return {shape_of<Cell>(), &run_forward<Cell>, &run_backward<Cell>};
}

constexpr cpu::Kernels<T> table = {
    kNumbers<O>,
    &forward_scratch,
    &backward_scratch,
    &pack<O, T>,
    &pack_transposed<O, T>,
    {
#define X(id, type) kernels_of<type>(),
#include "cells/cells.def"
#undef X
    },
    {
#define X(id, type) kernels_of<Regularized<type>>(),
#include "cells/cells.def"
#undef X
    },
    &draw_mask<T>,
#if defined(FUSEDRNN_LEVEL_AVX512_BF16) || defined(FUSEDRNN_LEVEL_AMX_BF16)
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    &to_float,
    &to_bfloat16,
#else
    &apply_activation<T>,
    &machine_forward,
    &machine_backward,
    &sum,
    nullptr,
    nullptr,
#endif
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
