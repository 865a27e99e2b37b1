// Runs blocks: the scheduler of the fibers, barriers and warp primitives.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#include "block.h"

namespace on_host {

Running running;
Block block;

namespace {

constexpr size_t kStack = 132 * 1024;
constexpr size_t kLine = 64;  // of a cache

enum class Order { kAscending, kDescending, kShuffled };

struct Scheduler {
  Order order = Order::kAscending;
  std::mt19937_64 random;
  Fiber home;
  const std::function<void()>* body = nullptr;
  std::exception_ptr failure;
  int waiting = 0;        // threads at the barrier
  int agreed = 0;         // of those, with a true predicate
  bool restart = false;   // a barrier was passed: begin again with the first thread
  int barrier_result = 0;
  std::map<std::string, Counts> counts;
};
Scheduler scheduler;
std::mutex one_launch_at_a_time;

// The stacks, each above a page that no one may touch.
char* stack_of(int thread) {
  static char* const stacks = [] {
    void* const memory = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < kMaxThreads; ++i) {
      mprotect(static_cast<char*>(memory) + i * kStack, sysconf(_SC_PAGESIZE), PROT_NONE);
    }
    return static_cast<char*>(memory);
  }();
  return stacks + thread * kStack;
}

void shuffle(std::vector<int>& order) {
  if (scheduler.order != Order::kShuffled) return;
  std::shuffle(order.begin(), order.end(), scheduler.random);
}

// 0 .. size - 1 in the order that is set.
std::vector<int> arranged(size_t size) {
  std::vector<int> order(size);
  std::iota(order.begin(), order.end(), 0);
  if (scheduler.order == Order::kDescending) std::reverse(order.begin(), order.end());
  shuffle(order);
  return order;
}

void enter() {
  try {
    (*scheduler.body)();
  } catch (...) {
    scheduler.failure = std::current_exception();
  }
  block.self->state = State::kReturned;
  Fiber::switch_from(block.self->fiber, scheduler.home);
}

void resume(Thread& thread) {
  block.self = &thread;
  running.thread = thread.index;
  Fiber::switch_from(scheduler.home, thread.fiber);
  block.self = nullptr;
  if (scheduler.failure) {
    std::rethrow_exception(std::exchange(scheduler.failure, nullptr));
  }
}

void leave() { Fiber::switch_from(block.self->fiber, scheduler.home); }

std::string hexadecimal(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

std::string whereabouts(const Thread& thread) {
  if (thread.state == State::kReturned) return text_of(thread) + " has returned";
  const std::string mask =
      thread.state == State::kAtPrimitive ? ", mask " + hexadecimal(thread.mask) : "";
  return text_of(thread) + " waits in " + thread.primitive + " at " + text(thread.site) + mask;
}

[[noreturn]] void fail_block(const std::string& what) {
  throw std::runtime_error(std::string(block.kernel) + ", " +
                           text("block", running.block.x, running.block.y, running.block.z) + ": " +
                           what);
}

// No thread can go on: says who waits where, and for whom.
[[noreturn]] void fail_stalled() {
  for (const Thread& thread : block.threads) {
    if (thread.state != State::kAtPrimitive) continue;
    const Thread* const warp = block.warp(thread);
    std::string missing = "a lane that the block does not have";
    for (int lane = 0; lane < block.lanes(thread); ++lane) {
      const Thread& other = warp[lane];
      const bool meets = other.state == State::kAtPrimitive && other.mask == thread.mask &&
                         other.site == thread.site && other.primitive == thread.primitive;
      if ((thread.mask >> lane & 1u) != 0 && !meets) {
        missing = whereabouts(other);
        break;
      }
    }
    fail_block(std::string(thread.primitive) + " at " + text(thread.site) +
               " is executed by only part of its mask " + hexadecimal(thread.mask) + ": " +
               text_of(thread) + " waits there; " + missing);
  }
  const auto waits = [](const Thread& thread) { return thread.state == State::kAtBarrier; };
  const auto& threads = block.threads;
  const auto at = std::find_if(threads.begin(), threads.end(), waits);
  const auto absent = std::find_if_not(threads.begin(), threads.end(), waits);
  fail_block("divergent barrier: " + whereabouts(*at) + "; " + whereabouts(*absent));
}

void pass_barrier() {
  const Thread& first = block.threads[0];
  for (const Thread& thread : block.threads) {
    if (thread.site != first.site) {
      fail_block("divergent barrier: " + whereabouts(first) + "; " + whereabouts(thread));
    }
  }
  learn();
  for (Thread& thread : block.threads) {
    thread.state = State::kReady;
    thread.fences_at_barrier = thread.fences;
  }
  ++block.epoch;
  scheduler.barrier_result = scheduler.agreed;
  scheduler.waiting = scheduler.agreed = 0;
  scheduler.restart = true;
}

void run_threads() {
  size_t returned = 0;
  std::vector<int> order = arranged(block.threads.size());
  while (returned < block.threads.size()) {
    bool stalled = true;
    scheduler.restart = false;
    for (const int number : order) {
      Thread& thread = block.threads[number];
      if (thread.state != State::kReady) continue;
      stalled = false;
      resume(thread);
      returned += thread.state == State::kReturned;
      if (scheduler.restart) break;
    }
    if (stalled) fail_stalled();
    shuffle(order);
  }
}

void run_block(uint3 index) {
  running.block = index;
  block.start = ++block.epoch;
  block.met = nullptr;
  block.before.clear();
  scheduler.waiting = scheduler.agreed = 0;
  poison_dynamic_shared();
  for (size_t i = 0; i < block.threads.size(); ++i) {
    Thread& thread = block.threads[i];
    const auto number = static_cast<unsigned>(i);
    const dim3 size = running.threads;
    thread.index = {number % size.x, number / size.x % size.y, number / size.x / size.y};
    thread.number = static_cast<int>(i);
    thread.state = State::kReady;
    thread.time = 1;
    thread.known.fill(0);
    thread.fences = thread.fences_at_barrier = 0;
    // Stacks that began at one place of a page would all want the same few lines of the cache.
    const size_t guard = sysconf(_SC_PAGESIZE), apart = i * 5 % 61 * kLine;
    thread.fiber.start(stack_of(thread.number) + guard, kStack - guard - apart, enter);
  }
  run_threads();
}

// All lanes of the mask wait at one place: hands each what it came for.
void complete(Thread* warp, unsigned mask) {
  unsigned ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    ballot |= (warp[lane].value != 0 ? 1u : 0u) << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    Thread& thread = warp[lane];
    thread.result = thread.source < 0 ? ballot : warp[thread.source].value;
    thread.state = State::kReady;
  }
}

// The lanes of the mask have passed __syncwarp: what each of them knew, all know.
void order(Thread* warp, unsigned mask) {
  std::array<uint32_t, kWarp> known{};
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    for (int other = 0; other < kWarp; ++other) {
      known[other] = std::max(known[other], warp[lane].known[other]);
    }
    known[lane] = std::max(known[lane], warp[lane].time);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    warp[lane].known = known;
    if (++warp[lane].time == kMostTimes) fail_block("too many __syncwarp in one thread");
  }
}

