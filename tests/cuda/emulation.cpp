// Fibers and who runs next. Never instrumented, also where ThreadSanitizer watches the kernels: what it knows of this
// file are the calls to its own interface. SPDX-License-Identifier: Apache-2.0
#undef _FORTIFY_SOURCE  // its longjmp goes up one stack alone

#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#if defined(FUSEDRNN_RACES)
#include <sanitizer/tsan_interface.h>
#define FUSEDRNN_TELL(call) call  // ThreadSanitizer
constexpr bool kRaces = true;
#else
#define FUSEDRNN_TELL(call)
constexpr bool kRaces = false;
#endif

emulation::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStacksKept = 1024;   // for the next launch
constexpr unsigned kBlocksAtOnce = 3;  // of a launch that is not cooperative
constexpr unsigned kVain = 64;         // polls that find the same, one after the other: it waits for ever
constexpr unsigned char kNan = 0xff;   // all bits set: NaN as float and as double
constexpr size_t kGuard = 256;         // bytes on both sides of shared memory that nobody may write
constexpr size_t kStack = (kRaces ? 256 : 64) << 10;  // a report is made on the stack where the race is seen

// --- one stack that runs something, and how to leave it for another ---------------------------------------------

void run_fibers();  // what every stack runs, without end

// Entered by setcontext the first time, and by longjmp where it was left: that calls nothing of the kernel.
struct Context {
  ucontext_t first;
  jmp_buf left;
  bool was_left = false;

  void start(char* stack) {
    getcontext(&first);
    first.uc_stack.ss_sp = stack, first.uc_stack.ss_size = kStack, first.uc_link = nullptr;
    makecontext(&first, run_fibers, 0);
    was_left = false;
  }
  void enter() {
    if (was_left) _longjmp(left, 1);
    setcontext(&first);
  }
};

struct Stack {
  char *mapped, *memory;
  Context context;
  void* thread = nullptr;  // to ThreadSanitizer
  Stack() {
    FUSEDRNN_TELL(thread = __tsan_create_fiber(0));
    static size_t made = 0;
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    void* p = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) != 0) {
      std::fprintf(stderr, "no memory for the stacks of the emulation\n");
      std::abort();
    }
    // not all at the same distance from a page's beginning: they would share a few lines of the cache
    mapped = static_cast<char*>(p);
    memory = mapped + page - made++ * 1600 % page / 64 * 64;
  }
  ~Stack() {
    FUSEDRNN_TELL(__tsan_destroy_fiber(thread));
    munmap(mapped, kStack + size_t(sysconf(_SC_PAGESIZE)));
  }
};

// --- what runs ----------------------------------------------------------------------------------------------------

enum class State { ready, block, cluster, lanes, polls, ended };
constexpr const char* kStates[] = {
    "can run",   "wait for their block", "wait for their cluster", "wait for their warp", "wait for a count",
    "have ended"};

struct Block;
struct Warp;
struct Fiber {
  Block* block;
  Warp* warp;
  unsigned thread;
  Stack* stack = nullptr;
  State state = State::ready;
  Place place{"", 0};
  // what it polled last, with nothing else in between, and how often it found the same count
  const unsigned* counter = nullptr;
  unsigned count = 0;
  unsigned again = 0;
};

// Of a block, of a cluster, or of the lanes of a warp.
struct Barrier {
  unsigned round = 0, arrived = 0;
  int kind = 0;  // of what the lanes do
  Place place{"", 0};
  char order[2];  // addresses that stand for its even and odd rounds
};

struct Warp {
  Fiber* fibers;       // 32 of them
  uint32_t ready = 0;  // a bit for each that can run
  size_t place_in_ready;
  Words words[2];  // of this exchange and of the last
  Barrier barrier;
};

struct Block {
  Dim index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> memory;
  unsigned live;
  Barrier barrier;
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

struct Scheduler {
  Launch launch;
  const std::function<void()>* kernel;
  Context main;
  std::string error;
  std::vector<std::unique_ptr<Block>> blocks;  // those that have begun
  std::vector<std::unique_ptr<Block>> spare;   // kept for later launches
  std::vector<Cluster> clusters;
  std::vector<Warp*> ready;  // that have somebody who can run
  std::vector<Fiber*> polling;
  std::vector<Stack*> stacks;  // free ones
  Fiber* current;
  uint64_t random;
  unsigned stay;  // of 64 choices so many are another lane of the same warp, where one can run: a warp runs ahead
  unsigned begun, ended;
  char order[2];      // addresses that stand for the beginning and the end of the launch
  void* main_thread;  // to ThreadSanitizer

