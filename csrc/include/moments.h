// What the launcher of a batch norm's tangent moments takes: of the tangents x_v of V directions,
// with the batch norm's result r and the loss's gradient g in it,
//   pairs[j, k]  = sum over n, p, c of weights[c] * x_j * x_k
//   by_result[v, c] = sum over n, p of r * x_v,  by_gradient[v, c] = of g * x_v,  plain[v, c] = of x_v
// All tensors are dense, channels innermost. Sums are float64.
#pragma once

#include <algorithm>
#include <cstdint>

#include "array.h"

namespace rdarts {

struct TangentMoments {
  DType dtype;
  int64_t directions, samples, pixels, channels;
  const void *x, *result, *gradient;  // [V, N, P, C], [N, P, C] each
  const void* weights;                // [C]
  double* sums;  // pairs [V, V], then by_result, by_gradient and plain, [V, C] each
  double* workspace;

  int64_t size() const { return directions * directions + 3 * directions * channels; }
};

constexpr int64_t kMomentChunks = 16;  // parts of a batch, each with sums of its own

// Samples of a part, and doubles of workspace for all.
inline int64_t moments_chunk(const TangentMoments& a) {
  return std::max<int64_t>(1, (a.samples + kMomentChunks - 1) / kMomentChunks);
}
inline int64_t moments_workspace(const TangentMoments& a) {
  return a.size() * ((a.samples + moments_chunk(a) - 1) / moments_chunk(a));
}

}  // namespace rdarts
