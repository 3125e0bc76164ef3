// Arrays of a call side by side in one buffer. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <initializer_list>

#include "cpu/arena.h"
#include "cpu/kernels.h"

namespace fusedrnn {

using cpu::Buffer;
using cpu::kBlock;

inline Index blocks_of(Index n) { return (n + kBlock - 1) / kBlock; }

// Elements rounded up to whole cache lines.
template <class T>
Index lines(Index n) {
  const Index line = 64 / Index(sizeof(T));
  return (n + line - 1) / line * line;
}

// Several arrays in one buffer: `take` each twice, once to count and once for the address.
template <class T>
class Layout {
 public:
  // n elements per factor product, on a cache line of their own; null while counting.
  T* take(std::initializer_list<Index> factors) {
    std::size_t n = 1;
    for (Index f : factors) n = cpu::checked_product({n, std::size_t(f)});
    const std::size_t at = used;
    used += std::size_t(lines<T>(Index(n)));
    cpu::checked_product({used, sizeof(T)});
    return base ? base + at : nullptr;
  }
  Buffer allocate() {
    Buffer memory(used * sizeof(T) + 64);
    base = memory.as<T>();
    used = 0;
    return memory;
  }

 private:
  T* base = nullptr;
  std::size_t used = 0;
};

// Weights of a row of blocks lie k * count * 16 apart; one more line keeps them out of each other's cache sets.
template <class T>
Index block_step(Index k, int count) {
  return k * count * kBlock + kBlock;
}

}  // namespace fusedrnn
