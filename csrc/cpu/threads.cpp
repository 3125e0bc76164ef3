// SPDX-License-Identifier: Apache-2.0
#include "cpu/threads.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/openmp.h"
#include "cpu/posix.h"

#if defined(__linux__) && !defined(FUSEDRNN_NO_FUTEX)
#define FUSEDRNN_FUTEX 1
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace fusedrnn::cpu {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr std::size_t cache_line = 128;  // two lines: x86 fetches them in pairs

constexpr microseconds idle_spin{50};      // a worker between regions: about the time to wake one
constexpr microseconds barrier_spin{200};  // inside a region no other work is waiting
constexpr microseconds crowded_spin{0};    // more threads than CPUs; yielding was 80 times slower next to other work
constexpr milliseconds poll_interval{10};  // while the caller sleeps

// A counter that advances without a system call; only poll() reads it, between tiles.
std::uint64_t ticks() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return static_cast<std::uint64_t>(Clock::now().time_since_epoch().count());
#endif
}
#if defined(__x86_64__)
constexpr std::uint64_t poll_ticks = 1 << 24;  // 3 to 17 ms at 1 to 5 GHz: accurate enough without calibration
#else
constexpr std::uint64_t poll_ticks = std::chrono::duration_cast<Clock::duration>(poll_interval).count();
#endif

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// A number that threads wait on: first they spin, then they sleep. It is not freed while a thread may wait on it.
struct Word {
  std::atomic<std::uint32_t> value{0};
  std::atomic<std::uint32_t> sleepers{0};
#if !FUSEDRNN_FUTEX
  std::mutex mutex;
  std::condition_variable changed;
#endif

  // To be called after every change of `value` that a thread may wait for. The change and the load are both
  // sequentially consistent, and so are their counterparts in wait(): one of the two sides sees the other.
  void wake() {
    if (sleepers.load() == 0) return;
#if FUSEDRNN_FUTEX
    syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
    {
      std::lock_guard<std::mutex> lock(mutex);
    }
    changed.notify_all();
#endif
  }

  // Returns when `value` is no longer `old`. The `poller` of the calling thread is polled while the thread sleeps.
  void wait(std::uint32_t old, microseconds spin, Shared* poller = nullptr);
  // Returns when it is `wanted`.
  void wait_for_value(std::uint32_t wanted, microseconds spin, Shared* poller) {
    for (std::uint32_t now; (now = value.load(std::memory_order_acquire)) != wanted;) wait(now, spin, poller);
  }

 private:
  void sleep(std::uint32_t old, bool forever) {
#if FUSEDRNN_FUTEX
    const timespec timeout = {0, std::chrono::nanoseconds(poll_interval).count()};
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, forever ? nullptr : &timeout, nullptr, 0);
#else
    std::unique_lock<std::mutex> lock(mutex);
    if (value.load() != old) return;
    if (forever) {
      changed.wait(lock);
    } else {
      changed.wait_for(lock, poll_interval);
    }
#endif
  }
};

}  // namespace

struct Shared {
  // The barrier's turn, counted in twos; bit 0 is set by an abort. It is one word, so that no thread misses an abort.
  alignas(cache_line) Word gate;
  alignas(cache_line) std::atomic<std::uint32_t> arrived{0};
  alignas(cache_line) microseconds spin{0};
  PollHook hook = nullptr;
  void* hook_context = nullptr;
  std::uint64_t next_poll = 0;  // only used by the caller

  void start(int running, PollHook new_hook, void* new_hook_context) {  // including the threads of other calls
    gate.value.store(0, std::memory_order_relaxed);
    arrived.store(0, std::memory_order_relaxed);
    spin = running > usable_cpus() ? crowded_spin : barrier_spin;
    hook = new_hook;
    hook_context = new_hook_context;
    next_poll = ticks() + poll_ticks;
  }

  bool aborted() const { return gate.value.load(std::memory_order_relaxed) & 1; }

  void abort() {
    gate.value.fetch_or(1);
    gate.wake();
  }

  void poll() {  // on the calling thread
    if (hook == nullptr || aborted() || ticks() < next_poll) return;
    if (!hook(hook_context)) abort();
    next_poll = ticks() + poll_ticks;  // counted from the end, so that a slow hook does not take all the time
  }
};

namespace {

void Word::wait(std::uint32_t old, microseconds spin, Shared* poller) {
  const Clock::time_point end = Clock::now() + spin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (Clock::now() < end);
  while (value.load(std::memory_order_acquire) == old) {
    sleepers.fetch_add(1);
    sleep(old, poller == nullptr);
    sleepers.fetch_sub(1);
    if (poller != nullptr) poller->poll();
  }
}

}  // namespace

