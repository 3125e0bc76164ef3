// The kernels of one cell and dtype as a library for Python. SPDX-License-Identifier: Apache-2.0
#include <stdio.h>
#include <string.h>

#include <string>
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
  const size_t sizes[] = {sizeof(A)...};
  bool same = given.count == sizeof...(A);
  for (size_t k = 0; same && k < given.count; ++k) same = given.sizes[k] == sizes[k];
  if (!same) {
    std::string what = "expected arguments of";
    for (size_t size : sizes) what += " " + std::to_string(size);
    what += " bytes, got";
    for (size_t k = 0; k < given.count; ++k) what += " " + std::to_string(given.sizes[k]);
    return what;
  }
  struct Call {
    void (*kernel)(A...);
    void** addresses;
  } call{kernel, given.addresses};
  return emulation::launch(
      launch,
      [](void* p) {
        const Call& call = *static_cast<Call*>(p);
        call.kernel(*static_cast<const A*>(call.addresses[i])...);
      },
      &call);
}

template <class... A>
std::string run(const emulation::Launch& launch, void (*kernel)(A...), const Arguments& given) {
  return run(launch, kernel, given, std::index_sequence_for<A...>());
}

std::string run(const char* name, const emulation::Launch& launch, const Arguments& given) {
#define FUSEDRNN_NAMED(kernel) \
  if (strcmp(name, #kernel) == 0) return run(launch, ::kernel, given)
  FUSEDRNN_NAMED(begin_forward);
  FUSEDRNN_NAMED(step_forward);
  FUSEDRNN_NAMED(step_forward2);
  FUSEDRNN_NAMED(begin_backward);
  FUSEDRNN_NAMED(step_backward);
  FUSEDRNN_NAMED(step_backward2);
  FUSEDRNN_NAMED(finish_backward);
  FUSEDRNN_NAMED(operands);
  FUSEDRNN_NAMED(grid_forward);
  FUSEDRNN_NAMED(grid_backward);
  FUSEDRNN_NAMED(grid_forward_registers);
  FUSEDRNN_NAMED(grid_backward_registers);
  FUSEDRNN_NAMED(cluster_forward);
  FUSEDRNN_NAMED(cluster_backward);
  FUSEDRNN_NAMED(cluster_forward_registers);
  FUSEDRNN_NAMED(cluster_backward_registers);
  return std::string("there is no kernel ") + name;
}

}  // namespace

// Runs a kernel; 0, or 1 with what went wrong in `error`.
extern "C" __attribute__((visibility("default"))) int fusedrnn_launch(const char* kernel, unsigned grid_x,
                                                                      unsigned grid_y, size_t shared, int cooperative,
                                                                      uint64_t seed, void** addresses,
                                                                      const size_t* sizes, size_t count, char* error,
                                                                      size_t error_size) {
  const bool clusters = strncmp(kernel, "cluster", 7) == 0;
  const emulation::Launch launch{{grid_x, grid_y, 1}, unsigned(kThreads), shared, cooperative != 0, clusters, seed};
  const std::string what = run(kernel, launch, Arguments{addresses, sizes, count});
  snprintf(error, error_size, "%s", what.c_str());
  return what.empty() ? 0 : 1;
}
