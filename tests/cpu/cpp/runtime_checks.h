// What the parts of runtime_test.cpp share: checks, a region from anything callable, a recurrence split over threads,
// forked children. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/arena.h"
#include "cpu/control_word.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace fusedrnn::cpu;
using Clock = std::chrono::steady_clock;

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                                 \
    }                                                                                \
  } while (0)

#define CHECK_THROWS(type, statement) \
  do {                                \
    bool thrown = false;              \
    try {                             \
      statement;                      \
    } catch (const type&) {           \
      thrown = true;                  \
    }                                 \
    CHECK(thrown);                    \
  } while (0)

namespace {

double seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// A body from anything callable.
template <class F>
Outcome parallel(int threads, F&& f, PollHook hook = nullptr, void* hook_context = nullptr) {
  const Body body = [](void* context, Region& region) { (*static_cast<std::remove_reference_t<F>*>(context))(region); };
  return run(threads, body, const_cast<void*>(static_cast<const void*>(&f)), hook, hook_context);
}

// A recurrence split over threads: every step each thread reads what the others wrote before the barrier. Plain memory,
// so that the thread sanitizer judges the barrier. Right for any number of threads.
void ring(int threads, int steps, int cells) {
  std::vector<std::uint64_t> now(cells), next(cells), expected(cells), scratch(cells);
  for (int i = 0; i < cells; ++i) now[i] = expected[i] = static_cast<std::uint64_t>(i) + 1;
  for (int t = 0; t < steps; ++t) {
    for (int i = 0; i < cells; ++i) scratch[i] = expected[i] * 31 + expected[(i + 1) % cells];
    expected.swap(scratch);
  }
  std::atomic<int> inside{0};
  const Outcome outcome = parallel(threads, [&](Region& region) {
    ++inside;
    CHECK(region.threads <= threads && region.thread < region.threads);
    std::uint64_t *from = now.data(), *to = next.data();
    for (int t = 0; t < steps; ++t) {
      for (int i = region.thread; i < cells; i += region.threads) to[i] = from[i] * 31 + from[(i + 1) % cells];
      CHECK(region.poll());
      CHECK(region.barrier());
      std::swap(from, to);
    }
  });
  CHECK(outcome == Outcome::done);
  CHECK(inside <= threads);
  CHECK((steps % 2 ? next : now) == expected);
}

// Of a forked child: a tenth of a second's work on a quiet machine. What takes longer hangs.
constexpr unsigned child_seconds = 60;

// Runs f in a forked child; a hang there is an alarm.
template <class F>
void in_child(F&& f) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    alarm(child_seconds);
    f();
    std::_Exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void whole_pool() {
  parallel(3, [](Region& region) { CHECK(region.threads == 3 && region.barrier()); });
  ring(3, 20, 7);
}

}  // namespace
