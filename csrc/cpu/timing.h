// What threads and memory cost on this machine: measured for docs/scaling.md, used by no kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>

namespace fusedrnn::cpu {

// All times in seconds. std::runtime_error where the pool has fewer threads to give; std::invalid_argument for a count,
// a size or a time that is none.

// An empty region, begun when the caller has been busy elsewhere for `idle`: long enough, and the workers sleep.
double time_region(int threads, double idle);
// One of `count` barriers in a region.
double time_barriers(int threads, std::int64_t count);
// One of `count` turns of a cache line that two threads write alternately.
double time_transfers(std::int64_t count);
// One of `passes` over `bytes`, of which each thread reads its own part.
double time_reads(int threads, std::int64_t bytes, std::int64_t passes);

}  // namespace fusedrnn::cpu