  uint64_t draw() {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return random * 0x2545f4914f6cdd1dull >> 32;
  }

  unsigned block_count() const { return launch.grid.x * launch.grid.y; }

  void begin_block() {
    if (spare.empty()) spare.push_back(std::make_unique<Block>());
    Block& block = *spare.back();
    blocks.push_back(std::move(spare.back()));
    spare.pop_back();
    block.index = {begun % launch.grid.x, begun / launch.grid.x, 0};
    ++begun;
    block.memory.assign(launch.shared + 2 * kGuard, char(kNan));
    block.barrier = Barrier(), block.live = launch.threads;
    if (launch.clusters) clusters[block.index.y].blocks.push_back(&block);
    block.warps.assign(launch.threads / kWarp, Warp());
    block.fibers.assign(launch.threads, Fiber());
    for (unsigned i = 0; i < launch.threads; ++i) {
      Fiber& fiber = block.fibers[i];
      fiber.block = &block, fiber.thread = i, fiber.warp = &block.warps[i / kWarp];
      if (i % kWarp == 0) fiber.warp->fibers = &fiber;
      wake(fiber);
      if (kRaces) give_stack(fiber);
    }
  }

  void give_stack(Fiber& fiber) {
    if (stacks.empty()) stacks.push_back(new Stack);
    fiber.stack = stacks.back();
    stacks.pop_back();
    fiber.stack->context.start(fiber.stack->memory);
  }

  // Takes one of those that can run; null where nobody can.
  Fiber* pick() {
    const bool poll = !polling.empty() && (ready.empty() || draw() % 16 == 0);
    if (!poll) {
      if (ready.empty()) return nullptr;
      Warp* warp = current ? current->warp : nullptr;
      if (!warp || !warp->ready || draw() % 64 >= stay) warp = ready[draw() % ready.size()];
      const unsigned turn = unsigned(draw() % kWarp);
      const uint32_t turned = warp->ready >> turn | (turn ? warp->ready << (kWarp - turn) : 0);
      Fiber* fiber = warp->fibers + (unsigned(__builtin_ctz(turned)) + turn) % kWarp;
      warp->ready &= ~(1u << (fiber - warp->fibers));
      if (!warp->ready) {
        ready[warp->place_in_ready] = ready.back();
        ready[warp->place_in_ready]->place_in_ready = warp->place_in_ready;
        ready.pop_back();
      }
      return fiber;
    }
    if (ready.empty()) {
      bool vain = true;
      for (const Fiber* fiber : polling) vain = vain && fiber->again >= kVain && *fiber->counter == fiber->count;
      if (vain) return nullptr;
    }
    const size_t i = draw() % polling.size();
    Fiber* fiber = polling[i];
    polling[i] = polling.back();
    polling.pop_back();
    return fiber;
  }

  void become(Fiber* fiber) {
    current = fiber;
    fiber->state = State::ready;
    threadIdx = {fiber->thread, 0, 0};
    blockIdx = fiber->block->index;
  }

  // Leaves the current fiber for another; comes back when somebody picks it.
  void leave() {
    Fiber *from = current, *to = pick();
    if (!to) fail_without_progress();
    if (to != from) {
      if (!to->stack) give_stack(*to);
      become(to);
      switch_stack(from->stack->context, *to->stack);
    } else {
      become(to);
    }
  }

  // Returns when something switches back to `from`.
  void switch_stack(Context& from, Stack& to) {
    from.was_left = true;
    if (_setjmp(from.left)) return;
    FUSEDRNN_TELL(__tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync));
    to.context.enter();
  }

  void return_to_main() {
    FUSEDRNN_TELL(__tsan_switch_to_fiber(main_thread, __tsan_switch_to_fiber_no_sync));
    main.enter();
  }

  void fail(const std::string& what) {
    error = what;
    return_to_main();
  }

