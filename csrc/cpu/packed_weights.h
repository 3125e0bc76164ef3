// Weights in the order in which the kernels read them. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <memory>
#include <utility>

#include "api.h"
#include "cpu/dispatch.h"
#include "cpu/layout.h"
#include "cpu/threads.h"

namespace fusedrnn {

using cpu::CellShape;

// The weights of a compiled cell by name, null for those that there are not.
template <class T>
struct NamedWeights {
  T *weight_ih, *weight_hh, *bias_ih, *bias_hh, *gain_ih = nullptr, *gain_hh = nullptr, *gain_c = nullptr,
                                                *bias_c = nullptr, *weight_hr = nullptr;
  NamedWeights(const CellShape& shape, const Weights<T>& all)
      : weight_ih(all[0]), weight_hh(all[1]), bias_ih(all[2]), bias_hh(all[3]) {
    if (shape.layer_norm) gain_ih = all[4], gain_hh = all[5];
    if (shape.layer_norm && shape.has_c) gain_c = all[6], bias_c = all[7];
    if (shape.projects) weight_hr = all.back();
  }
};

template <class T>
struct PackedMachine;  // cpu/machine/run.h

template <class T>
struct PackedWeights {
  Buffer memory;
  cpu::Packed<T> input, recurrent, recurrent2, projection;
  bool narrow;  // PackJob
  const T* bias;
  cpu::NormWeights<T> norm;
  std::unique_ptr<PackedMachine<T>> machine;  // what else a program has
};

// Whether the last block may be narrow (cpu/tile.h). Norms read whole blocks.
inline bool has_narrow(const CellShape& shape, Index H) {
  return shape.accumulators > 1 && !shape.layer_norm && H % kBlock && H % kBlock <= 8;
}

// Packs all blocks of so many parts on the pool; a part without blocks is none.
template <class T>
void pack_all(void (*pack)(const cpu::PackJob<T>&), const cpu::PackJob<T>* parts, std::size_t count, Poll poll) {
  struct Context {
    void (*pack)(const cpu::PackJob<T>&);
    const cpu::PackJob<T>*begin, *end;
  } context = {pack, parts, parts + count};
  const auto body = [](void* data, cpu::Region& region) {
    const Context& all = *static_cast<const Context*>(data);
    constexpr Index kTogether = 4;  // blocks between two polls; of a row's columns, as many come at once
    for (const cpu::PackJob<T>* of = all.begin; of != all.end; ++of) {
      if (!of->block_end) continue;
      cpu::PackJob<T> part = *of;
      const Index n = of->block_end, end = n * (region.thread + 1) / region.threads;
      for (Index block = n * region.thread / region.threads; block < end; block = part.block_end) {
        part.block_begin = block, part.block_end = std::min(end, block + kTogether);
        part.out = of->out + block * of->block_step;
        all.pack(part);
        if (!region.poll()) return;
      }
    }
  };
  Index elements = 0;
  for (std::size_t k = 0; k < count; ++k) elements += parts[k].block_end * parts[k].block_step;
  const int threads = elements > 100000 ? cpu::num_threads() : 1;
  if (cpu::run(threads, body, &context, poll.hook, poll.context) == cpu::Outcome::interrupted) throw Interrupted{};
}

template <class T>
void set_weights(cpu::ForwardJob<T>& job, const PackedWeights<T>& packed) {
  job.input = packed.input, job.recurrent = packed.recurrent, job.recurrent2 = packed.recurrent2,
  job.projection = packed.projection, job.narrow = packed.narrow, job.bias = packed.bias, job.norm = packed.norm;
}

// Gains or biases in the order of the accumulators; each adds to what its part's accumulators have.
template <class T>
void pack_vectors(const CellShape& shape, Index H, const T* ih, const T* hh, T* out) {
  std::fill(out, out + blocks_of(H) * shape.accumulators * kBlock, T(0));
  const auto add = [&](const T* from, const Part& part) {
    for (int s = 0; from && s < part.count; ++s)
      for (Index u = 0; u < H; ++u)
        out[(u / kBlock * shape.accumulators + part.first + s) * kBlock + u % kBlock] += from[part.gate[s] * H + u];
  };
  add(ih, shape.input);
  add(hh, shape.recurrent);
  add(hh, shape.recurrent2);
}

// What layer norm multiplies and adds, in memory of its own kind.
template <class T>
struct PackedNorm {
  T *gain, *gain_c, *bias_c;
  void take(Layout& layout, const CellShape& shape, Index blocks) {
    const Index some = shape.layer_norm ? blocks : 0, states = shape.has_c ? some : 0;
    layout.take(gain, {some, shape.accumulators, kBlock});
    layout.take(gain_c, {states, kBlock}), layout.take(bias_c, {states, kBlock});
  }
  cpu::NormWeights<T> fill(const CellShape& shape, Index H, const NamedWeights<const T>& weights, const T* bias) {
    if (!shape.layer_norm) return {};
    pack_vectors(shape, H, weights.gain_ih, weights.gain_hh, gain);
    if (!shape.has_c) return {gain, bias, nullptr, nullptr};
    for (auto [from, to] : {std::pair(weights.gain_c, gain_c), std::pair(weights.bias_c, bias_c)})
      std::fill(std::copy(from, from + H, to), to + blocks_of(H) * kBlock, T(0));
    return {gain, bias, gain_c, bias_c};
  }
};

// Weights packed for a call alone, where they are wanted and not there.
template <class T, class Call>
PackedPtr<T> pack_own(const Call& call, bool wanted) {
  const Problem& p = call.problem;
  if (!wanted || call.packed) return nullptr;
  return pack<T>(p.cell, p.sizes.I, p.sizes.H, p.sizes.P, call.weights, call.poll, p.bfloat16);
}

}  // namespace fusedrnn
