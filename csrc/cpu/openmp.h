// The OpenMP runtime that the process has loaded. It is looked up by name; we neither link nor load one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fusedrnn::cpu {

// libgomp, LLVM's libomp and Intel's libiomp5 all have these names.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);  // 0 threads: all
  int (*num_threads)();
  int (*thread_num)();
  int (*max_threads)();
  int (*in_parallel)();
};

// Null if there is none. Once found it is valid, since a runtime with threads is never unloaded.
const OpenMP* find_openmp();

}  // namespace fusedrnn::cpu
