// Time and rows: which rows are valid at a step, and where their previous state comes from. The same for every loop, on
// a CPU and on a GPU. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdint.h>

#include "simd/inline.h"

namespace fusedrnn {

using Index = int64_t;

// One array over time and batch whose last axis is contiguous.
template <class T>
struct Sequence {
  T* data = nullptr;  // may be null: absent
  Index step = 0;     // elements between time steps
  Index row = 0;      // elements between batch rows
  FUSEDRNN_INLINE T* at(Index t, Index b) const { return data + t * step + b * row; }
};

struct Steps {
  Index T, B;
  const Index* lengths;        // (B) or null
  const unsigned char* reset;  // (T, B) or null
  bool reverse;
  Index detach_every;  // in the order of the recurrence; 0: nowhere
};

#if defined(FUSEDRNN_LEVEL)
namespace FUSEDRNN_LEVEL {

// Where the state before a step comes from.
enum class Before { start, previous, nothing };  // state0; the step before; a cut: zeros

FUSEDRNN_INLINE Index length_of(const Steps& steps, Index b) { return steps.lengths ? steps.lengths[b] : steps.T; }
FUSEDRNN_INLINE Index time_of(const Steps& steps, Index s) { return steps.reverse ? steps.T - 1 - s : s; }
FUSEDRNN_INLINE bool valid(const Steps& steps, Index t, Index b) { return t < length_of(steps, b); }
// The time steps at which row b (of length > 0) begins and ends, in the order of the recurrence.
FUSEDRNN_INLINE Index first_time(const Steps& steps, Index b) { return steps.reverse ? length_of(steps, b) - 1 : 0; }
FUSEDRNN_INLINE Index last_time(const Steps& steps, Index b) { return steps.reverse ? 0 : length_of(steps, b) - 1; }

// A cut lies between t-1 and t in time, in both directions; in reverse the state enters t from t+1. It is noted there:
FUSEDRNN_INLINE Index cut_of(const Steps& steps, Index t, Index b) { return (steps.reverse ? t + 1 : t) * steps.B + b; }
FUSEDRNN_INLINE Before before(const Steps& steps, Index t, Index b) {
  const bool first = t == first_time(steps, b);
  if (steps.reset && !(steps.reverse && first) && steps.reset[cut_of(steps, t, b)]) return Before::nothing;
  return first ? Before::start : Before::previous;
}

// Whether the gradient stops between step t and the one before it. The state goes on.
FUSEDRNN_INLINE bool detached(const Steps& steps, Index t) {
  return steps.detach_every && time_of(steps, t) % steps.detach_every == 0;  // time_of is its own inverse
}

// Where thread i of n begins among the rows of the batch, so that all have about the same number of valid steps.
FUSEDRNN_INLINE Index first_row(const Steps& steps, Index i, Index n) {
  if (!steps.lengths) return steps.B * i / n;
  Index total = 0, sum = 0, b = 0;
  for (Index k = 0; k < steps.B; ++k) total += steps.lengths[k];
  while (b < steps.B && (i == n || sum * n < total * i)) sum += steps.lengths[b++];
  return b;
}

}  // namespace FUSEDRNN_LEVEL
#endif

}  // namespace fusedrnn
