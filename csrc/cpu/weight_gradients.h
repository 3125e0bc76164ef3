// The weight gradients of a chunk of steps, for any cell. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/forward.h"
#include "cpu/tile.h"
#include "simd/transpose.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

using cpu::BackwardJob;
using cpu::CellShape;
using cpu::Gradient;
using cpu::Group;
using cpu::kBlock;
using cpu::Worker;

// Sums them up chunk by chunk, from the rows of da and the joint rows. Pairs are of two rows: those of the joint rows
// are made so (cpu/backward.h), those of da in the copies.
template <class V, class O = V>
struct WeightGradients {
  using T = typename V::scalar;

  const BackwardJob<T>& job;
  const Worker& worker;
  const CellShape& shape;
  // Of a cell that projects, where a row of da has the gradient of h, and what was projected, both in T, for the
  // gradient of weight_hr; and where it has that of h as products with weight_hr read it.
  const Index dh_at, unprojected_at, dh_operand_at;

  WeightGradients(const BackwardJob<T>& job_, const Worker& worker_, const CellShape& shape_)
      : job(job_),
        worker(worker_),
        shape(shape_),
        dh_at(shape_.accumulators * job_.blocks * kBlock / kNumbers<O>),
        unprojected_at(dh_at + blocks_of(job_.P) * kBlock),
        dh_operand_at(kNumbers<O> == 1 ? dh_at : unprojected_at + job_.blocks * kBlock) {}

  // Adds the part of a chunk of so many rows.
  FUSEDRNN_NOINLINE bool add(Index rows, bool first_chunk) const {
    const Index count = elements<O>(rows);
    if (job.by_tile) {
      order_by_tile(count);
      if (!worker.barrier()) return false;
    }
    return (!job.need_weights || products(count, rows, first_chunk)) &&
           (!job.dprojection || projection(rows, first_chunk));
  }

  // The columns of each tile side by side, [tile][row][column]: in the joint rows each row of a tile is on another
  // page, of which a tile uses a few bytes. Where tiles take columns (kByColumns), [tile][column][row].
  void order_by_tile(Index count) const {
    const Index n = worker.region.threads, i = worker.region.thread, end = count * (i + 1) / n;
    constexpr Index kTogether = 16;  // rows, which stay in the nearest cache
    for (Index begin = count * i / n; begin < end; begin += kTogether)
      for (int g = 0; g < job.group_count; ++g) {
        const Group& group = job.groups[g];
        const Tiling tiles = column_tiles(group);
        for (Index t = 0; t < tiles.pieces; ++t) {
          const Index first = tiles.begin(t), m = tiles.begin(t + 1) - first;
          const T* from = job.inputs + begin * job.inputs_row + group.column + first;
          T* to = job.by_tile + count * (group.before + first) + begin * (kByColumns<O> ? 1 : m);
          if constexpr (kByColumns<O>) {
            alignas(64) T columns[kTogether * kBlock];
            O::transpose_rows(from, job.inputs_row, end - begin, m, columns);
            for (Index k = 0; k < m; ++k) V::load(columns + k * kBlock).store(to + k * count, end - begin);
          } else {
            for (Index r = begin; r < end && r < begin + kTogether; ++r, from += job.inputs_row, to += m)
              for (Index k = 0; k < m; k += V::lanes) V::load(from + k, m - k).store(to + k, m - k);
          }
        }
      }
  }

  // So many numbers of da, of each of some blocks, one row after another, for the same reason.
  void copy_panel(Index count, const T* from, Index numbers, int wide, T* to) const {
    for (Index r = 0; r < count; ++r, from += job.da_row)
      for (int w = 0; w < wide; ++w, to += numbers)
        for (Index k = 0; k < numbers; k += V::lanes)
          V::load(from + w * (shape.accumulators * kBlock) + k).store(to + k);
  }
  // The rows [row, end) in pairs.
  void copy_pairs(Index row, Index end, const Group& group, Index block, int wide, T* to) const {
    const Index vectors = group.count * kBlock, next = shape.accumulators * kBlock;
    const T* from = job.da + row * job.da_row + (block * next + group.first * kBlock) / kNumbers<O>;
    for (Index r = row; r < end; r += 2, from += 2 * job.da_row)
      for (int w = 0; w < wide; ++w, to += vectors)
        for (Index k = 0; k < vectors; k += V::lanes) {
          const T* const one = from + (w * next + k) / kNumbers<O>;
          O::zip(one, r + 1 < end ? one + job.da_row : nullptr).store(to + k);
        }
  }

