// Memory for tapes and scratch. Blocks go back to a bounded cache, so that a repeated call meets no page fault.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <initializer_list>

namespace fusedrnn::cpu {

// 64-byte aligned memory, not initialised. May be made and destroyed on any thread, and kept across a fork.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);  // std::bad_alloc (what() says how much was asked for)
  Buffer(Buffer&& other) noexcept : block(other.block), bytes(other.bytes) { other.forget(); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer() { release(); }

  void* data() const { return block; }  // null only if made without a size
  std::size_t size() const { return bytes; }
  template <class T>
  T* as() const {
    return static_cast<T*>(block);
  }

 private:
  void release() noexcept;
  void forget() {
    block = nullptr;
    bytes = 0;
  }
  void* block = nullptr;
  std::size_t bytes = 0;
};

// The product, 0 if any factor is 0. std::overflow_error, naming the factors, if it does not fit a ptrdiff_t.
std::size_t checked_product(std::initializer_list<std::size_t> factors);

struct ArenaUse {
  std::size_t live;    // bytes in buffers
  std::size_t cached;  // bytes waiting to be used again
  std::size_t limit;   // `cached` never exceeds this; 1 GiB unless set
};
ArenaUse arena_use();
void set_arena_limit(std::size_t bytes);
void trim_arena();  // gives all cached blocks back to the system

// For tests.
void fail_allocation_after(
    long count);       // `count` more buffers succeed, the next one fails, then all is normal; < 0: off
void poison(bool on);  // fill every new and every recycled buffer with 0xFF (NaN in every float type)

}  // namespace fusedrnn::cpu
