// The masks of recurrent dropout and zoneout: each thread draws the entries that it needs, where it needs them.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cells/regularized.h"
#include "cuda/jobs.h"
#include "simd/philox.h"

namespace fusedrnn {
namespace cuda {

// The mask's entry for unit u of row b at step t; 1 where the rule does not act.
template <class T>
FUSEDRNN_INLINE T mask_entry(const Regularization& rules, const MaskRule& rule, MaskKind kind, Index t, Index b,
                             Index u) {
  if (!rule.acts) return T(1);
  if (!rule.drawn) return T(rule.kept);
  const uint32_t group = uint32_t(u / 4), row = uint32_t(b);
  uint32_t words[4];
  philox<1>(rules.seed, &group, &row, uint32_t(t), last_of_counter(kind, rules.stream), words);
  return entry_of<T>(rule, words[u % 4]);
}

// What happens to one unit of one row; nothing where the cell is not a regularized one.
template <class Cell, class T>
struct Rules {
  using V = Vec<T>;
  const Regularization& rules;
  Index b, u;

  // h as weight_hh meets it, and the gradient of that as one of h.
  FUSEDRNN_INLINE T dropped(T h) const {
    if constexpr (kRegularized<Cell>)
      if (rules.dropout.acts) return h * mask_entry<T>(rules, rules.dropout, MaskKind::dropout, 0, b, u);
    return h;
  }
  FUSEDRNN_INLINE V zoned_h(Index t, V candidate, V before) const {
    return zoned(rules.zoneout_h, MaskKind::zoneout_h, t, candidate, before);
  }
  FUSEDRNN_INLINE V zoned_c(Index t, V candidate, V before) const {
    return zoned(rules.zoneout_c, MaskKind::zoneout_c, t, candidate, before);
  }
  // The gradient d of a state becomes that of its candidate; -> what the state before gets of it past the cell.
  FUSEDRNN_INLINE V past_h(Index t, V& d) const { return past(rules.zoneout_h, MaskKind::zoneout_h, t, d); }
  FUSEDRNN_INLINE V past_c(Index t, V& d) const { return past(rules.zoneout_c, MaskKind::zoneout_c, t, d); }

 private:
  FUSEDRNN_INLINE V zoned(const MaskRule& rule, MaskKind kind, Index t, V candidate, V before) const {
    if constexpr (kRegularized<Cell>)
      if (rule.acts) return Cell::zoneout(V(mask_entry<T>(rules, rule, kind, t, b, u)), candidate, before);
    return candidate;
  }
  FUSEDRNN_INLINE V past(const MaskRule& rule, MaskKind kind, Index t, V& d) const {
    if constexpr (kRegularized<Cell>)
      if (rule.acts) return Cell::zoneout_backward(V(mask_entry<T>(rules, rule, kind, t, b, u)), d);
    return V::zero();
  }
};

}  // namespace cuda
}  // namespace fusedrnn
