// Memory for tapes and scratch. Freed blocks are kept in a bounded cache, so that repeated calls have no page faults.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <initializer_list>
#include <utility>

namespace fusedrnn::cpu {

// 64-byte aligned memory, not initialised. It may be created and destroyed on any thread, and kept across a fork.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);  // std::bad_alloc (what() has the number of bytes)
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block, other.block), std::swap(bytes, other.bytes);
    return *this;
  }
  ~Buffer();

  void* data() const { return block; }  // null only if made without a size
  std::size_t size() const { return bytes; }
  template <class T>
  T* as() const {
    return static_cast<T*>(block);
  }

 private:
  void* block = nullptr;
  std::size_t bytes = 0;
};

// The product, 0 if any factor is 0. std::overflow_error, with the factors, if it exceeds a ptrdiff_t.
std::size_t checked_product(std::initializer_list<std::size_t> factors);

struct ArenaUse {
  std::size_t live;    // bytes in buffers
  std::size_t cached;  // bytes that can be reused
  std::size_t limit;   // the maximum of `cached`; 1 GiB by default
};
ArenaUse arena_use();
void set_arena_limit(std::size_t bytes);
void trim_arena();  // returns all cached blocks to the system

// For tests.
void fail_allocation_after(
    long count);       // `count` more buffers succeed, the next one fails, later ones succeed; < 0: off
void poison(bool on);  // fill every new or reused buffer with 0xFF (NaN in every float type)

}  // namespace fusedrnn::cpu