  // The joint rows, transposed, times da. Threads take whole output tiles.
  bool products(Index count, [[maybe_unused]] Index rows, bool first_chunk) const {
    const Tiling panels(job.blocks, panel_blocks(shape));
    Index total = 0;
    for (int g = 0; g < job.group_count; ++g) total += column_tiles(job.groups[g]).pieces;
    const Index n = worker.region.threads, i = worker.region.thread;
    const Index begin = total * panels.pieces * i / n, end = total * panels.pieces * (i + 1) / n;
    T* const copy = job.by_tile || kNumbers<O> > 1 ? job.panel + i * job.panel_step : nullptr;
    for (Index item = begin; item < end; ++item) {
      const Index panel = item / total;
      Index at = item % total;
      int g = 0;
      for (;; ++g) {
        const Index pieces = column_tiles(job.groups[g]).pieces;
        if (at < pieces) break;
        at -= pieces;
      }
      const Group& group = job.groups[g];
      const Index block = panels.begin(panel), first = column_tiles(group).begin(at);
      const int m = int(column_tiles(group).begin(at + 1) - first);
      const int wide = int(panels.begin(panel + 1) - block), A = shape.accumulators;
      Columns columns = {job.inputs + group.column + first, job.inputs_row, m};
      const BlockLayout layout = layout_of(group, block);
      const T* const da = job.da + block * A * kBlock + group.first * layout.step;
      Vectors vectors = {da,   job.da_row,     panel_blocks(shape) > 1 ? A * kBlock : layout.length,
                         wide, layout.vectors, layout.length < kBlock ? 1 : job.H - block * kBlock};
      const bool other = item == begin || at == 0;
      if (copy) {
        if (job.by_tile) {
          columns.data = job.by_tile + count * (group.before + first), columns.row = m;
          if (kByColumns<O>) columns.row = 1, columns.next = count;
        }
        vectors.data = copy, vectors.row = wide * layout.numbers(), vectors.gap = layout.length;
      }
      const auto sum = [&](int r, int w, int s) {
        return job.dpacked + (block + w) * job.dpacked_block + group.offset + (first + r) * layout.numbers() +
               s * layout.length;
      };
      if constexpr (kNumbers<O> == 1) {
        if (copy && other) copy_panel(count, da, layout.numbers(), wide, copy);
        add_rows<O>(count, columns, vectors, first_chunk, sum);
      } else {
        Index row = 0;
        do {
          const Index here = count - row < cpu::kSumRows ? count - row : cpu::kSumRows,
                      end = kNumbers<O> * (row + here);
          if (other || count > cpu::kSumRows)
            copy_pairs(kNumbers<O> * row, end < rows ? end : rows, group, block, wide, copy);
          add_rows<O>(here, {columns.data + row * columns.row, columns.row, m, columns.next}, vectors,
                      first_chunk && row == 0, sum);
          row += here;
        } while (row < count);
      }
      if ((item & 15) == 0 && !worker.poll()) return false;
    }
    return true;
  }

  // What was projected, transposed, times the gradient of h. A small part of all products, so never in pairs, which
  // would have to be made first.
  bool projection(Index count, bool first_chunk) const {
    const Tiling panels(blocks_of(job.P), kProjectionPanel), columns(job.H, max_rows<V>(kProjectionPanel));
    const Index n = worker.region.threads, i = worker.region.thread, total = panels.pieces * columns.pieces;
    for (Index item = total * i / n; item < total * (i + 1) / n; ++item) {
      const Index panel = item / columns.pieces, at = item % columns.pieces;
      const Index block = panels.begin(panel), first = columns.begin(at);
      add_rows<V>(count, {job.da + unprojected_at + first, job.da_row, int(columns.begin(at + 1) - first)},
                  {job.da + dh_at + block * kBlock, job.da_row, kBlock, int(panels.begin(panel + 1) - block), 1,
                   job.P - block * kBlock},
                  first_chunk,
                  [&](int r, int w, int) { return job.dprojection + ((block + w) * job.H + first + r) * kBlock; });
      if ((item & 15) == 0 && !worker.poll()) return false;
    }
    return true;
  }
  static constexpr int kProjectionPanel = 4;

  Tiling column_tiles(const Group& group) const {
    return Tiling(group.columns, max_rows<O>(group.count * panel_blocks(shape)));
  }

