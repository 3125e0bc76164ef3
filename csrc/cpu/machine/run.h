// One call of a cell that is a program: memory taken, weights packed, the loops run. SPDX-License-Identifier:
// Apache-2.0
//
// A part of cpu/run.cpp, whose helpers it uses.
#pragma once
#include "cpu/machine/parts.h"

namespace fusedrnn {

using cpu::MachinePlan;

// What is small.
template <class T>
struct MachineNumbers {
  T *vectors, *constants, *start;

  void take(Layout& layout, const MachinePlan& plan, Index H) {
    layout.take(vectors, {Index(plan.vectors.size()), blocks_of(H), kBlock});
    layout.take(constants, {Index(plan.constants.size())});
    layout.take(start, {plan.states, H});
  }
  void fill_constants(const MachinePlan& plan) {
    const cpu::ControlWord word(false);  // or the caller's would show that they are rounded
    for (std::size_t k = 0; k < plan.constants.size(); ++k) constants[k] = T(plan.constants[k]);
  }
  void fill(const MachinePlan& plan, Index H, const Weights<const T>& weights) {
    const Index row = blocks_of(H) * kBlock;
    T* to = vectors;
    for (const MachinePlan::Vector& v : plan.vectors) {
      const T* from = weights[std::size_t(v.parameter)];  // null: a bias that is not there
      std::fill(from ? std::copy(from + v.block * H, from + (v.block + 1) * H, to) : to, to + row, T(0));
      to += row;
    }
    fill_constants(plan);
    for (int s = 0; s < plan.states; ++s) std::fill(start + s * H, start + (s + 1) * H, T(plan.start[std::size_t(s)]));
  }
};

namespace {

// What the rules of split and chunks go by.
CellShape shape_of(const MachinePlan& plan) {
  return {std::max(plan.blocks[MachinePlan::weight_ih], plan.blocks[MachinePlan::weight_hh]),
          plan.accumulators,
          plan.saved,
          plan.operands - 1,
          false,
          false,
          false,
          plan.projects,
          {},
          {},
          {}};
}

// Memory of every thread.
template <class T>
struct MachineScratch {
  Index tables_step, registers_step;
  char* tables;
  T* registers;

