// The one door from host code to a kernel: fit of the device, device guard, empty input, launch,
// launch check.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"
#include "place.h"

namespace rdarts {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// Shared memory of a block, dynamic and static together; more must be asked for.
constexpr size_t kSharedByDefault = 48 * 1024;
constexpr size_t kMostStatic = 8 * 1024;  // of a kernel that has dynamic

// How a kernel is spread: blocks of threads, bytes of shared memory. Zero blocks: nothing to do.
struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;
};

// Throws for more blocks than a grid can have.
inline dim3 blocks_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  if (x > INT32_MAX || y > UINT16_MAX || z > UINT16_MAX) {
    throw std::runtime_error("blocks: expected at most 2147483647 x 65535 x 65535, got " +
                             std::to_string(x) + " x " + std::to_string(y) + " x " +
                             std::to_string(z) + ": split the batch");
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// One thread per item of [0, items).
inline Grid grid_of(int64_t items, unsigned threads = 256) {
  return {blocks_of((items + threads - 1) / threads), dim3(threads)};
}

// The kernel's threads start here: on the device, or in the harness that runs .cu files on the CPU.
template <typename... Parameters>
void start([[maybe_unused]] const char* name, void (*kernel)(Parameters...), const Grid& grid,
           [[maybe_unused]] cudaStream_t stream, Parameters... arguments) {
#ifdef RDARTS_ON_HOST
  on_host::launch(name, kernel, grid.blocks, grid.threads, grid.shared, arguments...);
#else
  kernel<<<grid.blocks, grid.threads, grid.shared, stream>>>(arguments...);
#endif
}

// Runs kernel(arguments...) on the place's stream; `name` is what an error calls it.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const Place& place,
            Arguments... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "what older toolkits let a kernel take");
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  check_device(place.device);
  const DeviceGuard guard(place.device);
  if (grid.shared + kMostStatic > kSharedByDefault) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared)),
          name);
  }
  start(name, kernel, grid, reinterpret_cast<cudaStream_t>(place.stream),
        Parameters(arguments)...);
  check(cudaGetLastError(), name);
}

}  // namespace rdarts