bool Region::barrier() {
  const std::uint32_t turn = shared->gate.value.load(std::memory_order_relaxed);
  if (turn & 1) return false;
  if (shared->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(threads)) {
    shared->arrived.store(0, std::memory_order_relaxed);
    const std::uint32_t last = shared->gate.value.fetch_add(2);
    shared->gate.wake();
    return (last & 1) == 0;
  }
  shared->gate.wait(turn, shared->spin, thread == 0 && shared->hook != nullptr ? shared : nullptr);
  return !shared->aborted();
}

bool Region::poll() {
  if (thread == 0) shared->poll();
  return !shared->aborted();
}

void Region::abort() { shared->abort(); }

namespace {

constexpr const char* forked_inside = "the process was forked inside a parallel region";

struct alignas(cache_line) Worker {
  Word job;  // counts the regions this worker takes part in
  int thread = 0;
};

struct Pool {
  Shared shared;
  alignas(cache_line) Word remaining;  // workers that are still inside the body
  alignas(cache_line) std::atomic<bool> busy{false};
  int threads = 1;
  Body body = nullptr;
  void* context = nullptr;
  std::atomic<bool> failed{false};
  std::exception_ptr error;         // of the first worker that failed
  std::atomic<bool> forked{false};  // this is the copy in a child: it has no workers
  std::vector<Worker*> workers;     // only used by the call that has set `busy`

  Outcome run(int wanted, Body new_body, void* new_context, PollHook hook, void* hook_context);
  void grow(int count);
  void work(Worker& worker);
};

// Never freed, neither at exit (workers may wait in it) nor in a forked child (its threads and locks are lost).
std::atomic<Pool*> current{nullptr};

std::atomic<const OpenMP*> openmp{nullptr};  // null: our own pool
std::atomic<bool> openmp_lost{false};        // by a fork
std::atomic<int> forks{0};                   // from the first process to this one

void after_fork_in_child() {
  forks.fetch_add(1);
  if (openmp.exchange(nullptr) != nullptr) openmp_lost.store(true);
  Pool* pool = current.exchange(nullptr);
  if (pool == nullptr) return;
  // The forking thread itself may be inside the region, in its poll hook: let it leave.
  pool->forked.store(true);
  pool->shared.gate.value.fetch_or(1);
  pool->remaining.value.store(0);
}

[[maybe_unused]] const int registered = at_fork(nullptr, nullptr, after_fork_in_child);

Pool* enter() {
  Pool* pool = current.load(std::memory_order_acquire);
  if (pool == nullptr) {
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) {
      pool = fresh;
    } else {
      delete fresh;
    }
  }
  return pool->busy.exchange(true, std::memory_order_acquire) ? nullptr : pool;
}

void Pool::work(Worker& worker) {
  microseconds spin = idle_spin;
  for (std::uint32_t turn = 0;; ++turn) {
    worker.job.wait(turn, spin);
    spin = std::min(idle_spin, shared.spin);
    {
      Region region(worker.thread, threads, &shared);
      try {
        body(context, region);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        shared.abort();
      }
    }
    if (remaining.value.fetch_sub(1) == 1) remaining.wake();
  }
}

// Signals are for the program's own threads (Ctrl-C for the main one). Faults are not blocked, so they are reported.
struct BlockedSignals {
#if !defined(_WIN32)
  sigset_t old;
  BlockedSignals() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &old);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &old, nullptr); }
#endif
};

void Pool::grow(int count) {
  workers.reserve(max_threads);
  [[maybe_unused]] const BlockedSignals blocked;
  while (static_cast<int>(workers.size()) < count) {
    Worker* worker = new (std::nothrow) Worker;
    if (worker == nullptr) break;
    worker->thread = static_cast<int>(workers.size()) + 1;
    try {
      std::thread thread([this, worker] { work(*worker); });
#if defined(__linux__)
      pthread_setname_np(thread.native_handle(), "fusedrnn");
#endif
      thread.detach();
    } catch (const std::exception&) {  // no more threads, or no memory for one: use those that exist
      delete worker;
      break;
    }
    workers.push_back(worker);
  }
}

