// Weights in the order in which the tile reads them. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/kernels.h"
#include "simd/transpose.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::kBlock;
using cpu::PackJob;

// Forward: [unit block][k][accumulator of the part][16 units]. Units beyond H are computed and never read: zero, so
// that they cost no more than others.
template <class T>
void pack(const PackJob<T>& job) {
  const int count = job.part.count;
  for (Index block = job.block_begin; block < job.block_end; ++block)
    for (int s = 0; s < count; ++s) {
      const T* rows = job.weight + (job.part.gate[s] * job.H + block * kBlock) * job.K;
      T* out = job.out + (block - job.block_begin) * job.block_step + s * kBlock;
      const Index step = count * kBlock, units = job.H - block * kBlock < kBlock ? job.H - block * kBlock : kBlock;
      Index k = 0;
      if (units == kBlock)
        for (; k + kBlock <= job.K; k += kBlock) transpose(rows + k, job.K, out + k * step, step);
      for (; k < job.K; ++k)
        for (Index lane = 0; lane < kBlock; ++lane) out[k * step + lane] = lane < units ? rows[lane * job.K + k] : T(0);
    }
}

// Backward: [block of 16 columns of the matrix][k = unit block, accumulator of the part, unit < H][16 columns].
template <class T>
void pack_transposed(const PackJob<T>& job) {
  Index at = 0;
  for (Index u0 = 0; u0 < job.H; u0 += kBlock)
    for (int s = 0; s < job.part.count; ++s)
      for (Index u = u0; u < job.H && u < u0 + kBlock; ++u, at += kBlock) {
        const T* row = job.weight + (job.part.gate[s] * job.H + u) * job.K;
        for (Index block = job.block_begin; block < job.block_end; ++block) {
          T* out = job.out + (block - job.block_begin) * job.block_step + at;
          const Index column = block * kBlock, columns = job.K - column;
          if (columns >= kBlock)
            __builtin_memcpy(out, row + column, kBlock * sizeof(T));
          else
            for (Index j = 0; j < kBlock; ++j) out[j] = j < columns ? row[column + j] : T(0);
        }
      }
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
