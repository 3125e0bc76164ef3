// Stress test of the thread pool, the arena, the control word and the choice of the instruction set.
// SPDX-License-Identifier: Apache-2.0
//
// Needs a compiler only: c++ -std=c++17 -pthread -rdynamic -Icsrc tests/cpu/cpp/runtime_test.cpp
// csrc/cpu/{threads,openmp,arena,isa}.cpp. Runs the part named by the first argument, on OpenMP's threads if the last
// is "openmp"; tests/cpu/test_threads_cpp.py runs all, plain and under the sanitizers.
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/arena.h"
#include "cpu/control_word.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace fusedrnn::cpu;
using Clock = std::chrono::steady_clock;

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                                 \
    }                                                                                \
  } while (0)

#define CHECK_THROWS(type, statement) \
  do {                                \
    bool thrown = false;              \
    try {                             \
      statement;                      \
    } catch (const type&) {           \
      thrown = true;                  \
    }                                 \
    CHECK(thrown);                    \
  } while (0)

// The names that an OpenMP runtime has. Without -fopenmp they are those of this stand-in: the sanitizers, which do not
// know libgomp, see what its threads do, and it can grant fewer threads than it promises.
extern "C" {
#if defined(_OPENMP)
void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned flags);
void omp_set_num_threads(int threads);
void omp_set_max_active_levels(int levels);
int omp_get_num_threads();
#else
static std::atomic<int> promised_threads{2}, granted_threads{max_threads};
static thread_local int team_size = 1, team_thread = 0;

void omp_set_max_active_levels(int) {}  // regions always nest
void omp_set_num_threads(int threads) { promised_threads = threads; }
int omp_get_max_threads() { return promised_threads; }
int omp_get_num_threads() { return team_size; }
int omp_get_thread_num() { return team_thread; }
int omp_in_parallel() { return team_size > 1; }

void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned) {
  struct Start {
    void (*body)(void*);
    void* context;
    int size, thread;
    pthread_t handle;
  } starts[max_threads];
  const int wanted = threads == 0 ? promised_threads.load() : static_cast<int>(threads);
  const int size = std::min(wanted, granted_threads.load()), size_before = team_size, thread_before = team_thread;
  for (int i = 1; i < size; ++i) {
    starts[i] = {body, context, size, i, {}};
    const auto work = [](void* p) -> void* {
      const Start& start = *static_cast<Start*>(p);
      team_size = start.size, team_thread = start.thread;
      start.body(start.context);
      return nullptr;
    };
    CHECK(pthread_create(&starts[i].handle, nullptr, work, &starts[i]) == 0);
  }
  team_size = size, team_thread = 0;
  body(context);
  for (int i = 1; i < size; ++i) pthread_join(starts[i].handle, nullptr);
  team_size = size_before, team_thread = thread_before;
}
#endif
}

