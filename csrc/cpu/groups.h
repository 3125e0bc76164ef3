// Which columns of the joint rows share the accumulators they give gradients to. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace fusedrnn::cpu {

struct Groups {
  std::vector<Group> all;
  Index block_step = 0, columns = 0;  // elements of dpacked for a block of units; columns of all groups

  // n more columns, with gradients to the accumulators of these parts: the next ones of the joint rows, so that they
  // belong to the groups before them where the accumulators are the same.
  void add(Index column, Index n, const Part* parts, std::size_t count) {
    const auto same = [](const Group& g, const Part& p) { return g.first == p.first && g.count == p.count; };
    const auto before = all.begin() + std::ptrdiff_t(last);
    if (std::equal(before, all.end(), parts, parts + count, same)) {
      for (auto group = before; group != all.end(); ++group) group->columns += n;
    } else {
      last = all.size();
      for (const Part* p = parts; p != parts + count; ++p) all.push_back({column, n, p->first, p->count, 0, 0});
    }
  }
  // Once all columns are there.
  void lay_out() {
    for (Group& g : all) {
      g.offset = block_step, g.before = columns;
      block_step += g.columns * g.count * kBlock, columns += g.columns;
    }
  }
  // The one with this column and this accumulator.
  int of(Index column, int accumulator) const {
    const auto found = std::find_if(all.begin(), all.end(), [&](const Group& g) {
      return column >= g.column && column < g.column + g.columns && accumulator >= g.first &&
             accumulator < g.first + g.count;
    });
    return int(found - all.begin());
  }

 private:
  std::size_t last = 0;  // where the groups of the last columns begin
};

}  // namespace fusedrnn::cpu
