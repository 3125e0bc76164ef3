// The thread pool: regions, errors, interruption, callers, signals, forks; a part of runtime_test.cpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "runtime_checks.h"
#include "runtime_openmp.h"

namespace {

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
        CHECK(region.barrier());
      }
    });
    CHECK(outcome == Outcome::done);
  }

  // Inside a body: alone.
  parallel(2, [&](Region&) {
    int inner = 0;
    parallel(4, [&](Region& region) {
      CHECK(region.threads == 1 && region.barrier());
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
          if (!region.barrier()) {
            all = false;
            CHECK(!region.poll() && !region.barrier());  // for good
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
                   CHECK(!region.barrier());
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
              if (mode == 1) CHECK(!region.barrier());
              return;
            }
            while (region.poll()) {
            }
            CHECK(!region.barrier());
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
            if (region.thread == 0 && mode == 1) region.barrier();
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
          if (!region.barrier()) return;
        }
      });
    }).detach();
    while (!*started) sleep_ms(1);
  }
}

}  // namespace