  MachineScratch(const MachinePlan& plan, Index B)
      : tables_step(lines<char>((cpu::kStates + 3 * plan.states + plan.operands + 2) * B * Index(sizeof(T*)))),
        registers_step(plan.registers * cpu::kMachineVectors * (64 / Index(sizeof(T)))) {}
  void take(Layout& layout, int threads) {
    layout.take(tables, {threads, tables_step});
    layout.take(registers, {threads, registers_step});
  }
};

std::vector<cpu::MachineRound> rounds_of(const std::vector<MachinePlan::Round>& rounds) {
  std::vector<cpu::MachineRound> found;
  for (const MachinePlan::Round& r : rounds)
    found.push_back({r.code.data(), int(r.code.size()), 0, 0, 0, 0, 0, r.operands.data(), int(r.operands.size()),
                     r.norms.data(), int(r.norms.size()), r.values.data()});
  return found;
}

std::vector<cpu::MachineRound> forward_rounds(const MachinePlan& plan, const cpu::MachineForwardParts& parts) {
  std::vector<cpu::MachineRound> rounds = rounds_of(plan.forward);
  for (std::size_t r = 0; r < rounds.size(); ++r) {
    const cpu::MachineForwardParts::Round& of = parts.rounds[r];
    rounds[r].first = of.first, rounds[r].accumulators = of.accumulators, rounds[r].widest = of.widest;
    rounds[r].sum_begin = of.sum_begin, rounds[r].sum_end = of.sum_end;
  }
  return rounds;
}

// Of Masks: its own three, of which one is of the second operand, and the others from the third on.
int mask_arrays(const MachinePlan& plan) { return std::max(3, plan.operands + 1); }

template <class T>
cpu::MachineCall<T> machine_call(const MachinePlan& plan, const Problem& problem, const Sequence<const T>& x,
                                 const MachineNumbers<T>& numbers, const MachineScratch<T>& scratch) {
  cpu::MachineCall<T> call{};
  const Sizes& n = problem.sizes;
  call.steps = steps_of(problem);
  call.I = n.I, call.H = n.H, call.P = n.P, call.blocks = blocks_of(n.H);
  call.projects = plan.projects, call.projected_mask = plan.projected_mask;
  call.states = plan.states, call.operands = plan.operands, call.accumulators = plan.accumulators;
  call.saved_count = plan.saved, call.vector_count = int(plan.vectors.size());
  call.scalar_count = plan.scalars;
  call.state_of = plan.state_of.data();
  call.x = x;
  call.vectors = numbers.vectors, call.constants = numbers.constants, call.start = numbers.start;
  call.tables = scratch.tables, call.tables_step = scratch.tables_step;
  call.register_count = plan.registers;
  call.registers = scratch.registers, call.registers_step = scratch.registers_step;
  call.states_kept = call.saved_kept = -1, call.boundary_time = -1;
  call.norm_count = plan.norms;
  call.rows_outside = rows_outside<T>(shape_of(plan), n);
  return call;
}

}  // namespace

template <class T>
struct PackedMachine {
  cpu::MachineForwardParts parts;
  std::vector<cpu::MachinePart<T>> packed;
  MachineNumbers<T> numbers;
};

template <class T>
PackedPtr<T> pack_machine(const MachinePlan& plan, Index I, Index H, Index P, const Weights<const T>& weights,
                          Poll poll) {
  PackedPtr<T> made(new PackedWeights<T>);
  made->machine = std::make_unique<PackedMachine<T>>();
  PackedMachine<T>& packed = *made->machine;
  packed.parts = cpu::MachineForwardParts(plan);
  const Index blocks = blocks_of(H);
  const auto columns = [&](int operand) { return operand ? P : I; };
  Layout layout;
  std::vector<T*> memory(packed.parts.parts.size());
  T *bias, *projection;
  for (std::size_t k = 0; k < memory.size(); ++k) {
    const cpu::HostPart& p = packed.parts.parts[k];
    layout.take(memory[k], {blocks, block_step<T>(columns(p.operand), p.part.count)});
  }
  layout.take(bias, {blocks, plan.accumulators, kBlock});
  layout.take(projection, {plan.projects ? blocks_of(P) : 0, block_step<T>(H, 1)});
  packed.numbers.take(layout, plan, H);
  made->memory = layout.allocate();
  std::vector<cpu::PackJob<T>> jobs;
  for (std::size_t k = 0; k < memory.size(); ++k) {
    const cpu::HostPart& p = packed.parts.parts[k];
    const Index K = columns(p.operand), step = block_step<T>(K, p.part.count);
    jobs.push_back({weights[p.operand ? 1 : 0], H, K, p.part, memory[k], step, 0, blocks});
    packed.packed.push_back({p.operand, p.part.first, p.part.count, memory[k], step});
  }
  made->projection = {projection, block_step<T>(H, 1)};
  if (plan.projects)
    jobs.push_back({weights[std::size_t(plan.weight_hr())], P, H, cpu::kProjection, projection, block_step<T>(H, 1), 0,
                    blocks_of(P)});
  pack_all(cpu::kernels<T>().pack, jobs.data(), jobs.size(), poll);
  packed.numbers.fill(plan, H, weights);
  const cpu::ControlWord word(flush_subnormals.load());
  std::fill(bias, bias + blocks * plan.accumulators * kBlock, T(0));
  for (const MachinePlan::Product& p : plan.products)
    if (const T* from = p.bias < 0 ? nullptr : weights[p.operand ? MachinePlan::bias_hh : MachinePlan::bias_ih])
      for (Index u = 0; u < H; ++u)
        bias[(u / kBlock * plan.accumulators + p.accumulator) * kBlock + u % kBlock] += from[p.bias * H + u];
  made->bias = bias;
  return made;
}

template <class T>
void set_weights(cpu::MachineForward<T>& job, const PackedWeights<T>& packed) {
  job.sums = packed.machine->parts.sums.data(), job.parts = packed.machine->packed.data();
  job.bias = packed.bias, job.projection = packed.projection;
}

// What is saved, then the states but the first.
template <class T>
void lay_out(Tape<T>& tape, const MachinePlan& plan, const Sizes& n, T* saved) {
  tape.saved = saved;
  tape.state.assign(1, nullptr);
  saved += n.T * n.B * plan.saved * n.H;
  for (int s = 1; s < plan.states; ++s, saved += n.T * n.B * n.H) tape.state.push_back(saved);
  tape.norms = saved;
}

template <class T>
TapePtr<T> machine_forward(const ForwardCall<T>& call) {
  const MachinePlan& plan = *call.problem.cell.plan;
  const Sizes& n = call.problem.sizes;
  const CellShape shape = shape_of(plan);
  const Index units = blocks_of(n.H) * kBlock;
  const Split split = split_for<T>(shape, n, cpu::num_threads());
  const std::size_t S = std::size_t(plan.states), O = std::size_t(plan.operands);
  const bool wanted = std::any_of(call.states.begin(), call.states.end(), [](const T* state) { return state; });
  const bool all = call.save == Save::all, every = all || wanted, keeps = all || plan.reads_saved;
  const PackedPtr<T> own = pack_own<T>(call, true);
  const PackedWeights<T>& packed = own ? *own : *call.packed;
  TapePtr<T> tape(call.save == Save::nothing ? nullptr : new Tape<T>{});
  const Chunk<T> chunk(shape, n);
  const Index boundaries = call.save == Save::boundary_states && chunk.count ? chunk.count - 1 : 0;
  Layout tape_layout, layout;
  Layout& kept = all ? tape_layout : layout;
  MachineScratch<T> scratch(plan, n.B);
  MachineNumbers<T> numbers = packed.machine->numbers;  // but for the constants
  T *carried, *saved, *boundary_states = nullptr, *masks, *norms;
  cpu::MachineForward<T> job{};
  std::vector<T*> computed(O), state(S, call.y);
  if (all && call.saved)
    lay_out(*tape, plan, n, call.saved), saved = tape->saved, norms = tape->norms, state = tape->state;
  state[0] = call.y;
  if (!all || !call.saved) {
    kept.take(saved, {keeps ? all ? n.T : 1 : 0, n.B, plan.saved, n.H});
    kept.take(norms, {all ? n.T : 1, n.B, plan.norms, cpu::kNormNumbers});
    for (std::size_t s = 1; s < S; ++s) kept.take(state[s], {every ? n.T : 2, n.B, n.H});
  }
  tape_layout.take(boundary_states, {call.saved ? 0 : boundaries, plan.states - 1, n.B, n.H});
  layout.take(carried, {plan.carried, n.B, units});
  layout.take(job.unprojected, {plan.projects ? n.B : 0, units});
  for (std::size_t o = 1; o < O; ++o)
    if (plan.state_of[o] < 0) layout.take(computed[o], {n.B, units});
  layout.take(numbers.constants, {Index(plan.constants.size())});
  layout.take(masks, {regularization_memory(call.problem, split.threads, mask_arrays(plan)), n.B, units});
  scratch.take(layout, split.threads);
  if (tape) tape->memory = tape_layout.allocate(), tape->save = call.save;
  const Buffer memory = layout.allocate();
  if (!all && call.saved) boundary_states = call.saved;
  numbers.fill_constants(plan);
  if (tape && all)
    tape->saved = saved, tape->norms = norms, tape->state = state;
  else if (tape)
    tape->boundary_states = boundary_states, tape->state.assign(S, nullptr);
  const std::vector<cpu::MachineRound> rounds = forward_rounds(plan, packed.machine->parts);

  job.call = machine_call(plan, call.problem, call.x, numbers, scratch);
  job.call.regularization = regularization_of(call.problem, cpu::kernels<T>(), masks, mask_arrays(plan));
  job.call.scalars = call.scalars.data();
  job.call.rounds = rounds.data(), job.call.round_count = int(rounds.size());
  job.call.state0 = call.state0.data(), job.call.state = state.data();
  job.call.saved = keeps && plan.saved ? saved : nullptr;
  job.call.norms = plan.norms ? norms : nullptr;
  job.call.states_kept = every ? -1 : 1, job.call.saved_kept = all ? -1 : 0;
  job.call.carried = carried, job.call.carried_count = plan.carried;
  set_weights(job, packed);
  job.computed = computed.data();
  const Index row_bytes = plan.saved * n.H * Index(sizeof(T));
  job.stream = all && !plan.reads_saved && row_bytes % 64 == 0 && reinterpret_cast<std::uintptr_t>(saved) % 64 == 0 &&
               (!thresholds || n.T * n.B * row_bytes > kSharedCache);
  job.stateT = call.stateT.data(), job.states = call.states.data();
  job.boundary_states = boundaries && S > 1 ? boundary_states : nullptr, job.chunk_steps = chunk.steps;
  run_job<T>(cpu::kernels<T>().machine_forward, job, split.threads, split.by_rows, call.poll);
  return tape;
}

template <class T>
void machine_backward(const BackwardCall<T>& call) {
  const MachinePlan& plan = *call.problem.cell.plan;
  const Sizes& n = call.problem.sizes;
  const CellShape shape = shape_of(plan);
  const cpu::Kernels<T>& kernels = cpu::kernels<T>();
  const Index blocks = blocks_of(n.H), units = blocks * kBlock;
  const Split split = split_for<T>(shape, n, cpu::num_threads());
  const Chunk<T> chunk(shape, n);
  const std::size_t S = std::size_t(plan.states), O = std::size_t(plan.operands);
  const bool replays = call.tape->save == Save::boundary_states && (plan.saved || plan.norms || S > 1);
  const PackedPtr<T> own = pack_own<T>(call, replays);
  const PackedWeights<T>* const again_packed = own ? own.get() : call.packed;
  const auto wanted = [&](int parameter) { return call.dweights[std::size_t(parameter)] != nullptr; };
  const bool need_weights =
                 std::any_of(plan.products.begin(), plan.products.end(),
                             [&](const MachinePlan::Product& p) {
                               const bool state = p.operand > 0;
                               return wanted(state ? MachinePlan::weight_hh : MachinePlan::weight_ih) ||
                                      (p.bias >= 0 && wanted(state ? MachinePlan::bias_hh : MachinePlan::bias_ih));
                             }),
             need_sums = std::any_of(plan.vectors.begin(), plan.vectors.end(),
                                     [&](const MachinePlan::Vector& v) { return wanted(v.parameter); }),
             need_scalars =
                 std::any_of(call.dscalars.begin(), call.dscalars.end(), [](const T* p) { return p != nullptr; });
  T* const dweight_hr = plan.projects ? call.dweights[std::size_t(plan.weight_hr())] : nullptr;
  const cpu::MachineBackwardParts parts(plan, n.I, n.P);
  const auto columns = [&](int operand) { return operand ? n.P : n.I; };
  const Index projection_step = block_step<T>(n.P, 1);

  Layout layout;
  MachineScratch<T> scratch(plan, n.B);
  MachineNumbers<T> numbers;
  T *zeros, *carried, *masks, *saved = call.tape->saved, *y_again, *norms = call.tape->norms, *projection;
  cpu::BackwardJob<T> base{};
  cpu::MachineBackward<T> job{};
  cpu::MachineForward<T> again{};
  std::vector<T*> direct(S), memory_of(parts.parts.size()), computed(O), state = call.tape->state;
  const Index replay_steps = replays ? chunk.steps : 0, replay_rows = replays ? n.B : 0;
  const Index zero_count = std::max(units, chunk.da_row);
  layout.take(zeros, {zero_count});
  for (std::size_t k = 0; k < memory_of.size(); ++k) {
    const cpu::HostPart& p = parts.parts[k];
    layout.take(memory_of[k],
                {p.operand || call.dx ? blocks_of(columns(p.operand)) : 0, block_step<T>(units, p.part.count)});
  }
  prepare(base, layout, call, kernels, shape, chunk, parts.groups, split.threads, need_weights, dweight_hr);
  layout.take(carried, {std::max(plan.carried_back, replays ? plan.carried : 0), n.B, units});
  if (replays) layout.take(saved, {replay_steps, n.B, plan.saved, n.H});
  if (replays) layout.take(norms, {replay_steps, n.B, plan.norms, cpu::kNormNumbers});
  for (std::size_t s = 1; replays && s < S; ++s) layout.take(state[s], {replay_steps, n.B, n.H});
  for (std::size_t o = 1; o < O; ++o)
    if (plan.state_of[o] < 0) layout.take(computed[o], {replay_rows, units});
  layout.take(y_again, {replay_rows, n.P});
  layout.take(projection, {plan.projects ? blocks : 0, projection_step});
  layout.take(again.unprojected, {plan.projects ? replay_rows : 0, units});
  layout.take(masks, {regularization_memory(call.problem, split.threads, mask_arrays(plan)), n.B, units});
  const Index sum_count = Index(plan.vectors.size());
  if (need_sums) layout.take(job.sums, {n.B, sum_count, units});
  if (plan.norm_gradients) layout.take(job.norm_gradients, {n.B, plan.norm_gradients, cpu::kNormGradientNumbers});
  if (need_scalars) layout.take(job.of_units, {chunk.steps, n.B, plan.scalars, units});
  for (std::size_t s = 0; s < S; ++s)
    if (plan.direct[s]) layout.take(direct[s], {n.B, units});
  numbers.take(layout, plan, n.H);
  scratch.take(layout, split.threads);
  const Buffer memory = layout.allocate();
  std::fill(zeros, zeros + zero_count, T(0));
  std::fill(job.sums, job.sums + (need_sums ? n.B * sum_count * units : 0), T(0));
  std::fill(job.of_units, job.of_units + (need_scalars ? chunk.steps * n.B * plan.scalars * units : 0), T(0));
  for (T* const d : call.dscalars)
    if (d) std::fill(d, d + n.T * n.B, T(0));  // padding
  numbers.fill(plan, n.H, call.weights);
  std::vector<cpu::MachinePart<T>> packed;
  std::vector<cpu::PackJob<T>> jobs;
  for (std::size_t k = 0; k < memory_of.size(); ++k) {
    const cpu::HostPart& p = parts.parts[k];
    const Index K = columns(p.operand), step = block_step<T>(units, p.part.count);
    packed.push_back({p.operand, p.part.first, p.part.count, memory_of[k], step});
    jobs.push_back({call.weights[p.operand ? 1 : 0], n.H, K, p.part, memory_of[k], step, 0,
                    p.operand || call.dx ? blocks_of(K) : 0});
  }
  if (plan.projects)
    jobs.push_back({call.weights[std::size_t(plan.weight_hr())], n.P, n.H, cpu::kProjection, projection,
                    projection_step, 0, blocks});
  pack_all(kernels.pack_transposed, jobs.data(), jobs.size(), call.poll);
  std::vector<cpu::Gradient<T>> gradients;
  for (const MachinePlan::Product& p : plan.products) {
    const Index K = columns(p.operand), column = parts.column_of[std::size_t(p.operand)];
    if (T* out = call.dweights[p.operand ? MachinePlan::weight_hh : MachinePlan::weight_ih])
      gradients.push_back({out + p.weight * n.H * K, p.accumulator, parts.groups.of(column, p.accumulator), column, K});
    if (T* out = p.bias < 0 ? nullptr : call.dweights[p.operand ? MachinePlan::bias_hh : MachinePlan::bias_ih])
      gradients.push_back({out + p.bias * n.H, p.accumulator, parts.groups.of(0, p.accumulator), 0, 1});
  }
  std::vector<T*> dvectors;
  for (const MachinePlan::Vector& v : plan.vectors) {
    T* const out = call.dweights[std::size_t(v.parameter)];
    dvectors.push_back(out ? out + v.block * n.H : nullptr);
  }

  base.zeros = zeros, base.projection = {projection, projection_step};
  base.gradients = gradients.data(), base.gradient_count = int(gradients.size());
  const std::vector<cpu::MachineRound> rounds = rounds_of(plan.backward);
  state[0] = const_cast<T*>(call.y);
  job.call = machine_call(plan, call.problem, call.x, numbers, scratch);
  job.call.regularization = regularization_of(call.problem, kernels, masks, mask_arrays(plan));
  job.call.scalars = call.scalars.data();
  job.call.state0 = call.state0.data(), job.call.state = state.data();
  job.call.saved = plan.saved ? saved : nullptr;
  job.call.norms = plan.norms ? norms : nullptr;
  job.call.carried = carried, job.call.carried_count = plan.carried_back;
  std::vector<cpu::MachineRound> again_rounds;
  if (replays) {
    again_rounds = forward_rounds(plan, again_packed->machine->parts);
    again.call = job.call;
    again.call.rounds = again_rounds.data(), again.call.round_count = int(again_rounds.size());
    again.call.carried_count = plan.carried, again.call.y_again = y_again;
    set_weights(again, *again_packed);
    again.computed = computed.data();
    job.replay = &again, job.boundary_states = call.tape->boundary_states;
  }
  job.call.rounds = rounds.data(), job.call.round_count = int(rounds.size());
  job.base = &base, job.shape = &shape;
  job.parts = packed.data(), job.part_begin = parts.begin.data(), job.operand_of = plan.operand_of.data();
  job.column_of = parts.column_of.data();
  job.dy = call.dy, job.dstateT = call.dstateT.data(), job.dstates = call.dstates.data();
  job.dstate0 = call.dstate0.data(), job.direct = direct.data();
  job.dvectors = dvectors.data();
  job.norm_gradient_count = plan.norm_gradients;
  job.dscalars = call.dscalars.data();
  run_job<T>(kernels.machine_backward, job, split.threads, split.by_rows, call.poll);
}

}  // namespace fusedrnn
