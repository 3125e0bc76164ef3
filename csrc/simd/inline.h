// How the small functions of cells and loops are compiled: into their callers, on a GPU for the device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#if defined(__CUDACC__)
#define FUSEDRNN_INLINE __device__ __forceinline__
#define FUSEDRNN_UNROLL _Pragma("unroll")
#else
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#define FUSEDRNN_UNROLL _Pragma("GCC unroll 8")
#endif

// For what every cell's loop calls: one copy of it, or the build takes twice as long.
#define FUSEDRNN_NOINLINE __attribute__((noinline))