namespace {

double seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// A body from anything callable.
template <class F>
Outcome parallel(int threads, F&& f, PollHook hook = nullptr, void* hook_context = nullptr) {
  const Body body = [](void* context, Region& region) { (*static_cast<std::remove_reference_t<F>*>(context))(region); };
  return run(threads, body, const_cast<void*>(static_cast<const void*>(&f)), hook, hook_context);
}

// A recurrence split over threads: every step each thread reads what the others wrote before the barrier. Plain memory,
// so that the thread sanitizer judges the barrier. Right for any number of threads.
void ring(int threads, int steps, int cells) {
  std::vector<std::uint64_t> now(cells), next(cells), expected(cells), scratch(cells);
  for (int i = 0; i < cells; ++i) now[i] = expected[i] = static_cast<std::uint64_t>(i) + 1;
  for (int t = 0; t < steps; ++t) {
    for (int i = 0; i < cells; ++i) scratch[i] = expected[i] * 31 + expected[(i + 1) % cells];
    expected.swap(scratch);
  }
  std::atomic<int> inside{0};
  const Outcome outcome = parallel(threads, [&](Region& region) {
    ++inside;
    CHECK(region.threads <= threads && region.thread < region.threads);
    std::uint64_t *from = now.data(), *to = next.data();
    for (int t = 0; t < steps; ++t) {
      for (int i = region.thread; i < cells; i += region.threads) to[i] = from[i] * 31 + from[(i + 1) % cells];
      CHECK(region.poll());
      CHECK(region.barrier->wait());
      std::swap(from, to);
    }
  });
  CHECK(outcome == Outcome::done);
  CHECK(inside <= threads);
  CHECK((steps % 2 ? next : now) == expected);
}

void test_regions() {
  std::mt19937 random(1);
  // The whole pool is there for a single caller.
  std::vector<int> seen(7, 0);
  parallel(7, [&](Region& region) {
    CHECK(region.threads == 7);
    ++seen[region.thread];
  });
  CHECK(seen == std::vector<int>(7, 1));

  for (int i = 0; i < 300; ++i) ring(1 + static_cast<int>(random() % 5), static_cast<int>(random() % 40), 11);
  for (int threads : {16, 33, 64}) ring(threads, 10, 101);  // more threads than CPUs, and growing
  for (int i = 0; i < 20; ++i) {                            // workers asleep
    if (i % 4 == 0) sleep_ms(2);
    ring(3, 5, 7);
  }

  // Late threads: the others fall asleep at the barrier.
  for (int late = 0; late < 3; ++late) {
    const Outcome outcome = parallel(3, [&](Region& region) {
      for (int t = 0; t < 3; ++t) {
        if (region.thread == late) sleep_ms(3);
        CHECK(region.barrier->wait());
      }
    });
    CHECK(outcome == Outcome::done);
  }

  // Inside a body: alone.
  parallel(2, [&](Region&) {
    int inner = 0;
    parallel(4, [&](Region& region) {
      CHECK(region.threads == 1 && region.barrier->wait());
      ++inner;
    });
    CHECK(inner == 1);
  });

  int most = 0;
  parallel(max_threads + 1, [&](Region& region) {
    if (region.thread == 0) most = region.threads;
  });
  CHECK(most >= 1 && most <= max_threads);
  CHECK_THROWS(std::invalid_argument, parallel(0, [](Region&) {}));
}

struct Error {
  int value;
};

void test_errors() {
  std::mt19937 random(2);
  for (int i = 0; i < 200; ++i) {
    const int threads = 1 + static_cast<int>(random() % 6), steps = static_cast<int>(random() % 10);
    const int culprit = static_cast<int>(random()) & 3, step = static_cast<int>(random() % 10);
    const bool throws = random() % 2, expected = culprit < threads && step < steps;
    std::atomic<bool> all{true};
    int caught = 0;
    Outcome outcome = Outcome::done;
    try {
      outcome = parallel(threads, [&](Region& region) {
        for (int t = 0; t < steps; ++t) {
          if (region.thread == culprit && t == step) {
            if (throws) throw Error{i + 1};
            region.abort();
          }
          if (!region.barrier->wait()) {
            all = false;
            CHECK(!region.poll() && !region.barrier->wait());  // for good
            return;
          }
        }
      });
    } catch (const Error& error) {
      caught = error.value;
    }
    CHECK(caught == (expected && throws ? i + 1 : 0));
    CHECK((outcome == Outcome::interrupted) == (expected && !throws));
    CHECK(all || expected);
    if (i % 10 == 0) ring(threads, 4, 5);  // usable afterwards
  }
  // All at once, and from a sleeper's neighbour.
  for (int i = 0; i < 50; ++i) CHECK_THROWS(Error, parallel(4, [](Region& region) { throw Error{region.thread}; }));
  for (int culprit = 0; culprit < 3; ++culprit) {
    CHECK_THROWS(std::bad_alloc, parallel(3, [&](Region& region) {
                   if (region.thread == culprit) {
                     sleep_ms(3);
                     throw std::bad_alloc();
                   }
                   CHECK(!region.barrier->wait());
                 }));
  }
}

struct Hook {
  std::thread::id caller = std::this_thread::get_id();
  int calls = 0;
  int stop_at = 1;
  static bool call(void* context) {
    Hook& hook = *static_cast<Hook*>(context);
    CHECK(std::this_thread::get_id() == hook.caller);
    return ++hook.calls < hook.stop_at;
  }
};

void test_interruption() {
  {  // Short regions do not ask. One that the system held up is not short.
    Hook hook;
    hook.stop_at = std::numeric_limits<int>::max();
    int asked_at_once = 0;
    for (int i = 0; i < 200; ++i) {
      const int calls = hook.calls;
      const auto begin = std::chrono::steady_clock::now();
      parallel(2, [](Region& region) { region.poll(); }, Hook::call, &hook);
      const bool was_short = std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(1);
      asked_at_once += was_short && hook.calls != calls;
    }
    CHECK(asked_at_once == 0);
  }
  // Whoever works and whoever waits, the caller asks: threads x (working, at the barrier, at the end).
  for (int threads : {1, 2, 3}) {
    for (int mode = 0; mode < 3; ++mode) {
      Hook hook;
      hook.stop_at = 2;
      const Clock::time_point start = Clock::now();
      const Outcome outcome = parallel(
          threads,
          [&](Region& region) {
            if (mode != 0 && region.thread == 0 && region.threads > 1) {
              if (mode == 1) CHECK(!region.barrier->wait());
              return;
            }
            while (region.poll()) {
            }
            CHECK(!region.barrier->wait());
          },
          Hook::call, &hook);
      CHECK(outcome == Outcome::interrupted);
      CHECK(hook.calls == 2);
      const double took = seconds(start);
      CHECK(took > 0.005 && took < 1.0);
    }
  }
  {  // About every 10 ms.
    Hook hook;
    hook.stop_at = std::numeric_limits<int>::max();
    const Clock::time_point start = Clock::now();
    parallel(
        2,
        [&](Region& region) {
          while (seconds(start) < 0.3) region.poll();
        },
        Hook::call, &hook);
    CHECK(hook.calls >= 3 && hook.calls <= 120);
  }
  {  // An exception in the hook comes out of run(), wherever it was called.
    for (int mode = 0; mode < 2; ++mode) {
      CHECK_THROWS(Error, parallel(
                              2,
                              [&](Region& region) {
                                if (mode == 1 && region.thread == 0) return;
                                while (region.poll()) {
                                }
                              },
                              [](void*) -> bool { throw Error{1}; }));
    }
  }
  ring(3, 10, 7);
}

void test_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 64; ++i) {
    callers.emplace_back([i] {
      for (int k = 0; k < 10; ++k) ring(1 + (i + k) % 4, 10, 5);
    });
  }
  for (std::thread& caller : callers) caller.join();
  // Free again.
  parallel(3, [](Region& region) { CHECK(region.threads == 3); });
}

