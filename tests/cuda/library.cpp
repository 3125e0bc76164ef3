// The kernels of one cell and dtype as a library for Python. SPDX-License-Identifier: Apache-2.0
#include <stdio.h>
#include <string.h>

#include <utility>

#include "cuda/kernels.cu"

namespace {

// The arguments of a launch: addresses, and the size of what lies there.
struct Arguments {
  void** addresses;
  const size_t* sizes;
  size_t count;
};

template <class... A, size_t... i>
std::string run(const emulation::Launch& launch, void (*kernel)(A...), const Arguments& given,
                std::index_sequence<i...>) {
  if (given.count != sizeof...(A) || !((given.sizes[i] == sizeof(A)) && ...)) return "arguments of other sizes";
  return emulation::launch(launch, [&] { kernel(*static_cast<const A*>(given.addresses[i])...); });
}
template <class... A>
std::string run(const emulation::Launch& launch, void (*kernel)(A...), const Arguments& given) {
  return run(launch, kernel, given, std::index_sequence_for<A...>());
}

#define FUSEDRNN_EACH_KERNEL(f)                                                                          \
  f(begin_forward) f(step_forward) f(step_forward2) f(begin_backward) f(step_backward) f(step_backward2) \
      f(finish_backward) f(operands) f(grid_forward) f(grid_backward) f(cluster_forward) f(cluster_backward)

std::string run(const char* name, const emulation::Launch& launch, const Arguments& given) {
#define FUSEDRNN_NAMED(kernel) \
  if (strcmp(name, #kernel) == 0) return run(launch, ::kernel, given);
  FUSEDRNN_EACH_KERNEL(FUSEDRNN_NAMED)
  return std::string("there is no kernel ") + name;
}

}  // namespace

// Runs a kernel; 0, or 1 with what went wrong in `error`.
FUSEDRNN_EXPORT int fusedrnn_launch(const char* kernel, unsigned grid_x, unsigned grid_y, size_t shared,
                                    int cooperative, uint64_t seed, void** addresses, const size_t* sizes, size_t count,
                                    char* error, size_t error_size) {
  const bool clusters = strncmp(kernel, "cluster", 7) == 0;
  const emulation::Launch launch{{grid_x, grid_y, 1}, unsigned(kThreads), shared, cooperative != 0, clusters, seed};
  const std::string what = run(kernel, launch, {addresses, sizes, count});
  snprintf(error, error_size, "%s", what.c_str());
  return what.empty() ? 0 : 1;
}
