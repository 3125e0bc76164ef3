// What the kernels ask of the machine, one small function each. Everything that orders memory between threads is here.
//
// Compiled for a GPU these are a few instructions. With FUSEDRNN_EMULATED the same kernels are compiled for a CPU, and
// a header "emulation.h" (tests/cuda) provides the same names. Nothing but CUDA's built-in names is used, so NVRTC
// needs no header of a toolkit. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdint.h>

namespace fusedrnn {
namespace cuda {
template <class F>
struct alignas(16) Sixteen {  // bytes in memory, moved at once
  static constexpr int count = 16 / sizeof(F);
  F of[count];
};
}  // namespace cuda
}  // namespace fusedrnn

#if defined(FUSEDRNN_EMULATED)
#include "emulation.h"
#else

#define FUSEDRNN_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)

namespace fusedrnn {
namespace cuda {

constexpr int kWarp = 32;
// Of blocks, along the x axis of the grid; from sm_90 on. Every GPU that has clusters can run 8 blocks as one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#define FUSEDRNN_CLUSTER
#else
constexpr bool kClusters = true;
#define FUSEDRNN_CLUSTER __cluster_dims__(8, 1, 1)
#endif

// Memory that the threads of a block share, of the size the launch asked for.
FUSEDRNN_INLINE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// All threads of the block have come here, and see what the others wrote before.
FUSEDRNN_INLINE void sync_block() { __syncthreads(); }
// The same of a cluster.
FUSEDRNN_INLINE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The place in the shared memory of another block of the cluster that p is in this one's.
template <class T>
FUSEDRNN_INLINE T* in_block(T* p, unsigned rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
}

// What the lane whose number differs in the bits of `mask` passes; all lanes of the warp call it together.
template <class T>
FUSEDRNN_INLINE T from_lane(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// A load that does not take what an earlier one left in this multiprocessor's own cache: of what other blocks write.
template <class F>
FUSEDRNN_INLINE Sixteen<F> load_shared_by_blocks(const Sixteen<F>* p) {
  const uint4 words = __ldcg(reinterpret_cast<const uint4*>(p));
  return *reinterpret_cast<const Sixteen<F>*>(&words);
}

// Rounded correctly.
FUSEDRNN_INLINE float square_root(float x) { return __fsqrt_rn(x); }
FUSEDRNN_INLINE double square_root(double x) { return __dsqrt_rn(x); }

// Two neighbours in one word, the first in the lower half; p is aligned to it.
FUSEDRNN_INLINE uint32_t load_two(const uint16_t* p) { return *reinterpret_cast<const uint32_t*>(p); }

// Into this multiprocessor's cache, while the thread goes on: of what no thread of the launch writes.
template <class T>
FUSEDRNN_INLINE void prefetch(const T* p) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

// Counting up, after everything that this thread knows to be written; and the count, before everything that follows.
FUSEDRNN_INLINE void add_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
FUSEDRNN_INLINE unsigned load_acquire(const unsigned* counter) {
  unsigned count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return count;
}

// sums += a b by the matrix units; a (16, k), b (k, 8), sums (16, 8), over the lanes of a warp as PTX lays it down. k
// is 8 for tf32, 16 for the pairs of bf16 and fp16.
#define FUSEDRNN_MULTIPLY(name, shape, type)                                          \
  FUSEDRNN_INLINE void name(float* sums, const uint32_t* a, const uint32_t* b) {      \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type              \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"         \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
FUSEDRNN_MULTIPLY(multiply_tf32, "m16n8k8", "tf32")
FUSEDRNN_MULTIPLY(multiply_bf16, "m16n8k16", "bf16")
FUSEDRNN_MULTIPLY(multiply_fp16, "m16n8k16", "f16")
#undef FUSEDRNN_MULTIPLY
// Rounded to 10 bits of mantissa.
FUSEDRNN_INLINE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
// Rounded to nearest, and back.
FUSEDRNN_INLINE uint16_t to_bf16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
FUSEDRNN_INLINE uint16_t to_fp16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
FUSEDRNN_INLINE float of_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
FUSEDRNN_INLINE float of_fp16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

}  // namespace cuda
}  // namespace fusedrnn
#endif

namespace fusedrnn {
namespace cuda {

#if !defined(FUSEDRNN_WARPS)
#define FUSEDRNN_WARPS 8
#endif
constexpr int kWarps = FUSEDRNN_WARPS, kThreads = kWarps * kWarp;  // of a block

FUSEDRNN_INLINE int lane() { return int(threadIdx.x % kWarp); }

}  // namespace cuda
}  // namespace fusedrnn
