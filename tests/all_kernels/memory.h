// Buffers of device memory for one case, each of its exact size, so that a tool which watches memory
// sees the first byte past its end. Whatever nobody fills holds NaN.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"
#include "device.h"

namespace rdarts {

enum class Layout { kInner, kOuter };  // where the channels lie

inline size_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : dtype == DType::kUInt8 ? 1 : 2;
}

inline int64_t elements_in(const Array& a) {
  return a.shape[0] * a.shape[1] * a.shape[2] * a.shape[3];
}

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* buffer : buffers_) cudaFree(buffer);
  }

  // `bytes` of 0xFF: NaN as a number of any type.
  void* take(size_t bytes) {
    void* buffer = nullptr;
    check(cudaMalloc(&buffer, bytes == 0 ? 1 : bytes), "cudaMalloc");
    buffers_.push_back(buffer);
    check(cudaMemset(buffer, 0xFF, bytes), "cudaMemset");
    return buffer;
  }
  double* doubles(int64_t count) { return static_cast<double*>(take(8 * count)); }

  // Numbers of [low, high), the next of one sequence.
  void* numbers(DType dtype, int64_t count, double low = -1.0, double high = 1.0) {
    std::vector<unsigned char> bytes(count * bytes_of(dtype));
    for (int64_t i = 0; i < count; ++i) put(dtype, &bytes[i * bytes_of(dtype)], low, high);
    void* const buffer = take(bytes.size());
    check(cudaMemcpy(buffer, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    return buffer;
  }

  // A dense tensor; without numbers where it is to be written.
  Array tensor(DType dtype, const std::vector<int64_t>& shape, Layout layout, bool filled) {
    Array a = {nullptr, dtype, {shape[0], shape[1], shape[2], shape[3]}, {}};
    const int64_t c = shape[1], h = shape[2], w = shape[3];
    const int64_t inner[] = {c * h * w, 1, c * w, c}, outer[] = {c * h * w, h * w, w, 1};
    std::memcpy(a.strides, layout == Layout::kInner ? inner : outer, sizeof a.strides);
    const int64_t count = elements_in(a);
    a.data = filled ? numbers(dtype, count) : take(count * bytes_of(dtype));
    return a;
  }

 private:
  double next() {  // a linear congruential generator (Knuth, MMIX)
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 40) / (1 << 24);
  }
  void put(DType dtype, unsigned char* to, double low, double high) {
    const double number = low + (high - low) * next();
    const float single = static_cast<float>(number);
    if (dtype == DType::kFloat64) {
      std::memcpy(to, &number, 8);
    } else if (dtype == DType::kFloat32) {
      std::memcpy(to, &single, 4);
    } else {  // the upper half of a float32 is a bfloat16, rounded down
      uint32_t bits = 0;
      std::memcpy(&bits, &single, 4);
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      std::memcpy(to, &half, 2);
    }
  }

  std::vector<void*> buffers_;
  uint64_t state_ = 1;
};

inline double number_at(DType dtype, const unsigned char* from) {
  if (dtype == DType::kFloat64) {
    double number = 0;
    std::memcpy(&number, from, 8);
    return number;
  }
  uint32_t bits = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(&bits, from, 4);
  } else {
    uint16_t half = 0;
    std::memcpy(&half, from, 2);
    bits = uint32_t{half} << 16;
  }
  float single = 0;
  std::memcpy(&single, &bits, 4);
  return single;
}

// Throws unless every number was written, and is finite.
inline void check_written(const char* name, DType dtype, const void* data, int64_t count) {
  std::vector<unsigned char> bytes(count * bytes_of(dtype));
  check(cudaMemcpy(bytes.data(), data, bytes.size(), cudaMemcpyDeviceToHost), name);
  for (int64_t i = 0; i < count; ++i) {
    const unsigned char* const at = &bytes[i * bytes_of(dtype)];
    const bool fine = dtype == DType::kUInt8 ? *at < 9 : std::isfinite(number_at(dtype, at));
    if (fine) continue;
    throw std::runtime_error(std::string(name) + ": number " + std::to_string(i) + " of " +
                             std::to_string(count) + " was not written, or is not finite");
  }
}

inline void check_written(const char* name, const Array& a) {
  check_written(name, a.dtype, a.data, elements_in(a));
}

}  // namespace rdarts
