// SPDX-License-Identifier: Apache-2.0
#include "cpu/machine/plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace fusedrnn::cpu {
namespace {

using Limits = MachineLimits;

[[noreturn]] void refuse(const std::string& what, const std::string& expected) {
  throw std::invalid_argument("program: " + what + ": expected " + expected);
}

class Numbers {
 public:
  Numbers(const std::int32_t* begin, std::size_t count) : at(begin), end(begin + count) {}
  // The next one, from `low` to `high`.
  int next(const char* what, int low, int high) {
    if (at == end) refuse(what, "a number, got the end");
    const int n = *at++;
    if (n < low || n > high)
      refuse(what, std::to_string(low) + " to " + std::to_string(high) + ", got " + std::to_string(n));
    return n;
  }
  void finish() const {
    if (at != end) refuse("end", "no more numbers, got " + std::to_string(end - at));
  }

 private:
  const std::int32_t *at, *end;
};

constexpr int kMostBlocks = 1 << 12;  // of a parameter

// How many registers each operation reads.
constexpr int sources[] = {
#define X(name, count) count,
#include "cpu/machine/operations.def"
#undef X
};

// Values side by side at a place that an operation of this direction may use; 0: it may not.
int values_at(const MachinePlan& plan, int place, Operation op, bool backward) {
  const bool load = op == Operation::load, store = op == Operation::store;
  if (place == kSaved) return load || (store && !backward) ? plan.saved : 0;
  if (place == kCarried) return load || store ? backward ? plan.carried_back : plan.carried : 0;
  if (place == kGradients) return store && backward ? plan.accumulators : 0;
  if (place == kSums) return op == Operation::add_to ? backward ? int(plan.vectors.size()) : 0 : 0;
  if (place == kNorms || place == kNormGradients) return 0;
  if (place == kScalars) return store && backward ? plan.scalars : 0;
  if (place < kStates) return load && place != plan.projected_mask;  // a mask
  const int state = place - kStates, S = plan.states;
  if (plan.projects && state < 3 * S && state % S == 0) return store && state == S;  // what is projected
  if (state < S) return load;                                                        // before the step
  if (state < 2 * S) return load || (store && !backward);                            // after it
  if (state < 3 * S) return store && backward && plan.direct[std::size_t(state - 2 * S)];
  return store && plan.state_of[std::size_t(state - 3 * S + 1)] < 0;
}

int count_places(const MachinePlan& plan) { return kStates + 3 * plan.states + plan.operands - 1; }

// The norms that a round begins with. Their values are loaded from places.
void read_norms(Numbers& numbers, const MachinePlan& plan, bool backward, int& count, MachinePlan::Round& round) {
  round.norms.resize(std::size_t(numbers.next("norms", 0, Limits::norms - count)));
  for (MachineNorm& norm : round.norms) {
    norm.number = count++;
    norm.begin = int(round.values.size());
    if (backward) {
      if (!plan.norms) refuse("norms", "none of gradients without norms of values");
      norm.of = numbers.next("norm", 0, plan.norms - 1);
      const MachineNorm* of = nullptr;
      for (const MachinePlan::Round& r : plan.forward)
        for (const MachineNorm& each : r.norms)
          if (each.number == norm.of) of = &each;
      norm.size = of->size, norm.epsilon = of->epsilon, norm.centred = of->centred;
    } else {
      if (plan.constants.empty()) refuse("norms", "none without constants");
      norm.of = norm.number;
      norm.centred = numbers.next("centred", 0, 1) != 0;
      norm.epsilon = numbers.next("constant", 0, int(plan.constants.size()) - 1);
    }
    const int values = numbers.next("values of a norm", backward ? 0 : 1, backward ? norm.size : kMostNormed);
    if (!backward) norm.size = values;
    for (int k = 0; k < (backward ? 2 : 1) * values; ++k) {
      const int place = numbers.next("place", 0, count_places(plan) - 1);
      const int side_by_side = values_at(plan, place, Operation::load, backward);
      if (!side_by_side || (place >= kDropout && place < kStates))
        refuse("place", "one to load from, got " + std::to_string(place));
      round.values.push_back({place, numbers.next("value of a place", 0, side_by_side - 1)});
    }
    norm.end = int(round.values.size());
  }
}

std::vector<Instruction> read_code(Numbers& numbers, MachinePlan& plan, bool backward, int& registers) {
  std::vector<Instruction> code(std::size_t(numbers.next("instructions", 0, Limits::instructions)));
  const int places = count_places(plan);
  for (Instruction& in : code) {
    in.op = Operation(numbers.next("operation", 0, kOperations - 1));
    int n[4];
    for (int& k : n) k = numbers.next("register", 0, Limits::registers - 1);
    in.d = std::uint8_t(n[0]), in.a = std::uint8_t(n[1]), in.b = std::uint8_t(n[2]), in.c = std::uint8_t(n[3]);
    registers = std::max(registers, n[0] + 1);
    for (int k = 1; k <= sources[int(in.op)]; ++k) registers = std::max(registers, n[k] + 1);
    const auto below = [&](const char* what, int k, int count) {
      if (k >= count) refuse(what, "less than " + std::to_string(count) + ", got " + std::to_string(k));
    };
    switch (in.op) {
      case Operation::constant:
        below("constant", in.a, int(plan.constants.size()));
        break;
      case Operation::vector:
        below("vector", in.a, int(plan.vectors.size()));
        break;
      case Operation::scalar:
        below("row scalar", in.a, plan.scalars);
        break;
      case Operation::load:  // c more of them
        below("register", in.d + in.c, Limits::registers);
        registers = std::max(registers, in.d + in.c + 1);
        below("place", in.a, places);
        below("value of a place", in.b + in.c, values_at(plan, in.a, in.op, backward));
        if (in.a >= kDropout && in.a < kStates) plan.reads_masks[in.a - kDropout] = true;
        break;
      case Operation::store:
      case Operation::add_to:
        below("place", in.a, places);
        below("value of a place", in.b, values_at(plan, in.a, in.op, backward));
        break;
      case Operation::normalise:
        below("norm", in.b, plan.norms);
        break;
      case Operation::normalise_gradient:
        below("norm of gradients", in.c, backward ? plan.norm_gradients : 0);
        break;
      default:
        break;
    }
  }
  return code;
}

}  // namespace

