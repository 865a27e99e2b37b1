// The calls of the CUDA runtime, and what a launch may ask for.
#include "on_host/runtime.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "on_host/launch.h"

namespace {

constexpr size_t kSharedByDefault = 48 * 1024;
constexpr size_t kStatic = 8 * 1024;  // of that, what any kernel is taken to have beside
constexpr int kRuntimeVersion = 13020;

cudaError_t last_error = cudaSuccess;
std::map<const void*, size_t> shared_limits;
std::vector<int> capabilities = {90};
int driver_version = kRuntimeVersion;

bool exists(int device) { return device >= 0 && device < static_cast<int>(capabilities.size()); }

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return exists(device) ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kRuntimeVersion;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!exists(device)) return cudaErrorInvalidDevice;
  const bool major = attribute == cudaDevAttrComputeCapabilityMajor;
  *value = major ? capabilities[device] / 10 : capabilities[device] % 10;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return *memory == nullptr ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

namespace on_host {

int add_device(int capability) {
  capabilities.push_back(capability);
  return static_cast<int>(capabilities.size()) - 1;
}

void set_driver(int version) { driver_version = version; }

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > kMaxShared) return cudaErrorInvalidValue;
  shared_limits[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

bool launchable(const void* kernel, dim3 blocks, dim3 threads, size_t shared) {
  const auto limit = shared_limits.find(kernel);
  const size_t most = limit == shared_limits.end() ? kSharedByDefault - kStatic : limit->second;
  const bool valid = blocks.x > 0 && blocks.x < 1u << 31 && blocks.y > 0 && blocks.y < 1u << 16 &&
                     blocks.z > 0 && blocks.z < 1u << 16 && threads.x > 0 && threads.y > 0 &&
                     threads.z > 0 && threads.z <= 64 &&
                     uint64_t{threads.x} * threads.y * threads.z <= kMaxThreads;
  if (!valid) last_error = cudaErrorInvalidConfiguration;
  if (shared > most) last_error = cudaErrorInvalidValue;
  return valid && shared <= most;
}

}  // namespace on_host
