// Stress test of the thread pool, the arena, the control word and the choice of the instruction set.
// SPDX-License-Identifier: Apache-2.0
//
// Needs a compiler only: c++ -std=c++17 -pthread -rdynamic -Icsrc tests/cpu/cpp/runtime_test.cpp
// csrc/cpu/{threads,openmp,arena,isa}.cpp. Runs the part named by the first argument, on OpenMP's threads if the last
// is "openmp"; tests/cpu/test_threads_cpp.py runs all, plain and under the sanitizers.
#include "cpu/control_word.h"
#include "cpu/isa.h"
#include "runtime_checks.h"
#include "runtime_memory.h"
#include "runtime_openmp.h"
#include "runtime_threads.h"

namespace {

void test_control_word() {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  volatile float smallest = std::numeric_limits<float>::denorm_min(), zero = 0, one = 1, three = 3;
  volatile double smallest_double = std::numeric_limits<double>::denorm_min();
  // Rounding up, one exception open (inexact), one flag set: all comes back.
  for (unsigned odd : {0x1F80u, 0x5F80u, 0x0F80u, 0x1F81u, 0xFFC0u, 0x7FBFu}) {
    _mm_setcsr(odd);
    {
      ControlWord word;
      CHECK(_mm_getcsr() == 0x9FC0);
      volatile float third = one / three, nan = zero / zero, tiny = smallest * one;
      volatile double tiny_double = smallest_double * 1.0;
      CHECK(_mm_getcsr() & 1);  // flags do rise inside
      CHECK(third == 0x1.555556p-2f && nan != nan && tiny == 0 && tiny_double == 0);
      {
        ControlWord inner(false);
        CHECK(_mm_getcsr() == 0x1F80);
        volatile float kept = smallest * one;
        std::uint32_t bits;
        const float copy = kept;
        std::memcpy(&bits, &copy, 4);
        CHECK(bits == 1);
      }
      CHECK((_mm_getcsr() & ~0x3Fu) == 0x9FC0);
    }
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    CHECK(after == odd);
  }
#elif defined(__aarch64__)
  const auto set = [](unsigned long control, unsigned long flags) {
    asm volatile("msr fpcr, %0\n\tmsr fpsr, %1" : : "r"(control), "r"(flags) : "memory");
  };
  const auto flags = [] {
    unsigned long word;
    asm volatile("mrs %0, fpsr" : "=r"(word) : : "memory");
    return word;
  };
  constexpr unsigned long flushing = 1UL << 24, invalid = 1;
  volatile float smallest = std::numeric_limits<float>::denorm_min(), zero = 0, one = 1, three = 3;
  // Rounding up, flushing, default NaN, with and without a flag: all comes back.
  for (unsigned long odd : {0UL, 1UL << 22, flushing, 1UL << 25}) {
    for (unsigned long flag : {0UL, invalid}) {
      set(odd, flag);
      {
        ControlWord word;
        CHECK(ControlWord::current() == flushing);
        volatile float third = one / three, nan = zero / zero, tiny = smallest * one;
        CHECK(flags() & invalid);
        CHECK(third == 0x1.555556p-2f && nan != nan);
        {
          ControlWord inner(false);
          CHECK(ControlWord::current() == 0);
          volatile float kept = smallest * one;
          CHECK(tiny == 0 && kept > 0);
        }
        CHECK(ControlWord::current() == flushing);
      }
      const unsigned long after = ControlWord::current(), flags_after = flags();
      set(0, 0);
      CHECK(after == odd && flags_after == flag);
    }
  }
#endif
  // Where nothing can be set, it still compiles and does nothing.
  ControlWord word(true);
}

void print_isa() {
  try {
    const Isa isa = chosen();
    CHECK(isa == chosen() && available(isa));
    std::printf("%s\n", name(isa));
  } catch (const std::invalid_argument& error) {
    CHECK_THROWS(std::invalid_argument, chosen());  // every time
    std::printf("error: %s\n", error.what());
  }
}

void print_threads() {
  try {
    std::printf("%d\n", num_threads());
  } catch (const std::invalid_argument& error) {
    std::printf("error: %s\n", error.what());
  }
}

// Figures

template <class F>
double best_us(int rounds, int inner, F&& f) {
  double best = 1e9;
  for (int i = 0; i < rounds; ++i) {
    const Clock::time_point start = Clock::now();
    for (int k = 0; k < inner; ++k) f();
    best = std::min(best, seconds(start) * 1e6 / inner);
  }
  return best;
}

void bench() {
  for (int threads : {1, 2, 4, 8}) {
    std::printf("empty region, hot, %d threads: %.2f us\n", threads,
                best_us(20, 500, [&] { parallel(threads, [](Region&) {}); }));
  }
  std::vector<double> cold;
  for (int i = 0; i < 100; ++i) {
    sleep_ms(3);
    cold.push_back(best_us(1, 1, [] { parallel(2, [](Region&) {}); }));
  }
  std::sort(cold.begin(), cold.end());
  std::printf("empty region, workers asleep, 2 threads: median %.1f us, 90 %%: %.1f us\n", cold[50], cold[90]);
  for (int threads : {2, 4, 8}) {
    const int steps = 2000;
    const double us = best_us(threads == 2 ? 10 : 3, 1, [&] {
      parallel(threads, [](Region& region) {
        for (int t = 0; t < steps; ++t) region.barrier();
      });
    });
    std::printf("barrier, %d threads: %.3f us\n", threads, us / steps);
  }
  parallel(
      1,
      [](Region& region) {
        const double us = best_us(5, 100000, [&] { region.poll(); });
        std::printf("poll: %.1f ns\n", us * 1000);
      },
      [](void*) { return true; });

  const std::size_t bytes = std::size_t(256) << 20;
  const auto touch = [](char* p, std::size_t size) {
    for (std::size_t i = 0; i < size; i += 4096) p[i] = 1;
  };
  const auto fill = [](char* p, std::size_t size) { std::memset(p, 1, size); };
  const auto with_malloc = [&](auto use) {
    char* p = static_cast<char*>(std::malloc(bytes));
    use(p, bytes);
    asm volatile("" : : "r"(p) : "memory");  // else the compiler drops stores that nobody reads
    std::free(p);
  };
  std::printf("256 MiB, touched / written, ms: malloc %.1f / %.1f", best_us(5, 1, [&] { with_malloc(touch); }) / 1e3,
              best_us(5, 1, [&] { with_malloc(fill); }) / 1e3);
  for (std::size_t limit : {std::size_t(0), std::size_t(1) << 30}) {
    set_arena_limit(limit);
    const double touched = best_us(5, 1, [&] {
      Buffer buffer(bytes);
      touch(buffer.as<char>(), bytes);
    });
    const double written = best_us(5, 1, [&] {
      Buffer buffer(bytes);
      fill(buffer.as<char>(), bytes);
    });
    std::printf(", %s %.2f / %.1f", limit == 0 ? "arena without recycling" : "recycled", touched / 1e3, written / 1e3);
  }
  std::printf("\nsmall buffer: %.3f us\n", best_us(10, 10000, [] { Buffer buffer(2000); }));
}

}  // namespace

