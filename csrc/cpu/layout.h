// Arrays of a call side by side in one buffer. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <initializer_list>
#include <vector>

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

// Several arrays in one buffer: `take` says how large each is, `allocate` where it begins.
class Layout {
 public:
  Layout() { places.reserve(32); }
  // n elements per factor product, on a cache line of their own.
  template <class T>
  void take(T*& to, std::initializer_list<Index> factors) {
    std::size_t n = sizeof(T);
    for (Index f : factors) n = cpu::checked_product({n, std::size_t(f)});
    places.push_back({&to, used, [](void* place, void* at) { *static_cast<T**>(place) = static_cast<T*>(at); }});
    used = cpu::checked_product({used + std::size_t(lines<char>(Index(n))), 1});
  }
  Buffer allocate() const {
    Buffer memory(used + 64);
    for (const Place& p : places) p.set(p.to, memory.as<char>() + p.at);
    return memory;
  }

 private:
  struct Place {
    void* to;
    std::size_t at;
    void (*set)(void* to, void* at);
  };
  std::vector<Place> places;
  std::size_t used = 0;
};

// Weights of a row of blocks lie k * count * 16 apart; 16 more numbers keep them out of each other's cache sets.
template <class T>
Index block_step(Index k, int count) {
  return k * count * kBlock + kBlock;
}

}  // namespace fusedrnn
