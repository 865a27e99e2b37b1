// What the launchers of the 1x1 convolutions below a ReLU take: the preprocessing of a cell's inputs
// and FactorizedReduce, G of them on the same M sources, which count as one tensor of M C channels:
//   y[m C + c] = relu(scale[m, c] * x_m + shift[m, c])             or relu(x_m)
//   z_g[n, o, h, w] = sum_k weights_g[o, k] * y[n, k, stride h + s, stride w + s]
// with s = 0 for the first half of the output channels (the larger one) and, where `halves` is 2,
// s = 1 and weights of their own for the second; there are zeros past the image's edge. z and dv lie
// densely with their channels innermost; otherwise as in stage.h.
#pragma once

#include <cstdint>

#include "array.h"
#include "stage.h"

namespace rdarts {

struct Mixing {
  int edges, sources, halves, stride;
  const Array* x;              // [M], each [N, C, H, W], any strides
  const void* scale;           // [M, C] or null
  const void* shift;           // [M, C], where scale is
  const void* const* weights;  // [G, halves] of [O / halves, M C]; null where a half is empty
};

struct MixingForward {
  Mixing mixing;
  const Array* z;  // [G], each [N, O, ceil(H / stride), ceil(W / stride)]
  double* sums;    // [3, G, O]: sum of (z - pivot), of its square, the pivots
  double* workspace;
  const Normalization* norms = nullptr;  // of these sums: on a GPU the same launch fills them
};

// dv_m is the gradient of scale x_m + shift over all edges, 0 where that is <= 0.
struct MixingBackward : GradientOfZ {
  Mixing mixing;
  const Array* dv;        // [M], each [N, C, H, W], no two of them one tensor; absent: not wanted
  const uint8_t* adds;    // [M]: whether dv_m is added to what is there
  void* const* dweights;  // [G, halves], like weights; null: they get no gradients
  double* workspace;
};

// Channels of z that a half has.
static inline int64_t channels_of_half(const Mixing& m, int64_t channels, int half) {
  const int64_t second = m.halves == 2 ? channels / 2 : 0;
  return half == 1 ? second : channels - second;
}

}  // namespace rdarts
