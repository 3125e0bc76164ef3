// What Python says of a cell (fusedrnn.cells.program), read from numbers and checked. SPDX-License-Identifier:
// Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "api.h"
#include "cpu/machine/job.h"

namespace fusedrnn::cpu {

// Largest numbers; std::invalid_argument says which is larger. `operations` of a cell's step only Python counts: those
// of larger cells would take seconds to derive.
struct MachineLimits {
  static constexpr int operations = 1000;
  static constexpr int states = kMostStates, operands = 48, accumulators = 64, vectors = 64, scalars = 16, saved = 255,
                       carried = 255, constants = 255, norms = 255, rounds = 64, instructions = 1 << 14,
                       registers = 255;
};
constexpr int kMachineVectors = 24;  // of a register: those of the widest tile

struct MachinePlan {
  struct Product {
    int accumulator, operand, weight, bias;  // blocks of H rows; bias: -1 where there is none
    bool operator==(const Product& o) const {
      return accumulator == o.accumulator && operand == o.operand && weight == o.weight && bias == o.bias;
    }
  };
  struct Vector {
    int parameter, block;  // bias_ih, bias_hh or one from kPlain on
    bool operator==(const Vector& o) const { return parameter == o.parameter && block == o.block; }
  };
  struct Round {
    int accumulators;           // forward
    std::vector<int> operands;  // backward
    std::vector<MachineNorm> norms;
    std::vector<MachineValue> values;
    std::vector<Instruction> code;
  };
  enum { weight_ih, weight_hh, bias_ih, bias_hh, kPlain };

  int states, operands, saved, scalars, carried, carried_back, accumulators = 0, registers = 0, norms = 0,
                                                               norm_gradients = 0;
  int blocks[kPlain];  // of H rows
  bool projects = false;
  int projected_mask = 0;  // see MachineCall
  std::vector<double> start, constants;
  std::vector<bool> direct;     // of each state
  std::vector<int> state_of;    // of each operand; of x, and of those that the cell computes, -1
  std::vector<int> operand_of;  // of each state, or -1
  std::vector<Product> products;
  std::vector<int> parameters;  // the blocks of those beside weights and biases
  std::vector<Vector> vectors;
  std::vector<Round> forward, backward;
  bool reads_saved = false;  // forward, in a later round
  bool reads_masks[3] = {};  // of dropout, of zoneout on h and on c

  // std::invalid_argument for whatever is out of range: no program reads or writes beside its call's memory.
  MachinePlan(const std::int32_t* numbers, std::size_t count, std::vector<double> start_,
              std::vector<double> constants_);
  // Weights, biases and parameters; behind them weight_hr, where the cell projects.
  int weight_hr() const { return kPlain + int(parameters.size()); }
  // Elements of a tape for each row and step: what is saved, the states but the first, the numbers of norms.
  Index tape_width(Index H) const { return (saved + states - 1) * H + norms * kNormNumbers; }
  // Whether weights that are packed for one are packed for the other.
  bool same_weights(const MachinePlan& other) const;
};

}  // namespace fusedrnn::cpu
