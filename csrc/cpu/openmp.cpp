// SPDX-License-Identifier: Apache-2.0
#include "cpu/openmp.h"

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

namespace fusedrnn::cpu {

#ifdef RTLD_DEFAULT

namespace {

template <class F>
bool find(F*& function, const char* name) {
  function = reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
  return function != nullptr;
}

}  // namespace

const OpenMP* find_openmp() {
  OpenMP all;
  if (!find(all.parallel, "GOMP_parallel") || !find(all.num_threads, "omp_get_num_threads") ||
      !find(all.thread_num, "omp_get_thread_num") || !find(all.max_threads, "omp_get_max_threads") ||
      !find(all.in_parallel, "omp_in_parallel"))
    return nullptr;
  static const OpenMP found = all;
  return &found;
}

#else

const OpenMP* find_openmp() { return nullptr; }

#endif

}  // namespace fusedrnn::cpu
