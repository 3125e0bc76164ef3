// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fusedrnn::cpu {

const char* name(Isa isa) {
  constexpr const char* names[] = {"portable", "portable_fma", "avx2", "avx512", "neon"};
  return names[int(isa)];
}

#if defined(__x86_64__)
namespace {

// By CPUID, and by XGETBV whether the operating system saves the registers. Not by __builtin_cpu_supports: in a
// program for Windows by Zig's Clang it says no to everything.
struct Features {
  bool intel = false, amd_25 = false, fma = false, avx2 = false, avx512 = false, bfloat16 = false, amx = false;

  Features() {
    unsigned a = 0, b = 0, c = 0, d = 0, saved = 0;
    if (!__get_cpuid(0, &a, &b, &c, &d)) return;
    intel = b == signature_INTEL_ebx;
    const bool amd = b == signature_AMD_ebx;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    amd_25 = amd && (a >> 8 & 0xF) + (a >> 20 & 0xFF) == 25;
    if (!(c & bit_OSXSAVE)) return;
    asm volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    fma = (saved & 0x06) == 0x06 && (c & bit_AVX) && (c & bit_FMA);
    if (!fma || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    constexpr unsigned all = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    avx2 = b & bit_AVX2;
    avx512 = (saved & 0xE6) == 0xE6 && (b & all) == all;
    constexpr unsigned tiles = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
    amx = (saved & 0x60000) == 0x60000 && (d & tiles) == tiles;
    bfloat16 = avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
  }
};

const Features& features() {
  static const Features found;
  return found;
}

}  // namespace
#endif

bool detected(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::portable_fma:
      return features().fma;
    case Isa::avx2:
      return features().avx2;
    case Isa::avx512:
      return features().avx512;
    case Isa::neon:
      return false;
  }
  return false;
#elif defined(__aarch64__)
  return isa == Isa::portable || isa == Isa::portable_fma || isa == Isa::neon;  // part of every aarch64
#else
  return isa == Isa::portable;
#endif
}

bool built(Isa isa) {
  switch (isa) {
    case Isa::portable:
#if defined(FUSEDRNN_HAS_PORTABLE_FMA)
    case Isa::portable_fma:
#endif
#if defined(FUSEDRNN_HAS_AVX2)
    case Isa::avx2:
#endif
#if defined(FUSEDRNN_HAS_AVX512)
    case Isa::avx512:
#endif
#if defined(FUSEDRNN_HAS_NEON)
    case Isa::neon:
#endif
      return true;
    default:
      return false;
  }
}

const char* name(Bfloat16Isa isa) {
  constexpr const char* names[] = {"none", "avx512_bf16", "amx_bf16"};
  return names[int(isa)];
}

bool available(Bfloat16Isa isa) {
  switch (isa) {
#if defined(FUSEDRNN_HAS_AVX512_BF16)
    case Bfloat16Isa::avx512_bf16:
      return features().bfloat16;
#endif
#if defined(FUSEDRNN_HAS_AMX_BF16) && defined(__linux__)
    case Bfloat16Isa::amx_bf16: {
      if (!features().bfloat16 || !features().amx) return false;
      constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
      static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
      return granted;
    }
#endif
    default:
      return false;
  }
}