void test_signals() {
#if defined(__linux__)
  parallel(2, [](Region& region) {
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    const bool worker = region.thread != 0;
    for (int signal : {SIGINT, SIGTERM, SIGUSR1, SIGALRM, SIGCHLD})
      CHECK((sigismember(&blocked, signal) == 1) == worker);
    for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) CHECK(sigismember(&blocked, signal) == 0);
    if (worker) {
      char name[16];
      CHECK(pthread_getname_np(pthread_self(), name, sizeof name) == 0 && std::strcmp(name, "fusedrnn") == 0);
    }
  });
#endif
}

void test_count() {
  CHECK_THROWS(std::invalid_argument, set_num_threads(0));
  CHECK_THROWS(std::invalid_argument, set_num_threads(-3));
  set_num_threads(3);
  CHECK(num_threads() == 3);
  set_num_threads(100000);
  CHECK(num_threads() == max_threads);
  CHECK(usable_cpus() >= 1);
}

constexpr int team_of_test = 7;

void use_openmp() {
  omp_set_max_active_levels(2);  // nested regions have threads too, where nobody asks whether they are nested
  omp_set_num_threads(team_of_test);
  set_thread_pool(ThreadPool::openmp);
}

void test_openmp() {
  CHECK(thread_pool() == ThreadPool::openmp);
  for (int wanted : {2, 3, 7, 20, max_threads + 1}) {
    const int expected = std::min(wanted, team_of_test);
    std::vector<int> seen(expected, 0);
    const std::thread::id caller = std::this_thread::get_id();
    parallel(wanted, [&](Region& region) {
      CHECK(region.threads == expected);
      CHECK((region.thread == 0) == (std::this_thread::get_id() == caller));
      CHECK(region.barrier->wait());
      ++seen[region.thread];
    });
    CHECK(seen == std::vector<int>(expected, 1));
  }
  // A caller that is inside an OpenMP region works alone.
  const auto nested = [](void*) {
    CHECK(omp_get_num_threads() == 3);
    parallel(2, [](Region& region) { CHECK(region.threads == 1); });
  };
  GOMP_parallel(nested, nullptr, 3, 0);
  // A region of fewer threads leaves the others to the program: they are the same ones afterwards.
  const auto workers = [](int wanted) {
    std::vector<std::thread::id> ids(team_of_test);
    parallel(wanted, [&](Region& region) { ids[region.thread] = std::this_thread::get_id(); });
    return ids;
  };
  const std::vector<std::thread::id> before = workers(team_of_test);
  parallel(2, [](Region&) {});
  sleep_ms(2);
#if defined(_OPENMP)
  CHECK(workers(team_of_test) == before);
#else
  for (int granted : {5, 3, 1}) {  // fewer than omp_get_max_threads says
    granted_threads = granted;
    parallel(4, [&](Region& region) { CHECK(region.threads == std::min(granted, 4) && region.barrier->wait()); });
    ring(4, 10, 7);
  }
  granted_threads = max_threads;
#endif
  // Several callers at a time: a team each.
  std::atomic<int> inside{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 2; ++i) {
    callers.emplace_back([&] {
      omp_set_num_threads(2);
      parallel(2, [&](Region& region) {
        CHECK(region.threads == 2);
        ++inside;
        while (inside < 4) CHECK(region.poll());
      });
    });
  }
  for (std::thread& caller : callers) caller.join();
  // And back.
  set_thread_pool(ThreadPool::own);
  CHECK(thread_pool() == ThreadPool::own);
  parallel(3, [](Region& region) { CHECK(region.threads == 3 && omp_get_num_threads() == 1); });
}

