// OpenMP's threads as the thread pool; a part of runtime_test.cpp. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "runtime_checks.h"

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
      CHECK(region.barrier());
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
    parallel(4, [&](Region& region) { CHECK(region.threads == std::min(granted, 4) && region.barrier()); });
    ring(4, 10, 7);
  }
  granted_threads = max_threads;
#endif
  // Several callers at a time, each with an OpenMP team of its own.
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
  parallel(5, [](Region& region) { CHECK(region.threads == 3 && region.barrier()); });
  ring(5, 20, 7);
}

}  // namespace
