// A cell as programs, and the jobs of the loops that run them. SPDX-License-Identifier: Apache-2.0
//
// Seen by files compiled for different instruction sets: plain data only, all of it checked before it gets here.
//
// A step runs round by round. A round begins with products of matrices, whose results are the first registers: forward
// the round's accumulators, backward the gradients that come in (of the new states; in later rounds, of the operands
// that the cell computes), or with the numbers of a row by which a norm is made (norm.h), or both. Then its program
// runs over the tile. Units of one row meet in products and norms alone, so a round ends where the next one needs all
// units.
//
// Of a cell that projects its first state, programs leave what is projected; that state, of P units, is an operand
// only.
#pragma once
#include <stdint.h>

#include "cells/cell.h"
#include "steps.h"

namespace fusedrnn {
namespace cpu {

enum class Operation : uint8_t {
#define X(name, count) name,
#include "cpu/machine/operations.def"
#undef X
};
constexpr int kOperations = 0
#define X(name, count) +1
#include "cpu/machine/operations.def"
#undef X
    ;

// fusedrnn.cells.program says what the numbers are for each operation.
struct Instruction {
  Operation op;
  uint8_t d, a, b, c;
};

// Places in memory that instructions load from and store to: these, then of each state before the step, after it and
// its direct gradient, then the operands from the second on (the first is x). kDropout, kKeepH and kKeepC are the masks
// of recurrent dropout and zoneout. Of the numbers of norms each row has some, not each unit: instructions that
// normalise read them.
enum : int { kSaved, kCarried, kGradients, kSums, kScalars, kDropout, kKeepH, kKeepC, kNorms, kNormGradients, kStates };

template <class T>
struct Packed;
template <class T>
struct BackwardJob;
template <class T>
struct Regularization;
struct CellShape;

// What one operand gives to neighbouring accumulators of the cell, at most four.
template <class T>
struct MachinePart {
  int operand, first, count;
  const T* weights;
  Index block_step;
};

// Accumulators with the same parts: one pass over them.
struct MachineSum {
  int first, count;
  int part_begin, part_end;
};

// A vector of a place that programs load from.
struct MachineValue {
  int place, value;
};

// The numbers of each row by which values are normalised; backward, those of their gradients.
struct MachineNorm {
  int number, of;     // backward: the number of the norm whose values had these gradients
  int begin, end;     // of the round's values; backward: each gradient and then its normalised value
  int size, epsilon;  // how many values are normalised together; a constant
  bool centred;       // or by the mean square
};

// Mean and 1 / deviation of values; of gradients their mean, that of their products with what was normalised, and
// 1 / deviation again.
constexpr int kNormNumbers = 2, kNormGradientNumbers = 3;
constexpr int kMostNormed = 64;  // values of a norm

struct MachineRound {
  const Instruction* code;
  int count;
  int first, accumulators;  // forward
  int widest;               // of its sums, the most accumulators
  int sum_begin, sum_end;   // forward
  const int* operands;      // backward: whose gradients come first
  int operand_count;
  const MachineNorm* norms;
  int norm_count;
  const MachineValue* values;
};

// What both directions know of a call.
template <class T>
struct MachineCall {
  Steps steps;
  Index I, H, P, blocks;  // P: units of the first state, H if it is not projected
  bool projects;
  int projected_mask;  // where zoneout of the projected state has what it keeps: kKeepH, kKeepC or 0
  int states, operands, accumulators, saved_count, carried_count, vector_count, scalar_count;
  const int* state_of;  // of each operand the state before that it is, or -1
  const MachineRound* rounds;
  int round_count;
  Sequence<const T> x;
  const T* vectors;  // [vector][blocks * 16]
  const T* constants;
  const T* const* scalars;  // of each row scalar (T, B)
  const T* const* state0;   // of each state (B, H) or null; the first has rows of P here and below
  const T* start;           // of each state H times what it starts from
  T* const* state;          // of each state [step][B][H], the first is y
  T* saved;                 // [step][B] rows of [block][saved value][16], or null
  // Where step t lies: at (t - first) & kept. All bits: every step is kept, or those of a chunk, from `first` on. 1: of
  // the states but y two steps, in turn; 0: one.
  Index states_kept, saved_kept, first;
  Index boundary_time;  // of a chunk, that of the step before it, or -1
  const T* boundary;    // the states but y after that: [state][B][H]
  T* y_again;           // where the first state goes when forward runs again: one step (B, H); else null
  T* carried;           // [B][block][carried value][16]
  T* norms;             // [step][B][norm][kNormNumbers], kept as saved is
  int norm_count;
  char* tables;  // per thread: pointers
  Index tables_step;
  T* registers;  // per thread
  int register_count;
  Index registers_step;
  bool rows_outside;
  Regularization<T> regularization;
  // Where cpu/masks.h has an operand as dropout leaves it.
  static int array_of(int operand) { return operand == 1 ? 0 : operand + 1; }
};

template <class T>
struct MachineForward {
  MachineCall<T> call;
  const MachineSum* sums;
  const MachinePart<T>* parts;
  const T* bias;         // [block][accumulator][16]
  T* const* computed;    // of each operand [B][blocks * 16], or null
  Packed<T> projection;  // weight_hr, where the cell projects
  T* unprojected;        // [B][blocks * 16]: what it multiplies
  bool stream;           // saved is larger than the caches
  T* const* stateT;      // of each state (B, H)
  T* const* states;      // of each state (T, B, H) or null
  T* boundary_states;    // [chunk][state but y][B][H]: before each chunk, counted from the end, but the first; or null
  Index chunk_steps;
};

template <class T>
struct MachineBackward {
  MachineCall<T> call;
  const BackwardJob<T>* base;  // what does not depend on the cell
  const CellShape* shape;
  const MachinePart<T>* parts;  // transposed
  const int* part_begin;        // of each operand; one more at the end
  const int* operand_of;        // of each state the operand that it is, or -1
  const Index* column_of;       // of each operand, where it begins in a joint row
  Sequence<const T> dy;
  const T* const* dstateT;  // of each state; null: none
  const Sequence<const T>* dstates;
  T* const* dstate0;
  T* const* direct;   // of each state [B][blocks * 16], or null: it has no such gradient
  T* sums;            // [B][block][vector][16], or null
  T* norm_gradients;  // [B][norm][kNormGradientNumbers]
  int norm_gradient_count;
  T* const* dvectors;               // of each vector (H) or null
  const MachineForward<T>* replay;  // with boundary states: makes the saved values and states of a chunk; else null
  const T* boundary_states;
  T* of_units;  // the gradients of row scalars before they are summed: [row of a chunk][block][scalar][16], or null
  T* const* dscalars;  // of each row scalar (T, B) or null
};

}  // namespace cpu
}  // namespace fusedrnn
