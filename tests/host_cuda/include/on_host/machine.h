// The machine that runs a kernel on the CPU: the threads of a block are fibers, the blocks run one
// after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace on_host {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;  // bytes a block of sm_90 can have

// A place in a kernel's source. As a default argument it is the caller's.
struct Site {
  const char* file;
  int line;
};
inline bool operator==(Site a, Site b) { return a.file == b.file && a.line == b.line; }
inline bool operator!=(Site a, Site b) { return !(a == b); }

// The index of a subscript, and where it stands.
struct Subscript {
  template <typename Index,
            typename = std::enable_if_t<!std::is_same_v<std::decay_t<Index>, Subscript>>>
  Subscript(Index&& index, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : value(static_cast<int64_t>(static_cast<Index&&>(index))), site{file, line} {}
  int64_t value;
  Site site;
};

// What the running thread reads of threadIdx, blockIdx, blockDim and gridDim.
struct Running {
  uint3 thread, block;
  dim3 threads, blocks;
};
extern Running running;

// Throws std::runtime_error: kernel, block, thread, site, `what`.
[[noreturn]] void fail(Site site, const std::string& what);

// Waits for the whole block; returns how many threads came with `predicate`.
int wait_for_block(const char* primitive, Site site, bool predicate);

// Waits for the lanes of `mask`. exchange returns the value that lane `source` came with, vote the
// lanes that came with `predicate`; only sync_lanes orders memory.
uint64_t exchange(const char* primitive, Site site, unsigned mask, uint64_t value, int source);
unsigned vote(const char* primitive, Site site, unsigned mask, bool predicate);
void sync_lanes(const char* primitive, Site site, unsigned mask);
int lane();

// Of the running thread.
void fence();

enum class Access { kRead, kWrite, kAtomic };

// One thread's access to an element.
struct Touch {
  uint64_t epoch = 0;  // counts the barriers of all blocks; of no access it is 0
  const char* file = nullptr;
  // The source's line; the thread, how often it had passed __syncwarp, and __threadfence.
  uint64_t line : 16, thread : 10, time : 24, fences : 14;

  constexpr Touch() : line(0), thread(0), time(0), fences(0) {}
  constexpr Touch(uint64_t epoch_, Site site, int thread_, uint32_t time_, uint32_t fences_)
      : epoch(epoch_), file(site.file), line(site.line), thread(thread_), time(time_),
        fences(fences_) {}
  Site site() const { return {file, static_cast<int>(line)}; }
};
constexpr uint32_t kMostTimes = 1u << 24, kMostFences = 1u << 14;
static_assert(kMaxThreads <= 1 << 10, "a Touch knows its thread by 10 bits");

// Who touched an element of memory: the last write, and what came after it. One line of the cache,
// for every access of every thread looks at one.
struct alignas(64) Element {
  struct Others {
    std::vector<Touch> reads, atomics;
  };
  Touch write, read;         // the last of each
  Others* others = nullptr;  // reads before `read`, and atomics; never freed, but used again

  Others& more() {
    if (others == nullptr) others = new Others;
    return *others;
  }
  void clear_reads() {
    read = {};
    if (others != nullptr) others->reads.clear();
  }
  void clear() {
    write = {};
    clear_reads();
    if (others != nullptr) others->atomics.clear();
  }
};
// Of shared memory every second byte has an element: no type is smaller.
constexpr int kBytesOfElement = 2;

// An element of a view.
struct Target {
  const void* address;
  size_t bytes;
  int64_t index, size;
  Site site;
  bool constant;
  Element* element;  // null in global memory
};

// Checks bounds and order, counts the bytes of global memory.
void touch(Access access, const Target& target);
// The same for `count` neighbours that are read or written as one vector.
void touch_vector(Access access, Target target, int count, size_t align);

// Differs from block to block.
uint64_t block_serial();

// The block's dynamic shared memory from `offset` on, and its elements.
struct Dynamic {
  void* memory;
  Element* elements;
};
Dynamic dynamic_shared(size_t offset, size_t bytes, size_t align, Site site);

// Runs `thread` once for each thread of the grid.
void run(const char* kernel, dim3 blocks, dim3 threads, size_t shared,
         const std::function<void()>& thread);

}  // namespace on_host
