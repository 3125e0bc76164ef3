// POSIX's fork handlers and aligned memory, and what stands in for them on Windows. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdlib>

#if defined(_WIN32)
#include <malloc.h>

namespace fusedrnn::cpu {

inline int posix_memalign(void** block, std::size_t alignment, std::size_t bytes) {
  *block = _aligned_malloc(bytes, alignment);
  return *block == nullptr;
}

inline void free_aligned(void* block) { _aligned_free(block); }

inline int at_fork(void (*)(), void (*)(), void (*)()) { return 0; }  // there is no fork

}  // namespace fusedrnn::cpu
#else
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

namespace fusedrnn::cpu {

inline void free_aligned(void* block) { std::free(block); }

inline int at_fork(void (*before)(), void (*in_parent)(), void (*in_child)()) {
  return pthread_atfork(before, in_parent, in_child);
}

}  // namespace fusedrnn::cpu
#endif
