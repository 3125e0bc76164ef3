// Runs a program over a tile. SPDX-License-Identifier: Apache-2.0
//
// Each instruction runs over all vectors of the tile before the next, so that choosing what to do is paid once for many
// vectors, and its loop is the compiled cells' code for one operation: the bits are theirs. A register holds the
// vectors of all rows and blocks of the tile, [block][row], in the nearest cache.
#pragma once
#include "cpu/layer_norm.h"
#include "cpu/machine/job.h"
#include "cpu/tile.h"
#include "simd/log.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::Instruction;
using cpu::kBlock;
using cpu::Operation;

// Where a vector of a value lies for each row of a step.
template <class T>
struct Place {
  T** rows;     // null: it is not wanted
  int count;    // values side by side, [block][value][16]
  bool whole;   // the last block has 16 units as well
  bool stream;  // past the caches
};

template <class V>
struct Frame {
  using T = typename V::scalar;
  Index H, blocks;
  const Place<T>* places;
  const T *vectors, *constants;
  const T* const* scalars;
  const Index* at;  // of each row of the step, t * B + b
  // Of registers: from one to the next, and from a vector of one to its next.
  T* registers;
  Index next, step;
  // The tile: rows from `first` on, blocks from `block` on, of each of them the vector that begins with `lane`.
  Index first, block, lane;
  int rows, wide;
};

// f of the vectors of some registers, to another one. It may be one of them.
template <class V, class F, class... Registers>
FUSEDRNN_INLINE void each(Index n, Index step, typename V::scalar* d, F f, const Registers*... registers) {
  for (Index at = 0; at < n * step; at += step) f(V::load(registers + at)...).store(d + at);
}

// then(register, memory, units that exist from there on) for each vector of a place.
template <class V, class Then>
FUSEDRNN_INLINE void each_at(const Frame<V>& f, const Place<typename V::scalar>& place, int value,
                             typename V::scalar* d, Then&& then) {
  using T = typename V::scalar;
  T* const* const rows = place.rows + f.first;
  const Index block = kBlock * place.count;
  Index at = f.block * block + f.lane;
  int full = f.wide;  // blocks with all their units
  if (!place.whole && (f.block + f.wide) * kBlock > f.H) --full;
  for (int w = 0; w < full; ++w, at += block)
    for (int i = 0; i < f.rows; ++i, d += f.step) then(d, rows[i] + at + value * kBlock, kBlock);
  if (full == f.wide) return;
  const Index units = units_of(f.H, f.block + full);
  for (int i = 0; i < f.rows; ++i, d += f.step) then(d, rows[i] + at + value * units, units - f.lane);
}

// Out of line, as what they need would take the registers of everything else.
template <class V>
FUSEDRNN_NOINLINE void load(const Frame<V>& f, const Place<typename V::scalar>& place, int value, int more,
                            typename V::scalar* d) {
  using T = typename V::scalar;
  for (int k = 0; k <= more; ++k)
    each_at<V>(f, place, value + k, d + k * f.next,
               [](T* to, T* from, Index units) { V::load(from, units).store(to); });
}
template <class V>
FUSEDRNN_NOINLINE void store(const Frame<V>& f, const Place<typename V::scalar>& place, int value,
                             typename V::scalar* d) {
  using T = typename V::scalar;
  if (!place.rows) return;
  if constexpr (V::whole_lines)
    if (place.stream)
      return each_at<V>(f, place, value, d, [](T* from, T* to, Index units) {
        units == kBlock ? V::load(from).stream(to) : V::load(from).store(to, units);
      });
  each_at<V>(f, place, value, d, [](T* from, T* to, Index units) { V::load(from).store(to, units); });
}
template <class V>
FUSEDRNN_NOINLINE void add_to(const Frame<V>& f, const Place<typename V::scalar>& place, int value,
                              typename V::scalar* d) {
  using T = typename V::scalar;
  if (place.rows)
    each_at<V>(f, place, value, d, [](T* from, T* to, Index) { (V::load(to) + V::load(from)).store(to); });
}

// then(offset of a vector in its register, the numbers of its row) for each vector of the tile.
template <class V, class Then>
FUSEDRNN_INLINE void each_row(const Frame<V>& f, int place, Index offset, Then&& then) {
  typename V::scalar* const* const rows = f.places[place].rows + f.first;
  for (int i = 0; i < f.rows; ++i)
    for (int w = 0; w < f.wide; ++w) then((w * f.rows + i) * f.step, rows[i] + offset);
}

template <class V>
FUSEDRNN_INLINE V sqrt(V x) {
  alignas(64) typename V::scalar lanes[V::lanes];
  x.store(lanes);
  for (auto& lane : lanes) lane = RowUnits<V>::root(lane);
  return V::load(lanes);
}

