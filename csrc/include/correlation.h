// The correlation of two images along their rows and its adjoints: what their launchers take. With
// d_i = first + i and zeros outside of the images:
//   correlation             out[n, i, y, x] = 1/C sum over c of left[n, c, y, x] right[n, c, y, x + d_i]
//   correlation_adjoint     out[n, c, y, x] = 1/C sum over i of g[n, i, y, x] other[n, c, y, x + d_i]
//     to the right          out[n, c, y, x] = 1/C sum over i of g[n, i, y, x - d_i] other[n, c, y, x - d_i]
// All three are bilinear; each one's derivatives are the other two.
#pragma once

#include <cstdint>

#include "array.h"

namespace rdarts {

struct Correlation {
  Array left, right;  // [N, C, H, W]
  Array out;          // [N, count, H, W]
  int64_t first;
};

struct CorrelationAdjoint {
  Array g;      // [N, count, H, W]
  Array other;  // [N, C, H, W]
  Array out;    // [N, C, H, W]
  int64_t first;
  bool to_right;
};

}  // namespace rdarts
