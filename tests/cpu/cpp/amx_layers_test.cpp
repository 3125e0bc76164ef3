// Layers in bfloat16 by AMX beside those by AVX512-BF16: prints, in units of 2^-8 of an array's largest entry, the
// largest difference, and how many results differ with one thread. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cpu/dispatch.h"
#include "kernels_problems.h"

namespace fusedrnn::cpu {

// In place of dispatch.cpp.
const Kernels<float>* in_use;
const Kernels<float>* bfloat16_kernels() { return in_use; }
template <class T>
const Kernels<T>& kernels() {
  std::abort();
}
template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace fusedrnn::cpu

int main() {
  set_thresholds(false);
  int count = 0, differ = 0;
  double largest = 0;
  for (CellId cell : cells)
    for (const Sizes& n : sizes)
      for (const Options& o : options) {
        cpu::set_num_threads(2);
        cpu::in_use = cpu::kernels_avx512_bf16(float());
        auto want = run<float>(cell, n, o, true);
        cpu::in_use = cpu::kernels_amx_bf16(float());
        auto got = run<float>(cell, n, o, true);
        cpu::set_num_threads(1);
        differ += run<float>(cell, n, o, true) != got;
        // The gradient of relu jumps where rounding changes a sign.
        if (cell == CellId::rnn_relu || cell == CellId::rnn_relu_layer_norm) want.resize(5), got.resize(5);
        for (std::size_t a = 0; a < want.size(); ++a) {
          float most = 0, off = 0;
          for (std::size_t k = 0; k < want[a].size(); ++k)
            most = std::max(most, std::abs(want[a][k])), off = std::max(off, std::abs(got[a][k] - want[a][k]));
          if (most > 0) largest = std::max(largest, double(off / most) * 256);
        }
        ++count;
      }
  std::printf("%d problems, %.2f units, %d differ\n", count, largest, differ);
}