// a or b by masks that are both false where one of them is NaN: then their sum, which is NaN too.
template <class V, class Mask>
FUSEDRNN_INLINE V one_of(V a, V b, Mask a_or_equal, Mask second) {
  return select(a_or_equal, a, select(second, b, a + b));
}

template <class V>
FUSEDRNN_NOINLINE void interpret(const Instruction* code, int count, const Frame<V>& frame) {
  using T = typename V::scalar;
  const Frame<V> f = frame;  // local: a store could change whatever is reached through a pointer
  const Index n = f.rows * f.wide, step = f.step;
  const V zero = V::zero(), one = V::set(1);
  for (const Instruction* const end = code + count; code != end; ++code) {
    const Instruction in = *code;
    T* const d = f.registers + in.d * f.next;
    const T *const a = f.registers + in.a * f.next, *const b = f.registers + in.b * f.next,
                   *const c = f.registers + in.c * f.next;
    switch (in.op) {
      case Operation::constant: {
        const V value = V::set(f.constants[in.a]);
        for (Index j = 0; j < n; ++j) value.store(d + j * step);
        break;
      }
      case Operation::vector:
        for (int w = 0; w < f.wide; ++w) {
          const V value = V::load(f.vectors + (in.a * f.blocks + f.block + w) * kBlock + f.lane);
          for (int i = 0; i < f.rows; ++i) value.store(d + (w * f.rows + i) * step);
        }
        break;
      case Operation::scalar:
        for (int i = 0; i < f.rows; ++i) {
          const V value = V::set(f.scalars[in.a][f.at[f.first + i]]);
          for (int w = 0; w < f.wide; ++w) value.store(d + (w * f.rows + i) * step);
        }
        break;
      case Operation::load:
        load<V>(f, f.places[in.a], in.b, in.c, d);
        break;
      case Operation::store:
        store<V>(f, f.places[in.a], in.b, d);
        break;
      case Operation::add_to:
        add_to<V>(f, f.places[in.a], in.b, d);
        break;
// The operation of one, two or three registers: x, y and z are vectors of theirs.
#define OF_ONE(name, result)                             \
  case Operation::name:                                  \
    each<V>(n, step, d, [=](V x) { return result; }, a); \
    break
#define OF_TWO(name, result)                                     \
  case Operation::name:                                          \
    each<V>(n, step, d, [=](V x, V y) { return result; }, a, b); \
    break
#define OF_THREE(name, result)                                           \
  case Operation::name:                                                  \
    each<V>(n, step, d, [=](V x, V y, V z) { return result; }, a, b, c); \
    break
        OF_TWO(add, x + y);
        OF_TWO(sub, x - y);
        OF_TWO(mul, x * y);
        OF_TWO(div, x / y);
        OF_ONE(neg, -x);
        OF_THREE(fma, fma(x, y, z));
        OF_THREE(fnma, fnma(x, y, z));
        OF_ONE(tanh, tanh(x));
        OF_ONE(sigmoid, sigmoid(x));
        OF_ONE(exp, exp(x));
        OF_ONE(log, log(x));
        OF_ONE(sqrt, sqrt(x));
        OF_ONE(softplus, softplus(x));
        OF_ONE(relu, relu(x));
        OF_ONE(absolute, abs(x));
        OF_TWO(maximum, one_of(x, y, greater_equal(x, y), greater(y, x)));
        OF_TWO(minimum, one_of(x, y, greater_equal(y, x), greater(x, y)));
        OF_THREE(where, select(greater(x, zero), y, z));
        OF_TWO(greater, select(greater(x, y), one, zero));
        OF_TWO(greater_equal, select(greater_equal(x, y), one, zero));
        OF_ONE(one_minus, one - x);
        OF_TWO(sigmoid_gradient, x * (y * (one - y)));
        OF_TWO(tanh_gradient, x * fnma(y, y, one));
#undef OF_ONE
#undef OF_TWO
#undef OF_THREE
      case Operation::normalise:
        each_row(f, cpu::kNorms, in.b * cpu::kNormNumbers, [d, a](Index at, const T* row) {
          normalised(V::load(a + at), V::set(row[0]), V::set(row[1])).store(d + at);
        });
        break;
      case Operation::normalise_gradient:
        each_row(f, cpu::kNormGradients, in.c * cpu::kNormGradientNumbers, [d, a, b](Index at, const T* row) {
          normalised_gradient(V::load(a + at), V::load(b + at), V::set(row[0]), V::set(row[1]), V::set(row[2]))
              .store(d + at);
        });
        break;
    }
  }
}

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
