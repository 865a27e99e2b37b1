// A kernel's views of memory: raw pointers on the device; tests/host_cuda brings checked ones of
// the same names for .cu files that are compiled to run on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "body.h"

#ifndef RDARTS_ON_HOST
namespace rdarts {

// Global memory, a kernel parameter. Indices count elements. A vector's address must be a multiple
// of its alignment.
template <typename T>
struct Span {
  T* data;
  int64_t size;  // elements
  RDARTS_METHOD T& operator[](int64_t index) const { return data[index]; }
  template <typename Vector>
  RDARTS_METHOD Vector load(int64_t index) const {
    return *reinterpret_cast<const Vector*>(data + index);
  }
  template <typename Vector>
  RDARTS_METHOD void store(int64_t index, Vector value) const {
    *reinterpret_cast<Vector*>(data + index) = value;
  }
};

// A run of the block's shared memory.
template <typename T>
struct SharedSpan {
  T* data;
  int size;
  RDARTS_METHOD T& operator[](int index) const { return data[index]; }
  template <typename Vector>
  RDARTS_METHOD Vector load(int index) const {
    return *reinterpret_cast<const Vector*>(data + index);
  }
  template <typename Vector>
  RDARTS_METHOD void store(int index, Vector value) const {
    *reinterpret_cast<Vector*>(data + index) = value;
  }
};

// Static shared memory, declared as `__shared__ Shared<float, 32> sums;`.
template <typename T, int count>
struct Shared {
  alignas(16) T data[count];
  RDARTS_METHOD T& operator[](int index) { return data[index]; }
  RDARTS_METHOD SharedSpan<T> span() { return {data, count}; }
  template <typename Vector>
  RDARTS_METHOD Vector load(int index) {
    return span().template load<Vector>(index);
  }
  template <typename Vector>
  RDARTS_METHOD void store(int index, Vector value) {
    span().store(index, value);
  }
};

// `count` elements of the launch's dynamic shared memory (Grid::shared), from `byte_offset` on.
template <typename T>
__device__ __forceinline__ SharedSpan<T> dynamic_shared(int count, int byte_offset = 0) {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return {reinterpret_cast<T*>(dynamic_shared_memory + byte_offset), count};
}

}  // namespace rdarts
#endif
