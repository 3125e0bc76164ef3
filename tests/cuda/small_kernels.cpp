// Small kernels, right and wrong ones, by which the emulation itself is tested (test_cuda_emulation.py).
// SPDX-License-Identifier: Apache-2.0
#include <stdio.h>
#include <string.h>

#include "emulation.h"

namespace {

using namespace fusedrnn::cuda;

struct Arguments {
  double* out;  // one for each thread of the grid
  unsigned* counter;
};

double* shared() { return reinterpret_cast<double*>(shared_memory()); }
double& mine(const Arguments& a) { return a.out[(blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x]; }

// A block's threads turn round what they wrote, twice.
void turn(const Arguments& a) {
  const unsigned other = blockDim.x - 1 - threadIdx.x;
  shared()[threadIdx.x] = threadIdx.x;
  sync_block();
  const double once = shared()[other];
  sync_block();
  shared()[threadIdx.x] = once + 1;
  sync_block();
  mine(a) = shared()[other];
}
void turn_without_first_barrier(const Arguments& a) {
  shared()[threadIdx.x] = threadIdx.x;
  mine(a) = shared()[blockDim.x - 1 - threadIdx.x];
}
void turn_without_second_barrier(const Arguments& a) {
  const unsigned other = blockDim.x - 1 - threadIdx.x;
  shared()[threadIdx.x] = threadIdx.x;
  sync_block();
  shared()[threadIdx.x] = shared()[other] + 1;
  sync_block();
  mine(a) = shared()[other];
}
void barriers_of_two_branches(const Arguments&) {
  if (threadIdx.x < 32)
    sync_block();
  else
    sync_block();
}
void one_leaves(const Arguments&) {
  if (threadIdx.x == 7) return;
  sync_block();
}
void one_warp_waits_again(const Arguments&) {
  for (unsigned i = 0; i < 1 + threadIdx.x / 32; ++i) sync_block();
}

void lanes(const Arguments& a) {
  double all = threadIdx.x, first = 0;
  for (int mask = 1; mask < kWarp; mask *= 2) all += from_lane(all, mask);
  first = from_lane(float(threadIdx.x), 21);
  mine(a) = all * 1000 + first;
}
void lanes_with_two_masks(const Arguments& a) { mine(a) = from_lane(1.0, threadIdx.x % 2 ? 1 : 2); }
void lanes_and_barrier(const Arguments& a) {
  if (threadIdx.x % 32 < 16)
    sync_block();
  else
    mine(a) = from_lane(1.0, 1);
}
void half_a_warp(const Arguments& a) {
  if (threadIdx.x % 32 < 16) mine(a) = from_lane(1.0, 1);
}

// Block by block: each adds to what the one before it left.
void relay(const Arguments& a) {
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
void meet(const Arguments& a) {
  if (threadIdx.x == 0) {
    add_release(a.counter);
    while (load_acquire(a.counter) < gridDim.x) {
    }
  }
  sync_block();
  mine(a) = 1;
}
void wait_for_nobody(const Arguments& a) {
  while (load_acquire(a.counter) < gridDim.x * blockDim.x + 1) {
  }
}
void wait_again_with_the_same_count(const Arguments& a) {
  for (int i = 0; i < 3; ++i)
    while (load_acquire(a.counter) > 0) {
    }
  mine(a) = 1;
}

void beyond_shared_memory(const Arguments&) {
  if (threadIdx.x == 0) shared()[blockDim.x] = 1;
}
void before_shared_memory(const Arguments&) {
  if (threadIdx.x == 0) shared()[-1] = 1;
}
void what_was_in_shared_memory(const Arguments& a) {
  mine(a) = shared()[threadIdx.x];
  shared()[threadIdx.x] = 1;
}

// Everybody gives its number to the next block of the cluster. A block can be written to when it has begun.
void ring(const Arguments& a) {
  sync_cluster();
  store_to_block(shared() + threadIdx.x, (blockIdx.x + 1) % gridDim.x, double(blockIdx.x));
  sync_cluster();
  mine(a) = shared()[threadIdx.x];
}
void ring_without_first_barrier(const Arguments& a) {
  store_to_block(shared() + threadIdx.x, (blockIdx.x + 1) % gridDim.x, double(blockIdx.x));
  sync_cluster();
  mine(a) = shared()[threadIdx.x];
}
void ring_without_second_barrier(const Arguments& a) {
  sync_cluster();
  store_to_block(shared() + threadIdx.x, (blockIdx.x + 1) % gridDim.x, double(blockIdx.x));
  sync_block();
  mine(a) = shared()[threadIdx.x];
}
void one_leaves_the_cluster(const Arguments&) {
  if (blockIdx.x == 0 && threadIdx.x == 0) return;
  sync_cluster();
}

struct Named {
  const char* name;
  void (*kernel)(const Arguments&);
};
#define FUSEDRNN_NAMED(kernel) {#kernel, kernel}
const Named kKernels[] = {
    FUSEDRNN_NAMED(turn),
    FUSEDRNN_NAMED(turn_without_first_barrier),
    FUSEDRNN_NAMED(turn_without_second_barrier),
    FUSEDRNN_NAMED(barriers_of_two_branches),
    FUSEDRNN_NAMED(one_leaves),
    FUSEDRNN_NAMED(one_warp_waits_again),
    FUSEDRNN_NAMED(lanes),
    FUSEDRNN_NAMED(lanes_with_two_masks),
    FUSEDRNN_NAMED(lanes_and_barrier),
    FUSEDRNN_NAMED(half_a_warp),
    FUSEDRNN_NAMED(relay),
    FUSEDRNN_NAMED(meet),
    FUSEDRNN_NAMED(wait_for_nobody),
    FUSEDRNN_NAMED(wait_again_with_the_same_count),
    FUSEDRNN_NAMED(beyond_shared_memory),
    FUSEDRNN_NAMED(before_shared_memory),
    FUSEDRNN_NAMED(what_was_in_shared_memory),
    FUSEDRNN_NAMED(ring),
    FUSEDRNN_NAMED(ring_without_first_barrier),
    FUSEDRNN_NAMED(ring_without_second_barrier),
    FUSEDRNN_NAMED(one_leaves_the_cluster),
};

struct Call {
  void (*kernel)(const Arguments&);
  Arguments arguments;
};

}  // namespace

#define FUSEDRNN_EXPORT extern "C" __attribute__((visibility("default")))

FUSEDRNN_EXPORT int launch_small(const char* name, unsigned x, unsigned y, unsigned threads, size_t shared,
                                 int cooperative, int clusters, uint64_t seed, double* out, unsigned* counter,
                                 char* error, size_t error_size) {
  std::string what = "no such kernel";
  for (const Named& named : kKernels)
    if (strcmp(named.name, name) == 0) {
      Call call{named.kernel, {out, counter}};
      what = emulation::launch(
          {{x, y, 1}, threads, shared, cooperative != 0, clusters != 0, seed},
          [](void* p) { static_cast<Call*>(p)->kernel(static_cast<Call*>(p)->arguments); }, &call);
    }
  snprintf(error, error_size, "%s", what.c_str());
  return what.empty() ? 0 : 1;
}

// sums (16, 8) = a (16, k) b (k, 8) of whole warps' worth, by one instruction: k is 8 for tf32, 16 for the others.
FUSEDRNN_EXPORT void multiply_small(const char* precision, const float* a, const float* b, float* sums) {
  struct Job {
    const char* precision;
    const float *a, *b;
    float* sums;
  } job{precision, a, b, sums};
  emulation::launch(
      {{1, 1, 1}, 32, 0, false, false, 0},
      [](void* p) {
        const Job& job = *static_cast<Job*>(p);
        const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
        uint32_t a[4], b[2];
        float sums[4] = {0, 0, 0, 0};
        if (strcmp(job.precision, "tf32") == 0) {
          for (int i = 0; i < 4; ++i) a[i] = to_tf32(job.a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
          for (int i = 0; i < 2; ++i) b[i] = to_tf32(job.b[(t + i * 4) * 8 + g]);
          multiply_tf32(sums, a, b);
        } else {
          const bool bf16 = strcmp(job.precision, "bf16") == 0;
          const auto pack = [&](float x, float y) {
            return bf16 ? to_bf16(x) | uint32_t(to_bf16(y)) << 16 : to_fp16(x) | uint32_t(to_fp16(y)) << 16;
          };
          for (int i = 0; i < 4; ++i) {
            const float* p = job.a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
            a[i] = pack(p[0], p[1]);
          }
          for (int i = 0; i < 2; ++i) {
            const float* p = job.b + (2 * t + i * 8) * 8 + g;
            b[i] = pack(p[0], p[8]);
          }
          if (bf16)
            multiply_bf16(sums, a, b);
          else
            multiply_fp16(sums, a, b);
        }
        for (int i = 0; i < 4; ++i) job.sums[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
      },
      &job);
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
