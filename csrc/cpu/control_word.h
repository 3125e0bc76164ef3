// The floating-point control word of one thread, set whole for the life of an object and restored whole, sticky
// exception flags included: round to nearest, exceptions masked, subnormals flushed to zero if `flush`.
// Always inlined: also used in files compiled for one instruction set.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fusedrnn::cpu {

class ControlWord {
 public:
#if defined(__x86_64__)
  using Word = unsigned;
  [[gnu::always_inline]] static Word current() { return _mm_getcsr(); }
  // All masked; 0x8000 flushes results (FTZ), 0x0040 operands (DAZ).
  static constexpr Word kernels(bool flush) { return flush ? 0x9FC0 : 0x1F80; }
#elif defined(__aarch64__)
  using Word = unsigned long;
  [[gnu::always_inline]] static Word current() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static constexpr Word kernels(bool flush) { return flush ? 1UL << 24 : 0; }  // FZ
#else
  using Word = int;
  static Word current() { return 0; }
  static constexpr Word kernels(bool) { return 0; }
#endif

  [[gnu::always_inline]] explicit ControlWord(bool flush = true) : ControlWord(kernels(flush)) {}

  // For the caller's own code that runs within a kernel: what `current` said before.
  [[gnu::always_inline]] explicit ControlWord(Word word) {
#if defined(__x86_64__)
    saved = _mm_getcsr();
    _mm_setcsr(word);
#elif defined(__aarch64__)
    saved = current();
    asm volatile("mrs %0, fpsr" : "=r"(saved_status));
    asm volatile("msr fpcr, %0" : : "r"(word));
#else
    (void)word;
#endif
    asm volatile("" ::: "memory");  // no arithmetic on loaded values moves across
  }

  [[gnu::always_inline]] ~ControlWord() {
    asm volatile("" ::: "memory");
#if defined(__x86_64__)
    _mm_setcsr(saved);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(saved));
    asm volatile("msr fpsr, %0" : : "r"(saved_status));
#endif
  }

  ControlWord(const ControlWord&) = delete;
  ControlWord& operator=(const ControlWord&) = delete;

#if defined(__x86_64__)
 private:
  Word saved;
#elif defined(__aarch64__)
 private:
  Word saved, saved_status;
#endif
};

}  // namespace fusedrnn::cpu