// With OMP_THREAD_LIMIT=3, of which omp_get_max_threads does not know.
void test_openmp_limit() {
  parallel(5, [](Region& region) { CHECK(region.threads == 3 && region.barrier->wait()); });
  ring(5, 20, 7);
}

// Of a forked child: a tenth of a second's work on a quiet machine. What takes longer hangs.
constexpr unsigned child_seconds = 60;

// Runs f in a forked child; a hang there is an alarm.
template <class F>
void in_child(F&& f) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    alarm(child_seconds);
    f();
    std::_Exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void whole_pool() {
  parallel(3, [](Region& region) { CHECK(region.threads == 3 && region.barrier->wait()); });
  ring(3, 20, 7);
}

void test_fork() {
  const ThreadPool before = thread_pool();
#if defined(__SANITIZE_ADDRESS__)
  // A thread that starts or ends takes locks of this sanitizer's allocator. One that does so at the fork would leave
  // the child a lock that nobody opens; so the team has no threads but a region's, and below these are all inside.
  omp_set_num_threads(3);
#endif
  in_child(whole_pool);  // before the first use
  whole_pool();
  in_child(whole_pool);
  in_child([] {  // nested, with and without use in between
    in_child(whole_pool);
    whole_pool();
    in_child(whole_pool);
    whole_pool();
  });
  whole_pool();
  in_child([before] {
    CHECK(thread_pool() == ThreadPool::own);
    if (before == ThreadPool::openmp) CHECK_THROWS(std::runtime_error, set_thread_pool(ThreadPool::openmp));
  });
  CHECK(thread_pool() == before);

  // In the poll hook, inside a region: the child gets out with an error and can go on; the parent notices nothing.
  for (int mode = 0; mode < 3; ++mode) {
    pid_t child = -1;
    int calls = 0;
    struct Fork {
      pid_t& child;
      int& calls;
    } context{child, calls};
    const PollHook hook = [](void* p) {
      Fork& fork_once = *static_cast<Fork*>(p);
      if (fork_once.calls++ == 0) fork_once.child = fork();
      return fork_once.child == 0 || fork_once.calls < 3;
    };
    bool failed = false;
    Outcome outcome = Outcome::done;
    [[maybe_unused]] std::atomic<int> inside{0};
    try {
      outcome = parallel(
          3,
          [&](Region& region) {
#if defined(__SANITIZE_ADDRESS__)
            ++inside;
            while (inside < 3) std::this_thread::yield();
#endif
            if (region.thread == 0 && mode == 1) region.barrier->wait();
            if (region.thread == 0 && mode != 0) return;
            while (region.poll()) {
            }
          },
          hook, &context);
    } catch (const std::runtime_error&) {
      failed = true;
    }
    if (child == 0) {
      alarm(child_seconds);
      CHECK(failed);
      whole_pool();
      std::_Exit(0);
    }
    CHECK(!failed && outcome == Outcome::interrupted);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

// While other threads are inside regions and at the arena. Not under the address sanitizer, whose own allocator hangs
// in the child of a process with threads.
void test_fork_busy() {
  std::atomic<bool> stop{false};
  std::vector<std::thread> busy;
  for (int i = 0; i < 3; ++i) {
    busy.emplace_back([&stop, i] {
      while (!stop) {
        ring(3, 50, 7);
        Buffer buffer(10000 + 1000 * static_cast<std::size_t>(i));
        std::memset(buffer.data(), i, buffer.size());
      }
    });
  }
  for (int i = 0; i < 30; ++i) {
    in_child([] {
      whole_pool();
      Buffer buffer(11000);
      std::memset(buffer.data(), 7, buffer.size());
      in_child(whole_pool);
    });
  }
  stop = true;
  for (std::thread& thread : busy) thread.join();
}

// Ends main() with workers parked, spinning, or inside a region that another thread runs.
void test_exit(const std::string& how) {
  whole_pool();
  if (how == "parked") sleep_ms(20);
  if (how == "inside") {
    std::atomic<bool>* started = new std::atomic<bool>(false);
    std::thread([started] {
      parallel(3, [started](Region& region) {
        for (;;) {
          *started = true;
          if (!region.barrier->wait()) return;
        }
      });
    }).detach();
    while (!*started) sleep_ms(1);
  }
}

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
  CHECK_THROWS(std::bad_alloc, Buffer(std::numeric_limits<std::size_t>::max()));
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
    CHECK(region.barrier->wait());
    if (region.thread == 0) threads = region.threads;
  });
  CHECK(threads >= 1 && threads < 64);
  ring(64, 10, 7);