namespace {

bool forces(Bfloat16Isa isa) {
  const char* forced = std::getenv("FUSEDRNN_ISA");
  return forced != nullptr && std::strcmp(forced, name(isa)) == 0;
}

Isa choose() {
  const char* forced = std::getenv("FUSEDRNN_ISA");
  const bool force = forced != nullptr && *forced != '\0';
  Isa best = Isa::portable;
  std::string names;
  for (Isa isa : all_isas) {
    if (!available(isa)) continue;
    if (force && std::strcmp(forced, name(isa)) == 0) return isa;
    best = isa;
    names += (names.empty() ? "" : ", ") + std::string(name(isa));
  }
  if (!force) return best;
  for (Bfloat16Isa isa : all_bfloat16_isas) {
    if (!available(isa)) continue;
    if (forces(isa)) return Isa::avx512;
    names += ", " + std::string(name(isa));
  }
  throw std::invalid_argument("FUSEDRNN_ISA: got '" + std::string(forced) + "', available here: " + names);
}

constexpr OrderedCopies all_copies[] = {OrderedCopies::never, OrderedCopies::large, OrderedCopies::always};
std::atomic<int> copies{-1}, prefetch{-1};

// Forward and backward of the LSTM at (50,64,512,512), (25,128,1024,1024), (25,16,1024,1024), (100,64,64,256) take so
// many times as long with copies: on an Intel Xeon with AVX-512 0.80, 0.81, 0.85, 0.92 by a prototype that did more
// besides; on an AMD Zen 4 by AVX2 0.89, 0.91, 0.85, 0.93. By AVX-512 on a Zen 4 (AMD's family 25; no other of this
// family has it), backward takes on one thread 0.99, 0.94, 0.97, 1.07, in float64 0.83, 0.80, 1.00, 1.01.
OrderedCopies choose_ordered_copies() {
  const char* forced = std::getenv("FUSEDRNN_ORDERED_COPIES");
  if (forced != nullptr && *forced != '\0') return ordered_copies_of(forced);
  if (chosen() == Isa::avx2) return OrderedCopies::always;
#if defined(__x86_64__)
  if (features().intel) return OrderedCopies::always;
  if (features().amd_25 && chosen() == Isa::avx512) return OrderedCopies::large;
#endif
  return OrderedCopies::never;
}

// On an Intel Xeon, whose L3 gives a core 20 to 24 GB/s, a prototype without it took 1.05 to 1.16 times as long forward
// at H >= 256, and 1.00 to 1.05 times forward and backward. On an AMD Zen 4 it changes nothing: 0.99 to 1.01.
bool choose_prefetch() {
  const char* forced = std::getenv("FUSEDRNN_PREFETCH");
  if (forced != nullptr && *forced != '\0') {
    if (std::strcmp(forced, "always") == 0) return true;
    if (std::strcmp(forced, "never") == 0) return false;
    throw std::invalid_argument("FUSEDRNN_PREFETCH: expected never or always, got '" + std::string(forced) + "'");
  }
#if defined(__x86_64__)
  return features().intel;
#else
  return false;
#endif
}

}  // namespace

const char* name(OrderedCopies copies) {
  constexpr const char* names[] = {"never", "large", "always"};
  return names[int(copies)];
}

OrderedCopies ordered_copies_of(const std::string& wanted) {
  for (OrderedCopies each : all_copies)
    if (wanted == name(each)) return each;
  throw std::invalid_argument("FUSEDRNN_ORDERED_COPIES: expected never, large or always, got '" + wanted + "'");
}

OrderedCopies ordered_copies() {
  if (copies.load(std::memory_order_relaxed) < 0) set_ordered_copies(choose_ordered_copies());
  return OrderedCopies(copies.load(std::memory_order_relaxed));
}

void set_ordered_copies(OrderedCopies chosen) { copies.store(int(chosen), std::memory_order_relaxed); }

bool prefetch_weights() {
  if (prefetch.load(std::memory_order_relaxed) < 0) set_prefetch_weights(choose_prefetch());
  return prefetch.load(std::memory_order_relaxed) != 0;
}

void set_prefetch_weights(bool on) { prefetch.store(on, std::memory_order_relaxed); }

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

Bfloat16Isa chosen_bfloat16() {
  Bfloat16Isa best = Bfloat16Isa::none;
  if (chosen() != Isa::avx512) return best;
  for (Bfloat16Isa isa : all_bfloat16_isas) {
    if (!available(isa)) continue;
    best = isa;
    if (forces(isa)) break;
  }
  return best;
}

}  // namespace fusedrnn::cpu
