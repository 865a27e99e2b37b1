// The 3x3 pools of padding 1, strides 1 and 2: what their launchers take, and the arithmetic that
// both sides share. The padding plays no part: neither in the maximum nor in the mean's count.
#pragma once

#include <cstdint>

#include "array.h"
#include "body.h"

namespace rdarts {

constexpr int kPools = 2;  // the maximum, the mean

// out[0] = the maximum over windows of x, out[1] = the mean; the tangent takes the elements of x at
// given places in the maximum's stead.
struct Pool {
  Array x;            // [N, C, H, W]
  Array out[kPools];  // [N, C, ceil(H / stride), ceil(W / stride)] each; absent: not wanted
  Array place;        // uint8, as out[0]: 3 row + column of the window's maximum; with out[0]
  int stride;
  double* sums;       // [3, kinds, C] of those wanted: sum of (out - pivot), of its square, pivot
  double* workspace;  // no sums in the tangent
};

// dx = what both pools hand back of g.
struct PoolAdjoint {
  Array g[kPools];  // absent: zeros
  Array place;      // with g[0]
  Array dx;         // [N, C, H, W]
  int stride;
};

// How many are wanted.
RDARTS_BODY int kinds_of(const Array* pools /* [kPools] */) {
  return (pools[0].data != nullptr) + (pools[1].data != nullptr);
}

RDARTS_BODY int64_t pooled(int64_t size, int stride) { return (size + stride - 1) / stride; }

// Whether the next element of a window becomes its maximum: the first of equals stays, and a NaN
// once taken yields to nothing but another NaN, as in torch.
template <typename T>
RDARTS_BODY bool takes(T value, T most) {
  return static_cast<int>(value > most) | static_cast<int>(value != value);
}

// How many of a window's three rows (or columns) lie in the image.
RDARTS_BODY int counted(int64_t index, int stride, int64_t size) {
  return 3 - (index == 0) - (stride * index + 1 >= size);
}

template <typename T>
RDARTS_BODY T inverse_of(int count) {
  return count == 3 ? T(1.0 / 3.0) : count == 2 ? T(0.5) : T(1);
}

}  // namespace rdarts
