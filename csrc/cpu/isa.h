// The levels a kernel is compiled for, and which one this process uses.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

namespace fusedrnn::cpu {

// From the least preferred to the most, on each machine.
enum class Isa { portable, portable_fma, avx2, avx512, neon };
constexpr Isa all_isas[] = {Isa::portable, Isa::portable_fma, Isa::avx2, Isa::avx512, Isa::neon};

const char* name(Isa isa);  // as FUSEDRNN_ISA spells it
bool detected(Isa isa);     // this processor and this operating system can run it
bool built(Isa isa);        // compiled into this library (FUSEDRNN_HAS_...)
inline bool available(Isa isa) { return built(isa) && detected(isa); }

// The level in use, settled once: FUSEDRNN_ISA, else the best available one. std::invalid_argument if the variable
// names no level, or one that is not available; it names those that are.
Isa chosen();

// The levels with products in bfloat16, which belong to avx512. FUSEDRNN_ISA may name one of them instead; else it is
// the best. None where there are no kernels for bfloat16.
enum class Bfloat16Isa { none, avx512_bf16, amx_bf16 };
constexpr Bfloat16Isa all_bfloat16_isas[] = {Bfloat16Isa::avx512_bf16, Bfloat16Isa::amx_bf16};

const char* name(Bfloat16Isa isa);
bool available(Bfloat16Isa isa);  // of amx_bf16, the first time, asks Linux for the tiles
Bfloat16Isa chosen_bfloat16();

// Whether the weight gradients of large chunks read copies in the order of their tiles: `large` means in float32 and
// float64, where the weights are large too. Results never depend on it. FUSEDRNN_ORDERED_COPIES, one of the names, else
// by the machine: isa.cpp has the figures. std::invalid_argument for another value.
enum class OrderedCopies { never, large, always };
OrderedCopies ordered_copies();
OrderedCopies ordered_copies_of(const std::string& name);
const char* name(OrderedCopies copies);
void set_ordered_copies(OrderedCopies copies);  // for tests

// Whether products bring the weights that are read next into the core's cache, where it cannot hold all of them.
// Results never depend on it. FUSEDRNN_PREFETCH, never or always, else by the machine: isa.cpp.
// std::invalid_argument for another value.
bool prefetch_weights();
void set_prefetch_weights(bool on);  // for tests

}  // namespace fusedrnn::cpu
