// Which rows are valid at a step and where their previous state comes from. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/kernels.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::Index;
using cpu::Steps;

// Where the state before a step comes from.
enum class Before { start, previous, nothing };  // state0; the step before; a cut: zeros

inline Index length_of(const Steps& steps, Index b) { return steps.lengths ? steps.lengths[b] : steps.T; }
inline Index time_of(const Steps& steps, Index s) { return steps.reverse ? steps.T - 1 - s : s; }
inline bool valid(const Steps& steps, Index t, Index b) { return t < length_of(steps, b); }
// The time steps at which row b (of length > 0) begins and ends, in the order of the recurrence.
inline Index first_time(const Steps& steps, Index b) { return steps.reverse ? length_of(steps, b) - 1 : 0; }
inline Index last_time(const Steps& steps, Index b) { return steps.reverse ? 0 : length_of(steps, b) - 1; }

// A cut lies between t-1 and t in time, in both directions; in reverse the state enters t from t+1.
inline Before before(const Steps& steps, Index t, Index b) {
  const bool first = t == first_time(steps, b);
  const Index cut = steps.reverse ? t + 1 : t;
  if (steps.reset && !(steps.reverse && first) && steps.reset[cut * steps.B + b]) return Before::nothing;
  return first ? Before::start : Before::previous;
}

// Whether the gradient stops between step t and the one before it. The state goes on.
inline bool detached(const Steps& steps, Index t) {
  return steps.detach_every && time_of(steps, t) % steps.detach_every == 0;  // time_of is its own inverse
}

// Where thread i of n begins among the rows of the batch, so that all have about the same number of valid steps.
inline Index first_row(const Steps& steps, Index i, Index n) {
  if (!steps.lengths) return steps.B * i / n;
  Index total = 0, sum = 0, b = 0;
  for (Index k = 0; k < steps.B; ++k) total += steps.lengths[k];
  while (b < steps.B && (i == n || sum * n < total * i)) sum += steps.lengths[b++];
  return b;
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
