// One call: sizes checked, memory taken, the split chosen, the kernels run. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <numeric>
#include <type_traits>
#include <vector>

#include "api.h"
#include "cpu/control_word.h"
#include "cpu/dispatch.h"
#include "cpu/groups.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/packed_weights.h"
#include "cpu/threads.h"

namespace fusedrnn {

template <class T>
struct Tape {
  Save save;
  Buffer memory;
  std::vector<Index> starts;  // with lengths: cpu::Kept; only of compiled cells
  T *saved, *c;               // every step's; null with boundary states
  T* boundary_states;         // with them: the states but y before each chunk but the first
  // Of programs: of each norm its numbers, and of each state every step's, y as that of the first.
  T* norms;
  std::vector<T*> state;
};

namespace {

std::atomic<bool> thresholds{true};
std::atomic<bool> flush_subnormals{true};

// Runs kernel(job, worker) on the pool with the kernels' own floating-point control word on every thread. The hook runs
// the caller's code, so it gets the caller's.
template <class T, class Job>
void run_job(bool (*kernel)(const Job&, const cpu::Worker&), const Job& job, int threads, bool by_rows, Poll poll) {
  struct Context {
    bool (*kernel)(const Job&, const cpu::Worker&);
    const Job* job;
    bool by_rows, flush;
    Poll poll;
    cpu::ControlWord::Word callers;
  } context = {kernel, &job, by_rows, flush_subnormals, poll, cpu::ControlWord::current()};
  const auto body = [](void* data, cpu::Region& region) {
    const Context& c = *static_cast<const Context*>(data);
    const cpu::ControlWord word(c.flush);
    if (!c.kernel(*c.job, cpu::Worker{region, c.by_rows})) region.abort();
  };
  const auto hook = [](void* data) {
    const Context& c = *static_cast<const Context*>(data);
    const cpu::ControlWord word(c.callers);
    return c.poll.hook(c.poll.context);
  };
  if (cpu::run(threads, body, &context, poll.hook ? +hook : nullptr, &context) == cpu::Outcome::interrupted)
    throw Interrupted{};
}

// Rows of every step in a tape of everything; where each row of the batch begins, with lengths.
Index tape_rows(const Problem& problem, std::vector<Index>& starts) {
  const Sizes& n = problem.sizes;
  if (!problem.lengths) return n.T * n.B;
  starts.resize(std::size_t(n.B) + 1);
  for (Index b = 0; b < n.B; ++b) starts[b + 1] = starts[b] + problem.lengths[b];
  return starts[n.B];
}

// Those that multiply bfloat16, or the others.
template <class T>
const cpu::Kernels<T>& kernels_for(bool bfloat16) {
  if constexpr (std::is_same_v<T, float>)
    if (bfloat16) return *cpu::bfloat16_kernels();
  return cpu::kernels<T>();
}

constexpr Index kSharedCache = 16 << 20;  // bytes that backward would still find there: docs/speed.md

template <class T>
std::size_t weight_bytes(const CellShape& shape, const Sizes& n) {
  return (std::size_t(shape.gates) * n.H * (n.I + n.P) + shape.projects * n.H * n.P) * sizeof(T);
}

// Rows where the weights stay in each core's cache anyway or there are many rows; else units, each core keeping its own
// part of the weights. Below a measured amount of work per step, one thread.
template <class T>
Split split_for(const CellShape& shape, const Sizes& n, int threads) {
  const cpu::ControlWord word(false);  // or the caller's would show our inexact quotients
  const double gates = shape.gates * double(n.I + n.P), projection = shape.projects * double(n.P);
  const double step = double(n.B) * double(n.H) * (gates + projection);
  const auto limit = [&](double work, double minimum, Index items) {
    return int(std::max<double>(1, std::min<double>({double(threads), work / minimum, double(items)})));
  };
  const bool worth = thresholds.load(std::memory_order_relaxed);
  const int by_rows = limit(step * double(n.T), worth ? SplitRule::call : 1, n.B);
  const int by_units = limit(step, worth ? SplitRule::step : 1, blocks_of(n.H));
  if (shape.layer_norm) return {by_rows, true};  // a norm takes all units of a row
  const bool rows = by_rows >= threads
                        ? weight_bytes<T>(shape, n) <= SplitRule::core_cache || n.B >= SplitRule::rows * Index(threads)
                        : by_rows >= by_units;
  return rows ? Split{by_rows, true} : Split{by_units, false};
}

template <class T>
bool rows_outside(const CellShape& shape, const Sizes& n) {
  return std::size_t(shape.gates) * n.H * n.P * sizeof(T) <= SplitRule::core_cache;
}

// Weights that stay in a core's cache need no prefetch.
template <class T>
bool prefetches(const CellShape& shape, const Sizes& n) {
  return cpu::prefetch_weights() && (!thresholds || !rows_outside<T>(shape, n));
}

// A chunk's da and joint rows [1 | x | h_prev | ...] stay in the cache between the steps and the products made of them;
// for large weights, whose gradients leave the cache, it has enough rows to be worth adding up. By the sizes alone.
template <class T>
struct Chunk {
  Index da_row, inputs_row, steps, count, panel_step;
  bool ordered;                                                     // the weight gradients read copies
  Chunk(const CellShape& shape, const Sizes& n, int numbers = 1) {  // Kernels::numbers
    const Index part = kBlock / numbers;
    // dh and what was projected, and dh as it is multiplied.
    const Index more =
        shape.projects ? (blocks_of(n.P) + blocks_of(n.H)) * kBlock + (numbers > 1 ? blocks_of(n.P) * part : 0) : 0;
    // Norms need da in T before it is what products multiply.
    da_row = shape.accumulators * blocks_of(n.H) * (shape.layer_norm ? kBlock : part) + more + kBlock;
    inputs_row = lines<T>(1 + n.I + n.P * shape.phases) + kBlock;
    const Index row = (da_row + inputs_row / numbers) * Index(sizeof(T));
    const bool large = weight_bytes<T>(shape, n) > 4 * SplitRule::core_cache;
    const Index rows = large ? 640 : 384;
    const Index bytes = std::max<Index>(Index(768) << 10, rows * row);
    steps = std::max<Index>(1, bytes / (std::max<Index>(1, n.B) * row));
    if (n.T <= steps + steps / 2) steps = std::max<Index>(1, n.T);  // a short rest would cost as much as a chunk
    count = (n.T + steps - 1) / steps;
    panel_step = std::min((steps * n.B + numbers - 1) / numbers, cpu::kSumRows) * kTileVectors * kBlock;
    const cpu::OrderedCopies copies = cpu::ordered_copies();
    ordered = (copies == cpu::OrderedCopies::always ||
               (copies == cpu::OrderedCopies::large && numbers == 1 && (large || !thresholds))) &&
              steps * n.B <= cpu::kSumRows &&
              (!thresholds || steps * n.B * inputs_row * Index(sizeof(T)) > Index(512) << 10);
  }
  static constexpr Index kTileVectors = 4;  // the most that a tile of several rows multiplies
};

// How many steps' W x is made at once; 0: each step's with the step. One row would leave most of a tile empty, and few
// rows would read weights larger than the cache from afar in every step. Else it gains nothing: docs/speed.md.
template <class T>
Index ahead_steps(const CellShape& shape, const Sizes& n) {
  constexpr Index kRows = 96;  // enough to pay for reading the weights, and their sums stay in the cache
  const bool large = !thresholds || weight_bytes<T>(shape, n) > SplitRule::core_cache;
  if (shape.layer_norm || n.I < kBlock || n.B < 1 || n.B > (large ? kRows / 4 : 1)) return 0;
  const Index steps = std::min(n.T, kRows / n.B);
  return steps > 1 ? steps : 0;
}

// Of the joint rows [1 | x | h_prev | middle], at most four.
cpu::Groups groups_of(const CellShape& shape, const Sizes& n, cpu::Group* memory) {
  const Part all = {0, shape.accumulators, {}};
  cpu::Groups groups{memory};
  if (!shape.layer_norm) groups.add(0, 1, &all, 1);
  groups.add(1, n.I, &shape.input, 1);
  groups.add(1 + n.I, n.P, &shape.recurrent, 1);
  if (shape.phases == 2) groups.add(1 + n.I + n.P, n.P, &shape.recurrent2, 1);
  groups.lay_out();
  return groups;
}

// Elements of n numbers that products multiply.
template <class T>
Index elements(const cpu::Kernels<T>& kernels, Index n) {
  return (n + kernels.numbers - 1) / kernels.numbers;
}

// Of a row of the batch, for the x and h that a step, or the steps ahead, multiply: where they have to be made.
template <class T>
Index operands_of_row(const cpu::Kernels<T>& kernels, const Sizes& n, Index ahead) {
  const Index blocks = std::max<Index>(ahead, 1) * blocks_of(n.I) + blocks_of(n.P);
  return kernels.numbers == 1 ? 0 : blocks * (kBlock / kernels.numbers);
}

template <class T>
const cpu::CellKernels<T>& cell_of(const cpu::Kernels<T>& kernels, const Problem& problem) {
  return (problem.regularization.acts() ? kernels.regularized : kernels.cells)[int(problem.cell.id)];
}

// A mask that is 0 with this rate, else `kept`. A word is 32 bits: the rate is rounded to that.
MaskRule drawn(double rate, double kept) {
  const double threshold = std::nearbyint(std::ldexp(rate, 32));
  if (threshold >= 0x1p32) return {true, false, 0, 0};
  return {true, true, std::uint32_t(threshold), kept};
}

MaskRule zoneout(double rate, bool training) {
  if (rate == 0) return {};
  return training ? drawn(rate, 1) : MaskRule{true, false, 0, 1 - rate};
}

// For the kernels, in memory of regularization_memory's size; the mask of dropout is drawn, once for all steps.
template <class T>
cpu::Regularization<T> regularization_of(const Problem& problem, const cpu::Kernels<T>& kernels, T* memory,
                                         int arrays = 3) {
  const Regularization& r = problem.regularization;
  if (!r.acts()) return {};
  const cpu::ControlWord word(flush_subnormals.load());
  const Index B = problem.sizes.B, blocks = blocks_of(problem.sizes.H), row = blocks * kBlock;
  if (r.drops()) {
    const MaskRule rule = drawn(r.recurrent_dropout, 1 / (1 - r.recurrent_dropout));
    kernels.draw_mask(rule, r.seed, r.stream, MaskKind::dropout, 0, nullptr, B, 0, blocks, row, memory);
  }
  return {r.seed,
          r.stream,
          zoneout(r.zoneout_h, r.training),
          zoneout(r.zoneout_c, r.training),
          r.drops() ? memory : nullptr,
          memory + B * row,
          arrays};
}

// Rows of units: the mask of dropout, and so many arrays per thread.
Index regularization_memory(const Problem& problem, int threads, int arrays = 3) {
  return problem.regularization.acts() ? 1 + arrays * Index(threads) : 0;
}

// Where no array shows that there is memory for them: a product larger than any that is made of sizes.
void check_sizes(const Sizes& n) {
  const auto size = [](Index k) { return std::size_t(k) + 16; };
  cpu::checked_product({size(n.T), size(n.B), size(n.H), size(n.I) + size(n.H), 64});
}

// Without rows there is nothing to walk through, however many steps.
Steps steps_of(const Problem& p) {
  return {p.sizes.B ? p.sizes.T : 0, p.sizes.B, p.lengths, p.reset, p.reverse, p.detach_every};
}

// What does not depend on the kind of cell: sizes, and memory, which is there once the layout is allocated.
template <class T>
void prepare(cpu::BackwardJob<T>& job, Layout& layout, const BackwardCall<T>& call, const cpu::Kernels<T>& kernels,
             const CellShape& shape, const Chunk<T>& chunk, const cpu::Groups& groups, int threads, bool need_weights,
             T* dweight_hr) {
  const Sizes& n = call.problem.sizes;
  const bool ordered = need_weights && chunk.ordered, copied = ordered || (need_weights && kernels.numbers > 1);
  const Index rows = elements(kernels, chunk.steps * n.B);
  job.steps = steps_of(call.problem);
  job.I = n.I, job.H = n.H, job.P = n.P, job.blocks = blocks_of(n.H);
  job.dx = call.dx, job.dweight_hr = dweight_hr, job.need_weights = need_weights;
  job.groups = groups.all, job.group_count = groups.count, job.dpacked_block = groups.block_step;
  job.da_row = chunk.da_row, job.inputs_row = chunk.inputs_row, job.panel_step = chunk.panel_step;
  job.chunk_steps = chunk.steps;
  job.rows_outside = rows_outside<T>(shape, n), job.prefetch = prefetches<T>(shape, n);
  job.scratch_step = lines<char>(kernels.backward_scratch(n.B, chunk.steps)) + 64;
  layout.take(job.dpacked, {need_weights ? job.blocks : 0, groups.block_step});
  if (dweight_hr) layout.take(job.dprojection, {blocks_of(n.P), n.H, kBlock});
  layout.take(job.da, {chunk.steps, n.B, chunk.da_row});
  layout.take(job.boundary, {n.B, chunk.da_row});
  layout.take(job.inputs, {need_weights ? rows : 0, chunk.inputs_row});
  if (ordered) layout.take(job.by_tile, {rows, groups.columns});
  layout.take(job.panel, {copied ? threads : 0, chunk.panel_step});
  layout.take(job.scratch, {threads, job.scratch_step});
}

}  // namespace

}  // namespace fusedrnn