  void fail_without_progress() {
    std::map<std::string, unsigned> counts;
    for (const auto& block : blocks)
      for (const Fiber& fiber : block->fibers) ++counts[describe(fiber)];
    std::string all = "no thread can go on:";
    for (const auto& entry : counts) all += "\n  " + std::to_string(entry.second) + " threads of " + entry.first;
    fail(all);
  }

  static std::string describe(const Fiber& fiber) {
    std::string what = "block (" + std::to_string(fiber.block->index.x) + ", " + std::to_string(fiber.block->index.y) +
                       ") " + kStates[int(fiber.state)];
    if (fiber.state == State::block || fiber.state == State::cluster || fiber.state == State::lanes)
      what += " at " + name(fiber.place);
    return what;
  }

  static std::string name(Place place) {
    const char* slash = std::strrchr(place.file, '/');
    return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
  }

  void wake(Fiber& fiber) {
    fiber.state = State::ready;
    Warp& warp = *fiber.warp;
    if (!warp.ready) {
      warp.place_in_ready = ready.size();
      ready.push_back(&warp);
    }
    warp.ready |= 1u << (&fiber - warp.fibers);
  }

  void expect_same(const char* what, Place here, Place there, bool same) {
    if (!same || here.line != there.line || (here.file != there.file && std::strcmp(here.file, there.file) != 0))
      fail(std::string(what) + " diverges: threads of one are at " + name(here) + " and at " + name(there));
  }

  void end_fiber() {
    Block& block = *current->block;
    current->state = State::ended;
    FUSEDRNN_TELL(__tsan_release(&order[1]));
    if (--block.live == 0) {
      const size_t end = block.memory.size();
      for (size_t i = 0; i < kGuard; ++i)
        if (block.memory[i] != char(kNan) || block.memory[end - 1 - i] != char(kNan))
          fail("a thread wrote outside the block's shared memory of " + std::to_string(launch.shared) + " bytes");
      ++ended;
      if (begun < block_count()) begin_block();
      if (ended == block_count()) return_to_main();
    }
  }
};

Scheduler scheduler;

void run_fibers() {
  for (;;) {
    FUSEDRNN_TELL(__tsan_acquire(&scheduler.order[0]));
    (*scheduler.kernel)();
    scheduler.end_fiber();
    Fiber *from = scheduler.current, *to = scheduler.pick();
    if (!to) scheduler.fail_without_progress();
    scheduler.become(to);
    Stack* stack = from->stack;
    if (!kRaces) from->stack = nullptr;
    if (to->stack) {
      if (!kRaces) scheduler.stacks.push_back(stack);
      scheduler.switch_stack(stack->context, *to->stack);
    }
    to->stack = stack;  // and goes on here
  }
}

}  // namespace

std::string launch(const Launch& launch, const std::function<void()>& kernel) {
  Scheduler& s = scheduler;
  if (launch.threads == 0 || launch.threads % kWarp) return "a block has whole warps";
  if (launch.grid.x == 0 || launch.grid.y == 0) return "a grid has at least one block";
  s.launch = launch, s.kernel = &kernel;
  s.error.clear(), s.ready.clear(), s.polling.clear();
  const size_t threads = size_t(s.block_count()) * launch.threads;
  s.ready.reserve(threads / kWarp), s.polling.reserve(threads);  // nothing is allocated while fibers run
  s.random = (launch.seed + 1) * 0x9e3779b97f4a7c15ull | 1;
  for (int i = 0; i < 4; ++i) s.draw();
  constexpr unsigned kStay[] = {0, 32, 60, 63, 63, 63, 64, 64};
  s.stay = kStay[s.draw() % 8];
  s.current = nullptr;
  s.begun = s.ended = 0;
  blockDim = {launch.threads, 1, 1}, gridDim = {launch.grid.x, launch.grid.y, 1};
  s.clusters.assign(launch.clusters ? launch.grid.y : 0, Cluster());
  unsigned at_once = launch.cooperative ? s.block_count() : kBlocksAtOnce;
  if (launch.clusters && at_once < launch.grid.x) at_once = launch.grid.x;
  if (kRaces) at_once = s.block_count();  // no stack is used twice: it would be a race of its own
  FUSEDRNN_TELL(s.main_thread = __tsan_get_current_fiber());
  while (s.begun < s.block_count() && s.begun < at_once) s.begin_block();
  FUSEDRNN_TELL(__tsan_release(&s.order[0]));
  Fiber* first = s.pick();
  if (!first->stack) s.give_stack(*first);
  s.become(first);
  s.switch_stack(s.main, *first->stack);
  // back: all have ended, or an error
  FUSEDRNN_TELL(__tsan_acquire(&s.order[1]));
  for (auto& block : s.blocks) {
    for (Fiber& fiber : block->fibers)
      if (fiber.stack) s.stacks.push_back(fiber.stack);
    s.spare.push_back(std::move(block));
  }
  s.blocks.clear();
  for (; s.stacks.size() > kStacksKept; s.stacks.pop_back()) delete s.stacks.back();
  return s.error;
}

