// Parallel regions, one per call, on our own pool of threads or on an OpenMP team. The calling thread takes part.
// No standard header here on purpose: kernel files compiled for one instruction set include this, and inline
// library code compiled there must not be linked for every machine.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fusedrnn::cpu {

struct Shared;  // what the threads of one region have in common (threads.cpp)

enum class ThreadPool { own, openmp };

// Called on the calling thread only, about every 10 ms; false asks to stop. It may run any code, but should not throw.
using PollHook = bool (*)(void* hook_context);

class Barrier {
 public:
  // Waits for all threads of the region. False once the region was aborted: leave the body then.
  bool wait();

 private:
  friend struct Region;
  Shared* shared;
  int threads;
  bool caller;
};

// What a body sees. Nothing a thread writes before a barrier is unseen after it by any other thread.
struct Region {
  Region(int index, int count, Shared* common);
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  const int thread;   // 0 is the calling thread
  const int threads;  // may be smaller than asked for; never larger
  Barrier* const barrier;

  bool poll();   // cheap; calls the hook when it is due; false once the region was aborted
  void abort();  // every barrier and every poll is false from now on, run() returns `interrupted`

 private:
  Shared* shared;
  Barrier own_barrier;
};

using Body = void (*)(void* context, Region& region);

enum class Outcome { done, interrupted };

constexpr int max_threads = 256;

// Runs body(context, region) on `threads` threads (at most max_threads) and returns when all have left it. A body works
// for any number of threads: there are fewer where the pool is busy with another caller (then one), where run() is
// called from inside a body (one), where the OpenMP team is smaller or where the system gives no more threads.
// An exception in a body aborts the region and is thrown here, after all threads have left. A fork inside the poll hook
// leaves the child without the other threads: there run() throws std::runtime_error.
Outcome run(int threads, Body body, void* context, PollHook hook = nullptr, void* hook_context = nullptr);

// Whose threads run() uses, in the whole process: our own pool, as at the start, or the calling thread's OpenMP team.
// std::runtime_error where there is no OpenMP runtime and in a child of a process on the OpenMP team: a fork brings
// back the own pool, as libgomp hangs in a child.
void set_thread_pool(ThreadPool pool);
ThreadPool thread_pool();

// The number of threads a call uses by default: FUSEDRNN_NUM_THREADS (std::invalid_argument if that is no number from
// 1), else the first number in OMP_NUM_THREADS (ignored if it is none), else usable_cpus().
int num_threads();
void set_num_threads(int threads);  // std::invalid_argument below 1; more than max_threads counts as max_threads

// CPUs in the affinity mask, and no more than the cgroup quota (v1 or v2, rounded up). At least 1.
int usable_cpus();
// The quota alone, 0 where there is none. `root` stands before /proc and /sys, for tests.
int cgroup_cpus(const char* root = "");

}  // namespace fusedrnn::cpu