// Whether every lane of the mask waits where `self` does. The search begins with the lane that was
// missing last, so that a warp's lanes together look at each other about once.
bool all_wait(const Thread* warp, const Thread& self) {
  static int missing = 0;
  const int lanes = block.lanes(self);
  if (lanes < kWarp && self.mask >> lanes != 0) return false;
  if (missing >= lanes) missing = 0;
  for (int i = 0; i < lanes; ++i) {
    const int lane = missing + i < lanes ? missing + i : missing + i - lanes;
    if ((self.mask >> lane & 1u) == 0) continue;
    const Thread& other = warp[lane];
    if (other.state != State::kAtPrimitive || other.primitive != self.primitive ||
        other.site != self.site || other.mask != self.mask) {
      missing = lane;
      return false;
    }
  }
  return true;
}

uint64_t meet(const char* primitive, Site site, unsigned mask, uint64_t value, int source,
              bool orders) {
  Thread& self = *block.self;
  if ((mask >> self.lane() & 1u) == 0) {
    fail(site, std::string(primitive) + ": the mask " + hexadecimal(mask) +
                   " does not name the lane that calls");
  }
  self.state = State::kAtPrimitive;
  self.primitive = primitive, self.site = site, self.mask = mask;
  self.value = value, self.source = source;
  Thread* const warp = block.warp(self);
  if (all_wait(warp, self)) {
    complete(warp, mask);
    if (orders) order(warp, mask);
  }
  leave();
  return self.result;
}

}  // namespace

