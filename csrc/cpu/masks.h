// The masks of recurrent dropout and zoneout, as arrays. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/kernels.h"
#include "simd/philox.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::kBlock;

// See cpu::Kernels::draw_mask.
template <class T>
void draw_mask(const MaskRule& rule, uint64_t seed, uint32_t stream, MaskKind kind, Index t, const Index* rows, Index n,
               Index begin, Index end, Index units, T* out) {
  const Index first = begin * kBlock, count = (end - begin) * kBlock;
  if (!rule.drawn) {
    for (Index i = 0; i < n; ++i)
      for (Index u = first; u < first + count; ++u) out[i * units + u] = T(rule.kept);
    return;
  }
  constexpr int kLanes = 64;
  uint32_t group[kLanes] = {}, row[kLanes] = {}, words[4 * kLanes];
  T entries[4 * kLanes], *to[kLanes];
  const Index total = n * (count / 4);
  Index i = 0, u = 0;
  for (Index done = 0; done < total; done += kLanes) {
    const int lanes = total - done < kLanes ? int(total - done) : kLanes;
    for (int k = 0; k < lanes; ++k) {
      group[k] = uint32_t((first + u) / 4), row[k] = uint32_t(rows ? rows[i] : i);
      to[k] = out + i * units + first + u;
      if ((u += 4) == count) u = 0, ++i;
    }
    philox<kLanes>(seed, group, row, uint32_t(t), last_of_counter(kind, stream), words);
    for (int w = 0; w < 4 * kLanes; ++w) entries[w] = entry_of<T>(rule, words[w]);
    for (int k = 0; k < lanes; ++k) __builtin_memcpy(to[k], entries + 4 * k, 4 * sizeof(T));
  }
}

// What a thread keeps of the masks of a step: arrays of [row of the step][units], filled in for its own units of h and
// of c, which differ where h is projected. The first is of an operand, then what zoneout keeps of h and c, then of more
// operands.
template <class T>
struct Masks {
  const cpu::Regularization<T>& rules;
  Index thread, B, units, h_begin, h_end, c_begin, c_end;

  // What zoneout keeps of the new h and c of the step's rows; null where it does nothing.
  const T* keep_h(Index t, const Index* rows, Index n) const {
    return keep(rules.zoneout_h, MaskKind::zoneout_h, 1, t, rows, n, h_begin, h_end);
  }
  const T* keep_c(Index t, const Index* rows, Index n) const {
    return keep(rules.zoneout_c, MaskKind::zoneout_c, 2, t, rows, n, c_begin, c_end);
  }
  // What recurrent dropout multiplies row b's units with; null: nothing.
  const T* dropout(Index b) const { return rules.dropout ? rules.dropout + b * units : nullptr; }
  // A vector of row b, at unit u, that weight_hh multiplies, or the gradient of that.
  template <class V>
  FUSEDRNN_INLINE V dropped(Index b, Index u, V v) const {
    const T* mask = dropout(b);
    return mask ? v * V::load(mask + u) : v;
  }
  // h before the step as weight_hh meets it, of the step's row i, row b of the batch.
  const T* operand(Index i, Index b, const T* h, Index P, Index place = 0) const {
    const T* mask = dropout(b);
    if (!mask) return h;
    T* to = array(place) + i * units;
    for (Index u = 0; u < P; ++u) to[u] = h[u] * mask[u];
    return to;
  }

 private:
  T* array(Index place) const { return rules.scratch + (thread * rules.arrays + place) * B * units; }
  const T* keep(const MaskRule& rule, MaskKind kind, Index place, Index t, const Index* rows, Index n, Index begin,
                Index end) const {
    if (!rule.acts) return nullptr;
    draw_mask<T>(rule, rules.seed, rules.stream, kind, t, rows, n, begin, end, units, array(place));
    return array(place);
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