#endif
}

void test_control_word() {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  volatile float smallest = std::numeric_limits<float>::denorm_min(), zero = 0, one = 1, three = 3;
  volatile double smallest_double = std::numeric_limits<double>::denorm_min();
  // Rounding up, one exception open (inexact), one flag set: all comes back.
  for (unsigned odd : {0x1F80u, 0x5F80u, 0x0F80u, 0x1F81u, 0xFFC0u, 0x7FBFu}) {
    _mm_setcsr(odd);
    {
      ControlWord word;
      CHECK(_mm_getcsr() == 0x9FC0);
      volatile float third = one / three, nan = zero / zero, tiny = smallest * one;
      volatile double tiny_double = smallest_double * 1.0;
      CHECK(_mm_getcsr() & 1);  // flags do rise inside
      CHECK(third == 0x1.555556p-2f && nan != nan && tiny == 0 && tiny_double == 0);
      {
        ControlWord inner(false);
        CHECK(_mm_getcsr() == 0x1F80);
        volatile float kept = smallest * one;
        std::uint32_t bits;
        const float copy = kept;
        std::memcpy(&bits, &copy, 4);
        CHECK(bits == 1);
      }
      CHECK((_mm_getcsr() & ~0x3Fu) == 0x9FC0);
    }
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    CHECK(after == odd);
  }
#endif
  // Where nothing can be set, it still compiles and does nothing.
  ControlWord word(true);
}

void print_isa() {
  try {
    const Isa isa = chosen();
    CHECK(isa == chosen() && available(isa));
    std::printf("%s\n", name(isa));
  } catch (const std::invalid_argument& error) {
    CHECK_THROWS(std::invalid_argument, chosen());  // every time
    std::printf("error: %s\n", error.what());
  }
}

void print_threads() {
  try {
    std::printf("%d\n", num_threads());
  } catch (const std::invalid_argument& error) {
    std::printf("error: %s\n", error.what());
  }
}

// Figures

