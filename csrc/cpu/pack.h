// Weights in the order in which the tile reads them. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/tile.h"
#include "simd/transpose.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::kBlock;
using cpu::PackJob;

// Of weights in bfloat16: pairs of neighbouring k, the last of an odd number one with zero.
template <class O, class T>
void pack_pairs(const PackJob<T>& job) {
  const int count = job.part.count;
  const Index step = count * kBlock;
  for (Index block = job.block_begin; block < job.block_end; ++block)
    for (int s = 0; s < count; ++s) {
      const Index first = job.part.gate[s] * job.H + block * kBlock;
      const auto* const rows = reinterpret_cast<const cpu::Bfloat16*>(job.weight) + first * job.K;
      T* out = job.out + (block - job.block_begin) * job.block_step + s * kBlock;
      alignas(64) T square[kBlock * kBlock] = {};  // [unit][pair]
      for (Index k = 0; k < job.K; k += 2 * kBlock, out += kBlock * step) {
        for (Index lane = 0; lane < units_of(job.H, block); ++lane)
          O::load(rows + lane * job.K + k, job.K - k).store(square + lane * kBlock);
        const Index pairs = elements<O>(job.K - k);
        if (pairs >= kBlock)
          transpose(square, kBlock, out, step);
        else
          for (Index p = 0; p < pairs; ++p)
            for (Index lane = 0; lane < kBlock; ++lane) out[p * step + lane] = square[lane * kBlock + p];
      }
    }
}

// The same transposed: pairs of neighbouring units of a gate.
template <class O, class T>
void pack_transposed_pairs(const PackJob<T>& job) {
  Index at = 0;
  for (Index u0 = 0; u0 < job.H; u0 += kBlock)
    for (int s = 0; s < job.part.count; ++s)
      for (Index u = u0; u < job.H && u < u0 + kBlock; u += 2, at += kBlock) {
        const auto* const weight = reinterpret_cast<const cpu::Bfloat16*>(job.weight);
        const auto* const row = weight + (job.part.gate[s] * job.H + u) * job.K;
        for (Index block = job.block_begin; block < job.block_end; ++block) {
          const Index column = block * kBlock;
          O::zip(row + column, u + 1 < job.H ? row + job.K + column : nullptr, job.K - column)
              .store(job.out + (block - job.block_begin) * job.block_step + at);
        }
      }
}

// The last block, narrow: [k][vector], or where a tile takes one vector at a time, [vector][k].
template <class O, class T>
void pack_narrow(const PackJob<T>& job, Index units, T* out) {
  constexpr Index n = O::lanes;
  const Index last = job.H / kBlock, vectors = narrow_vectors<O>(units, job.part.count);
  const Index step = kApart<O> ? n : vectors * n, gap = kApart<O> ? job.K * n : n;
  __builtin_memset(out, 0, size_t(vectors * n * job.K) * sizeof(T));
  for (int s = 0; s < job.part.count; ++s)
    for (Index u = 0; u < units_of(job.H, last); ++u) {
      const T* const row = job.weight + (job.part.gate[s] * job.H + last * kBlock + u) * job.K;
      T* const to = out + (s * units + u) / n * gap + (s * units + u) % n;
      for (Index k = 0; k < job.K; ++k) to[k * step] = row[k];
    }
}

// Forward: [unit block], and in it as a tile reads them (kApart). Units beyond H are computed and never read: zero, so
// that they cost no more than others.
template <class O, class T>
void pack(const PackJob<T>& job) {
  if constexpr (kNumbers<O> > 1) return pack_pairs<O>(job);
  const int count = job.part.count;
  for (Index block = job.block_begin; block < job.block_end; ++block)
    for (int s = 0; s < count; ++s) {
      const T* rows = job.weight + (job.part.gate[s] * job.H + block * kBlock) * job.K;
      constexpr Index n = O::lanes;
      T* out = job.out + (block - job.block_begin) * job.block_step + s * (kApart<O> ? job.K : 1) * n;
      const Index step = kApart<O> ? n : count * n, next = job.K * count * n, units = units_of(job.H, block);
      Index k = 0;
      if (units == kBlock)
        for (; k + kBlock <= job.K; k += kBlock) transpose(rows + k, job.K, out + k * step, step, next);
      for (; k < job.K; ++k)
        for (Index lane = 0; lane < kBlock; ++lane)
          out[lane / n * next + k * step + lane % n] = lane < units ? rows[lane * job.K + k] : T(0);
    }
  const Index narrow = narrow_units<O>(job.H), blocks = blocks_of(job.H);
  if (job.narrow && narrow < kBlock && job.block_end == blocks)
    pack_narrow<O>(job, narrow, job.out + (blocks - job.block_begin) * job.block_step);
}

// Backward: [block of 16 columns of the matrix][column / lanes][k][lanes], k = unit block, accumulator of the part,
// unit.
template <class O, class T>
void pack_transposed(const PackJob<T>& job) {
  if constexpr (kNumbers<O> > 1) return pack_transposed_pairs<O>(job);
  constexpr Index n = O::lanes;
  const Index next = job.H * job.part.count * n;
  Index at = 0;
  for (Index u0 = 0; u0 < job.H; u0 += kBlock)
    for (int s = 0; s < job.part.count; ++s)
      for (Index u = u0; u < job.H && u < u0 + kBlock; ++u, at += n) {
        const T* row = job.weight + (job.part.gate[s] * job.H + u) * job.K;
        for (Index block = job.block_begin; block < job.block_end; ++block) {
          T* out = job.out + (block - job.block_begin) * job.block_step + at;
          for (Index column = block * kBlock; column < (block + 1) * kBlock; column += n, out += next)
            Vec<T>::load(row + column, job.K - column).store(out);
        }
      }
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
