// The C++ interface of the CPU kernels. SPDX-License-Identifier: Apache-2.0
//
// Legend: T time steps, B batch, I input size, H hidden size, P projected size (at most H; H where nothing is
// projected), G gates. All sizes and strides are 64-bit and count elements. Nothing here knows Python. Callers check
// shapes (src/calls.h does). Inputs are never written to and outputs never overlap inputs. "contiguous" is C order.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "steps.h"

namespace fusedrnn {

enum class CellId : int {
#define X(id, type) id,
#include "cells/cells.def"
#undef X
};

namespace cpu {
struct MachinePlan;
}

// A compiled cell; or a program, whose plan outlives what is made with it, and whose id is of no meaning.
struct Cell {
  CellId id{};
  const cpu::MachinePlan* plan = nullptr;
};

struct Sizes {
  Index T, B, I, H, P;
};

// An entry for each weight, null where there is none: weight_ih (G*H, I), weight_hh (G*H, P), bias_ih and bias_hh
// (G*H); then vectors (n*H), of compiled cells with layer norm gain_ih, gain_hh and, with c, gain_c and bias_c; of a
// cell that projects weight_hr (P, H) last. All contiguous.
template <class T>
using Weights = std::vector<T*>;

// An entry for each state: of the first with rows of P, of the others with rows of H.
constexpr int kMostStates = 16;
template <class Entry>
using OfStates = std::array<Entry, kMostStates>;

template <class T>
struct Tape;  // what forward saves for backward; opaque, owned by the caller
template <class T>
struct PackedWeights;  // weights in the kernels' own order

// boundary_states: only the states at chunk boundaries; backward runs forward again.
enum class Save { nothing, all, boundary_states };

// Recurrent dropout and zoneout, whose masks are drawn from a seed (docs/bptt.md). Rates from 0 to 1.
struct Regularization {
  double recurrent_dropout = 0, zoneout_h = 0, zoneout_c = 0;
  bool training = false;  // false: no dropout, and zoneout by its expectation
  std::uint64_t seed = 0;
  std::uint32_t stream = 0;  // below 2^30; of the same seed, other masks
  bool drops() const { return training && recurrent_dropout > 0; }
  bool acts() const { return drops() || zoneout_h > 0 || zoneout_c > 0; }
};

struct Problem {
  Cell cell;
  Sizes sizes;
  const Index* lengths = nullptr;        // (B) or null
  const unsigned char* reset = nullptr;  // (T, B) contiguous, 0 or 1, or null
  bool reverse = false;
  Index detach_every = 0;  // no gradient flows into step k * detach_every - 1 from the next; 0: everywhere
  Regularization regularization{};
  // Of T float, where has_bfloat16 says so: products in bfloat16, and h rounded to it. weight_ih and weight_hh point to
  // bfloat16 then; what else is rounded is given as float.
  bool bfloat16 = false;
};

// Called on the caller's thread every few milliseconds; false stops the call.
struct Poll {
  bool (*hook)(void*) = nullptr;
  void* context = nullptr;
};

template <class T>
struct ForwardCall {
  Problem problem;
  const PackedWeights<T>* packed = nullptr;
  Weights<const T> weights;         // read only where none are packed
  Sequence<const T> x;              // (T, B, I)
  std::vector<const T*> scalars;    // of each row scalar (T, B) contiguous
  OfStates<const T*> state0{};      // (B, ·) contiguous, or null: what they start from
  T* y;                             // (T, B, P) contiguous; of one step it may be the first of stateT
  OfStates<T*> stateT{}, states{};  // (B, ·); (T, B, ·), or null
  Save save = Save::nothing;        // what the tape returned holds; nothing: no tape
  T* saved = nullptr;               // the tape's memory, of its tape_shape; null: its own
  Poll poll;
};

template <class T>
struct BackwardCall {
  Problem problem;
  const Tape<T>* tape;
  Weights<const T> weights;                  // as they were in forward
  const PackedWeights<T>* packed = nullptr;  // the same, packed, if they are: read for a tape of boundary states only
  Sequence<const T> x;
  std::vector<const T*> scalars;
  const T* y;  // what forward returned
  OfStates<const T*> state0{};
  Sequence<const T> dy;                   // (T, B, P); any upstream gradient may be absent
  OfStates<const T*> dstateT{};           // (B, ·)
  OfStates<Sequence<const T>> dstates{};  // (T, B, ·)
  T* dx = nullptr;                        // (T, B, I) contiguous; null: not needed, so with everything below
  Weights<T> dweights;                    // overwritten
  OfStates<T*> dstate0{};                 // (B, ·)
  std::vector<T*> dscalars;               // (T, B)
  Poll poll;
};

struct Deleter {  // of what is opaque here
  template <class Made>
  void operator()(Made* p) const;
};
template <class T>
using TapePtr = std::unique_ptr<Tape<T>, Deleter>;
template <class T>
using PackedPtr = std::unique_ptr<PackedWeights<T>, Deleter>;

// Over how many threads a call is split: each has rows of the batch, or blocks of 16 units and a barrier every step.
struct Split {
  int threads;
  bool by_rows;
};

// What the choice between them goes by (cpu/run.cpp; in words: docs/scaling.md).
struct SplitRule {
  static constexpr double call = 2e6;  // multiply-adds per thread and call: about 20 us, what waking a thread may cost
  static constexpr double step = 4e4;  // per thread and step, where a barrier follows every step
  static constexpr std::size_t core_cache = 1 << 20;  // bytes of weights that every core can keep
  static constexpr Index rows = 16;                   // of the batch per thread, with larger weights
};

struct Interrupted {};  // thrown when the poll hook says stop

// T is float or double. Throws std::bad_alloc, std::overflow_error, Interrupted.
template <class T>
PackedPtr<T> pack(const Cell& cell, Index I, Index H, Index P, const Weights<const T>& weights, Poll poll = {},
                  bool bfloat16 = false);  // as in Problem
// Whether there are kernels with products in bfloat16 here.
bool has_bfloat16();
template <class T>
TapePtr<T> forward(const ForwardCall<T>& call);
template <class T>
void backward(const BackwardCall<T>& call);
// A tape over memory that `saved` of a forward call was; the memory outlives it.
template <class T>
TapePtr<T> tape_over(const Problem& problem, Save save, const T* saved);
// What a tape takes, in elements.
struct TapeShape {
  Index rows, width;
};
template <class T>
TapeShape tape_shape(const Problem& problem, Save save);
// How forward and backward of a problem are split with so many threads, and backward's chunks of steps.
template <class T>
Split split_of(CellId cell, const Sizes& sizes, int threads);
template <class T>
Index chunks_of(CellId cell, const Sizes& sizes);
// Subnormals are flushed to zero in kernels; off for tests and for those who need them.
void set_flush_subnormals(bool on);
// For tests: off, small problems take what only large ones are worth (all threads, stores past the caches, W x of
// several steps at once).
void set_thresholds(bool on);
// Bytes that a tape holds.
template <class T>
Index tape_bytes(const Tape<T>& tape);

}  // namespace fusedrnn
