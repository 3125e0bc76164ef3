// The integers that the kernels use, for NVRTC, which has no headers of a C library. SPDX-License-Identifier:
// Apache-2.0
#pragma once
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
static_assert(sizeof(int64_t) == 8, "an LP64 platform");