std::string text(const char* what, unsigned x, unsigned y, unsigned z) {
  return std::string(what) + " (" + std::to_string(x) + "," + std::to_string(y) + "," +
         std::to_string(z) + ")";
}

std::string text(Site site) {
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string text_of(const Thread& thread) {
  return text("thread", thread.index.x, thread.index.y, thread.index.z);
}

void fail(Site site, const std::string& what) {
  fail_block(text_of(*block.self) + ", " + text(site) + ": " + what);
}

int wait_for_block(const char* primitive, Site site, bool predicate) {
  Thread& self = *block.self;
  self.state = State::kAtBarrier;
  self.primitive = primitive, self.site = site;
  scheduler.agreed += predicate;
  if (++scheduler.waiting == static_cast<int>(block.threads.size())) pass_barrier();
  leave();
  return scheduler.barrier_result;
}

uint64_t exchange(const char* primitive, Site site, unsigned mask, uint64_t value, int source) {
  if ((mask >> source & 1u) == 0) {
    fail(site, std::string(primitive) + ": reads lane " + std::to_string(source) +
                   ", which the mask " + hexadecimal(mask) + " does not name");
  }
  return meet(primitive, site, mask, value, source, false);
}

unsigned vote(const char* primitive, Site site, unsigned mask, bool predicate) {
  return static_cast<unsigned>(meet(primitive, site, mask, predicate, -1, false));
}

void sync_lanes(const char* primitive, Site site, unsigned mask) {
  meet(primitive, site, mask, 0, -1, true);
}

int lane() { return block.self->lane(); }

void fence() {
  if (++block.self->fences == kMostFences) fail_block("too many __threadfence in one thread");
}

uint64_t block_serial() { return block.start; }

void run(const char* kernel, dim3 blocks, dim3 threads, size_t shared,
         const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  block.kernel = kernel;
  block.counts = &scheduler.counts[kernel];
  ++block.counts->launches;
  block.shared = shared;
  block.threads.resize(static_cast<size_t>(threads.x) * threads.y * threads.z);
  block.launch_start = block.epoch + 1;
  running.threads = threads, running.blocks = blocks;
  scheduler.body = &thread;
  forget_global_memory();
  for (const int number : arranged(static_cast<size_t>(blocks.x) * blocks.y * blocks.z)) {
    const auto i = static_cast<unsigned>(number);
    run_block({i % blocks.x, i / blocks.x % blocks.y, i / blocks.x / blocks.y});
  }
}

void set_thread_order(const std::string& order, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  if (order == "ascending") {
    scheduler.order = Order::kAscending;
  } else if (order == "descending") {
    scheduler.order = Order::kDescending;
  } else if (order == "shuffled") {
    scheduler.order = Order::kShuffled;
  } else {
    throw std::invalid_argument("order: expected ascending, descending or shuffled, found \"" +
                                order + "\"");
  }
  scheduler.random.seed(seed);
}

const std::map<std::string, Counts>& counts() { return scheduler.counts; }

void reset() {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  scheduler.counts.clear();
}

}  // namespace on_host
