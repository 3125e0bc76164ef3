// Weights in the order in which the tile reads them. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/kernels.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::kBlock;
using cpu::PackJob;

// Forward: [unit block][k][accumulator of the part][16 units]. Units beyond H are computed and never read: zero, so
// that they cost no more than others.
template <class T>
void pack(const PackJob<T>& job) {
  const int count = job.part.count;
  for (Index block = job.block_begin; block < job.block_end; ++block) {
    T* out = job.out + block * job.block_step;
    for (Index k0 = 0; k0 < job.K; k0 += kBlock) {  // 16 x 16 squares, so that neither side strides through memory
      const Index k1 = k0 + kBlock < job.K ? k0 + kBlock : job.K;
      for (int s = 0; s < count; ++s)
        for (Index lane = 0; lane < kBlock; ++lane) {
          const Index u = block * kBlock + lane;
          const T* row = job.weight + (job.part.gate[s] * job.H + u) * job.K;
          if (u < job.H)
            for (Index k = k0; k < k1; ++k) out[(k * count + s) * kBlock + lane] = row[k];
          else
            for (Index k = k0; k < k1; ++k) out[(k * count + s) * kBlock + lane] = T(0);
        }
    }
  }
}

// Backward: [block of 16 columns of the matrix][k = unit block, accumulator of the part, unit < H][16 columns].
template <class T>
void pack_transposed(const PackJob<T>& job) {
  for (Index block = job.block_begin; block < job.block_end; ++block) {
    T* out = job.out + block * job.block_step;
    const Index columns = job.K - block * kBlock < kBlock ? job.K - block * kBlock : kBlock;
    for (Index u0 = 0; u0 < job.H; u0 += kBlock)
      for (int s = 0; s < job.part.count; ++s)
        for (Index u = u0; u < job.H && u < u0 + kBlock; ++u, out += kBlock) {
          const T* row = job.weight + (job.part.gate[s] * job.H + u) * job.K + block * kBlock;
          for (Index j = 0; j < kBlock; ++j) out[j] = j < columns ? row[j] : T(0);
        }
  }
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
