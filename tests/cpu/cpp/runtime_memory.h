// Memory: the arena, and what the system refuses; a part of runtime_test.cpp. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "runtime_checks.h"

namespace {

long page_faults() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt + usage.ru_majflt;
}

void test_arena() {
  constexpr std::size_t MiB = std::size_t(1) << 20;
  CHECK(arena_use().live == 0);
  for (std::size_t bytes :
       {0, 1, 63, 64, 65, 511, 512, 513, 575, 576, 577, 1023, 1024, 1025, 4095, 4097, 100000, 5000011}) {
    Buffer buffer(bytes);
    CHECK(buffer.data() != nullptr && buffer.size() == bytes);
    CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % 64 == 0);
    std::memset(buffer.data(), 1, bytes);
    CHECK(arena_use().live >= bytes && arena_use().live <= bytes + bytes / 8 + 512);
  }
  CHECK(arena_use().live == 0 && arena_use().cached > 5000000);
  {  // Every size gets its own class, and the class at least the size.
    std::mt19937_64 random(3);
    set_arena_limit(0);
    for (int i = 0; i < 2000; ++i) {
      const std::size_t bytes = 1 + random() % (std::size_t(1) << (1 + random() % 22));
      Buffer buffer(bytes);
      CHECK(arena_use().live >= bytes && arena_use().live <= bytes + bytes / 8 + 512 && arena_use().cached == 0);
    }
    set_arena_limit(1024 * MiB);
  }
  {  // Moving.
    Buffer a(1000);
    void* block = a.data();
    Buffer b(std::move(a));
    CHECK(a.data() == nullptr && a.size() == 0 && b.data() == block);
    a = std::move(b);
    CHECK(a.data() == block && b.data() == nullptr);
    Buffer& same = a;
    a = std::move(same);
    CHECK(a.data() == block && a.size() == 1000);
    a = Buffer();
    CHECK(arena_use().live == 0);
  }
  // The same shapes meet the same memory, without page faults.
  const auto shapes = [] {
    Buffer tape(40 * MiB), scratch(300000), other(40 * MiB);
    for (Buffer* buffer : {&tape, &scratch, &other}) {
      for (std::size_t i = 0; i < buffer->size(); i += 4096) buffer->as<char>()[i] = 1;
    }
    return reinterpret_cast<std::uintptr_t>(tape.data()) ^ reinterpret_cast<std::uintptr_t>(other.data());
  };
  const std::uintptr_t first = shapes();
  const long before = page_faults();
  for (int i = 0; i < 5; ++i) CHECK(shapes() == first);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  CHECK(page_faults() - before < 10);
#else
  (void)before;