char* shared_memory() { return scheduler.current->block->memory.data() + kGuard; }

namespace {

// Waits until `count` fibers are here; `all` calls its argument on each of them. What lanes do orders no memory.
template <class All>
void wait_for(Barrier& barrier, State state, size_t count, Place place, const char* what, All all, int kind = 0) {
  Scheduler& s = scheduler;
  Fiber& self = *s.current;
  if (barrier.arrived) s.expect_same(what, place, barrier.place, kind == barrier.kind);
  self.place = barrier.place = place;
  self.counter = nullptr, barrier.kind = kind;
  [[maybe_unused]] char* order = &barrier.order[barrier.round % 2];
  FUSEDRNN_TELL(if (state != State::lanes) __tsan_release(order));
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.round;
    all([&](Fiber& other) {
      if (&other != &self) s.wake(other);
    });
  } else {
    self.state = state;
    s.leave();
  }
  FUSEDRNN_TELL(if (state != State::lanes) __tsan_acquire(order));
}

}  // namespace

void sync_block(Place place) {
  Block& block = *scheduler.current->block;
  wait_for(block.barrier, State::block, block.fibers.size(), place, "a barrier of a block", [&](auto wake) {
    for (Fiber& fiber : block.fibers) wake(fiber);
  });
}

void sync_cluster(Place place) {
  Scheduler& s = scheduler;
  if (!s.launch.clusters) s.fail("a barrier of a cluster in a launch without clusters");
  Cluster& cluster = s.clusters[s.current->block->index.y];
  const size_t count = size_t(s.launch.grid.x) * s.launch.threads;
  wait_for(cluster.barrier, State::cluster, count, place, "a barrier of a cluster", [&](auto wake) {
    for (Block* block : cluster.blocks)
      for (Fiber& fiber : block->fibers) wake(fiber);
  });
}

void* in_block(void* p, unsigned rank) {
  Scheduler& s = scheduler;
  Block& block = *s.current->block;
  const ptrdiff_t offset = static_cast<char*>(p) - block.memory.data();
  if (offset < ptrdiff_t(kGuard) || offset >= ptrdiff_t(kGuard + s.launch.shared))
    s.fail("an address that is not in the block's shared memory is given to another block");
  if (!s.launch.clusters || rank >= s.launch.grid.x) s.fail("there is no block " + std::to_string(rank));
  for (Block* other : s.clusters[block.index.y].blocks)
    if (other->index.x == rank) {
      if (other->live < other->fibers.size()) s.fail("a thread of the block has ended that another one writes to");
      return other->memory.data() + offset;
    }
  s.fail("a block is written to that has not begun");
  return nullptr;
}

const Words& exchange(const uint32_t* words, int count, int kind, Place place) {
  const Fiber& self = *scheduler.current;
  Warp& warp = *self.warp;
  Words& all = warp.words[warp.barrier.round % 2];
  for (int i = 0; i < count; ++i) all.of_lane[self.thread % kWarp][i] = words[i];
  const auto each = [&](auto wake) {
    for (unsigned i = 0; i < kWarp; ++i) wake(warp.fibers[i]);
  };
  wait_for(warp.barrier, State::lanes, kWarp, place, "an exchange between lanes", each, kind);
  return all;
}

void poll(const unsigned* counter) {
  Scheduler& s = scheduler;
  Fiber& self = *s.current;
  self.again = self.counter == counter && self.count == *counter ? self.again + 1 : 0;
  self.counter = counter, self.count = *counter;
  self.state = State::polls;
  s.polling.push_back(&self);
  s.leave();
  self.count = *counter;  // what is loaded now
}

}  // namespace emulation
