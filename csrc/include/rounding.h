// float32 tensors rounded to bfloat16, as a backward pass keeps them:
//   out[k] = the bfloat16 nearest to z[k], ties to even
// and, where a batch norm and a ReLU follow, on the same side of the ReLU's zero as z[k]: where
// scale[k, c] * out + shift[k, c] > 0 would differ, the neighbour of the nearest on z's side. So the
// backward masks what the forward did; the error is below one unit in the last place, not half of one.
#pragma once

#include <cmath>
#include <cstdint>

#include "body.h"
#include "node_sum.h"

namespace rdarts {

struct Rounding {
  int inputs;        // K
  int64_t count;     // numbers of each tensor, [P, C]: channels innermost
  int64_t channels;  // C
  const float* z[kMostInputs];
  uint16_t* out[kMostInputs];
  const float* scale;  // [K, C] each; null: the nearest
  const float* shift;
};

// The bits of the bfloat16 nearest to x; a NaN stays one.
RDARTS_BODY uint16_t nearest_bfloat16(float x) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

RDARTS_BODY float bfloat16_value(uint16_t bits) {
  return float_of(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16));
}

RDARTS_BODY bool is_above(float x, float scale, float shift) {
  return add(mul(scale, x), shift) > 0.0f;
}

// The next bfloat16 above or below.
RDARTS_BODY uint16_t neighbour(uint16_t bits, bool up) {
  if ((bits & 0x7FFFu) == 0) return up ? 0x0001u : 0x8001u;
  const bool negative = (bits & 0x8000u) != 0;
  return static_cast<uint16_t>(up == negative ? bits - 1 : bits + 1);
}

RDARTS_BODY uint16_t rounded_beside(float x, float scale, float shift) {
  const uint16_t bits = nearest_bfloat16(x);
  const float near = bfloat16_value(bits);
  if (near == x || is_above(near, scale, shift) == is_above(x, scale, shift)) return bits;
  return neighbour(bits, x > near);
}

}  // namespace rdarts
