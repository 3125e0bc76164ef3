// Small kernels, right and wrong ones, by which the emulation itself is tested (test_cuda_emulation.py).
// SPDX-License-Identifier: Apache-2.0
#include <stdio.h>
#include <string.h>

#include "emulation.h"

using namespace fusedrnn::cuda;

struct Arguments {
  double* out;  // one for each thread of the grid
  unsigned* counter;
};

namespace {

double* shared() { return reinterpret_cast<double*>(shared_memory()); }
double& mine(const Arguments& a) { return a.out[(blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x]; }

}  // namespace

#define SMALL_KERNEL(name) FUSEDRNN_EXPORT void name([[maybe_unused]] const Arguments& a)

// A block's threads turn round what they wrote, twice.
static void turn_by(const Arguments& a, bool first_barrier, bool second_barrier) {
  const unsigned other = blockDim.x - 1 - threadIdx.x;
  shared()[threadIdx.x] = threadIdx.x;
  if (first_barrier) sync_block();
  const double once = shared()[other];
  if (second_barrier) sync_block();
  shared()[threadIdx.x] = once + 1;
  sync_block();
  mine(a) = shared()[other];
}
SMALL_KERNEL(turn) { turn_by(a, true, true); }
SMALL_KERNEL(turn_without_first_barrier) { turn_by(a, false, true); }
SMALL_KERNEL(turn_without_second_barrier) { turn_by(a, true, false); }
SMALL_KERNEL(barriers_of_two_branches) {
  if (threadIdx.x < 32)
    sync_block();
  else
    sync_block();
}
SMALL_KERNEL(one_leaves) {
  if (threadIdx.x == 7) return;
  sync_block();
}
SMALL_KERNEL(one_warp_waits_again) {
  for (unsigned i = 0; i < 1 + threadIdx.x / 32; ++i) sync_block();
}

SMALL_KERNEL(lanes) {
  double all = threadIdx.x, first = 0;
  for (int mask = 1; mask < kWarp; mask *= 2) all += from_lane(all, mask);
  first = from_lane(float(threadIdx.x), 21);
  mine(a) = all * 1000 + first;
}
SMALL_KERNEL(lanes_with_two_masks) { mine(a) = from_lane(1.0, threadIdx.x % 2 ? 1 : 2); }
SMALL_KERNEL(lanes_and_barrier) {
  if (threadIdx.x % 32 < 16)
    sync_block();
  else
    mine(a) = from_lane(1.0, 1);
}
SMALL_KERNEL(half_a_warp) {
  if (threadIdx.x % 32 < 16) mine(a) = from_lane(1.0, 1);
}

// Block by block: each adds to what the one before it left.
SMALL_KERNEL(relay) {
  const unsigned block = blockIdx.x;
  if (threadIdx.x == 0)
    while (load_acquire(a.counter) < block) {
    }
  sync_block();
  mine(a) = threadIdx.x + (block ? (&mine(a))[-int(blockDim.x)] : 0);
  sync_block();
  if (threadIdx.x == 0) add_release(a.counter);
}
// Each block waits for all.
SMALL_KERNEL(meet) {
  if (threadIdx.x == 0) {
    add_release(a.counter);
    while (load_acquire(a.counter) < gridDim.x) {
    }
  }
  sync_block();
  mine(a) = 1;
}
SMALL_KERNEL(wait_for_nobody) {
  while (load_acquire(a.counter) < gridDim.x * blockDim.x + 1) {
  }
}
SMALL_KERNEL(wait_again_with_the_same_count) {
  for (int i = 0; i < 3; ++i)
    while (load_acquire(a.counter) > 0) {
    }
  mine(a) = 1;
}

SMALL_KERNEL(beyond_shared_memory) {
  if (threadIdx.x == 0) shared()[blockDim.x] = 1;
}
SMALL_KERNEL(before_shared_memory) {
  if (threadIdx.x == 0) shared()[-1] = 1;
}
SMALL_KERNEL(what_was_in_shared_memory) {
  mine(a) = shared()[threadIdx.x];
  shared()[threadIdx.x] = 1;
}

// Everybody gives its number to the next block of the cluster. A block can be written to when it has begun.
static void ring_by(const Arguments& a, bool first_barrier, bool second_barrier) {
  if (first_barrier) sync_cluster();
  *in_block(shared() + threadIdx.x, (blockIdx.x + 1) % gridDim.x) = double(blockIdx.x);
  if (second_barrier)
    sync_cluster();
  else
    sync_block();
  mine(a) = shared()[threadIdx.x];
}
SMALL_KERNEL(ring) { ring_by(a, true, true); }
SMALL_KERNEL(ring_without_first_barrier) { ring_by(a, false, true); }
SMALL_KERNEL(ring_without_second_barrier) { ring_by(a, true, false); }
SMALL_KERNEL(one_leaves_the_cluster) {
  if (blockIdx.x == 0 && threadIdx.x == 0) return;
  sync_cluster();
}

FUSEDRNN_EXPORT void launch_small(void (*kernel)(const Arguments&), unsigned x, unsigned y, unsigned threads,
                                  size_t shared, int cooperative, int clusters, uint64_t seed, double* out,
                                  unsigned* counter, char* error, size_t error_size) {
  const emulation::Launch launch{{x, y, 1}, threads, shared, cooperative != 0, clusters != 0, seed};
  snprintf(error, error_size, "%s", emulation::launch(launch, [&] { kernel({out, counter}); }).c_str());
}

// sums (16, 8) = a (16, k) b (k, 8) of whole warps' worth, by one instruction: k is 8 for tf32, 16 for the others.
FUSEDRNN_EXPORT void multiply_small(const char* precision, const float* a, const float* b, float* sums) {
  const bool tf32 = strcmp(precision, "tf32") == 0, bf16 = strcmp(precision, "bf16") == 0;
  const auto pack = [&](float x, float y) {
    return bf16 ? to_bf16(x) | uint32_t(to_bf16(y)) << 16 : to_fp16(x) | uint32_t(to_fp16(y)) << 16;
  };
  emulation::launch({{1, 1, 1}, 32, 0, false, false, 0}, [&] {
    const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
    uint32_t words_a[4], words_b[2];
    float mine[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8;
      const float* p = a + row * 16 + 2 * t + i / 2 * 8;
      words_a[i] = tf32 ? to_tf32(a[row * 8 + t + i / 2 * 4]) : pack(p[0], p[1]);
    }
    for (int i = 0; i < 2; ++i) {
      const float* p = b + (2 * t + i * 8) * 8 + g;
      words_b[i] = tf32 ? to_tf32(b[(t + i * 4) * 8 + g]) : pack(p[0], p[8]);
    }
    (tf32 ? multiply_tf32 : bf16 ? multiply_bf16 : multiply_fp16)(mine, words_a, words_b, __FILE__, __LINE__);
    for (int i = 0; i < 4; ++i) sums[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = mine[i];
  });
}

FUSEDRNN_EXPORT void round_small(const char* precision, const float* x, uint32_t* bits, size_t n) {
  for (size_t i = 0; i < n; ++i)
    bits[i] = strcmp(precision, "tf32") == 0   ? to_tf32(x[i])
              : strcmp(precision, "bf16") == 0 ? to_bf16(x[i])
                                               : to_fp16(x[i]);
}
FUSEDRNN_EXPORT void widen_small(const char* precision, const uint16_t* bits, float* x, size_t n) {
  for (size_t i = 0; i < n; ++i) x[i] = strcmp(precision, "bf16") == 0 ? of_bf16(bits[i]) : of_fp16(bits[i]);
}
