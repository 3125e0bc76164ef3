// How the masks of recurrent dropout and zoneout are drawn, on a CPU and a GPU. SPDX-License-Identifier: Apache-2.0
//
// The random word of a unit is number unit % 4 of the four (simd/philox.h) of counter (unit / 4, row, time, kind + 4 *
// stream) and a call's seed: the same for any split over threads, any instruction set, forward, backward and recompute.
// Time is 0 for dropout, whose mask is the same at every step. In Python: fusedrnn.masks.
#pragma once
#include <stdint.h>

#include "simd/inline.h"

namespace fusedrnn {

enum class MaskKind : uint32_t { dropout, zoneout_h, zoneout_c };

// The entries of a mask: `kept` where the random word is at least the threshold, else 0; not drawn: `kept` everywhere.
struct MaskRule {
  bool acts, drawn;
  uint32_t threshold;
  double kept;
};

#if defined(FUSEDRNN_LEVEL)
namespace FUSEDRNN_LEVEL {

FUSEDRNN_INLINE uint32_t last_of_counter(MaskKind kind, uint32_t stream) { return uint32_t(kind) + 4 * stream; }
template <class T>
FUSEDRNN_INLINE T entry_of(const MaskRule& rule, uint32_t word) {
  return word >= rule.threshold ? T(rule.kept) : T(0);
}

}  // namespace FUSEDRNN_LEVEL
#endif

}  // namespace fusedrnn
