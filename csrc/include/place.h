// Where a launcher runs: a CPU unit and its threads, or a CUDA device and stream.
#pragma once

#include <cstdint>

namespace rdarts {

// The instruction sets the CPU files are compiled for, in ascending order.
enum class Unit { kBase, kAvx2, kAvx512 };

constexpr int kCounters = 1 << 15;

struct Place {
  Unit unit;
  int threads;
  int device;             // CUDA device, or -1 for the CPU
  std::uintptr_t stream;  // cudaStream_t
  std::uint32_t* counters = nullptr;  // [kCounters] on the device (last.h)
  bool tf32 = false;  // on a device: whether a backward may round float32's factors to that
};

}  // namespace rdarts