template <class F>
double best_us(int rounds, int inner, F&& f) {
  double best = 1e9;
  for (int i = 0; i < rounds; ++i) {
    const Clock::time_point start = Clock::now();
    for (int k = 0; k < inner; ++k) f();
    best = std::min(best, seconds(start) * 1e6 / inner);
  }
  return best;
}

void bench() {
  for (int threads : {1, 2, 4, 8}) {
    std::printf("empty region, hot, %d threads: %.2f us\n", threads,
                best_us(20, 500, [&] { parallel(threads, [](Region&) {}); }));
  }
  std::vector<double> cold;
  for (int i = 0; i < 100; ++i) {
    sleep_ms(3);
    cold.push_back(best_us(1, 1, [] { parallel(2, [](Region&) {}); }));
  }
  std::sort(cold.begin(), cold.end());
  std::printf("empty region, workers asleep, 2 threads: median %.1f us, 90 %%: %.1f us\n", cold[50], cold[90]);
  for (int threads : {2, 4, 8}) {
    const int steps = 2000;
    const double us = best_us(threads == 2 ? 10 : 3, 1, [&] {
      parallel(threads, [](Region& region) {
        for (int t = 0; t < steps; ++t) region.barrier->wait();
      });
    });
    std::printf("barrier, %d threads: %.3f us\n", threads, us / steps);
  }
  parallel(
      1,
      [](Region& region) {
        const double us = best_us(5, 100000, [&] { region.poll(); });
        std::printf("poll: %.1f ns\n", us * 1000);
      },
      [](void*) { return true; });

  const std::size_t bytes = std::size_t(256) << 20;
  const auto touch = [](char* p, std::size_t size) {
    for (std::size_t i = 0; i < size; i += 4096) p[i] = 1;
  };
  const auto fill = [](char* p, std::size_t size) { std::memset(p, 1, size); };
  const auto with_malloc = [&](auto use) {
    char* p = static_cast<char*>(std::malloc(bytes));
    use(p, bytes);
    asm volatile("" : : "r"(p) : "memory");  // else the compiler drops stores that nobody reads
    std::free(p);
  };
  std::printf("256 MiB, touched / written, ms: malloc %.1f / %.1f", best_us(5, 1, [&] { with_malloc(touch); }) / 1e3,
              best_us(5, 1, [&] { with_malloc(fill); }) / 1e3);
  for (std::size_t limit : {std::size_t(0), std::size_t(1) << 30}) {
    set_arena_limit(limit);
    const double touched = best_us(5, 1, [&] {
      Buffer buffer(bytes);
      touch(buffer.as<char>(), bytes);
    });
    const double written = best_us(5, 1, [&] {
      Buffer buffer(bytes);
      fill(buffer.as<char>(), bytes);
    });
    std::printf(", %s %.2f / %.1f", limit == 0 ? "arena without recycling" : "recycled", touched / 1e3, written / 1e3);
  }
  std::printf("\nsmall buffer: %.3f us\n", best_us(10, 10000, [] { Buffer buffer(2000); }));
}

}  // namespace

int main(int argc, char** argv) {
  alarm(120);
  const std::string part = argc > 1 ? argv[1] : "";
  const std::string option = argc > 2 ? argv[2] : "";
  if (std::strcmp(argv[argc - 1], "openmp") == 0) use_openmp();
  if (part == "regions")
    test_regions();
  else if (part == "errors")
    test_errors();
  else if (part == "interruption")
    test_interruption();
  else if (part == "callers")
    test_callers();
  else if (part == "signals")
    test_signals();
  else if (part == "count")
    test_count();
  else if (part == "thread_pool")
    test_openmp();
  else if (part == "thread_limit")
    test_openmp_limit();
  else if (part == "fork")
    test_fork();
  else if (part == "fork_busy")
    test_fork_busy();
  else if (part == "exit")
    test_exit(option);
  else if (part == "limits")
    test_limits();
  else if (part == "arena")
    test_arena();
  else if (part == "control_word")
    test_control_word();
  else if (part == "isa")
    print_isa();
  else if (part == "threads")
    print_threads();
  else if (part == "quota")
    std::printf("%d\n", cgroup_cpus(option.c_str()));
  else if (part == "bench")
    bench();
  else {
    std::fprintf(stderr, "no such part: '%s'\n", part.c_str());
    return 2;
  }
  return 0;
}
