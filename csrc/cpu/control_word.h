// The floating-point control word of one thread, set whole for the life of an object and restored whole, sticky
// exception flags included: round to nearest, exceptions masked, subnormals flushed to zero if `flush`.
// Always inlined: also used in files compiled for one instruction set.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fusedrnn::cpu {

class ControlWord {
 public:
  [[gnu::always_inline]] explicit ControlWord(bool flush = true) {
#if defined(__x86_64__)
    saved = _mm_getcsr();
    _mm_setcsr(flush ? 0x9FC0 : 0x1F80);  // all masked; 0x8000 flushes results (FTZ), 0x0040 operands (DAZ)
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("mrs %0, fpsr" : "=r"(saved_status));
    const unsigned long word = flush ? 1UL << 24 : 0;  // FZ
    asm volatile("msr fpcr, %0" : : "r"(word));
#else
    (void)flush;
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
  unsigned saved;
#elif defined(__aarch64__)
 private:
  unsigned long saved, saved_status;
#endif
};

}  // namespace fusedrnn::cpu
