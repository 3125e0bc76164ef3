// What a launch gets: plain structures, mirrored in python/fusedrnn/backends/cuda_jobs.py. SPDX-License-Identifier:
// Apache-2.0
//
// Legend as in api.h. All arrays are C-contiguous and in the device's memory. Between kernels everything lies gate by
// gate, in the order of the cell's accumulators (cells/cell.h): A of them, of which the input part feeds X neighbours
// and the recurrent part R. S is what the cell saves.
#pragma once
#include "steps.h"

namespace fusedrnn {
namespace cuda {

template <class T>
struct ForwardJob {
  Steps steps;
  Index H;
  const T* projected;      // (T, B, X*H): weight_ih x
  const T* bias;           // (A*H): bias_ih and bias_hh of what feeds the accumulator
  const T* weight;         // (R*H, H): weight_hh, its gates in the order of the accumulators
  const T *h0, *c0;        // (B, H) or null: zeros
  T* y;                    // (T, B, H)
  T *hT, *cT;              // (B, H); step by step the state as it stands
  T *h_states, *c_states;  // (T, B, H) or null
  T* c;                    // (T, B, H) of every step, for backward; or null
  T* saved;                // (T, B, S*H), or with saved_step 0 (B, S*H), for a step's two phases; or null
  Index saved_step;        // elements from one time step to the next
  // step by step
  T* operand;         // (B, H): what the recurrent product of the next step multiplies
  const T* products;  // (B, R*H): weight_hh times it; of the second phase (B, H)
  // all steps in one launch
  unsigned* arrived;  // one count for each tile of the batch, zero before the launch
  Index units;        // of each block
  Index rows;         // of the batch, of each tile
};

template <class T>
struct BackwardJob {
  Steps steps;
  Index H;
  const T* weight;  // (H, R*H): that of ForwardJob, transposed
  const T *y, *h0, *c0, *c, *saved;
  const T *dy, *dhT, *dcT, *dh_states, *dc_states;  // (T, B, H) or (B, H), any may be null
  T* da;                                            // (T, B, A*H): gradients of the accumulators, +0 at padding
  T *dh0, *dc0;                                     // (B, H)
  // step by step
  const T* chain;  // (B, H): weight_hh^T da of the step before in this direction; of the second phase d(r*h)
  T *direct, *dc;  // (B, H): what reaches the state before beside the product
  // all steps in one launch
  unsigned* arrived;
  Index units, rows;
};

}  // namespace cuda
}  // namespace fusedrnn
