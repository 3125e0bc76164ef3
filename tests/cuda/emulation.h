// The kernels on a CPU: what csrc/cuda/device.h includes with FUSEDRNN_EMULATED. SPDX-License-Identifier: Apache-2.0
//
// Every CUDA thread is a fiber; all fibers of a launch share one thread of the operating system (emulation.cpp). A
// fiber runs until it must wait for others: for its block or cluster, for the other lanes of its warp, for a count. Who
// goes on then is drawn.
//
// With FUSEDRNN_RACES every fiber is a thread to ThreadSanitizer, and only sync_block, sync_cluster, add_release with
// load_acquire, and the beginning and end of a launch order memory. What passes between lanes does not.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>
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
  bool clusters;     // the blocks along x are a cluster, and run at once
  uint64_t seed;     // of the order in which threads run
};

// Calls kernel() once for each thread. What went wrong: nothing where it is empty.
std::string launch(const Launch&, const std::function<void()>& kernel);

struct Place {
  const char* file;
  int line;
};

constexpr int kWords = 6;  // that a lane passes at once
struct Words {
  uint32_t of_lane[32][kWords];
};

char* shared_memory();
void* in_block(void* p, unsigned rank);  // what lies there in the shared memory of another block of the cluster
void sync_block(Place);
void sync_cluster(Place);
// Waits for the other lanes of the warp, which must come from the same place with the same `kind`; what all brought.
// Stays as it is until the exchange after the next.
const Words& exchange(const uint32_t* words, int count, int kind, Place);
void poll(const unsigned* counter);  // before every load of a counter that another thread may be waited for with

}  // namespace emulation

extern emulation::Dim threadIdx, blockIdx, blockDim, gridDim;

#define FUSEDRNN_KERNEL(threads) extern "C" void
#define FUSEDRNN_CLUSTER
#define FUSEDRNN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fusedrnn {
namespace cuda {

constexpr int kWarp = 32;

inline char* shared_memory() { return emulation::shared_memory(); }

inline void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::sync_block({file, line});
}

template <class T>
inline T from_lane(T x, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  constexpr int count = sizeof(T) / sizeof(uint32_t);
  uint32_t words[count];
  __builtin_memcpy(words, &x, sizeof x);
  const emulation::Words& all = emulation::exchange(words, count, mask, {file, line});
  __builtin_memcpy(&x, all.of_lane[(int(threadIdx.x) ^ mask) % kWarp], sizeof x);
  return x;
}

template <class F>
struct Sixteen;  // device.h
template <class F>
inline Sixteen<F> load_shared_by_blocks(const Sixteen<F>* p) {
  return *p;
}
inline uint32_t load_two(const uint16_t* p) { return p[0] | uint32_t(p[1]) << 16; }

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// Reads, so that the race detector sees it.
template <class T>
inline void prefetch(const T* p) {
  (void)*static_cast<const volatile T*>(p);
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

constexpr bool kClusters = true;
template <class T>
inline T* in_block(T* p, unsigned rank) {
  return static_cast<T*>(emulation::in_block(p, rank));
}
inline void sync_cluster(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::sync_cluster({file, line});
}

}  // namespace cuda
}  // namespace fusedrnn

#include "emulation_matrix.h"
