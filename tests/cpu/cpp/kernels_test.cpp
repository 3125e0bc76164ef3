// Every cell over a list of sizes and options: prints a digest of the bits of all results. Another machine, or an
// emulated one, has to print the same. SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "api.h"
#include "cpu/threads.h"

using namespace fusedrnn;

namespace {

struct Draw {  // the same numbers everywhere: multiples of 2^-16 in [-1, 1)
  std::uint64_t state = 1;
  double next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(std::int64_t(state >> 47)) / 65536 - 1;
  }
  template <class T>
  std::vector<T> array(Index n, double scale = 1) {
    std::vector<T> a(static_cast<std::size_t>(n));
    for (T& x : a) x = T(next() * scale);
    return a;
  }
};

struct Digest {  // FNV-1a
  std::uint64_t value = 1469598103934665603u;
  template <class T>
  void add(const std::vector<T>& a) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(a.data());
    for (std::size_t i = 0; i < a.size() * sizeof(T); ++i) value = (value ^ bytes[i]) * 1099511628211u;
  }
};

struct Options {
  bool ragged, reset, reverse, states;
  Index detach_every;
  Save save;
  bool regularized;
};

template <class T>
std::uint64_t run(CellId cell, Sizes n, const Options& o) {
  const bool norm = cell >= CellId::rnn_tanh_layer_norm;
  const bool c = cell == CellId::lstm || cell == CellId::lstm_layer_norm;
  const bool rnn = cell == CellId::rnn_tanh || cell == CellId::rnn_relu || cell == CellId::rnn_tanh_layer_norm ||
                   cell == CellId::rnn_relu_layer_norm;
  const Index G = c ? 4 : rnn ? 1 : 3;
  const double scale = 0.25;
  Draw draw;
  const Index rows = n.T * n.B;
  const auto x = draw.array<T>(rows * n.I), dy = draw.array<T>(rows * n.H), ds = draw.array<T>(rows * n.H);
  const auto w_ih = draw.array<T>(G * n.H * n.I, scale), w_hh = draw.array<T>(G * n.H * n.H, scale);
  const auto b_ih = draw.array<T>(G * n.H), b_hh = draw.array<T>(G * n.H);
  const auto g_ih = draw.array<T>(G * n.H), g_hh = draw.array<T>(G * n.H), g_c = draw.array<T>(n.H),
             b_c = draw.array<T>(n.H);
  const auto h0 = draw.array<T>(n.B * n.H), c0 = draw.array<T>(n.B * n.H), dhT = draw.array<T>(n.B * n.H);
  std::vector<Index> lengths(static_cast<std::size_t>(n.B));
  for (Index b = 0; b < n.B; ++b) lengths[std::size_t(b)] = (b * 5) % (n.T + 1);
  std::vector<unsigned char> reset(static_cast<std::size_t>(rows));
  for (unsigned char& r : reset) r = draw.next() > 0.5;
  std::vector<T> y(x.size() / std::size_t(n.I) * std::size_t(n.H)), hT(h0.size()), cT(h0.size()), hs(y.size()),
      cs(y.size()), dx(x.size()), dw_ih(w_ih.size()), dw_hh(w_hh.size()), db_ih(b_ih.size()), db_hh(b_hh.size()),
      dh0(h0.size()), dc0(h0.size()), dg_ih(g_ih.size()), dg_hh(g_hh.size()), dg_c(g_c.size()), db_c(b_c.size());

  Weights<const T> weights = {w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data()};
  Weights<T> dweights = {dw_ih.data(), dw_hh.data(), db_ih.data(), db_hh.data()};
  if (norm) weights.insert(weights.end(), {g_ih.data(), g_hh.data()});
  if (norm && c) weights.insert(weights.end(), {g_c.data(), b_c.data()});
  if (norm) dweights.insert(dweights.end(), {dg_ih.data(), dg_hh.data()});
  if (norm && c) dweights.insert(dweights.end(), {dg_c.data(), db_c.data()});
  const auto packed = pack<T>({cell}, n.I, n.H, n.P, weights);
  ForwardCall<T> f{};
  f.problem = {{cell},        n, o.ragged ? lengths.data() : nullptr, o.reset ? reset.data() : nullptr, o.reverse,
               o.detach_every};
  if (o.regularized) f.problem.regularization = {0.25, 0.25, c ? 0.5 : 0, true, (std::uint64_t(7) << 33) + 5, 3};
  if (n.T > 1)
    f.packed = packed.get();
  else
    f.weights = weights;  // a step of weights as they lie
  f.x = {x.data(), n.B * n.I, n.I};
  f.state0 = {h0.data(), c ? c0.data() : nullptr};
  f.y = y.data(), f.stateT = {hT.data(), c ? cT.data() : nullptr};
  if (o.states) f.states = {hs.data(), c ? cs.data() : nullptr};
  f.save = o.save;
  const auto tape = forward<T>(f);
  BackwardCall<T> b{};
  b.problem = f.problem, b.tape = tape.get(), b.weights = weights, b.packed = packed.get(), b.x = f.x, b.y = y.data();
  b.state0 = f.state0;
  b.dy = {dy.data(), n.B * n.H, n.H}, b.dstateT[0] = dhT.data();
  if (o.states) b.dstates[0] = {ds.data(), n.B * n.H, n.H};
  b.dx = dx.data(), b.dweights = dweights;
  b.dstate0 = {dh0.data(), c ? dc0.data() : nullptr};
  backward<T>(b);

  Digest digest;
  for (const auto* a :
       {&y, &hT, &cT, &hs, &cs, &dx, &dw_ih, &dw_hh, &db_ih, &db_hh, &dh0, &dc0, &dg_ih, &dg_hh, &dg_c, &db_c})
    digest.add(*a);
  return digest.value;
}

}  // namespace

int main() {
  set_thresholds(false);
  cpu::set_num_threads(2);
  const CellId cells[] = {CellId::rnn_tanh,
                          CellId::rnn_relu,
                          CellId::lstm,
                          CellId::gru_reset_after,
                          CellId::gru_reset_before,
                          CellId::rnn_tanh_layer_norm,
                          CellId::rnn_relu_layer_norm,
                          CellId::lstm_layer_norm,
                          CellId::gru_reset_after_layer_norm};
  const Sizes sizes[] = {{2, 3, 5, 7, 7},      {7, 7, 3, 17, 17},   {3, 13, 17, 31, 31}, {11, 2, 18, 33, 33},
                         {4, 1, 16, 100, 100}, {40, 30, 5, 20, 20}, {1, 1, 18, 33, 33},  {1, 5, 18, 33, 33}};
  const Options options[] = {{false, false, false, false, 0, Save::all, false},
                             {true, true, false, true, 0, Save::all, false},
                             {true, true, true, true, 3, Save::all, false},
                             {true, false, false, true, 2, Save::boundary_states, false},
                             {true, true, false, true, 2, Save::boundary_states, true}};
  for (CellId cell : cells)
    for (const Sizes& n : sizes)
      for (const Options& o : options) {
        const auto of = [](std::uint64_t digest) { return static_cast<unsigned long long>(digest); };
        std::printf("%d %lld,%lld,%lld,%lld %d%d%d%d%lld%d%d %016llx %016llx\n", int(cell), (long long)n.T,
                    (long long)n.B, (long long)n.I, (long long)n.H, o.ragged, o.reset, o.reverse, o.states,
                    (long long)o.detach_every, int(o.save), o.regularized, of(run<float>(cell, n, o)),
                    of(run<double>(cell, n, o)));
      }
}
