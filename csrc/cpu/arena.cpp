// SPDX-License-Identifier: Apache-2.0
#include "cpu/arena.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/posix.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace fusedrnn::cpu {

namespace {

constexpr std::size_t alignment = 64;
constexpr std::size_t huge_page = std::size_t(2) << 20;
constexpr std::size_t huge_from = 2 * huge_page;
constexpr std::size_t default_limit = std::size_t(1) << 30;

// Sizes are rounded up to a class: eight per doubling, so at most an eighth is wasted.
constexpr int octaves = 54;  // 2^9 to 2^63
constexpr int steps = 8;
constexpr int classes = octaves * steps;
constexpr std::size_t smallest = 512;

struct SizeClass {
  int index;
  std::size_t bytes;
};

SizeClass size_class(std::size_t bytes) {
  if (bytes <= smallest) return {0, smallest};
  const int octave = 64 - __builtin_clzll((bytes - 1) / smallest);  // smallest << (octave - 1) < bytes
  const std::size_t base = smallest << (octave - 1), step = base / steps;
  const std::size_t count = (bytes - base + step - 1) / step;  // 1 to 8
  return {(octave - 1) * steps + static_cast<int>(count), base + count * step};
}

// The list of cached blocks is stored in the blocks themselves: returning a block never needs memory.
struct Cached {
  Cached* newer;
  Cached* older;
  std::uint64_t stamp;
  std::size_t bytes;
};

struct List {
  Cached* newest;
  Cached* oldest;
};

struct Out : std::bad_alloc {
  char text[80];
  explicit Out(std::size_t bytes) { std::snprintf(text, sizeof text, "cannot allocate %zu bytes", bytes); }
  const char* what() const noexcept override { return text; }
};

struct Arena {
  std::mutex mutex;
  List lists[classes + 1];
  std::uint64_t stamp;
  std::size_t live, cached, limit;
};

// Never destroyed: buffers may be returned during exit.
Arena& arena() {
  alignas(Arena) static unsigned char storage[sizeof(Arena)];
  return *reinterpret_cast<Arena*>(storage);
}

std::atomic<long> fail_after{-1};
std::atomic<bool> poisoned{false};

void unlink(List& list, Cached* block) {
  (block->newer != nullptr ? block->newer->older : list.newest) = block->older;
  (block->older != nullptr ? block->older->newer : list.oldest) = block->newer;
}

// Removes the oldest blocks from the cache until it fits into `room`, and links them. The caller frees them without the
// lock.
Cached* evict(Arena& a, std::size_t room) {
  Cached* chain = nullptr;
  while (a.cached > room) {
    int oldest = -1;
    for (int i = 0; i <= classes; ++i) {
      Cached* block = a.lists[i].oldest;
      if (block != nullptr && (oldest < 0 || block->stamp < a.lists[oldest].oldest->stamp)) oldest = i;
    }
    Cached* block = a.lists[oldest].oldest;
    unlink(a.lists[oldest], block);
    a.cached -= block->bytes;
    ASAN_UNPOISON_MEMORY_REGION(block, block->bytes);
    block->older = chain;
    chain = block;
  }
  return chain;
}

void free_chain(Cached* chain) {
  while (chain != nullptr) {
    Cached* next = chain->older;
    free_aligned(chain);
    chain = next;
  }
}

void* fresh(std::size_t bytes) {
  void* block = nullptr;
  const bool huge = bytes >= huge_from;
  if (posix_memalign(&block, huge ? huge_page : alignment, bytes) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole huge pages only: memory after the block is not ours.
  if (huge) madvise(block, bytes / huge_page * huge_page, MADV_HUGEPAGE);
#endif
  return block;
}

void before_fork() { arena().mutex.lock(); }

void after_fork_in_parent() { arena().mutex.unlock(); }

// The child drops the cache: else every block that the parent reuses would be copied.
void after_fork_in_child() {
  Cached* chain = evict(arena(), 0);
  arena().mutex.unlock();
  free_chain(chain);
}

struct Start {
  Start() {
    (new (&arena()) Arena())->limit = default_limit;
    at_fork(before_fork, after_fork_in_parent, after_fork_in_child);
  }
};
const Start start;

bool injected_failure() {
  long left = fail_after.load(std::memory_order_relaxed);
  while (left >= 0 && !fail_after.compare_exchange_weak(left, left - 1)) {
  }
  return left == 0;
}

}  // namespace

Buffer::Buffer(std::size_t wanted) {
  if (wanted > PTRDIFF_MAX / 2 || injected_failure()) throw Out(wanted);
  const SizeClass size = size_class(wanted);
  Arena& a = arena();
  Cached* found = nullptr;
  {
    std::lock_guard<std::mutex> lock(a.mutex);
    List& list = a.lists[size.index];
    found = list.newest;
    if (found != nullptr) {
      unlink(list, found);
      a.cached -= size.bytes;
      a.live += size.bytes;
    }
  }
  void* memory = found;
  if (memory == nullptr) {
    memory = fresh(size.bytes);
    if (memory == nullptr) {
      trim_arena();
      memory = fresh(size.bytes);
    }
    if (memory == nullptr) throw Out(wanted);
    std::lock_guard<std::mutex> lock(a.mutex);
    a.live += size.bytes;
  }
  ASAN_UNPOISON_MEMORY_REGION(memory, size.bytes);
  if (poisoned.load(std::memory_order_relaxed)) std::memset(memory, 0xFF, size.bytes);
  // Rounding up must not hide a write past the end.
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(memory) + wanted, size.bytes - wanted);
  block = memory;
  bytes = wanted;
}