MachinePlan::MachinePlan(const std::int32_t* data, std::size_t count, std::vector<double> start_,
                         std::vector<double> constants_)
    : start(std::move(start_)), constants(std::move(constants_)) {
  Numbers numbers(data, count);
  states = numbers.next("states", 1, Limits::states);
  operands = numbers.next("operands", 1, Limits::operands);
  products.resize(std::size_t(numbers.next("products", 1, Limits::accumulators * Limits::operands)));
  parameters.resize(std::size_t(numbers.next("parameters", 0, Limits::vectors)));
  vectors.resize(std::size_t(numbers.next("vectors", 0, Limits::vectors)));
  const int constant_count = numbers.next("constants", 0, Limits::constants);
  if (start.size() != std::size_t(states) || constants.size() != std::size_t(constant_count))
    refuse("start and constants", std::to_string(states) + " and " + std::to_string(constant_count) + " numbers, got " +
                                      std::to_string(start.size()) + " and " + std::to_string(constants.size()));
  saved = numbers.next("saved values", 0, Limits::saved);
  carried = numbers.next("carried values", 0, Limits::carried);
  carried_back = numbers.next("carried values", 0, Limits::carried);
  for (int& n : blocks) n = numbers.next("blocks", 0, kMostBlocks);
  scalars = numbers.next("row scalars", 0, Limits::scalars);
  projects = numbers.next("projection", 0, 1) != 0;
  if (const int mask = numbers.next("mask of the projection", 0, projects ? 2 : 0)) {
    projected_mask = kDropout + mask;
    reads_masks[mask] = true;
  }
  if (!blocks[weight_ih]) refuse("blocks", "at least one of weight_ih, got 0");
  for (int s = 0; s < states; ++s) {
    const bool zoned = projected_mask != 0, fixed = projects && s == 0;  // of a projection what zoneout leaves
    direct.push_back(numbers.next("direct", fixed && zoned, !fixed || zoned));
  }
  state_of.push_back(-1);
  operand_of.assign(std::size_t(states), -1);
  for (int o = 1; o < operands; ++o) {
    const int state = numbers.next("state of an operand", projects ? 0 : -1, projects ? 0 : states - 1);
    state_of.push_back(state);
    if (state >= 0) operand_of[std::size_t(state)] = o;
  }
  if (operands > 1 && !blocks[weight_hh]) refuse("blocks", "at least one of weight_hh, got 0");
  for (Product& p : products) {
    p.accumulator = numbers.next("accumulator", 0, Limits::accumulators - 1);
    p.operand = numbers.next("operand", 0, operands - 1);
    p.weight = numbers.next("block of weights", 0, blocks[p.operand ? weight_hh : weight_ih] - 1);
    p.bias = numbers.next("block of biases", -1, blocks[p.operand ? bias_hh : bias_ih] - 1);
  }
  for (int& n : parameters) n = numbers.next("blocks", 1, kMostBlocks);
  for (Vector& v : vectors) {
    v.parameter = numbers.next("parameter", bias_ih, kPlain + int(parameters.size()) - 1);
    v.block =
        numbers.next("block of a parameter", 0,
                     (v.parameter < kPlain ? blocks[v.parameter] : parameters[std::size_t(v.parameter - kPlain)]) - 1);
  }
  forward.resize(std::size_t(numbers.next("rounds", 1, Limits::rounds)));
  for (Round& round : forward) {
    numbers.next("numbers of a round", 1, 1);
    round.accumulators = numbers.next("accumulators", 0, Limits::accumulators - accumulators);
    accumulators += round.accumulators;
    registers = std::max(registers, round.accumulators);
    read_norms(numbers, *this, false, norms, round);
    for (const MachineValue& v : round.values) reads_saved |= v.place == kSaved;
    round.code = read_code(numbers, *this, false, registers);
    for (const Instruction& in : round.code) reads_saved |= in.op == Operation::load && in.a == kSaved;
  }
  if (!accumulators) refuse("accumulators", "at least 1, got 0");
  for (const Product& p : products)
    if (p.accumulator >= accumulators) refuse("accumulator", "less than " + std::to_string(accumulators));
  backward.resize(std::size_t(numbers.next("rounds", 1, Limits::rounds)));
  for (Round& round : backward) {
    round.accumulators = 0;
    const bool first = &round == backward.data();
    round.operands.resize(std::size_t(numbers.next("operands of a round", 0, first ? 0 : operands - 1)));
    for (int& o : round.operands) o = numbers.next("operand", 1, operands - 1);
    registers = std::max(registers, first ? states : int(round.operands.size()));
    read_norms(numbers, *this, true, norm_gradients, round);
    if (first && norm_gradients) refuse("norms", "none in the first round backward");
    round.code = read_code(numbers, *this, true, registers);
  }
  numbers.finish();
}

bool MachinePlan::same_weights(const MachinePlan& other) const {
  const auto rounds_alike = [](const Round& a, const Round& b) { return a.accumulators == b.accumulators; };
  return this == &other ||
         (states == other.states && projects == other.projects && start == other.start && state_of == other.state_of &&
          products == other.products && parameters == other.parameters && vectors == other.vectors &&
          std::equal(blocks, blocks + kPlain, other.blocks) &&
          std::equal(forward.begin(), forward.end(), other.forward.begin(), other.forward.end(), rounds_alike));
}

}  // namespace fusedrnn::cpu
