// Any cell with recurrent dropout and zoneout. SPDX-License-Identifier: Apache-2.0
//
// Zoneout (Krueger et al. 2016): the cell's h and c are candidates; the state is keep * candidate + (1 - keep) * the
// state before. Dropout acts on the products, outside the cell.
#pragma once
#include "cells/cell.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <class Cell>
struct Regularized : Cell {
  // The candidate h, where the cell's backward reads it. With layer norm that of c: its gates are not kept to make it
  // again.
  static constexpr int saved = Cell::saved + (Cell::reads_h || (Cell::layer_norm && Cell::has_c));
  static constexpr bool has_direct = true, reads_h_prev = !Cell::projects, reads_h = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const V* a, V h_prev, V c_prev, V* saved, V& h, V& c) {
    Cell::forward(a, h_prev, c_prev, saved, h, c);
    if constexpr (Cell::reads_h) saved[Cell::saved] = h;
  }

  // dh and dc are those of the candidates. The candidate c is made again: c is what zoneout made of it.
  template <class V>
  FUSEDRNN_INLINE static void backward(const V* saved, V h_prev, V h, V c_prev, V c, V dh, V dc, V* da, V& dc_prev,
                                       V& direct) {
    if constexpr (Cell::reads_h) h = saved[Cell::saved];
    if constexpr (Cell::has_c) c = Cell::new_c(saved, c_prev);
    Cell::backward(saved, h_prev, h, c_prev, c, dh, dc, da, dc_prev, direct);
  }

  // Of a cell that projects: what is projected, of the candidate c.
  template <class V>
  FUSEDRNN_INLINE static V new_h(const V* saved, V c_prev, V) {
    return Cell::new_h(saved, c_prev, Cell::new_c(saved, c_prev));
  }

  template <class V>
  FUSEDRNN_INLINE static V zoneout(V keep, V candidate, V before) {
    return fma(keep, candidate, (V::set(1) - keep) * before);
  }
  // The gradient d of a state becomes that of the candidate; -> what the state before gets of it.
  template <class V>
  FUSEDRNN_INLINE static V zoneout_backward(V keep, V& d) {
    const V before = (V::set(1) - keep) * d;
    d = keep * d;
    return before;
  }
};

template <class Cell>
constexpr bool kRegularized = false;
template <class Cell>
constexpr bool kRegularized<Regularized<Cell>> = true;

template <class Cell>
struct Plain {
  using type = Cell;
};
template <class Cell>
struct Plain<Regularized<Cell>> {
  using type = Cell;
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