Buffer::~Buffer() {
  if (block == nullptr) return;
  const SizeClass size = size_class(bytes);
  Cached* entry = static_cast<Cached*>(block);
  Arena& a = arena();
  Cached* chain = nullptr;
  ASAN_UNPOISON_MEMORY_REGION(block, size.bytes);
  {
    std::lock_guard<std::mutex> lock(a.mutex);
    a.live -= size.bytes;
    if (size.bytes > a.limit) {
      entry->older = nullptr;
      chain = entry;
    } else {
      chain = evict(a, a.limit - size.bytes);
      List& list = a.lists[size.index];
      *entry = {nullptr, list.newest, ++a.stamp, size.bytes};
      (list.newest != nullptr ? list.newest->newer : list.oldest) = entry;
      list.newest = entry;
      a.cached += size.bytes;
      ASAN_POISON_MEMORY_REGION(entry + 1, size.bytes - sizeof(Cached));
    }
  }
  free_chain(chain);
}

std::size_t checked_product(std::initializer_list<std::size_t> factors) {
  if (std::count(factors.begin(), factors.end(), std::size_t(0))) return 0;
  std::size_t product = 1;
  for (std::size_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product) || product > PTRDIFF_MAX) {
      std::string text = "size too large:";
      const char* between = " ";
      for (std::size_t each : factors) {
        text += between + std::to_string(each);
        between = " * ";
      }
      throw std::overflow_error(text);
    }
  }
  return product;
}

ArenaUse arena_use() {
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  return {a.live, a.cached, a.limit};
}

void set_arena_limit(std::size_t bytes) {
  Arena& a = arena();
  std::unique_lock<std::mutex> lock(a.mutex);
  a.limit = bytes;
  Cached* chain = evict(a, bytes);
  lock.unlock();
  free_chain(chain);
}

void trim_arena() {
  Arena& a = arena();
  std::unique_lock<std::mutex> lock(a.mutex);
  Cached* chain = evict(a, 0);
  lock.unlock();
  free_chain(chain);
}

void fail_allocation_after(long count) { fail_after.store(count < 0 ? -1 : count); }

void poison(bool on) { poisoned.store(on); }

}  // namespace fusedrnn::cpu