Outcome Pool::run(int wanted, Body new_body, void* new_context, PollHook hook, void* hook_context) {
  struct Leave {
    Pool* pool;
    ~Leave() { pool->busy.store(false, std::memory_order_release); }
  } leave{this};

  if (static_cast<int>(workers.size()) < wanted - 1) grow(wanted - 1);
  threads = std::min(wanted, static_cast<int>(workers.size()) + 1);
  shared.start(threads, hook, hook_context);
  body = new_body;
  context = new_context;
  failed.store(false, std::memory_order_relaxed);
  remaining.value.store(static_cast<std::uint32_t>(threads - 1), std::memory_order_relaxed);
  for (int i = 0; i < threads - 1; ++i) {
    workers[i]->job.value.fetch_add(1);
    workers[i]->job.wake();
  }
  {
    // This frame must not be left while a worker still uses its variables.
    struct Join {
      Pool* pool;
      ~Join() {
        if (pool->remaining.value.load(std::memory_order_acquire) == 0) return;
        pool->shared.abort();  // only an exception gets here
        pool->remaining.wait_for_value(0, pool->shared.spin, nullptr);
      }
    } join{this};
    Region region(0, threads, &shared);
    body(context, region);
    remaining.wait_for_value(0, shared.spin, hook != nullptr ? &shared : nullptr);
  }
  if (forked.load()) throw std::runtime_error(forked_inside);
  if (failed.load(std::memory_order_relaxed)) std::rethrow_exception(std::exchange(error, nullptr));
  return shared.aborted() ? Outcome::interrupted : Outcome::done;
}

// A region on OpenMP's threads. Every calling thread has OpenMP threads of its own, so nothing is kept between regions.
struct OpenMPRegion {
  const OpenMP& team;
  const int wanted;
  const Body body;
  void* const context;
  const PollHook hook;
  void* const hook_context;
  const int born = forks.load();

  Shared shared{};
  alignas(cache_line) Word left{};  // workers that have left the body
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // of the first thread that failed
  std::uint32_t workers = 0;

  bool forked() const { return forks.load() != born; }
  Outcome run();
  void work();
  bool poll();
};

Outcome OpenMPRegion::run() {
  static std::atomic<int> running{0};  // for all callers
  struct Count {
    const int threads;
    ~Count() { running.fetch_sub(threads); }
  } count{wanted};
  const PollHook own_hook = [](void* self) { return static_cast<OpenMPRegion*>(self)->poll(); };
  shared.start(running.fetch_add(wanted) + wanted, hook != nullptr ? own_hook : nullptr, this);
  // All threads, or libgomp would end the others and start new ones for the program's next region.
  team.parallel([](void* self) { static_cast<OpenMPRegion*>(self)->work(); }, this, 0, 0);
  if (failed.load(std::memory_order_relaxed)) std::rethrow_exception(std::exchange(error, nullptr));
  return shared.aborted() ? Outcome::interrupted : Outcome::done;
}

void OpenMPRegion::work() {
  // Only here the number of threads is known: it may be lower because of limits or in a nested region.
  const int threads = std::min(wanted, team.num_threads()), thread = team.thread_num();
  if (thread >= threads) return;
  if (thread == 0) workers = static_cast<std::uint32_t>(threads - 1);
  try {
    Region region(thread, threads, &shared);
    body(context, region);
    // OpenMP's own wait does not poll.
    if (thread == 0) left.wait_for_value(workers, shared.spin, hook != nullptr ? &shared : nullptr);
  } catch (...) {
    if (!failed.exchange(true)) error = std::current_exception();
    shared.abort();
  }
  if (thread != 0) {
    left.value.fetch_add(1);
    left.wake();
  } else if (forked()) {
    // This skips the runtime's wait for threads that a forked child does not have: its frames can be unwound.
    throw std::runtime_error(forked_inside);
  }
}

bool OpenMPRegion::poll() {
  const bool go_on = hook(hook_context);
  if (!forked()) return go_on;
  shared.gate.value.fetch_or(1);  // let the only thread leave without locks that the others may have held
  left.value.store(workers);
  return true;
}

}  // namespace

void set_thread_pool(ThreadPool pool) {
  const OpenMP* found = nullptr;
  if (pool == ThreadPool::openmp) {
    if (openmp_lost.load())
      throw std::runtime_error("pool: expected 'own' in a process that was forked with OpenMP's threads, got 'openmp'");
    found = find_openmp();
    if (found == nullptr) {
      throw std::runtime_error(
          "pool: expected an OpenMP runtime in this process, got none; load one first, e.g. by importing torch");
    }
  }
  openmp.store(found, std::memory_order_release);
}

ThreadPool thread_pool() {
  return openmp.load(std::memory_order_relaxed) != nullptr ? ThreadPool::openmp : ThreadPool::own;
}