#endif
  trim_arena();
  CHECK(arena_use().cached == 0);

  // Bounded: the oldest go first, blocks above the limit at once.
  set_arena_limit(10 * MiB);
  for (int i = 0; i < 40; ++i) {
    Buffer buffer(MiB + static_cast<std::size_t>(i) * 200000);
    std::memset(buffer.data(), 1, 100);
    CHECK(arena_use().cached <= 10 * MiB);
  }
  trim_arena();
  {
    Buffer old(2 * MiB), middle(3 * MiB), big(11 * MiB);
    old = Buffer();
    middle = Buffer();
    CHECK(arena_use().cached == 5 * MiB);
    big = Buffer();
    CHECK(arena_use().cached == 5 * MiB);
    Buffer recent(6 * MiB);
    recent = Buffer();  // 2 + 3 + 6 > 10: the oldest, 2 MiB, leaves
    CHECK(arena_use().cached == 9 * MiB);
  }
  set_arena_limit(1024 * MiB);

  // Poison.
  poison(true);
  for (int i = 0; i < 2; ++i) {
    Buffer buffer(1000);
    for (int k = 0; k < 250; ++k) CHECK(std::isnan(buffer.as<float>()[k]));
    for (int k = 0; k < 125; ++k) CHECK(std::isnan(buffer.as<double>()[k]));
    std::memset(buffer.data(), 0, 1000);
  }
  poison(false);

  // Failure.
  fail_allocation_after(2);
  {
    Buffer a(10), b(10);
    CHECK_THROWS(std::bad_alloc, Buffer(10));
    Buffer c(10);
    CHECK(c.data() != nullptr);
  }
  fail_allocation_after(1);
  fail_allocation_after(-1);
  Buffer(10), Buffer(10);
  const std::size_t too_large = std::size_t(1) << 60;
  try {
    Buffer buffer(too_large);
    CHECK(false);
  } catch (const std::bad_alloc& error) {
    CHECK(std::strcmp(error.what(), "cannot allocate 1152921504606846976 bytes") == 0);
  }
  CHECK_THROWS(std::bad_alloc, Buffer{std::numeric_limits<std::size_t>::max()});
  CHECK(arena_use().live == 0);

  // Products.
  const std::size_t max = static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max());
  CHECK(checked_product({}) == 1 && checked_product({3, 5, 7}) == 105);
  CHECK(checked_product({max, max, 0}) == 0);
  CHECK(checked_product({max}) == max);
  CHECK_THROWS(std::overflow_error, checked_product({max, 2}));
  CHECK_THROWS(std::overflow_error, checked_product({max + 1}));
  CHECK_THROWS(std::overflow_error, checked_product({std::size_t(1) << 32, std::size_t(1) << 32}));
  try {
    checked_product({max, 3});
  } catch (const std::overflow_error& error) {
    CHECK(std::string(error.what()) == "size too large: 9223372036854775807 * 3");
  }

  // Many threads, each block owned by one of them at a time.
  set_arena_limit(MiB);
  parallel(4, [](Region& region) {
    std::mt19937 random(static_cast<unsigned>(region.thread));
    std::vector<Buffer> held;
    for (int i = 0; i < 3000; ++i) {
      if (held.size() < 8 && random() % 2) {
        Buffer buffer(1000 + random() % 20000);
        std::memset(buffer.data(), region.thread + 1, buffer.size());
        held.push_back(std::move(buffer));
      } else if (!held.empty()) {
        const Buffer& buffer = held.back();
        for (std::size_t k = 0; k < buffer.size(); k += 97) CHECK(buffer.as<char>()[k] == region.thread + 1);
        held.pop_back();
      }
    }
  });
  CHECK(arena_use().live == 0 && arena_use().cached <= MiB);

  // A forked child keeps the buffers and drops the cache.
  Buffer kept(5000);
  std::memset(kept.data(), 5, kept.size());
  CHECK(arena_use().cached > 0);
#if !defined(__SANITIZE_THREAD__)
  in_child([&] {
    CHECK(arena_use().cached == 0 && kept.as<char>()[4999] == 5);
    kept = Buffer();
    CHECK(arena_use().cached > 0);
  });
#endif
  CHECK(arena_use().cached > 0 && kept.as<char>()[4999] == 5);
#if defined(__SANITIZE_ADDRESS__)
  // Neither the rounding nor the cache hides a wrong access.
  char* block = kept.as<char>();
  CHECK(!__asan_address_is_poisoned(block + 4999) && __asan_address_is_poisoned(block + 5000));
  kept = Buffer();
  CHECK(__asan_address_is_poisoned(block + 100));
#endif
}

// What the system refuses. Not under the sanitizers, which reserve most of the address space themselves.
void test_limits() {
#if defined(__linux__)
  constexpr std::size_t MiB = std::size_t(1) << 20;
  const auto allow_more = [](std::size_t bytes) {
    std::size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlimit limit = {pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE)) + bytes, RLIM_INFINITY};
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
  };
  // Cached blocks give way to one of another size.
  {
    Buffer buffer(256 * MiB);
  }
  allow_more(100 * MiB);
  {
    Buffer buffer(300 * MiB);
  }
  CHECK(arena_use().cached > 256 * MiB);
  CHECK_THROWS(std::bad_alloc, Buffer(1000 * MiB));
  CHECK(arena_use().live == 0 && arena_use().cached == 0);
  // A stack takes 8 MiB: fewer threads than asked for, and the region runs.
  allow_more(50 * MiB);
  int threads = 0;
  parallel(64, [&](Region& region) {
    CHECK(region.barrier());
    if (region.thread == 0) threads = region.threads;
  });
  CHECK(threads >= 1 && threads < 64);
  ring(64, 10, 7);
#endif
}

}  // namespace
