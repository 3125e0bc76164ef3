// Which products of matrices a plan's accumulators take. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/groups.h"
#include "cpu/machine/plan.h"

namespace fusedrnn::cpu {

struct HostPart {
  int operand;
  Part part;
};

// Of each operand the block of weights of each accumulator, or -1.
inline std::vector<std::vector<int>> blocks_of_operands(const MachinePlan& plan) {
  std::vector<std::vector<int>> found(std::size_t(plan.operands), std::vector<int>(std::size_t(plan.accumulators), -1));
  for (const MachinePlan::Product& p : plan.products)
    found[std::size_t(p.operand)][std::size_t(p.accumulator)] = p.weight;
  return found;
}

// Adds the parts of accumulators [begin, end): neighbours of which none is -1, at most four.
inline void add_parts(int operand, const std::vector<int>& blocks, int begin, int end, std::vector<HostPart>& parts) {
  for (int a = begin; a < end; ++a) {
    const int block = blocks[std::size_t(a)];
    if (block < 0) continue;
    const bool neighbour = a > begin && blocks[std::size_t(a - 1)] >= 0;
    if (!neighbour || parts.back().part.count == 4) parts.push_back({operand, {a, 0, {}}});
    Part& part = parts.back().part;
    part.gate[part.count++] = block;
  }
}

// Forward: a round's accumulators in groups of at most four, each summed up by itself.
struct MachineForwardParts {
  struct Round {
    int first, accumulators, widest, sum_begin, sum_end;
  };
  std::vector<HostPart> parts;
  std::vector<MachineSum> sums;
  std::vector<Round> rounds;

  MachineForwardParts() = default;
  explicit MachineForwardParts(const MachinePlan& plan) {
    const std::vector<std::vector<int>> blocks = blocks_of_operands(plan);
    int first = 0;
    for (const MachinePlan::Round& r : plan.forward) {
      Round round = {first, r.accumulators, 1, int(sums.size()), 0};
      const int pieces = (r.accumulators + 3) / 4;
      for (int k = 0; k < pieces; ++k) {
        const std::size_t begin = parts.size(), before = sums.size();
        for (int o = 0; o < plan.operands; ++o)
          add_parts(o, blocks[std::size_t(o)], first + r.accumulators * k / pieces,
                    first + r.accumulators * (k + 1) / pieces, parts);
        for (std::size_t p = begin; p < parts.size(); ++p) {
          const Part& part = parts[p].part;
          round.widest = std::max(round.widest, part.count);
          if (sums.size() > before && sums.back().first == part.first && sums.back().count == part.count)
            ++sums.back().part_end;
          else
            sums.push_back({part.first, part.count, int(p), int(p) + 1});
        }
      }
      round.sum_end = int(sums.size());
      rounds.push_back(round);
      first += r.accumulators;
    }
  }
};

// Backward: the parts of each operand, and the columns of the joint rows [1 | x | operands] by whose gradients they
// are.
struct MachineBackwardParts {
  std::vector<HostPart> parts;
  std::vector<int> begin;        // of each operand; one more at the end
  std::vector<Index> column_of;  // of each operand
  std::vector<Group> memory;
  Groups groups;

  MachineBackwardParts(const MachinePlan& plan, Index I, Index P)
      : memory(std::size_t((1 + plan.operands) * plan.accumulators)), groups{memory.data()} {
    const std::vector<std::vector<int>> blocks = blocks_of_operands(plan);
    std::vector<int> biased(std::size_t(plan.accumulators), -1);
    for (const MachinePlan::Product& p : plan.products)
      if (p.bias >= 0) biased[std::size_t(p.accumulator)] = 0;
    add_columns(biased, 0, 1);
    Index column = 1;
    for (int o = 0; o < plan.operands; ++o) {
      begin.push_back(int(parts.size()));
      add_parts(o, blocks[std::size_t(o)], 0, plan.accumulators, parts);
      column_of.push_back(column);
      add_columns(blocks[std::size_t(o)], column, o ? P : I);
      column += o ? P : I;
    }
    begin.push_back(int(parts.size()));
    groups.lay_out();
  }

 private:
  void add_columns(const std::vector<int>& blocks, Index column, Index columns) {
    std::vector<HostPart> found;
    add_parts(0, blocks, 0, int(blocks.size()), found);
    std::vector<Part> gates;
    for (const HostPart& p : found) gates.push_back(p.part);
    groups.add(column, columns, gates.data(), gates.size());
  }
};

}  // namespace fusedrnn::cpu
