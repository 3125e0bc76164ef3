// Runs every kernel of one cell on small problems where ThreadSanitizer watches each CUDA thread. Compiled with
// -fsanitize=thread, linked with emulation.cpp that is not. Values are not looked at: they say nothing about races, and
// no order of the threads depends on them. SPDX-License-Identifier: Apache-2.0
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "cuda/kernels.cu"

namespace {

struct Problem {
  Index T, B, H, units, rows;
  bool reverse, lengths, resets, state0;
  uint64_t seed;
};

// Memory of the device, each array on its own.
class Memory {
 public:
  template <class Number>
  Number* operator()(Index count, Number value) {
    arrays.emplace_back(new char[size_t(count + 1) * sizeof(Number)]);
    Number* p = reinterpret_cast<Number*>(arrays.back().get());
    for (Index i = 0; i < count; ++i) p[i] = value;
    return p;
  }

 private:
  std::vector<std::unique_ptr<char[]>> arrays;
};

Index tiles_of(Index n, Index size) { return (n + size - 1) / size; }

// Calls a kernel for every thread of a grid.
template <class... A>
void launch(const char* name, unsigned x, unsigned y, size_t bytes, uint64_t seed, void (*kernel)(A...),
            typename std::common_type<A>::type... arguments) {
  auto call = [&] { kernel(arguments...); };
  const std::string kind(name);
  const emulation::Launch launch{
      {x, y, 1}, unsigned(kThreads), bytes, kind.rfind("grid", 0) == 0, kind.rfind("cluster", 0) == 0, seed};
  const std::string error = emulation::launch(launch, [](void* p) { (*static_cast<decltype(call)*>(p))(); }, &call);
  if (!error.empty()) {
    fprintf(stderr, "%s: %s\n", name, error.c_str());
    exit(3);
  }
}

using Scalar = fusedrnn::cuda::Compute<S>;  // what is computed in
using Factor = Tile::Factor;
constexpr Index kChunk = 64;

// What a launch needs beside the job, and of its block.
struct Tiling {
  Weights in;
  Index rows, units, columns, K;
  bool cluster;

