// The arithmetic of layer norm over the units of a row, forward beside backward. SPDX-License-Identifier: Apache-2.0
//
//   x = (a - mean) / sqrt(variance + epsilon),  p = gain * x + bias
//
// The derivation is in docs/bptt.md. How a row lies and is summed up, Units says: cpu/layer_norm.h, cuda/norm.h.
//   V                              a number for each unit, of one unit or several neighbours
//   each(f)                        f(u, k, in_row) for this thread's V: first unit, place in a Sum, units from u on
//   at(u, s, A)                    where accumulator s of A lies for unit u
//   load(row, u, s, A)             of a row; 0 for units that do not exist
//   Number(x), in(in_row), all()   x for units that exist, else 0; x for all
//   Sum, totals(sums, out)         over the units of a row
//   root(x)                        the square root
#pragma once
#include "steps.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

// c of an LSTM as something to be normalised: one accumulator.
struct CellState {
  static constexpr int accumulators = 1;
  FUSEDRNN_INLINE static constexpr int norm_of(int) { return 0; }
};

// The gradients of gains and biases, summed by themselves for each row of the batch: those of the gains, of the biases,
// of gain_c and of bias_c. On a CPU [block][sum][16], on a GPU [sum][unit].
template <class Cell>
constexpr int kNormSums = 2 * Cell::accumulators + (Cell::has_c ? 2 : 0);

// x of a, and da of dx, by the numbers of a row: the means of a, of dx and of dx x.
template <class V>
FUSEDRNN_INLINE V normalised(V a, V mean, V inverse) {
  return (a - mean) * inverse;
}
template <class V>
FUSEDRNN_INLINE V normalised_gradient(V dx, V x, V mean, V along, V inverse) {
  return inverse * fnma(x, along, dx - mean);
}

// Mean and 1 / sqrt(variance + epsilon) of each norm of a row, and what is made with them.
template <class Cell, class Units>
struct RowNorm {
  using V = typename Units::V;
  using T = typename V::scalar;
  static constexpr int A = Cell::accumulators, kNorms = Cell::norm_of(A - 1) + 1;
  static constexpr double kEpsilon = 1e-5;

  const Units units;
  const T* const row;
  typename Units::Number mean[kNorms];
  T inverse[kNorms], count[kNorms] = {};  // count: of the values that a norm takes together

  FUSEDRNN_INLINE RowNorm(const T* row_, Index H) : units{H}, row(row_) {
    typename Units::Sum sums[kNorms], squares[kNorms];
    T totals[kNorms];
    units.each([&](Index u, int k, Index) {
      FUSEDRNN_UNROLL
      for (int s = 0; s < A; ++s) sums[Cell::norm_of(s)].add(k, load(u, s));
    });
    for (int s = 0; s < A; ++s) count[Cell::norm_of(s)] += T(H);
    Units::template totals<kNorms>(sums, totals);
    for (int n = 0; n < kNorms; ++n) mean[n] = typename Units::Number(totals[n] / count[n]);
    units.each([&](Index u, int k, Index in_row) {
      FUSEDRNN_UNROLL
      for (int s = 0; s < A; ++s) {
        const V d = load(u, s) - mean[Cell::norm_of(s)].in(in_row);
        squares[Cell::norm_of(s)].add_product(k, d, d);
      }
    });
    Units::template totals<kNorms>(squares, totals);
    for (int n = 0; n < kNorms; ++n) inverse[n] = T(1) / Units::root(totals[n] / count[n] + T(kEpsilon));
  }

  FUSEDRNN_INLINE V load(Index u, int s) const { return units.load(row, u, s, A); }
  FUSEDRNN_INLINE Index at(Index u, int s) const { return units.at(u, s, A); }
  FUSEDRNN_INLINE V x(Index u, int s) const {
    const int n = Cell::norm_of(s);
    return normalised(load(u, s), mean[n].all(), V::set(inverse[n]));
  }
  // p of all accumulators.
  FUSEDRNN_INLINE void parts(const T* gain, const T* bias, Index u, V* p) const {
    FUSEDRNN_UNROLL
    for (int s = 0; s < A; ++s) p[s] = fma(x(u, s), V::load(gain + at(u, s)), V::load(bias + at(u, s)));
  }
};

// The way back through the norms of a row: less the mean of dx, and less its part along x, which the variance keeps
// fixed.
template <class Cell, class Units>
struct RowNormBackward {
  using Norm = RowNorm<Cell, Units>;
  using V = typename Norm::V;
  static constexpr int kNorms = Norm::kNorms;

  const Norm& norm;
  typename Units::Sum sums[2 * kNorms];  // of dx, of dx x
  typename Norm::T means[2 * kNorms];

  FUSEDRNN_INLINE explicit RowNormBackward(const Norm& norm_) : norm(norm_) {}
  FUSEDRNN_INLINE void add(int s, int k, V dx, V x) {
    const int n = Cell::norm_of(s);
    sums[n].add(k, dx);
    sums[kNorms + n].add_product(k, dx, x);
  }
  FUSEDRNN_INLINE void finish() {
    Units::template totals<2 * kNorms>(sums, means);
    for (int n = 0; n < 2 * kNorms; ++n) means[n] /= norm.count[n % kNorms];
  }
  FUSEDRNN_INLINE V da(Index u, int s, V dx) const {
    const int n = Cell::norm_of(s);
    return normalised_gradient(dx, norm.x(u, s), V::set(means[n]), V::set(means[kNorms + n]), V::set(norm.inverse[n]));
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
