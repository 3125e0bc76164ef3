// The one product everything runs on. SPDX-License-Identifier: Apache-2.0
//
//   acc[n][m] += sum over k of a[m][k] * b[k][n]      m < M rows, n < N vectors, k in ascending order, one FMA each
//
// The sum of one output never depends on M, N, the lane width or its neighbours: this is what makes the bits the same
// for every batch size, thread count, split and instruction set. Accumulators live in registers between load and store.
#pragma once
#include "cpu/kernels.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

FUSEDRNN_INLINE Index blocks_of(Index n) { return (n + cpu::kBlock - 1) / cpu::kBlock; }

// Units of a block in the tape: the last one has only those there are.
FUSEDRNN_INLINE Index units_of(Index H, Index block) {
  return H - block * cpu::kBlock < cpu::kBlock ? H - block * cpu::kBlock : cpu::kBlock;
}

// How many of `wide` blocks, the first of them `block`, have unit `lane`, of n units in all: the others need no
// product.
FUSEDRNN_INLINE int blocks_with(Index lane, Index n, Index block, int wide) {
  return wide - (n - (block + wide - 1) * cpu::kBlock <= lane);
}

// How many numbers an element holds of what the tile multiplies. O is Vec, or Pairs (simd/pairs.h) or AmxPairs, whose
// k counts pairs; sums and all else are in Vec.
template <class O>
constexpr int kNumbers = 1;

// Elements of n numbers.
template <class O>
constexpr Index elements(Index n) {
  return (n + kNumbers<O> - 1) / kNumbers<O>;
}

// How many units each accumulator has in a last block that is narrow: its accumulators lie side by side, so that few
// vectors hold them. 16: there is no such block, because it would need as many.
template <class O>
constexpr Index narrow_units(Index H) {
  const Index rest = H % cpu::kBlock, units = rest == 0 || rest > 8 ? cpu::kBlock : rest > 4 ? 8 : 4;
  return kNumbers<O> == 1 && 2 * units <= O::lanes ? units : cpu::kBlock;
}
// Vectors of so many accumulators of it.
template <class O>
constexpr int narrow_vectors(Index units, int accumulators) {
  return int((accumulators * units + O::lanes - 1) / O::lanes);
}

// The packed weights of a block: [lane / lanes][k][accumulator][lanes], so that a tile reads whole cache lines; where
// it takes one vector at a time, [lane / lanes][accumulator][k][lanes].
template <class O>
constexpr bool kApart = O::registers == 8;

// Whether a tile reads neighbouring elements of a row at once. Weight gradients then read the joint rows by columns.
template <class O>
constexpr bool kByColumns = false;

// Stores what products multiply, from number `at` of a row on.
template <class O, class V>
FUSEDRNN_INLINE void put_operand(V v, typename V::scalar* row, Index at) {
  if constexpr (kNumbers<O> > 1)
    O::put(v, row + at / kNumbers<O>);
  else
    v.store(row + at);
}

// h as the next step reads it.
template <class O, class V>
FUSEDRNN_INLINE V rounded(V h) {
  if constexpr (kNumbers<O> > 1)
    return O::round(h);
  else
    return h;
}

// k runs over `runs` runs of `run` neighbours, so that a part can skip accumulators it does not feed.
template <class T>
struct Product {
  const T* const* a;  // M row pointers
  Index a_begin, a_step, a_run;
  const T* b;
  Index b_step, b_gap;  // from k to k+1; from vector n to n+1
  Index runs, run;
  Index b_block = 0, acc_block = 0;  // W > 1: from a block's N vectors to the next's, in b and, in vectors, in acc
  const char* prefetched = nullptr;  // Prefetch: so many lines before each run
  Index prefetched_lines = 0;
};

// What a sum takes in a register before it is added to its accumulator: all of it with FMA. A level without rounds
// every product as well, and makes up for it by shorter sums.
constexpr Index kSumPart = 32;

template <class V, int M, int N, int W>
struct Accumulators {
  using T = typename V::scalar;
  V c[M][W * N];
  T* const acc;
  const Index block;

  T* at(int m, int n) const { return acc + ((n / N * block + n % N) * M + m) * V::lanes; }
  FUSEDRNN_INLINE void load() {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < W * N; ++n) c[m][n] = V::fused ? V::load(at(m, n)) : V::zero();
  }
  FUSEDRNN_INLINE void store() const {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < W * N; ++n) (V::fused ? c[m][n] : V::load(at(m, n)) + c[m][n]).store(at(m, n));
  }
};

