// What a GPU and its driver must offer to run what was compiled. RDARTS_CUDA_ARCHS names that, as
// "sm_80,sm_90,compute_90": machine code, and PTX that a driver compiles for later GPUs.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>

namespace rdarts {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Whether code for `arch` runs on a GPU of that capability (86 is 8.6), by CUDA's own rules. The
// suffix a binds it to that one GPU, f to those of one major version, as machine code always is.
inline bool runs_on(const std::string& arch, int capability) {
  const int compiled = std::stoi(arch.substr(arch.find('_') + 1));
  if (arch.back() == 'a') return capability == compiled;
  const bool any_later = arch.rfind("compute_", 0) == 0 && arch.back() != 'f';
  return capability >= compiled && (any_later || capability / 10 == compiled / 10);
}

// 13020 -> "13.2".
inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The least CUDA version that a driver must support to run this module on such a GPU. Of one major
// version a driver runs all machine code, but compiles only PTX that is no newer than itself.
inline int needed_driver(int capability, int runtime) {
  const std::string archs = RDARTS_CUDA_ARCHS, number = std::to_string(capability);
  std::istringstream words(archs);
  bool as_ptx = false;
  for (std::string arch; std::getline(words, arch, ',');) {
    if (!runs_on(arch, capability)) continue;
    if (arch.rfind("sm_", 0) == 0) return runtime / 1000 * 1000;
    as_ptx = true;
  }
  if (as_ptx) return runtime;
  throw std::runtime_error("this GPU is sm_" + number + ", the module was compiled for " + archs +
                           ": set RDARTS_CUDA_ARCHS=" + number + " and run `pip install .`");
}

inline void check_driver(int driver, int needed) {
  if (driver >= needed) return;
  throw std::runtime_error("the driver supports CUDA " + version_text(driver) +
                           ", the module needs " + version_text(needed) +
                           ": update the driver, or run `pip install .` with an older toolkit");
}

// Throws where the device or its driver cannot run this module. They are asked until they can, then
// never again in this process.
inline void check_device(int device) {
  static std::mutex mutex;
  static std::set<int> fit;
  const std::lock_guard<std::mutex> lock(mutex);
  if (fit.count(device) > 0) return;
  int driver = 0, runtime = 0, major = 0, minor = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  check_driver(driver, runtime / 1000 * 1000);  // an older one answers no question about its GPUs
  const std::string name = "device " + std::to_string(device);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), name.c_str());
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), name.c_str());
  check_driver(driver, needed_driver(10 * major + minor, runtime));
  fit.insert(device);
}

}  // namespace rdarts
