// Parallel regions, one per call, on our own thread pool or on OpenMP's threads. The calling thread is one of them.
// There is no standard header here on purpose: kernel files compiled for one instruction set include this file, and
// inline library code compiled there must not be linked for every machine.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fusedrnn::cpu {

struct Shared;  // the shared state of the threads of one region (threads.cpp)

enum class ThreadPool { own, openmp };

// Called on the calling thread only, about every 10 ms; false stops the call. It may run any code but should not throw.
using PollHook = bool (*)(void* hook_context);

// The argument of a body. What a thread writes before a barrier is visible to all other threads after it.
struct Region {
  Region(int index, int count, Shared* common) : thread(index), threads(count), shared(common) {}

  const int thread;   // 0 is the calling thread
  const int threads;  // at most the number that was asked for

  bool barrier();  // waits for all threads of the region; false after it was aborted: leave the body then
  bool poll();     // cheap; calls the hook when it is due; false after the region was aborted
  void abort();    // every later barrier and poll is false, run() returns `interrupted`

 private:
  Shared* const shared;
};

using Body = void (*)(void* context, Region& region);

enum class Outcome { done, interrupted };

constexpr int max_threads = 256;

// Runs body(context, region) on `threads` threads (at most max_threads) and returns when all have left it. A body must
// work for any number of threads. There is only one if the pool is busy with another caller or if run() is called in a
// body, and there are fewer if OpenMP has fewer or if the system cannot start more.
// An exception in a body aborts the region and is thrown here, after all threads have left. After a fork in the poll
// hook the child does not have the other threads: there run() throws std::runtime_error.
Outcome run(int threads, Body body, void* context, PollHook hook = nullptr, void* hook_context = nullptr);

// The threads that run() uses, in the whole process: our own pool, by default, or the OpenMP threads of the calling
// thread. std::runtime_error if there is no OpenMP runtime, and in a child of a process with OpenMP's threads: after a
// fork the child uses our own pool, since libgomp hangs in a child.
void set_thread_pool(ThreadPool pool);
ThreadPool thread_pool();

// The default number of threads of a call: FUSEDRNN_NUM_THREADS (std::invalid_argument if it is not an integer of at
// least 1), else the first number in OMP_NUM_THREADS (ignored if it is not one), else usable_cpus().
int num_threads();
void set_num_threads(int threads);  // std::invalid_argument below 1; more than max_threads counts as max_threads

// CPUs in the affinity mask, at most the cgroup quota (v1 or v2, rounded up), at least 1.
int usable_cpus();
// Only the quota, 0 if there is none. `root` is a prefix of /proc and /sys, for tests.
int cgroup_cpus(const char* root = "");

}  // namespace fusedrnn::cpu
