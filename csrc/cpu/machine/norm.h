// Norms of cells that are programs: the numbers of a row. SPDX-License-Identifier: Apache-2.0
//
// They need all units of the row's values, which rounds before have stored, and they are made in the order of the
// compiled cells' (cpu/layer_norm.h): it depends neither on threads nor on lanes.
#pragma once
#include "cpu/layer_norm.h"
#include "cpu/machine/rows.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::MachineNorm;
using cpu::MachineRound;
using cpu::MachineValue;

template <class V>
struct MachineNorms {
  using T = typename V::scalar;
  using Units = RowUnits<V>;
  using Sum = typename Units::Sum;
  using Number = typename Units::Number;

  const MachineRows<V>& rows;

  // One row's vectors of a value; 0 for units that do not exist.
  struct Value {
    const T* row;
    Index H, block, before;
    bool whole;
    FUSEDRNN_INLINE V load(Index u, Index in_row) const {
      const Index b = u / kBlock;
      return V::load(row + b * block + before * (whole ? kBlock : units_of(H, b)) + u % kBlock, in_row);
    }
  };
  static constexpr int kMost = 2 * cpu::kMostNormed;

  void find(const MachineRound& round, const MachineNorm& norm, Index i, Value* values) const {
    for (int k = norm.begin; k < norm.end; ++k) {
      const MachineValue& v = round.values[k];
      const Place<T>& place = rows.places[v.place];
      *values++ = {place.rows[i], rows.call.H, place.count * kBlock, v.value, place.whole};
    }
  }
  T* numbers(Index i, int norm) const { return rows.places[cpu::kNorms].rows[i] + norm * cpu::kNormNumbers; }

  FUSEDRNN_NOINLINE void forward(const MachineRound& round, const MachineNorm& norm, Index i) const {
    Value values[kMost];
    find(round, norm, i, values);
    const int n = norm.end - norm.begin;
    const T count = T(rows.call.H * n);
    T total = 0;
    if (norm.centred) {
      Sum sum;
      each_vector<V>(rows.call.H, [&](Index u, int k, Index in_row) {
        for (int v = 0; v < n; ++v) sum.add(k, values[v].load(u, in_row));
      });
      total = sum.total();
    }
    const Number mean(total / count);
    Sum squares;
    each_vector<V>(rows.call.H, [&](Index u, int k, Index in_row) {
      for (int v = 0; v < n; ++v) {
        const V d = values[v].load(u, in_row) - mean.in(in_row);
        squares.add_product(k, d, d);
      }
    });
    T* const to = numbers(i, norm.number);
    to[0] = mean.of[0];
    to[1] = T(1) / Units::root(squares.total() / count + rows.call.constants[norm.epsilon]);
  }

  FUSEDRNN_NOINLINE void backward(const MachineRound& round, const MachineNorm& norm, Index i) const {
    Value values[kMost];
    find(round, norm, i, values);
    Sum sums[2];  // of dx, of dx x
    each_vector<V>(rows.call.H, [&](Index u, int k, Index in_row) {
      for (int v = 0; v < norm.end - norm.begin; v += 2) {
        const V dx = values[v].load(u, in_row);
        if (norm.centred) sums[0].add(k, dx);
        sums[1].add_product(k, dx, values[v + 1].load(u, in_row));
      }
    });
    T totals[2];
    Units::template totals<2>(sums, totals);
    const T count = T(rows.call.H * norm.size);
    T* const to = rows.places[cpu::kNormGradients].rows[i] + norm.number * cpu::kNormGradientNumbers;
    to[0] = totals[0] / count, to[1] = totals[1] / count, to[2] = numbers(i, norm.of)[1];
  }

  // Of `count` rows of a step those that this thread has; then all threads may read the numbers.
  bool run(const MachineRound& round, Index count, bool is_backward, const cpu::Worker& worker) const {
    const Index n = worker.by_rows ? 1 : worker.region.threads, t = worker.by_rows ? 0 : worker.region.thread;
    for (Index i = count * t / n; i < count * (t + 1) / n; ++i) {
      for (int k = 0; k < round.norm_count; ++k)
        is_backward ? backward(round, round.norms[k], i) : forward(round, round.norms[k], i);
      if ((i & 15) == 0 && !worker.poll()) return false;
    }
    return worker.by_rows || worker.barrier();
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