  Layout layout() const { return {rows, columns, Tile::columns, in}; }
  Index at_once() const { return in == Weights::registers && !cluster ? kRows : layout().rows(); }
  Index chunk() const { return cluster ? K : in == Weights::registers ? round_up(K, kWarp) : kChunk; }
  size_t bytes() const {
    const Shared<Scalar, Factor> shared(nullptr, layout(), columns, K, (cluster ? 2 : 1) * at_once(), chunk(),
                                        rows * units, in);
    return size_t(reinterpret_cast<char*>(shared.end) - static_cast<char*>(nullptr));
  }
};

fusedrnn::cuda::Regularization rules_of(uint64_t seed) {
  const fusedrnn::MaskRule rule{true, true, 1u << 31, 1};
  return {seed, 0, rule, rule, rule};
}

void run(const Problem& p) {
  constexpr Index A = Cell::accumulators, X = Cell::input.count, R = Cell::recurrent.count, K = Cell::saved;
  const Index T_ = p.T, B = p.B, H = p.H, n = B * H;
  Memory memory;
  uint64_t draws = p.seed * 2 + 1;
  const auto draw = [&] { return draws = draws * 6364136223846793005u + 1442695040888963407u, draws >> 33; };
  Index* lengths = p.lengths ? memory(B, T_) : nullptr;
  unsigned char* reset = p.resets ? memory(T_ * B, (unsigned char)(0)) : nullptr;
  if (lengths)
    for (Index b = 0; b + 1 < B; ++b) lengths[b] = Index(draw() % uint64_t(T_ + 1));
  if (reset)
    for (Index i = 0; i < T_ * B; ++i) reset[i] = draw() % 4 == 0;
  const fusedrnn::Steps steps{T_, B, lengths, reset, p.reverse, p.seed % 3 == 0 ? 2 : 0};
  const Scalar one = Scalar(0.5);  // and stored:
  const S half = S(one);

  ForwardJob<S> f{};
  f.steps = steps, f.H = H;
  f.projected = memory(T_ * B * X * H, one), f.bias = memory(A * H, one), f.weight = memory(R * H * H, half);
  f.h0 = p.state0 ? memory(n, half) : nullptr, f.c0 = p.state0 && Cell::has_c ? memory(n, half) : nullptr;
  f.y = memory(T_ * n, half), f.hT = memory(n, half), f.h_states = memory(T_ * n, half);
  if (Cell::has_c) f.cT = memory(n, half), f.c_states = memory(T_ * n, half), f.c = memory(T_ * n, one);
  if (Cell::has_c) f.state_c = memory(n, one);
  if (K) f.saved = memory(T_ * n * K, one), f.saved_step = n * K;
  f.operand = memory(n, half), f.products = memory(n * R, one);
  f.gain = f.bias, f.rules = rules_of(p.seed);
  if (Cell::has_c) f.gain_c = f.bias_c = memory(H, one);
  f.units = p.units, f.rows = p.rows;

  BackwardJob<S> b{};
  b.steps = steps, b.H = H;
  b.weight = f.weight, b.y = f.y, b.h0 = f.h0, b.c0 = f.c0, b.c = f.c, b.saved = f.saved;
  b.dy = memory(T_ * n, half), b.dhT = memory(n, half), b.dh_states = memory(T_ * n, half);
  if (Cell::has_c) b.dcT = memory(n, half), b.dc_states = memory(T_ * n, half), b.dc0 = memory(n, half);
  b.da = memory(T_ * n * A, half), b.dh0 = memory(n, half);
  b.chain = memory(n, one), b.direct = memory(n, one), b.dc = memory(n, one);
  b.gain = f.gain, b.bias = f.bias, b.gain_c = f.gain_c, b.bias_c = f.bias_c, b.rules = f.rules;
  b.row = memory(n * A, one), b.norm_sums = memory(n * kNormSums<Cell>, Scalar(0));
  b.units = p.units, b.rows = p.rows;

  uint64_t seed = p.seed * 100;
  const auto elementwise = [&](const char* name, auto kernel, auto... arguments) {
    launch(name, 2, 1, 64 * kWarps, ++seed, kernel, arguments...);
  };
  elementwise("begin_forward", begin_forward, f);
  for (Index s = 0; s < T_; ++s) {
    elementwise("step_forward", step_forward, f, s);
    if (Cell::phases == 2) elementwise("step_forward2", step_forward2, f, s);
  }
  elementwise("begin_backward", begin_backward, b);
  for (Index s = T_ - 1; s >= 0; --s) {
    elementwise("step_backward", step_backward, b, s);
    if (Cell::phases == 2) elementwise("step_backward2", step_backward2, b, s);
  }
  elementwise("finish_backward", finish_backward, b);
  elementwise("operands", operands, b, memory(T_ * n, half), Cell::phases == 2 ? memory(T_ * n, half) : nullptr);
  if (!kWhole<Cell>) return;

  const unsigned x = unsigned(tiles_of(H, p.units)), y = unsigned(tiles_of(B, p.rows));
  const auto whole = [&](const char* name, Weights in, auto kernel, auto job, Index columns, Index k) {
    const Tiling tiling{in, p.rows, p.units, columns, k, name[0] == 'c'};
    job.arrived = memory(y, 0u), job.at_once = tiling.at_once(), job.chunk = tiling.chunk();
    launch(name, x, y, tiling.bytes(), ++seed, kernel, job);
  };
  const auto both = [&](const char* name, Weights in, auto forward, auto backward) {
    whole(name, in, forward, f, p.units * R, H), whole(name, in, backward, b, p.units, R * H);
  };
  both("grid", Weights::shared, ::grid_forward, ::grid_backward);
  both("cluster", Weights::shared, ::cluster_forward, ::cluster_backward);
  if (p.rows * p.units > 2 * kThreads) return;
  both("grid_registers", Weights::registers, grid_forward_registers, grid_backward_registers);
  both("cluster_registers", Weights::registers, cluster_forward_registers, cluster_backward_registers);
}

}  // namespace

int main() {
  // Several tiles of rows in a block, several tiles of the batch, k of several splits, in the last one of several
  // chunks; units that do not divide H.
  constexpr Index R = Cell::recurrent.count;
  const Problem problems[] = {
      {3, 11, 5, 3, 9, false, false, false, true, 1},  {3, 11, 5, 3, 9, true, true, true, true, 2},
      {2, 3, 7, 4, 2, false, true, true, false, 3},    {4, 2, 9, 3, 2, true, false, true, true, 4},
      {3, 20, 5, 3, 19, false, false, false, true, 6}, {2, 9, kChunk / R + 1, 16 / R, 9, false, false, false, false, 5},
  };
  for (const Problem& problem : problems) run(problem);
  puts("ran");
}
