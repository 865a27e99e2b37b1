// What the files of the machine share: the block that runs and its threads.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "fiber.h"
#include "on_host/machine.h"

namespace on_host {

enum class State { kReady, kAtBarrier, kAtPrimitive, kReturned };

struct Thread {
  uint3 index;
  int number;  // in the block
  State state;
  Fiber fiber;
  // Where it waits, and what it brought and takes away.
  const char* primitive;
  Site site;
  unsigned mask;
  uint64_t value;
  int source;
  uint64_t result;
  // How often it passed __syncwarp, and which such times of its warp's lanes lie before it.
  uint32_t time;
  std::array<uint32_t, kWarp> known;
  // How often it passed __threadfence, and how often at the last barrier.
  uint32_t fences, fences_at_barrier;

  int lane() const { return number % kWarp; }
};

// What a block let others know by an atomic of global memory: what each thread did before so many
// of its fences, up to an epoch.
struct Published {
  uint64_t start, epoch;
  std::vector<uint32_t> fences;
};

struct Counts {
  int64_t launches = 0, bytes_read = 0, bytes_written = 0;
};

struct Block {
  const char* kernel = nullptr;
  Counts* counts = nullptr;
  std::vector<Thread> threads;
  Thread* self = nullptr;
  size_t shared = 0;  // bytes of dynamic shared memory
  // One clock over everything: the epochs in which the launch and the block began, and the present.
  uint64_t launch_start = 0, start = 0, epoch = 0;
  // What lies before its next epoch: of the address of an atomic that was followed by a fence; and
  // what lies before this one, by the epoch in which the other block began.
  const void* met = nullptr;
  int met_by = 0;  // the thread
  uint32_t met_fences = 0;
  std::map<uint64_t, const Published*> before;

  // The lanes of the warp that `thread` is in.
  Thread* warp(const Thread& thread) { return &threads[thread.number / kWarp * kWarp]; }
  int lanes(const Thread& thread) const {
    const int rest = static_cast<int>(threads.size()) - thread.number / kWarp * kWarp;
    return rest < kWarp ? rest : kWarp;
  }
};
extern Block block;

// Forgets the order of global memory, which a new launch does not need.
void forget_global_memory();
// The block has met at a barrier: what its thread learned from an atomic is the block's.
void learn();
void poison_dynamic_shared();

// "thread (0,0,0)", "philox.cu:18".
std::string text(const char* what, unsigned x, unsigned y, unsigned z);
std::string text(Site site);
std::string text_of(const Thread& thread);

// For Python.
void set_thread_order(const std::string& order, uint64_t seed);
const std::map<std::string, Counts>& counts();
void reset();

}  // namespace on_host
