// The OpenMP runtime that the process has loaded: looked up by name, never linked and never loaded by us.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fusedrnn::cpu {

// Under these names libgomp, LLVM's libomp and Intel's libiomp5 all have them.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);  // 0 threads: the whole team
  int (*num_threads)();
  int (*thread_num)();
  int (*max_threads)();
  int (*in_parallel)();
};

// Null where none is in reach. Once found it stays, as a runtime with threads is never unloaded.
const OpenMP* find_openmp();

}  // namespace fusedrnn::cpu