// The N vectors of each of W blocks, from vector `First` on.
template <class V, int M, int N, int W = 1, int First = 0>
void tile(const Product<typename V::scalar>* products, int count, typename V::scalar* acc) {
  using T = typename V::scalar;
  Accumulators<V, M, N, W> sums{{}, acc + First * M * V::lanes, products->acc_block};
  auto& c = sums.c;
  sums.load();
  for (int p = 0; p < count; ++p) {
    const Product<T>& product = products[p];
    const T* a[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) a[m] = product.a[m];
    const T* b = product.b + First * product.b_gap;
    const Index gap = product.b_gap, block = product.b_block, b_step = product.b_step, a_step = product.a_step;
    const char* line = product.prefetched;
    for (Index r = 0; r < product.runs; ++r) {
      for (Index n = 0; n < product.prefetched_lines; ++n, line += 64) __builtin_prefetch(line, 0, 2);
      const Index begin = product.a_begin + r * product.a_run, end = begin + product.run * a_step;
      for (Index k = begin; k < end;) {
        const Index stop = V::fused || end - k <= kSumPart * a_step ? end : k + kSumPart * a_step;
        for (; k < stop; k += a_step) {
          V w[W * N];
#pragma GCC unroll 8
          for (int n = 0; n < W * N; ++n) w[n] = V::load(b + n / N * block + n % N * gap);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) {
            const V x = V::set(a[m][k]);
#pragma GCC unroll 8
            for (int n = 0; n < W * N; ++n) c[m][n] = fma(x, w[n], c[m][n]);
          }
          b += b_step;
        }
        if constexpr (!V::fused) sums.store(), sums.load();
      }
    }
  }
  sums.store();
}

// Accumulator vectors of the widest tile.
#if defined(FUSEDRNN_LEVEL_AMX_BF16)
constexpr int kMaxTile = 64;
#else
constexpr int kMaxTile = 24;
#endif

// Widest tiles that stay in registers: M*N accumulators, N weights and a broadcast. A wider one would spill. With few
// registers several vectors have the rows of one or two, and are summed up by so many at a time: weights that come from
// L2 are then read for 6 rows, not for fewer.
template <class V>
constexpr int max_rows(int n) {
  return V::registers == 32 ? (n == 1 ? 14 : n == 2 ? 12 : n == 3 ? 8 : 6) : V::registers == 16 && n == 1 ? 10 : 6;
}

template <class V, int M, int N, int Part, int First = 0>
void tile_by_parts(const Product<typename V::scalar>* products, int count, typename V::scalar* acc) {
  constexpr int part = N - First < Part ? N - First : Part;
  tile<V, M, part, 1, First>(products, count, acc);
  if constexpr (First + part < N) tile_by_parts<V, M, N, Part, First + part>(products, count, acc);
}

template <class T>
using TileFn = void (*)(const Product<T>*, int, T*);

// One row alone: its few sums would wait for each other, so a tile takes up to 8 vectors, or two blocks, if there are
// registers for them.
template <class V>
constexpr int kOneRow = V::registers > 8 ? 8 : 4;

// tile<V, rows, N> for a run-time number of rows and vectors: 1 <= N <= 4 and 1 <= rows <= max_rows(N), or one row.
template <class V>
struct Tiles {
  TileFn<typename V::scalar> of[kOneRow<V>][max_rows<V>(1)] = {};

  constexpr Tiles() {
    fill<1>(), fill<2>(), fill<3>(), fill<4>();
    if constexpr (kOneRow<V> == 8)
      of[4][0] = &tile<V, 1, 5>, of[5][0] = &tile<V, 1, 6>, of[6][0] = &tile<V, 1, 7>, of[7][0] = &tile<V, 1, 8>;
  }
  template <int N, int M = max_rows<V>(N)>
  constexpr void fill() {
    if constexpr (V::registers == 16 && N > 2 && M * N > 12)
      of[N - 1][M - 1] = &tile_by_parts<V, M, N, 2>;
    else if constexpr (V::registers == 8 && M > 1 && M * N + N > 6)
      of[N - 1][M - 1] = &tile_by_parts<V, M, N, (M < 3 ? 2 : 1)>;
    else
      of[N - 1][M - 1] = &tile<V, M, N>;
    if constexpr (M > 1) fill<N, M - 1>();
  }
};
template <class V>
constexpr Tiles<V> kTiles;

template <class V>
FUSEDRNN_INLINE auto tile_for(int rows, int n) {
  return kTiles<V>.of[n - 1][rows - 1];
}

