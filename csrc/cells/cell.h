// What a cell tells the loops, apart from its maths. SPDX-License-Identifier: Apache-2.0
//
// A cell is a set of accumulators per hidden unit: a[s] = bias + input part + recurrent part. Which accumulators a part
// feeds, and from which of PyTorch's gates (rows of weight_ih / weight_hh), is a Part. The gradient of a[s] is da[s],
// so the same Parts serve the backward products. A part always feeds neighbouring accumulators.
#pragma once

namespace fusedrnn {

// With layer norm (`layer_norm`) each part of a gate has an accumulator of its own, the input part's first, and a holds
// the bare products; what the cell's maths takes are their normalised values p. `norm_of` says which accumulators are
// normalised together: those with the same number, which lie side by side.
struct Part {
  int first;    // first accumulator it feeds
  int count;    // how many; 0: the cell has no such part
  int gate[4];  // for each, the gate (block of H rows) of the weight matrix
};

}  // namespace fusedrnn
