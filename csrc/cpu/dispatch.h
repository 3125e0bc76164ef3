// The kernels of the instruction set in use. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace fusedrnn::cpu {

// Settled once per process (cpu/isa.h says how). T is float or double.
template <class T>
const Kernels<T>& kernels();
template <class T>
const Kernels<T>* kernels_of(Isa isa);  // null where it is not built
// With products in bfloat16: null where they are not built, the processor lacks the instructions, or a level below
// AVX-512 is in use.
const Kernels<float>* bfloat16_kernels();

}  // namespace fusedrnn::cpu
