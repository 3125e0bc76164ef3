// Which columns of the joint rows share the accumulators they give gradients to. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>

#include "cpu/kernels.h"

namespace fusedrnn::cpu {

struct Groups {
  Group* const all;  // memory for as many as there may be
  int count = 0;
  Index block_step = 0, columns = 0;  // elements of dpacked for a block of units; columns of all groups

  // n more columns, with gradients to the accumulators of these parts: the next ones of the joint rows, so that they
  // belong to the groups before them where the accumulators are the same.
  void add(Index column, Index n, const Part* parts, std::size_t part_count) {
    const auto same = [](const Group& g, const Part& p) { return g.first == p.first && g.count == p.count; };
    if (std::equal(all + last, all + count, parts, parts + part_count, same)) {
      for (int g = last; g < count; ++g) all[g].columns += n;
    } else {
      last = count;
      for (const Part* p = parts; p != parts + part_count; ++p) all[count++] = {column, n, p->first, p->count, 0, 0};
    }
  }
  // Once all columns are there.
  void lay_out() {
    for (Group* g = all; g != all + count; ++g) {
      g->offset = block_step, g->before = columns;
      block_step += g->columns * g->count * kBlock, columns += g->columns;
    }
  }
  // The one with this column and this accumulator.
  int of(Index column, int accumulator) const {
    int g = 0;
    while (column < all[g].column || column >= all[g].column + all[g].columns || accumulator < all[g].first ||
           accumulator >= all[g].first + all[g].count)
      ++g;
    return g;
  }

  int last = 0;  // where the groups of the last columns begin
};

}  // namespace fusedrnn::cpu