  // How a block's numbers of a group lie, in da and in the sums: in so many vectors of `length`, from an accumulator to
  // the next `step`.
  struct BlockLayout {
    int vectors;
    Index length, step;
    Index numbers() const { return vectors * length; }
  };
  BlockLayout layout_of(const Group& group, Index block) const {
    const Index units = job.narrow && units_of(job.H, block) < kBlock ? narrow_units<O>(job.H) : kBlock;
    if (units == kBlock) return {group.count, kBlock, kBlock};
    return {narrow_vectors<O>(units, group.count), V::lanes, units};
  }

  // What a tile multiplies, of every row: so many columns, and of each of `wide` blocks so many vectors.
  struct Columns {
    const T* data;
    Index row;
    int count;
    Index next = 1;  // from a column to the next, where kByColumns
  };
  struct Vectors {
    const T* data;
    Index row, gap;  // from a row to the next; from a block's to the next's
    int wide, each;
    Index units;  // that there are from the first block on
  };

  // Adds to sum(r, w, s), which are vectors: over the rows, column r of `a` times vector (w, s) of `b`, of elements of
  // Of.
  template <class Of, class Sum>
  FUSEDRNN_INLINE void add_rows(Index count, const Columns& a, const Vectors& b, bool first_chunk, Sum&& sum_of) const {
    const int m = a.count, each = b.each;
    const T* columns[kMaxTile];
    Index row = 0;
    do {
      const Index rows_here = count - row < cpu::kSumRows ? count - row : cpu::kSumRows;
      const bool overwrite = first_chunk && row == 0;
      for (int r = 0; r < m; ++r) columns[r] = a.data + row * a.row + r * (kByColumns<Of> ? a.next : 1);
      for (Index lane = 0; lane < kBlock; lane += V::lanes) {
        const int wide = blocks_with(lane, b.units, 0, b.wide);
        if (!wide) break;
        alignas(64) T acc[kMaxTile * V::lanes];
        for (int v = 0; v < m * wide * each; ++v) V::zero().store(acc + v * V::lanes);
        const Product<T> p = {columns, 0, a.row, 0, b.data + row * b.row + lane, b.row, b.gap, 1, rows_here};
        tile_for<Of>(m, wide * each)(&p, 1, acc);
        for (int r = 0; r < m; ++r)
          for (int w = 0; w < wide; ++w)
            for (int s = 0; s < each; ++s) {
              T* const sum = sum_of(r, w, s) + lane;
              const V part = V::load(acc + ((w * each + s) * m + r) * V::lanes);
              (overwrite ? part : V::load(sum) + part).store(sum);
            }
      }
      row += cpu::kSumRows;
    } while (row < count);
  }

  // All of them back to PyTorch's layout.
  FUSEDRNN_NOINLINE void unpack() const {
    if (job.dprojection) unpack_projection();
    const Index n = worker.region.threads, i = worker.region.thread;
    for (Index block = job.blocks * i / n; block < job.blocks * (i + 1) / n; ++block)
      for (int k = 0; k < job.gradient_count; ++k) {
        const Gradient<T>& d = job.gradients[k];
        const Group& group = job.groups[d.group];
        const BlockLayout layout = layout_of(group, block);
        const Index step = layout.numbers();
        const T* from = job.dpacked + block * job.dpacked_block + group.offset + (d.column - group.column) * step +
                        (d.accumulator - group.first) * layout.step;
        transpose_block(from, step, d.out + block * kBlock * d.columns, d.columns, units_of(job.H, block));
      }
  }

  void unpack_projection() const {
    const Index n = worker.region.threads, i = worker.region.thread, H = job.H, blocks = blocks_of(job.P);
    for (Index block = blocks * i / n; block < blocks * (i + 1) / n; ++block)
      transpose_block(job.dprojection + block * H * kBlock, kBlock, job.dweight_hr + block * kBlock * H, H,
                      units_of(job.P, block));
  }

  // Up to 16 rows of so many columns, from columns of 16.
  static void transpose_block(const T* from, Index step, T* to, Index columns, Index lanes) {
    Index k = 0;
    if (lanes == kBlock)
      for (; k + kBlock <= columns; k += kBlock) transpose(from + k * step, step, to + k, columns);
    for (; k < columns; ++k)
      for (Index lane = 0; lane < lanes; ++lane) to[lane * columns + k] = from[k * step + lane];
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
