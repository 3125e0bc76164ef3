// The table of kernels that every instruction set fills, and the jobs they work on. SPDX-License-Identifier: Apache-2.0
//
// This header is seen by files compiled for different instruction sets, so it holds plain data and declarations only.
#pragma once
#include <stdint.h>

#include "cells/cell.h"
#include "cpu/machine/job.h"
#include "cpu/threads.h"
#include "mask_rule.h"
#include "steps.h"

namespace fusedrnn {
namespace cpu {

using Bfloat16 = uint16_t;  // its bits

constexpr Index kBlock = 16;  // hidden units per block, on every instruction set and dtype

constexpr Part kProjection = {0, 1, {0}};  // weight_hr: its rows in their own order

// A chunk of many rows (one step of a large batch) is summed in parts: a running float32 sum would lose digits.
constexpr Index kSumRows = 4096;

constexpr Index kPanelVectors = 8;  // of 16, at most: the accumulators of a panel of blocks

constexpr int kCells = 0
#define X(id, type) +1
#include "cells/cells.def"
#undef X
    ;

// What allocation and packing know of a cell without knowing its maths.
struct CellShape {
  int gates, accumulators, saved, phases;
  bool has_c, has_direct, layer_norm, projects;
  Part input, recurrent, recurrent2;
};

// A thread's share of a region. Split by rows of the batch, threads share nothing within a step; split by units, they
// meet at a barrier after every step.
struct Worker {
  Region& region;
  bool by_rows;
  bool barrier() const { return region.barrier(); }
  bool poll() const { return region.poll(); }
};

// Panels of weights: for each block of 16 outputs, k rows of `count` vectors of 16, then padding (so that neighbouring
// blocks do not fall into the same cache sets).
template <class T>
struct Packed {
  const T* data;
  Index block_step;
};

// The saved values of the time steps [first, first + count), and the cell state of the one step before or after them.
// With everything saved that is all steps; with boundary states only, one chunk at a time. The last block of a row has
// only the units there are: rows of H or saved * H elements.
template <class T>
struct Kept {
  Index first, count;
  Index step;           // rows from a step to the next: B; 0: one step is enough
  const Index* starts;  // (B) with lengths: row b's steps follow each other from here, without padding; or null
  T* saved;             // [row][blocks][saved][16] or null
  T* c;                 // [row][H]
  T* c_boundary;        // (B, H)
  bool has(Index t) const { return t >= first && t < first + count; }
  Index row(Index t, Index b) const { return starts ? starts[b] + t : (t - first) * step + b; }
};

// Recurrent dropout and zoneout of a call, for the kernels of regularized cells.
template <class T>
struct Regularization {
  uint64_t seed;
  uint32_t stream;
  MaskRule zoneout_h, zoneout_c;
  const T* dropout;  // [B][blocks*16]: what weight_hh multiplies is multiplied with it first; or null
  T* scratch;        // per thread: so many arrays of [B][blocks*16]
  int arrays;
};

// Of layer norm; null without it.
template <class T>
struct NormWeights {
  const T *gain, *bias;      // [block][accumulator][16]
  const T *gain_c, *bias_c;  // [blocks*16], cells with c
};

template <class T>
struct ForwardJob {
  Steps steps;
  Index I, H, P, blocks;
  Sequence<const T> x;
  Packed<T> input, recurrent, recurrent2, projection;
  // Instead of packed ones, for a single step: weights as PyTorch lays them out, and memory of `panel_step` elements
  // per thread, where the blocks of a panel are packed just before they are used.
  const T *weight_ih, *weight_hh, *weight_hr;  // null: packed
  T* panel;
  Index panel_step;
  // Null, or where x and h are in bfloat16: for each row of the batch as many elements, of each thread that has it.
  T* operands;
  Index operands_row;
  bool narrow;     // the last block of input and recurrent also lies behind the others (PackJob)
  const T* bias;   // [block][accumulator][16]
  const T* h0;     // (B, P) or null
  const T* c0;     // (B, H) or null
  const T* zeros;  // at least max(P, blocks*16) zeros
  const T* y;      // (T, B, P), where the state before a step is read
  T* h_out;        // where h is written: y itself, or one step of scratch
  Index h_out_step;
  Kept<T> kept;
  bool stream;         // kept.saved is larger than the caches: write past them where a vector is a line
  T* boundary_states;  // [chunk][B][H]: c before each chunk of chunk_steps, counted from the end; or null
  Index chunk_steps;
  T* middle;  // [B][blocks*16]: what the second product of a step multiplies
  // W x + bias of so many steps at once: [step][B][blocks][input's accumulators][16], or null: step by step.
  T* ahead;
  Index ahead_steps;
  T *hT, *cT, *h_states, *c_states;
  NormWeights<T> norm;
  bool rows_outside;
  bool prefetch;  // of the next panel of weights, during the tiles of the one before (isa.h)
  char* scratch;  // per thread
  Index scratch_step;
  Regularization<T> regularization;
};

// Columns of the joint rows [1 | x | h_prev | middle] that share the accumulators they give gradients to: one product.
struct Group {
  Index column, columns;
  int first, count;      // accumulators
  Index offset, before;  // in a block of dpacked; columns of the groups before it
};

// Where the gradient of some columns of a group goes, of one accumulator.
template <class T>
struct Gradient {
  T* out;  // (units, columns)
  int accumulator, group;
  Index column, columns;
};

template <class T>
struct BackwardJob {
  Steps steps;
  Index I, H, P, blocks;
  Sequence<const T> x;
  // Transposed: blocks of outputs, k over [unit block][accumulator][16].
  Packed<T> input, recurrent, recurrent2, projection;
  const T *h0, *c0, *zeros, *y;
  Kept<T> kept;
  const ForwardJob<T>* replay;  // with boundary states only: fills `kept` chunk by chunk; else null
  const T* boundary_states;
  Sequence<const T> dy, dh_states, dc_states;
  const T *dhT, *dcT;
  T* dx;
  T *dh0, *dc0;
  bool need_weights;
  const Group* groups;  // in the order of the joint rows
  int group_count;
  T* dpacked;  // [block][group][column][accumulator][16], but of a narrow last block as many vectors as it has
  Index dpacked_block;
  T* dprojection;  // [block of P][unit][16], where weight_hr has a gradient; else null
  const Gradient<T>* gradients;
  int gradient_count;
  T* dweight_hr;
  NormWeights<T> norm;
  T* norm_sums;  // [B][blocks*16*kNormSums], or null: no gradient of a gain or bias is needed
  T *dgain_ih, *dgain_hh, *dgain_c, *dbias_ih, *dbias_hh, *dbias_c;
  T* da;  // a chunk's valid rows: [row][da_row]; of a cell that projects with dh and what is projected behind
  Index da_row;
  bool narrow;  // the last block of da has its accumulators side by side, where these are fewer vectors (tile.h)
  T* boundary;  // [B][da_row]: each row's latest da, kept across chunks
  T* inputs;    // a chunk's valid rows of [1 | x | h_prev | middle]
  Index inputs_row;
  T* by_tile;  // the same as the tiles of the weight gradients read it (isa.h), or null
  T* panel;    // for each thread, what the tiles of some blocks read of da
  Index panel_step;
  T *dc, *direct;  // [B][blocks*16]
  Index chunk_steps;
  bool rows_outside;
  bool prefetch;
  char* scratch;
  Index scratch_step;
  Regularization<T> regularization;
};

// Packing of some blocks of one part of a weight matrix (gates*H, K).
template <class T>
struct PackJob {
  const T* weight;  // bfloat16 where products are
  Index H, K;
  Part part;
  T* out;  // of block_begin
  Index block_step;
  Index block_begin, block_end;  // blocks of outputs: units, or when transposed, columns of the matrix
  bool narrow = false;           // the last block also once more, as tiles of several rows read it: behind the others
};

template <class T>
struct CellKernels {
  CellShape shape;
  bool (*forward)(const ForwardJob<T>&, const Worker&);
  bool (*backward)(const BackwardJob<T>&, const Worker&);
};

template <class T>
struct Kernels {
  int numbers;  // in an element of what the products multiply: 1, or two bfloat16; sums are T
  Index (*forward_scratch)(Index B, Index ahead_steps);  // bytes per thread
  Index (*backward_scratch)(Index B, Index chunk_steps);
  void (*pack)(const PackJob<T>&);
  void (*pack_transposed)(const PackJob<T>&);
  CellKernels<T> cells[kCells];
  CellKernels<T> regularized[kCells];  // the same cells with recurrent dropout and zoneout
  // The entries of n rows of the batch (rows null: 0 to n-1) at time t for blocks [begin, end) of units, to out
  // [n][units].
  void (*draw_mask)(const MaskRule&, uint64_t seed, uint32_t stream, MaskKind, Index t, const Index* rows, Index n,
                    Index begin, Index end, Index units, T* out);
  void (*activation)(int which, const T* in, T* out, Index n);
  bool (*machine_forward)(const MachineForward<T>&, const Worker&);
  bool (*machine_backward)(const MachineBackward<T>&, const Worker&);
  T (*sum)(const T* in, Index n);  // of all but the last few, to read them: cpu/timing.h
  // Where products are in bfloat16: n numbers as T, and rounded to it.
  void (*to_float)(const Bfloat16* in, T* out, Index n);
  void (*to_bfloat16)(const T* in, Bfloat16* out, Index n);
};

// One per level; kernels.cpp defines them, dispatch.cpp chooses. Of the levels in bfloat16 what is no cell's is null.
#define FUSEDRNN_LEVELS(X) X(portable) X(portable_fma) X(avx2) X(avx512) X(neon)
#define X(level)                                \
  const Kernels<float>* kernels_##level(float); \
  const Kernels<double>* kernels_##level(double);
FUSEDRNN_LEVELS(X)
#undef X
const Kernels<float>* kernels_avx512_bf16(float);
const Kernels<float>* kernels_amx_bf16(float);

}  // namespace cpu
}  // namespace fusedrnn
