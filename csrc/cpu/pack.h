// Weights in the order in which the tile reads them. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/kernels.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::kBlock;
using cpu::PackJob;

// Forward: [unit block][k][accumulator of the part][16 units]; units beyond H are zero.
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

// Backward: [block of 16 columns of the matrix][k = unit block, accumulator of the part, unit][16 columns].
template <class T>
void pack_transposed(const PackJob<T>& job) {
  const Index unit_blocks = (job.H + kBlock - 1) / kBlock;
  for (Index block = job.block_begin; block < job.block_end; ++block) {
    T* out = job.out + block * job.block_step;
    const Index columns = job.K - block * kBlock < kBlock ? job.K - block * kBlock : kBlock;
    for (Index unit_block = 0; unit_block < unit_blocks; ++unit_block)
      for (int s = 0; s < job.part.count; ++s)
        for (Index lane = 0; lane < kBlock; ++lane, out += kBlock) {
          const Index u = unit_block * kBlock + lane;
          const T* row = job.weight + (job.part.gate[s] * job.H + u) * job.K + block * kBlock;
          for (Index j = 0; j < kBlock; ++j) out[j] = u < job.H && j < columns ? row[j] : T(0);
        }
  }
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
