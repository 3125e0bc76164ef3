// What a cell tells the loops, apart from its maths. SPDX-License-Identifier: Apache-2.0
//
// A cell is a set of accumulators per hidden unit: a[s] = bias + input part + recurrent part. Which accumulators a part
// feeds, and from which of PyTorch's gates (rows of weight_ih / weight_hh), is a Part. The gradient of a[s] is da[s],
// so the same Parts serve the backward products. A part always feeds neighbouring accumulators.
#pragma once

namespace fusedrnn {

struct Part {
  int first;    // first accumulator it feeds
  int count;    // how many; 0: the cell has no such part
  int gate[4];  // for each, the gate (block of H rows) of the weight matrix
};

}  // namespace fusedrnn
