// SPDX-License-Identifier: Apache-2.0
#include "cpu/timing.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "cpu/arena.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"

namespace fusedrnn::cpu {

namespace {

using std::int64_t;
using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Runs f(region) on exactly so many threads: on fewer it would be another measurement.
template <class F>
void on_all(int threads, F&& f) {
  struct Context {
    F& f;
    int threads;
  } context = {f, threads};
  const auto body = [](void* data, Region& region) {
    const Context& c = *static_cast<const Context*>(data);
    if (region.threads != c.threads) throw std::runtime_error("the pool has fewer threads to give");
    c.f(region);
  };
  run(threads, body, &context);
}

void check(bool right, const char* what) {
  if (!right) throw std::invalid_argument(what);
}

// With the kernels' own vectors; of the sum no use is made.
void read(const float* from, int64_t count) {
  const float sum = kernels<float>().sum(from, count);
  asm volatile("" : : "g"(&sum) : "memory");
}

}  // namespace

double time_region(int threads, double idle) {
  check(idle >= 0 && idle <= 1, "idle: expected 0 to 1 second");
  const Clock::time_point begin = Clock::now();
  while (since(begin) < idle) {
  }
  const Clock::time_point start = Clock::now();
  on_all(threads, [](Region&) {});
  return since(start);
}

double time_barriers(int threads, int64_t count) {
  check(count > 0, "count: expected at least 1");
  double seconds = 0;
  on_all(threads, [&](Region& region) {
    if (!region.barrier()) return;  // all are here
    const Clock::time_point start = Clock::now();
    for (int64_t i = 0; i < count; ++i)
      if (!region.barrier()) return;
    if (region.thread == 0) seconds = since(start) / double(count);
  });
  return seconds;
}

double time_transfers(int64_t count) {
  check(count > 0, "count: expected at least 1");
  struct alignas(128) {
    std::atomic<int64_t> value{0};
  } turn;
  double seconds = 0;
  on_all(2, [&](Region& region) {
    if (!region.barrier()) return;
    const Clock::time_point start = Clock::now();
    for (int64_t i = region.thread; i < count; i += 2) {
      while (turn.value.load(std::memory_order_acquire) != i) {
      }
      turn.value.store(i + 1, std::memory_order_release);
    }
    if (!region.barrier()) return;
    if (region.thread == 0) seconds = since(start) / double(count);
  });
  return seconds;
}

double time_reads(int threads, int64_t bytes, int64_t passes) {
  check(bytes > 0 && bytes <= int64_t(1) << 32, "bytes: expected 1 to 2^32");
  check(passes > 0, "passes: expected at least 1");
  const Buffer memory(static_cast<std::size_t>(bytes));
  const int64_t count = bytes / int64_t(sizeof(float));
  double seconds = 0;
  on_all(threads, [&](Region& region) {
    const int64_t begin = count * region.thread / region.threads, end = count * (region.thread + 1) / region.threads;
    float* const part = memory.as<float>() + begin;
    std::fill(part, part + (end - begin), 0.0f);  // its pages near the thread that reads them
    read(part, end - begin);
    if (!region.barrier()) return;
    const Clock::time_point start = Clock::now();
    for (int64_t pass = 0; pass < passes; ++pass) read(part, end - begin);
    if (!region.barrier()) return;
    if (region.thread == 0) seconds = since(start) / double(passes);
  });
  return seconds;
}

}  // namespace fusedrnn::cpu
