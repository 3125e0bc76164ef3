// The arrays of a call as kernels take them, also in bfloat16. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <type_traits>
#include <vector>

#include "arrays.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"

namespace fusedrnn {

// The arrays themselves; or, where a call is in bfloat16, whose arrays are given as int16 with their bits, copies in
// float. `widen` fills those that the kernels read, `round` writes what the kernels wrote to the arrays.
template <class T>
class Arrays {
 public:
  explicit Arrays(bool bfloat16_) : bfloat16(bfloat16_) {}

  // No copy: products read it as it is.
  const T* matrix(const py::object& o, const char* name, Shape shape) const {
    return bfloat16 ? reinterpret_cast<const T*>(fusedrnn::need<std::int16_t>(o, name, shape))
                    : fusedrnn::need<T>(o, name, shape);
  }
  const T* need(const py::object& o, const char* name, Shape shape) {
    return bfloat16 ? copied(read, fusedrnn::need<std::int16_t>(o, name, shape), shape)
                    : fusedrnn::need<T>(o, name, shape);
  }
  const T* maybe(const py::object& o, const char* name, Shape shape) {
    return o.is_none() ? nullptr : need(o, name, shape);
  }
  Sequence<const T> sequence(const py::object& o, const char* name, Shape shape) {
    if (!bfloat16 || o.is_none()) return fusedrnn::sequence<T>(o, name, shape);
    const auto bits = fusedrnn::sequence<std::int16_t>(o, name, shape);
    const Index strides[] = {bits.step, bits.row};
    const Index width = shape.end()[-1];
    return {copied(read, bits.data, shape, strides), shape.end()[-2] * width, width};
  }
  T* output(py::object& to, const char* name, Shape shape) {
    if (!bfloat16) return fusedrnn::output<T>(to, name, shape);
    const std::int16_t* const bits = fusedrnn::output<std::int16_t>(to, name, shape);
    return to.is_none() ? nullptr : copied(written, bits, shape);
  }

  // Without the GIL.
  void widen() const { convert<false>(read); }
  void round() const { convert<true>(written); }

 private:
  struct Copy {
    cpu::Bfloat16* bits;
    T* copy;
    Index rows, of_step, width, step, row;  // `of_step` rows, then the next step
  };

  T* copied(std::vector<Copy>& to, const std::int16_t* bits, Shape shape, const Index* strides = nullptr) {
    const Index width = shape.end()[-1], of_step = shape.size() > 1 ? shape.end()[-2] : 1;
    std::size_t bytes = sizeof(T);
    for (const Index n : shape) bytes = cpu::checked_product({bytes, std::size_t(n)});
    const Index rows = Index(bytes / sizeof(T)) / width;
    memory.emplace_back(bytes);
    to.push_back({reinterpret_cast<cpu::Bfloat16*>(const_cast<std::int16_t*>(bits)), memory.back().template as<T>(),
                  rows, of_step, width, strides ? strides[0] : of_step * width, strides ? strides[1] : width});
    return to.back().copy;
  }
  template <bool rounds>
  static void convert(const std::vector<Copy>& copies) {
    if constexpr (std::is_same_v<T, float>) {
      Index total = 0;
      for (const Copy& c : copies) total += c.rows * c.width;
      if (total == 0) return;
      const auto body = [](void* data, cpu::Region& region) {
        const cpu::Kernels<float>& kernels = *cpu::bfloat16_kernels();
        for (const Copy& c : *static_cast<const std::vector<Copy>*>(data)) {
          const Index end = c.rows * (region.thread + 1) / region.threads;
          for (Index k = c.rows * region.thread / region.threads; k < end; ++k) {
            cpu::Bfloat16* const bits = c.bits + k / c.of_step * c.step + k % c.of_step * c.row;
            rounds ? kernels.to_bfloat16(c.copy + k * c.width, bits, c.width)
                   : kernels.to_float(bits, c.copy + k * c.width, c.width);
          }
        }
      };
      constexpr Index kAlone = 100000;  // numbers, which take about as long as waking a thread
      cpu::run(total > kAlone ? cpu::num_threads() : 1, body, const_cast<std::vector<Copy>*>(&copies));
    }
  }

  bool bfloat16;
  std::vector<Copy> read, written;
  std::vector<cpu::Buffer> memory;
};

}  // namespace fusedrnn
