// The masks of recurrent dropout and zoneout. SPDX-License-Identifier: Apache-2.0
//
// The random word of a unit is that of counter (unit / 4, row, time, kind + 4 * stream), place unit % 4: the same for
// any split over threads, any instruction set, forward, backward and recompute.
#pragma once
#include "cpu/kernels.h"
#include "simd/philox.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::Index;
using cpu::kBlock;
using cpu::MaskKind;
using cpu::MaskRule;

template <int blocks, class T>
FUSEDRNN_INLINE void draw_blocks(const MaskRule<T>& rule, uint64_t seed, uint32_t last, Index t, Index b, Index block,
                                 T* out) {
  constexpr int n = blocks * int(kBlock);
  uint32_t words[n];
  philox<n / 4>(seed, uint32_t(block * kBlock / 4), uint32_t(b), uint32_t(t), last, words);
  for (int u = 0; u < n; ++u) out[block * kBlock + u] = words[u] >= rule.threshold ? rule.kept : T(0);
}

// See cpu::Kernels::draw_mask.
template <class T>
void draw_mask(const MaskRule<T>& rule, uint64_t seed, uint32_t stream, MaskKind kind, Index t, Index b, Index begin,
               Index end, T* out) {
  if (!rule.drawn) {
    for (Index u = begin * kBlock; u < end * kBlock; ++u) out[u] = rule.kept;
    return;
  }
  const uint32_t last = uint32_t(kind) + 4 * stream;
  Index block = begin;
  for (; block + 4 <= end; block += 4) draw_blocks<4>(rule, seed, last, t, b, block, out);
  for (; block < end; ++block) draw_blocks<1>(rule, seed, last, t, b, block, out);
}

// What a thread keeps of the masks: of the rows of the step at hand, the i-th at the i-th place.
template <class T>
struct Masks {
  const cpu::Regularization<T>& rules;
  T* const memory;
  const Index B, units, block_begin, block_end;

  // What zoneout keeps of the new h and c of row b, for this thread's units; null where it does nothing.
  const T* keep_h(Index i, Index t, Index b) const { return keep(rules.zoneout_h, MaskKind::zoneout_h, B + i, t, b); }
  const T* keep_c(Index i, Index t, Index b) const {
    return keep(rules.zoneout_c, MaskKind::zoneout_c, 2 * B + i, t, b);
  }
  // h before the step as weight_hh multiplies it.
  const T* operand(Index i, Index b, const T* h, Index P) const {
    if (!rules.dropout) return h;
    const T* mask = rules.dropout + b * units;
    T* to = memory + i * units;
    for (Index u = 0; u < P; ++u) to[u] = h[u] * mask[u];
    return to;
  }

 private:
  const T* keep(const MaskRule<T>& rule, MaskKind kind, Index place, Index t, Index b) const {
    if (!rule.acts) return nullptr;
    T* to = memory + place * units;
    draw_mask(rule, rules.seed, rules.stream, kind, t, b, block_begin, block_end, to);
    return to;
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