int main(int argc, char** argv) {
  alarm(120);
  const std::string part = argc > 1 ? argv[1] : "";
  const std::string option = argc > 2 ? argv[2] : "";
  if (std::strcmp(argv[argc - 1], "openmp") == 0) use_openmp();
  if (part == "regions")
    test_regions();
  else if (part == "errors")
    test_errors();
  else if (part == "interruption")
    test_interruption();
  else if (part == "callers")
    test_callers();
  else if (part == "signals")
    test_signals();
  else if (part == "count")
    test_count();
  else if (part == "thread_pool")
    test_openmp();
  else if (part == "thread_limit")
    test_openmp_limit();
  else if (part == "fork")
    test_fork();
  else if (part == "fork_busy")
    test_fork_busy();
  else if (part == "exit")
    test_exit(option);
  else if (part == "limits")
    test_limits();
  else if (part == "arena")
    test_arena();
  else if (part == "control_word")
    test_control_word();
  else if (part == "isa")
    print_isa();
  else if (part == "threads")
    print_threads();
  else if (part == "quota")
    std::printf("%d\n", cgroup_cpus(option.c_str()));
  else if (part == "bench")
    bench();
  else {
    std::fprintf(stderr, "no such part: '%s'\n", part.c_str());
    return 2;
  }
  return 0;
}
