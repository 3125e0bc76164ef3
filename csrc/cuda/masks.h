// The masks of recurrent dropout and zoneout: each thread draws the entries that it needs, where it needs them.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cells/regularized.h"
#include "cuda/jobs.h"
#include "simd/philox.h"

namespace fusedrnn {
namespace cuda {

// What happens to unit u of row b; nothing where the cell is not a regularized one.
template <class Cell, class T>
struct Masks {
  using V = Vec<T>;
  const Regularization& of;
  Index b, u;

  // h as weight_hh meets it, and the gradient of that as one of h.
  FUSEDRNN_INLINE T dropped(T h) const {
    if constexpr (kRegularized<Cell>)
      if (acts(MaskKind::dropout)) return h * entry(MaskKind::dropout, 0);
    return h;
  }
  // The state after step t, of h or c by `kind`.
  FUSEDRNN_INLINE V zoned(MaskKind kind, Index t, V candidate, V before) const {
    if constexpr (kRegularized<Cell>)
      if (acts(kind)) return Cell::zoneout(V(entry(kind, t)), candidate, before);
    return candidate;
  }
  // Its gradient d becomes that of the candidate; -> what the state before gets of it past the cell.
  FUSEDRNN_INLINE V past(MaskKind kind, Index t, V& d) const {
    if constexpr (kRegularized<Cell>)
      if (acts(kind)) return Cell::zoneout_backward(V(entry(kind, t)), d);
    return V::zero();
  }

 private:
  FUSEDRNN_INLINE bool acts(MaskKind kind) const { return of.rules[int(kind)].acts; }
  FUSEDRNN_INLINE T entry(MaskKind kind, Index t) const {
    const MaskRule& rule = of.rules[int(kind)];
    if (!rule.drawn) return T(rule.kept);
    const uint32_t group = uint32_t(u / 4), row = uint32_t(b);
    uint32_t words[4];
    philox<1>(of.seed, &group, &row, uint32_t(t), last_of_counter(kind, of.stream), words);
    return entry_of<T>(rule, words[u % 4]);
  }
};

}  // namespace cuda
}  // namespace fusedrnn
