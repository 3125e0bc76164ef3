// The C++ interface of cells that are programs, as api.h is that of the compiled ones. SPDX-License-Identifier:
// Apache-2.0
#pragma once
#include <memory>
#include <vector>

#include "api.h"
#include "cpu/machine/plan.h"

namespace fusedrnn {

// weight_ih, weight_hh, bias_ih and bias_hh, then the plan's other parameters, then weight_hr of a cell that projects,
// each contiguous; null: none.
template <class T>
using MachineWeights = std::vector<T*>;

template <class T>
struct PackedMachine;
template <class T>
struct MachineTape;
template <class T>
using PackedMachinePtr = std::unique_ptr<PackedMachine<T>, Deleter>;
template <class T>
using MachineTapePtr = std::unique_ptr<MachineTape<T>, Deleter>;

// The problem's cell is of no meaning. The plan is that of the weights, or has the same products and vectors: another
// one where the call is regularized. Of each state (B, H), or (T, B, H) in `states` and `dstates`, of a projected one
// with P for H; null: none.
template <class T>
struct MachineForwardCall {
  const cpu::MachinePlan* plan;
  const PackedMachine<T>* packed;
  Problem problem;
  Sequence<const T> x;
  std::vector<const T*> scalars;  // of each row scalar (T, B)
  std::vector<const T*> state0;
  T* y;
  std::vector<T*> stateT, states;
  Save save;
  T* saved = nullptr;  // memory for a tape of everything, (T, B, tape_width); null: its own
  Poll poll;
};

template <class T>
struct MachineBackwardCall {
  const cpu::MachinePlan* plan;
  const MachineTape<T>* tape;
  const PackedMachine<T>* packed;   // of boundary states, which run forward again; else it is not read
  MachineWeights<const T> weights;  // as they were in forward
  Problem problem;
  Sequence<const T> x;
  std::vector<const T*> scalars;
  T* y;  // what forward returned
  std::vector<const T*> state0;
  const T* dy;
  std::vector<const T*> dstateT, dstates;
  T* dx;
  MachineWeights<T> dweights;
  std::vector<T*> dstate0, dscalars;
  Poll poll;
};

// The plan outlives what is packed. T is float or double; throws as those of api.h do.
template <class T>
PackedMachinePtr<T> pack_machine(const cpu::MachinePlan& plan, Index I, Index H, Index P,
                                 const MachineWeights<const T>& weights, Poll poll);
template <class T>
MachineTapePtr<T> machine_forward(const MachineForwardCall<T>& call);
template <class T>
void machine_backward(const MachineBackwardCall<T>& call);
template <class T>
Index tape_bytes(const MachineTape<T>& tape);
// Elements of a tape for each row and step.
inline Index tape_width(const cpu::MachinePlan& plan, Index H) {
  return (plan.saved + plan.states - 1) * H + plan.norms * cpu::kNormNumbers;
}
// A tape over memory that `saved` of a forward call was; the memory outlives it.
template <class T>
MachineTapePtr<T> machine_tape_over(const cpu::MachinePlan& plan, const Sizes& sizes, T* saved);

}  // namespace fusedrnn