#include "cpu/machine/run.h"  // cells that are programs: with what is above, for what is below

namespace fusedrnn {

template <class Made>
void Deleter::operator()(Made* p) const {
  delete p;
}

template <class T>
PackedPtr<T> pack(const Cell& cell, Index I, Index H, Index P, const Weights<const T>& all, Poll poll, bool bfloat16) {
  if (cell.plan) return pack_machine<T>(*cell.plan, I, H, P, all, poll);
  const cpu::Kernels<T>& kernels = kernels_for<T>(bfloat16);
  const CellShape& shape = kernels.cells[int(cell.id)].shape;
  const NamedWeights<const T> weights(shape, all);
  const Index blocks = blocks_of(H);
  PackedPtr<T> packed(new PackedWeights<T>);
  Layout layout;
  T *input, *recurrent, *recurrent2, *projection, *bias;
  const auto k = [&](Index n) { return elements(kernels, n); };
  const Index input_step = block_step<T>(k(I), shape.input.count),
              recurrent_step = block_step<T>(k(P), shape.recurrent.count),
              recurrent2_step = block_step<T>(k(P), shape.recurrent2.count), projection_step = block_step<T>(k(H), 1);
  PackedNorm<T> norm;
  const bool narrow = packed->narrow = has_narrow(shape, H);
  layout.take(input, {blocks + narrow, input_step});
  layout.take(recurrent, {blocks + narrow, recurrent_step});
  layout.take(recurrent2, {shape.recurrent2.count ? blocks : 0, recurrent2_step});
  layout.take(projection, {shape.projects ? blocks_of(P) : 0, projection_step});
  layout.take(bias, {blocks, shape.accumulators, kBlock});
  norm.take(layout, shape, blocks);
  packed->memory = layout.allocate();
  packed->input = {input, input_step}, packed->recurrent = {recurrent, recurrent_step},
  packed->recurrent2 = {recurrent2, recurrent2_step}, packed->projection = {projection, projection_step};
  packed->bias = bias;

  const cpu::PackJob<T> parts[] = {
      {weights.weight_ih, H, I, shape.input, input, input_step, 0, blocks, narrow},
      {weights.weight_hh, H, P, shape.recurrent, recurrent, recurrent_step, 0, blocks, narrow},
      {weights.weight_hh, H, P, shape.recurrent2, recurrent2, recurrent2_step, 0, shape.recurrent2.count ? blocks : 0},
      {weights.weight_hr, P, H, cpu::kProjection, projection, projection_step, 0, shape.projects ? blocks_of(P) : 0}};
  pack_all(kernels.pack, parts, std::size(parts), poll);

  const cpu::ControlWord word(flush_subnormals.load());
  pack_vectors(shape, H, weights.bias_ih, weights.bias_hh, bias);
  packed->norm = norm.fill(shape, H, weights, bias);
  return packed;
}

template <class T>
TapePtr<T> forward(const ForwardCall<T>& call) {
  if (call.problem.cell.plan) return machine_forward(call);
  const Problem& problem = call.problem;
  const Sizes& n = problem.sizes;
  const cpu::Kernels<T>& kernels = kernels_for<T>(problem.bfloat16);
  const cpu::CellKernels<T>& cell = cell_of(kernels, problem);
  const CellShape& shape = cell.shape;
  const Index blocks = blocks_of(n.H), units = blocks * kBlock;
  Split split = split_for<T>(shape, n, cpu::num_threads());

  // One step reads each weight once: packed panel by panel they need not leave the cache in between.
  const bool by_panel = !call.packed && n.T == 1 && !shape.layer_norm;
  if (by_panel && split.by_rows) split = {int(std::min<Index>(split.threads, blocks)), false};  // each panel once
  const PackedPtr<T> own = pack_own<T>(call, !by_panel);
  const PackedWeights<T>* packed = own ? own.get() : call.packed;

  const Chunk<T> chunk(shape, n, kernels.numbers);

  // What backward will need lives in the tape, else one step of it in the scratch.
  Layout tape_layout, scratch;
  TapePtr<T> tape(call.save == Save::nothing ? nullptr : new Tape<T>{});
  const bool all = call.save == Save::all;
  const bool outside = call.saved;  // the tape lies in the caller's memory
  const Index rows = all ? tape_rows(problem, tape->starts) : n.B,
              boundary_count = call.save == Save::boundary_states && shape.has_c && chunk.count ? chunk.count - 1 : 0;
  T *saved, *c, *boundary_states = nullptr, *zeros, *masks, *bias;
  const Index ahead = ahead_steps<T>(shape, n);
  cpu::ForwardJob<T> job{};
  job.ahead_steps = ahead;
  job.panel_step = lines<T>(cpu::kPanelVectors * kBlock * std::max(n.I + n.P, n.H));
  job.operands_row = operands_of_row(kernels, n, ahead);
  job.scratch_step = lines<char>(kernels.forward_scratch(n.B, ahead)) + 64;
  const bool two_products = shape.phases == 2 || shape.projects;
  const bool keeps = all || shape.phases == 2 || shape.layer_norm;  // read again in the same step
  Layout& kept_in = all ? tape_layout : scratch;
  kept_in.take(saved, {!(all && outside) && keeps ? rows : 0, shape.saved, n.H});
  kept_in.take(c, {!(all && outside) && shape.has_c ? rows : 0, n.H});
  tape_layout.take(boundary_states, {outside ? 0 : boundary_count, n.B, n.H});
  if (two_products) scratch.take(job.middle, {n.B, units});
  if (ahead) scratch.take(job.ahead, {ahead, n.B, blocks, shape.input.count, kBlock});
  scratch.take(zeros, {units});
  scratch.take(masks, {regularization_memory(problem, split.threads), n.B, units});
  if (by_panel) scratch.take(job.panel, {split.threads, job.panel_step});
  scratch.take(bias, {by_panel ? blocks : 0, shape.accumulators, kBlock});
  scratch.take(job.operands, {split.by_rows ? 1 : split.threads, n.B, job.operands_row});
  scratch.take(job.scratch, {split.threads, job.scratch_step});
  if (tape && !outside) tape->memory = tape_layout.allocate();
  const Buffer memory = scratch.allocate();
  if (outside && all) saved = call.saved, c = saved + rows * shape.saved * n.H;
  if (outside && !all) boundary_states = call.saved;
  if (tape) tape->save = call.save, tape->boundary_states = boundary_states;
  if (tape && all) tape->saved = saved, tape->c = c;
  std::fill(zeros, zeros + units, T(0));

  job.steps = steps_of(problem);
  job.I = n.I, job.H = n.H, job.P = n.P, job.blocks = blocks;
  job.x = call.x;
  if (packed) set_weights(job, *packed);
  if (by_panel) {
    const cpu::ControlWord word(flush_subnormals.load());
    const NamedWeights<const T> weights(shape, call.weights);
    pack_vectors(shape, n.H, weights.bias_ih, weights.bias_hh, bias);
    job.weight_ih = weights.weight_ih, job.weight_hh = weights.weight_hh;
    job.weight_hr = weights.weight_hr, job.bias = bias;
  }
  job.h0 = call.state0[0], job.c0 = call.state0[1], job.zeros = zeros;
  job.y = call.y, job.h_out = call.y, job.h_out_step = n.B * n.P;
  job.kept = {0,
              n.T,
              all ? n.B : 0,
              all && problem.lengths ? tape->starts.data() : nullptr,
              shape.saved && keeps ? saved : nullptr,
              c,
              nullptr};
  // Written through a cache that cannot hold it, a line would be read first. Phase 2 and norms read it again at once.
  const Index row_bytes = shape.saved * n.H * Index(sizeof(T));
  job.stream = all && shape.phases == 1 && !shape.layer_norm && row_bytes % 64 == 0 &&
               reinterpret_cast<std::uintptr_t>(saved) % 64 == 0 && (!thresholds || rows * row_bytes > kSharedCache);
  job.boundary_states = boundary_count ? boundary_states : nullptr, job.chunk_steps = chunk.steps;
  job.hT = call.stateT[0], job.cT = call.stateT[1], job.h_states = call.states[0], job.c_states = call.states[1];
  job.rows_outside = !by_panel && rows_outside<T>(shape, n);
  job.prefetch = !by_panel && prefetches<T>(shape, n);
  job.regularization = regularization_of(problem, kernels, masks);
  run_job<T>(cell.forward, job, split.threads, split.by_rows, call.poll);
  return tape;
}

template <class T>
TapePtr<T> tape_over(const Problem& problem, Save save, const T* saved) {
  TapePtr<T> tape(new Tape<T>{});
  tape->save = save;
  T* const memory = const_cast<T*>(saved);  // backward only reads
  const cpu::MachinePlan* const plan = problem.cell.plan;
  if (save == Save::boundary_states) {
    tape->boundary_states = memory;
    if (plan) tape->state.resize(std::size_t(plan->states));
  } else if (plan) {
    lay_out(*tape, *plan, problem.sizes, memory);
  } else {
    const CellShape& shape = cell_of(cpu::kernels<T>(), problem).shape;
    tape->saved = memory;
    tape->c = memory + tape_rows(problem, tape->starts) * shape.saved * problem.sizes.H;
  }
  return tape;
}

template <class T>
void backward(const BackwardCall<T>& call) {
  if (call.problem.cell.plan) return machine_backward(call);
  const Problem& problem = call.problem;
  const Sizes& n = problem.sizes;
  const cpu::Kernels<T>& kernels = kernels_for<T>(problem.bfloat16);
  const cpu::CellKernels<T>& cell = cell_of(kernels, problem);
  const CellShape& shape = cell.shape;
  const Index blocks = blocks_of(n.H), units = blocks * kBlock;
  const Split split = split_for<T>(shape, n, cpu::num_threads());
  const NamedWeights<const T> weights(shape, call.weights);
  const NamedWeights<T> dw(shape, call.dweights);
  const bool need_biases = dw.bias_ih || dw.bias_hh, need_matrices = dw.weight_ih || dw.weight_hh;
  const bool need_norms = shape.layer_norm && (need_biases || dw.gain_ih || dw.gain_hh || dw.gain_c || dw.bias_c);
  const bool need_weights = need_matrices || (need_biases && !shape.layer_norm);

  const Chunk<T> chunk(shape, n, kernels.numbers);
  const bool replay = call.tape->save == Save::boundary_states && shape.saved;  // an Elman cell saves nothing but y
  const PackedPtr<T> own = pack_own<T>(call, replay);
  const PackedWeights<T>* packed = own ? own.get() : call.packed;
  const bool two_products = shape.phases == 2 || shape.projects;
  cpu::Group group[4];
  const cpu::Groups groups = groups_of(shape, n, group);
  Layout layout;
  T *zeros, *input, *recurrent, *recurrent2, *saved, *c, *bias, *masks, *projection;
  PackedNorm<T> norm;
  const int k_input = shape.input.count, k_recurrent = shape.recurrent.count, k_recurrent2 = shape.recurrent2.count;
  const Index k_units = elements(kernels, units);
  const Index input_step = block_step<T>(k_units, k_input), recurrent_step = block_step<T>(k_units, k_recurrent),
              recurrent2_step = block_step<T>(k_units, k_recurrent2),
              projection_step = block_step<T>(elements(kernels, n.P), 1);
  const Index zero_count = std::max(units, chunk.da_row);
  const Index replay_steps = replay ? chunk.steps : 0, replay_rows = replay ? n.B : 0;
  cpu::BackwardJob<T> job{};
  cpu::ForwardJob<T> again{};
  again.operands_row = operands_of_row(kernels, n, 0);
  again.scratch_step = lines<char>(kernels.forward_scratch(n.B, 0)) + 64;
  layout.take(zeros, {zero_count});
  layout.take(input, {call.dx ? blocks_of(n.I) : 0, input_step});
  layout.take(recurrent, {blocks_of(n.P), recurrent_step});
  layout.take(recurrent2, {k_recurrent2 ? blocks_of(n.P) : 0, recurrent2_step});
  layout.take(projection, {shape.projects ? blocks : 0, projection_step});
  prepare(job, layout, call, kernels, shape, chunk, groups, split.threads, need_weights, dw.weight_hr);
  layout.take(again.operands, {split.by_rows ? 1 : split.threads, replay_rows, again.operands_row});
  layout.take(saved, {replay_steps, n.B, shape.saved, n.H});
  layout.take(c, {shape.has_c ? replay_steps : 0, n.B, n.H});
  if (two_products) layout.take(again.middle, {replay_rows, units});
  layout.take(again.h_out, {replay_rows, n.P});
  layout.take(again.scratch, {replay ? split.threads : 0, again.scratch_step});
  layout.take(job.dc, {shape.has_c ? n.B : 0, units});
  layout.take(job.direct, {shape.has_direct ? n.B : 0, units});
  layout.take(masks, {regularization_memory(problem, split.threads), n.B, units});
  layout.take(bias, {shape.layer_norm ? blocks : 0, shape.accumulators, kBlock});
  norm.take(layout, shape, blocks);
  if (need_norms) layout.take(job.norm_sums, {n.B, units, 2 * shape.accumulators + 2 * shape.has_c});
  const Buffer memory = layout.allocate();
  std::fill(zeros, zeros + zero_count, T(0));

  const Index P_blocks = blocks_of(n.P);
  const cpu::PackJob<T> parts[] = {
      {weights.weight_ih, n.H, n.I, shape.input, input, input_step, 0, call.dx ? blocks_of(n.I) : 0},
      {weights.weight_hh, n.H, n.P, shape.recurrent, recurrent, recurrent_step, 0, P_blocks},
      {weights.weight_hh, n.H, n.P, shape.recurrent2, recurrent2, recurrent2_step, 0, k_recurrent2 ? P_blocks : 0},
      {weights.weight_hr, n.P, n.H, cpu::kProjection, projection, projection_step, 0, shape.projects ? blocks : 0}};
  pack_all(kernels.pack_transposed, parts, std::size(parts), call.poll);

  job.x = call.x;
  job.input = {input, input_step}, job.recurrent = {recurrent, recurrent_step},
  job.recurrent2 = {recurrent2, recurrent2_step}, job.projection = {projection, projection_step};
  job.zeros = zeros, job.h0 = call.state0[0], job.c0 = call.state0[1];
  job.y = call.y;
  job.kept = {0,
              n.T,
              n.B,
              replay || call.tape->starts.empty() ? nullptr : call.tape->starts.data(),
              shape.saved ? replay ? saved : call.tape->saved : nullptr,
              shape.has_c ? replay ? c : call.tape->c : nullptr,
              nullptr};
  job.regularization = regularization_of(problem, kernels, masks);
  if (replay) {
    again.steps = job.steps;
    again.I = n.I, again.H = n.H, again.P = n.P, again.blocks = blocks;
    again.x = job.x;
    set_weights(again, *packed);
    again.h0 = job.h0, again.c0 = job.c0, again.zeros = zeros;
    again.y = job.y;
    again.rows_outside = job.rows_outside;
    again.regularization = job.regularization;
    job.replay = &again, job.boundary_states = call.tape->boundary_states;
  }
  job.dy = call.dy, job.dhT = call.dstateT[0], job.dcT = call.dstateT[1];
  job.dh_states = call.dstates[0], job.dc_states = call.dstates[1];
  job.dh0 = call.dstate0[0], job.dc0 = call.dstate0[1];
  job.narrow = has_narrow(shape, n.H);
  cpu::Gradient<T> gradients[16];  // of at most four gates: both matrices and both biases
  job.gradients = gradients;
  const auto add = [&](T* out, Index column, Index columns, const Part& part) {
    if (!out || !part.count) return;
    const int in = groups.of(column, part.first);
    for (int s = 0; s < part.count; ++s)
      gradients[job.gradient_count++] = {out + part.gate[s] * n.H * columns, part.first + s, in, column, columns};
  };
  add(dw.weight_ih, 1, n.I, shape.input);
  add(dw.weight_hh, 1 + n.I, n.P, shape.recurrent);
  add(dw.weight_hh, 1 + n.I + n.P, n.P, shape.recurrent2);
  if (!shape.layer_norm) {
    add(dw.bias_ih, 0, 1, shape.input);
    add(dw.bias_hh, 0, 1, shape.recurrent);
    add(dw.bias_hh, 0, 1, shape.recurrent2);
  }
  if (shape.layer_norm) {
    const cpu::ControlWord word(flush_subnormals.load());
    pack_vectors(shape, n.H, weights.bias_ih, weights.bias_hh, bias);
    job.norm = norm.fill(shape, n.H, weights, bias);
    job.dgain_ih = dw.gain_ih, job.dgain_hh = dw.gain_hh, job.dgain_c = dw.gain_c;
    job.dbias_ih = dw.bias_ih, job.dbias_hh = dw.bias_hh, job.dbias_c = dw.bias_c;
  }
  run_job<T>(cell.backward, job, split.threads, split.by_rows, call.poll);
}

template <class T>
Split split_of(CellId cell, const Sizes& sizes, int threads) {
  check_sizes(sizes);
  return split_for<T>(cpu::kernels<T>().cells[int(cell)].shape, sizes, threads);
}

template <class T>
Index chunks_of(CellId cell, const Sizes& sizes) {
  check_sizes(sizes);
  return Chunk<T>(cpu::kernels<T>().cells[int(cell)].shape, sizes).count;
}

template <class T>
TapeShape tape_shape(const Problem& problem, Save save) {
  const Sizes& n = problem.sizes;
  check_sizes(n);
  const cpu::Kernels<T>& kernels = kernels_for<T>(problem.bfloat16);
  const cpu::MachinePlan* const plan = problem.cell.plan;
  const CellShape shape = plan ? shape_of(*plan) : cell_of(kernels, problem).shape;
  if (save == Save::boundary_states) {
    const Index count = Chunk<T>(shape, n, kernels.numbers).count, states = plan ? plan->states - 1 : shape.has_c;
    return {count ? (count - 1) * states * n.B : 0, n.H};
  }
  if (plan) return {n.T * n.B, plan->tape_width(n.H)};
  return {problem.lengths ? std::accumulate(problem.lengths, problem.lengths + n.B, Index(0)) : n.T * n.B,
          (shape.saved + shape.has_c) * n.H};
}

template <class T>
Index tape_bytes(const Tape<T>& tape) {
  return Index(tape.memory.size() + tape.starts.size() * sizeof(Index));
}

bool has_bfloat16() { return cpu::bfloat16_kernels() != nullptr; }

void set_thresholds(bool on) { thresholds = on; }

void set_flush_subnormals(bool on) { flush_subnormals = on; }

#define FUSEDRNN_INSTANTIATE(T)                                                                      \
  template void Deleter::operator()(Tape<T>*) const;                                                 \
  template void Deleter::operator()(PackedWeights<T>*) const;                                        \
  template PackedPtr<T> pack(const Cell&, Index, Index, Index, const Weights<const T>&, Poll, bool); \
  template TapePtr<T> forward(const ForwardCall<T>&);                                                \
  template TapePtr<T> tape_over(const Problem&, Save, const T*);                                     \
  template TapeShape tape_shape<T>(const Problem&, Save);                                            \
  template void backward(const BackwardCall<T>&);                                                    \
  template Split split_of<T>(CellId, const Sizes&, int);                                             \
  template Index chunks_of<T>(CellId, const Sizes&);                                                 \
  template Index tape_bytes(const Tape<T>&);
FUSEDRNN_INSTANTIATE(float)
FUSEDRNN_INSTANTIATE(double)

}  // namespace fusedrnn
