// Problems of every cell, and all results of one. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
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

// Of numbers as float, bfloat16 by cutting off the others' bits.
template <class T>
std::vector<std::uint16_t> high_halves(const std::vector<T>& numbers) {
  std::vector<std::uint16_t> halves;
  for (const T x : numbers) {
    const float number = float(x);
    std::uint32_t bits;
    std::memcpy(&bits, &number, 4);
    halves.push_back(std::uint16_t(bits >> 16));
  }
  return halves;
}

struct Options {
  bool ragged, reset, reverse, states;
  Index detach_every;
  Save save;
  bool regularized;
};

// All results of a forward and a backward pass: y and the final states, then all states, then the gradients.
template <class T>
std::vector<std::vector<T>> run(CellId cell, Sizes n, const Options& o, bool bfloat16 = false) {
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

  const auto low_ih = high_halves(w_ih), low_hh = high_halves(w_hh);
  const auto matrix = [&](const std::vector<T>& w, const std::vector<std::uint16_t>& low) {
    return bfloat16 ? reinterpret_cast<const T*>(low.data()) : w.data();
  };
  Weights<const T> weights = {matrix(w_ih, low_ih), matrix(w_hh, low_hh), b_ih.data(), b_hh.data()};
  Weights<T> dweights = {dw_ih.data(), dw_hh.data(), db_ih.data(), db_hh.data()};
  if (norm) weights.insert(weights.end(), {g_ih.data(), g_hh.data()});
  if (norm && c) weights.insert(weights.end(), {g_c.data(), b_c.data()});
  if (norm) dweights.insert(dweights.end(), {dg_ih.data(), dg_hh.data()});
  if (norm && c) dweights.insert(dweights.end(), {dg_c.data(), db_c.data()});
  const auto packed = pack<T>({cell}, n.I, n.H, n.P, weights, {}, bfloat16);
  ForwardCall<T> f{};
  f.problem = {{cell},        n, o.ragged ? lengths.data() : nullptr, o.reset ? reset.data() : nullptr, o.reverse,
               o.detach_every};
  f.problem.bfloat16 = bfloat16;
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

  return {y, hT, cT, hs, cs, dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0, dg_ih, dg_hh, dg_c, db_c};
}

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

}  // namespace
