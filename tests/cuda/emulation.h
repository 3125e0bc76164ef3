// The kernels on a CPU: what csrc/cuda/device.h includes with FUSEDRNN_EMULATED. SPDX-License-Identifier: Apache-2.0
//
// Every CUDA thread is a fiber; all fibers of a launch share one thread of the operating system (emulation.cpp). A
// fiber runs until it must wait for others: in sync_block, from_lane and load_acquire. Who goes on then is drawn.
//
// With FUSEDRNN_RACES every fiber is a thread to ThreadSanitizer, and only sync_block, add_release with load_acquire,
// and the beginning and end of a launch order memory. What passes between lanes does not.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>

namespace emulation {

struct Dim {
  unsigned x, y, z;
};

struct Launch {
  Dim grid;
  unsigned threads;  // of a block: whole warps
  size_t shared;     // bytes of a block's shared memory, NaN at first
  bool cooperative;  // all blocks run at once; otherwise only some
  uint64_t seed;     // of the order in which threads run
};

// Calls kernel(argument) once for each thread. What went wrong: nothing where it is empty.
std::string launch(const Launch&, void (*kernel)(void*), void* argument);

struct Place {
  const char* file;
  int line;
};

char* shared_memory();
void sync_block(Place);
uint64_t exchange(uint64_t bits, int mask, Place);
void poll(const unsigned* counter);  // before every load of a counter that another thread may be waited for with

}  // namespace emulation

extern emulation::Dim threadIdx, blockIdx, blockDim, gridDim;

#define FUSEDRNN_KERNEL(threads) extern "C" void

namespace fusedrnn {
namespace cuda {

constexpr int kWarp = 32;

inline char* shared_memory() { return emulation::shared_memory(); }

inline void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::sync_block({file, line});
}

template <class T>
inline T from_lane(T x, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane passes a number");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &x, sizeof x);
  bits = emulation::exchange(bits, mask, {file, line});
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
inline T load_shared_by_blocks(const T* p) {
  return *p;
}

inline void add_release(unsigned* counter) { __atomic_fetch_add(counter, 1u, __ATOMIC_RELEASE); }
inline unsigned load_acquire(const unsigned* counter) {
  emulation::poll(counter);
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

// The same without order: no kernel has them, mutants do.
inline void add_relaxed(unsigned* counter) { __atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED); }
inline unsigned load_relaxed(const unsigned* counter) {
  emulation::poll(counter);
  return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

}  // namespace cuda
}  // namespace fusedrnn

#include "emulation_matrix.h"