Outcome run(int threads, Body body, void* context, PollHook hook, void* hook_context) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
  threads = std::min(threads, max_threads);
  if (threads > 1) {
    if (const OpenMP* team = openmp.load(std::memory_order_acquire)) {
      threads = team->in_parallel() ? 1 : std::min(threads, team->max_threads());
      if (threads > 1) return OpenMPRegion{*team, threads, body, context, hook, hook_context}.run();
    } else if (Pool* pool = enter()) {
      return pool->run(threads, body, context, hook, hook_context);
    }
  }
  Shared shared;
  shared.start(1, hook, hook_context);
  Region region(0, 1, &shared);
  body(context, region);
  return shared.aborted() ? Outcome::interrupted : Outcome::done;
}

// How many threads

namespace {

// The number at the start of `text`, followed by a comma or the end; 0 if there is none of at least 1.
int leading_number(const char* text, bool list) {
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(text, &end, 10);
  if (end == text || errno != 0 || value < 1) return 0;
  while (*end == ' ') ++end;
  if (*end != '\0' && !(list && *end == ',')) return 0;
  return static_cast<int>(std::min<long>(value, max_threads));
}

int default_threads() {
  const char* own = std::getenv("FUSEDRNN_NUM_THREADS");
  if (own != nullptr && *own != '\0') {
    const int threads = leading_number(own, false);
    if (threads == 0) {
      throw std::invalid_argument("FUSEDRNN_NUM_THREADS: expected an integer of at least 1, got '" + std::string(own) +
                                  "'");
    }
    return threads;
  }
  if (const char* omp = std::getenv("OMP_NUM_THREADS")) {
    if (const int threads = leading_number(omp, true)) return threads;
  }
  return std::min(usable_cpus(), max_threads);
}

int affinity_cpus() {
#if defined(__linux__)
  for (int size = 1024; size <= 1 << 20; size *= 4) {  // the kernel does not accept a mask smaller than its own
    cpu_set_t* set = CPU_ALLOC(size);
    if (set == nullptr) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(size);
    const bool got = sched_getaffinity(0, bytes, set) == 0;
    const int count = got ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (got) return count;
    if (errno != EINVAL) break;
  }
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

// Quota divided by period, rounded up; 0: no limit here.
int group_cpus(const std::string& folder, bool version2) {
  double quota = 0, period = 0;  // of "max" and what is not there
  std::ifstream file(folder + (version2 ? "/cpu.max" : "/cpu.cfs_quota_us"));
  file >> quota;
  if (!version2) file = std::ifstream(folder + "/cpu.cfs_period_us");
  file >> period;
  const double share = quota > 0 && period > 0 ? quota / period : 0;
  return share < 1e6 ? static_cast<int>(std::ceil(share)) : 0;
}

std::atomic<int> usable{0};
std::atomic<int> chosen_threads{0};

}  // namespace

int cgroup_cpus(const char* root) {
  const std::string top = root;
  std::ifstream groups(top + "/proc/self/cgroup");
  int least = 0;
  for (std::string line; std::getline(groups, line);) {  // "4:cpu,cpuacct:/path" or "0::/path"
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool version2 = line.compare(0, second + 1, "0::") == 0;
    if (!version2 && controllers.find(",cpu,") == std::string::npos) continue;
    // A limit of a parent applies too. Inside a container the path may be the host's; the loop still ends at the
    // mount.
    const std::vector<std::string> mounts =
        version2 ? std::vector<std::string>{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}
                 : std::vector<std::string>{"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"};
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      for (const std::string& mount : mounts) {
        const int cpus = group_cpus(top + mount + path, version2);
        if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
      }
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

int usable_cpus() {
  int cpus = usable.load(std::memory_order_relaxed);
  if (cpus == 0) {
    cpus = affinity_cpus();
    if (const int quota = cgroup_cpus()) cpus = std::min(cpus, quota);
    cpus = std::max(cpus, 1);
    usable.store(cpus, std::memory_order_relaxed);
  }
  return cpus;
}

int num_threads() {
  int threads = chosen_threads.load(std::memory_order_relaxed);
  if (threads == 0) {
    threads = default_threads();
    int none = 0;  // set_num_threads in another thread takes precedence
    if (!chosen_threads.compare_exchange_strong(none, threads)) threads = none;
  }
  return threads;
}

void set_num_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
  chosen_threads.store(std::min(threads, max_threads), std::memory_order_relaxed);
}

}  // namespace fusedrnn::cpu
