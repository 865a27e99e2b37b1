// A tensor as the kernels see it.
#pragma once

#include <cstdint>

namespace rdarts {

enum class DType { kFloat32, kFloat64, kBFloat16, kUInt8 };

struct Array {
  void* data;  // null: absent
  DType dtype;
  int64_t shape[4];    // N, C, H, W
  int64_t strides[4];  // in elements
};

}  // namespace rdarts
