// What the launchers of the convolution stages take: half a separable convolution of G edges,
//   y_g = relu(scale_g[c] * x_g + shift_g[c])                   or relu(x_g)
//       = scale_g[c] * x_g + by_gate_g[c] * gate + shift_g[c] where gate > 0, else 0,  with a gate
//   d_g = y_g convolved with depthwise_g, channel by channel    K x K, padding dilation * (K / 2)
//   z_g[n, o, h, w] = sum_c pointwise_g[o, c] * d_g[n, c, h, w]
// z and dv lie densely with their channels innermost; arrays of one call share a dtype. Sums are
// float64, coefficients float64 for float64 arrays, else float32, as are the weights. A null pointer
// is an absent argument.
#pragma once

#include <cstdint>

#include "array.h"
#include "cell.h"
#include "node_sum.h"

namespace rdarts {

constexpr int kMostEdges = 64;

struct Stage {
  int edges;
  int kernel;  // 3, 5 or 7
  int dilation, stride;          // 1 or 2 each
  const Array* x;                // [G], each [N, C, H, W], any strides; one may stand there often
  const void* scale;             // [G, C] or null
  const void* shift;             // [G, C], where scale is
  const void* const* depthwise;  // [G] of [C, 1, K, K]
  const void* const* pointwise;  // [G] of [O, C, 1, 1]
  const Array* gate = nullptr;   // like x, of all edges: the tangent of relu. Forward only
  const void* by_gate = nullptr;  // [G, C], where scale is
};

struct StageForward {
  Stage stage;
  const Array* z;  // [G], each [N, O, H', W']
  double* sums;    // [3, G, O]: sum of (z - pivot), of its square, the pivots
  double* workspace;
  bool read_soon = true;  // else z need not stay in the CPU's cache
  const Normalization* norms = nullptr;  // of these sums: on a GPU the same launch fills them
};

// The gradient of z_g, from that of what z_g enters:
//   dz_g = factors[g, n] * by_g[g, o] * g_g + by_z[g, o] * z_g + constant[g, o]
struct GradientOfZ {
  const Array* g;        // [G], each [N, O, H', W'], any strides
  const Array* z;        // [G]; null where by_z is
  const void* by_g;      // [G, O] or null for ones
  const void* by_z;      // [G, O] or null
  const void* constant;  // [G, O] or null
  const void* factors;   // [G, N] or null
};

// With v_g = scale_g * x_g + shift_g: dv_g is the gradient of v_g, 0 where v_g <= 0.
struct StageBackward : GradientOfZ {
  Stage stage;
  const Array* dv;          // [G], each [N, C, H, W]; absent: not wanted; those of a repeated x may
                            // be one tensor
  const uint8_t* adds;      // [G]: whether dv_g is added to what is there
  double* sums;          // [2, G, C]: sum of dv_g, sum of dv_g * y_g; null: not wanted
  void* const* ddepthwise;  // [G], like depthwise; null: the weights get no gradients
  void* const* dpointwise;  // [G], like pointwise
  double* workspace;
  const RowGradients* rows = nullptr;  // of these sums: on a GPU the same launch fills them
};

}  // namespace rdarts
