// How the kernels walk over tensors [N, C, H, W]: samples, rows, channels, pixels.
#pragma once

#include "array.h"
#include "body.h"

namespace rdarts {

// rows * pixels = H * W; rows is 1 where every tensor's pixels lie at one stride.
struct Walk {
  int64_t samples, rows, channels, pixels;
};

// Strides in elements of a tensor that is walked over.
struct Steps {
  int64_t sample, row, channel, pixel;
};

static inline bool even_pixels(const Array& a) {
  return a.data == nullptr || a.shape[2] == 1 || a.shape[3] == 1 ||
         a.strides[2] == a.shape[3] * a.strides[3];
}

static inline Walk walk_over(const Array& first, bool even) {
  const int64_t n = first.shape[0], c = first.shape[1], h = first.shape[2], w = first.shape[3];
  return even ? Walk{n, 1, c, h * w} : Walk{n, h, c, w};
}

static inline Steps steps_of(const Array& a, const Walk& walk) {
  // With one column the pixels of an even walk lie a row apart.
  const bool column = walk.rows == 1 && a.shape[3] == 1;
  return {a.strides[0], a.strides[2], a.strides[1], column ? a.strides[2] : a.strides[3]};
}

// Whether the channels lie innermost.
static inline bool channels_inner(const Array& a) {
  return a.shape[1] > 1 ? a.strides[1] == 1 : false;
}

}  // namespace rdarts
