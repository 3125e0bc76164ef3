// Every cell over a list of sizes and options: prints a digest of the bits of all results. Another machine, or an
// emulated one, has to print the same. SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "kernels_problems.h"

namespace {

struct Digest {  // FNV-1a
  std::uint64_t value = 1469598103934665603u;
  template <class T>
  void add(const std::vector<T>& a) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(a.data());
    for (std::size_t i = 0; i < a.size() * sizeof(T); ++i) value = (value ^ bytes[i]) * 1099511628211u;
  }
};

template <class T>
unsigned long long digest_of(CellId cell, const Sizes& n, const Options& o) {
  Digest digest;
  for (const auto& a : run<T>(cell, n, o)) digest.add(a);
  return digest.value;
}

}  // namespace

int main() {
  set_thresholds(false);
  cpu::set_num_threads(2);
  for (CellId cell : cells)
    for (const Sizes& n : sizes)
      for (const Options& o : options)
        std::printf("%d %lld,%lld,%lld,%lld %d%d%d%d%lld%d%d %016llx %016llx\n", int(cell), (long long)n.T,
                    (long long)n.B, (long long)n.I, (long long)n.H, o.ragged, o.reset, o.reverse, o.states,
                    (long long)o.detach_every, int(o.save), o.regularized, digest_of<float>(cell, n, o),
                    digest_of<double>(cell, n, o));
}
