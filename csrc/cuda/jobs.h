// What a launch gets: plain structures, mirrored in python/fusedrnn/backends/cuda/jobs.py. SPDX-License-Identifier:
// Apache-2.0
//
// Legend as in api.h. All arrays are C-contiguous and in the device's memory. Between kernels everything lies gate by
// gate, in the order of the cell's accumulators (cells/cell.h): A of them, of which the input part feeds X neighbours
// and the recurrent part R; the cell saves K of them.
//
// S is what the arrays of the caller hold, T what is computed in (half.h). h is rounded to S in every step, so all that
// reads it, now or going back, reads the same; c, sums and what is saved stay in T.
#pragma once
#include "cuda/half.h"
#include "mask_rule.h"
#include "steps.h"

namespace fusedrnn {
namespace cuda {

// Of a call, for regularized cells; of others it is not read.
struct Regularization {
  uint64_t seed;
  uint32_t stream;
  MaskRule rules[3];  // by MaskKind
};

// All steps in one launch: how the work is cut (backends/cuda/plans.py).
struct Cut {
  Index units, rows;  // of each block: hidden units, and rows of the batch
  Index splits;       // of k in a product; a power of two
  Index at_once;      // rows of what a grid multiplies that are in shared memory, a multiple of 8
  unsigned* arrived;  // of a grid one count for each tile of the batch, zero before the launch
  void* exchanged;    // and two buffers for each, zeros before the launch
};

template <class S, class T = Compute<S>>
struct ForwardJob {
  Steps steps;
  Index H;
  const T* projected;      // (T, B, X*H): weight_ih x
  const T* bias;           // (A*H): bias_ih and bias_hh of what feeds the accumulator
  const S* weight;         // (R*H, H): weight_hh, its gates in the order of the accumulators
  const S *h0, *c0;        // (B, H) or null: zeros
  S* y;                    // (T, B, H)
  S *hT, *cT;              // (B, H); step by step the state as it stands
  S *h_states, *c_states;  // (T, B, H) or null
  T* c;                    // (T, B, H) of every step, for backward; or null
  T* saved;                // (T, B, K*H), or with saved_step 0 (B, K*H), for a step's two phases; or null
  Index saved_step;        // elements from one time step to the next
  Cut cut;
  // step by step
  S* operand;                       // (B, H): what the recurrent product of the next step multiplies
  const T* products;                // (B, R*H): weight_hh times it; of the second phase (B, H)
  T* state_c;                       // (B, H): c as it stands
  const T *gain, *gain_c, *bias_c;  // (A*H), (H), (H): of layer norm
  Regularization regularization;
};

template <class S, class T = Compute<S>>
struct BackwardJob {
  Steps steps;
  Index H;
  const S* weight;  // (H, R*H): that of ForwardJob, transposed
  const S *y, *h0, *c0;
  const T *c, *saved;
  const S *dy, *dhT, *dcT, *dh_states, *dc_states;  // (T, B, H) or (B, H), any may be null
  S* da;                                            // (T, B, A*H): gradients of the accumulators, +0 at padding
  S *dh0, *dc0;                                     // (B, H)
  Cut cut;
  // step by step
  const T* chain;  // (B, H): weight_hh^T da of the step before in this direction; of the second phase d(r*h)
  T *direct, *dc;  // (B, H): what reaches the state before beside the product
  const T *gain, *bias, *gain_c, *bias_c;  // of layer norm, as going forward
  T* row;                                  // (B, A*H): room for a row's values
  T* norm_sums;                            // (B, N*H), zeros before the first step; kNormSums in cells/row_norm.h
  Regularization regularization;
};

}  // namespace cuda
}  // namespace fusedrnn