template <class V>
TileFn<typename V::scalar> tile_for_two_blocks(int n) {
  return n == 1 ? &tile<V, 1, 1, 2> : n == 2 ? &tile<V, 1, 2, 2> : n == 3 ? &tile<V, 1, 3, 2> : &tile<V, 1, 4, 2>;
}

// acc[wide][m] += m rows of k numbers times blocks of weights with one accumulator, from this block and lane on.
template <class O>
FUSEDRNN_INLINE void add_product(const typename O::scalar* const* rows, Index k,
                                 const cpu::Packed<typename O::scalar>& weights, Index block, Index lane, int m,
                                 int wide, typename O::scalar* acc) {
  const Index step = weights.block_step, K = elements<O>(k);
  const Product<typename O::scalar> p = {rows, 0, 1, 0, weights.data + block * step + lane * K, O::lanes, step, 1, K};
  tile_for<O>(m, wide)(&p, 1, acc);
}

// n items cut into ceil(n / widest) pieces of nearly equal size: 16 rows are 6+5+5, not 6+6+4.
struct Tiling {
  Index n, pieces;
  Tiling(Index n_, Index widest) : n(n_), pieces((n_ + widest - 1) / widest) {}
  Index begin(Index i) const {
    const Index small = n / pieces, larger = n % pieces;
    return i * small + (i < larger ? i : larger);
  }
};

// One of `pieces` pieces of the panel of weights that the tiles after these rows read: a product brings it into the
// core's cache. It is cut into runs so that few lines come at a time: many would take the buffers that the tile's own
// loads wait for.
struct Prefetch {
  Index block = 0, blocks = 0, piece = 0, pieces = 0;

  // For tile i of n, of the panel behind panel j of those from block `begin` on.
  static Prefetch after(const Tiling& panels, Index j, Index begin, Index i, Index n) {
    const Index next = j + 1 < panels.pieces ? j + 1 : 0;
    return {begin + panels.begin(next), panels.begin(next + 1) - panels.begin(next), i, n};
  }
  template <class V, class O, class T>
  FUSEDRNN_INLINE void during(Product<T>& p, const cpu::Packed<T>& weights, Index lane) const {
    constexpr Index kFewPieces = 3;          // fewer would be so large that products wait for them
    if (!V::fused || kByColumns<O>) return;  // there sums depend on the runs
    if (lane || pieces < kFewPieces || p.runs != 1) return;
    const Index lines = blocks * weights.block_step * Index(sizeof(T)) / 64, first = lines * piece / pieces,
                mine = lines * (piece + 1) / pieces - first, run = 2 * mine > p.run ? 4 : 16;
    if (p.run % run) return;
    p.prefetched = reinterpret_cast<const char*>(weights.data + block * weights.block_step) + first * 64;
    p.prefetched_lines = (mine * run + p.run - 1) / p.run;
    p.runs = p.run / run, p.run = p.a_run = run;
  }
};

// then(first row, rows, first block, blocks) for each tile of rows and panel of blocks, from block `begin` on; false:
// the call is to stop.
template <class Then>
FUSEDRNN_INLINE bool each_tile(const cpu::Worker& worker, bool rows_outside, Tiling tiles, Tiling panels, Index begin,
                               Then&& then) {
  const Index outer = rows_outside ? tiles.pieces : panels.pieces, inner = rows_outside ? panels.pieces : tiles.pieces;
  for (Index o = 0; o < outer; ++o) {
    for (Index n = 0; n < inner; ++n) {
      const Index i = rows_outside ? o : n, j = rows_outside ? n : o;
      const Index first = tiles.begin(i), block = begin + panels.begin(j);
      then(first, int(tiles.begin(i + 1) - first), block, int(begin + panels.begin(j + 1) - block));
    }
    if (!worker.poll()) return false;
  }
  return true;
}

// What of a step is a thread's: rows of the batch, or blocks of units, and of h, which are others where it is
// projected.
struct Share {
  Index row_begin, row_end, block_begin, block_end, h_begin, h_end;
  Share(const Steps& steps, Index blocks, Index P, const cpu::Worker& worker) {
    const Index n = worker.region.threads, i = worker.region.thread, h_blocks = blocks_of(P);
    const bool by_rows = worker.by_rows;
    row_begin = by_rows ? first_row(steps, i, n) : 0, row_end = by_rows ? first_row(steps, i + 1, n) : steps.B;
    block_begin = by_rows ? 0 : blocks * i / n, block_end = by_rows ? blocks : blocks * (i + 1) / n;
    h_begin = by_rows ? 0 : h_blocks * i / n, h_end = by_rows ? h_blocks : h_blocks * (i + 1) / n;
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
