// Depthwise convolutions on images in blocks of L channels, some rows of a block at a time:
//   forward    out[r, c] = sum_t taps[t] * image[r, c + t]
//   gradient   taps[t] += sum_rc out[r, c] * image[r, c + t]
//   scattered  image[c + t] += taps[t] * out[c], a row
// `image` points to the first row's first pixel under tap 0; a step from row to row is `width` pixels.
#pragma once

#include "matmul.h"
#include "vectors.h"

namespace rdarts {
namespace {

// out: [rows, columns, L]
template <int K, int D, int S, typename T>
void convolve(const T* image, int64_t width, const T* taps, int64_t rows, int64_t columns, T* out) {
  constexpr int L = kVector<T>, together = 4;
  const int64_t row = width * L * D;
  Vec<T> tap[K * K];  // in registers where there are enough
  RDARTS_UNROLL
  for (int t = 0; t < K * K; ++t) tap[t] = load(taps + t * L);
  for (int64_t r = 0; r < rows; ++r, image += S * width * L, out += columns * L) {
    int64_t column = 0;
    for (; column + together <= columns; column += together) {
      const T* const from = image + column * S * L;
      Vec<T> sum[together];
      RDARTS_UNROLL
      for (int q = 0; q < together; ++q) sum[q] = Vec<T>{};
      RDARTS_UNROLL
      for (int y = 0; y < K; ++y) {
        RDARTS_UNROLL
        for (int x = 0; x < K; ++x) {
          RDARTS_UNROLL
          for (int q = 0; q < together; ++q) {
            sum[q] += tap[y * K + x] * load(from + y * row + (x * D + q * S) * L);
          }
        }
      }
      RDARTS_UNROLL
      for (int q = 0; q < together; ++q) store<T>(out + (column + q) * L, sum[q]);
    }
    for (; column < columns; ++column) {
      const T* const from = image + column * S * L;
      Vec<T> sum = {};
      for (int y = 0; y < K; ++y) {
        RDARTS_UNROLL
        for (int x = 0; x < K; ++x) sum += tap[y * K + x] * load(from + y * row + x * D * L);
      }
      store<T>(out + column * L, sum);
    }
  }
}

// out: rows of `columns` pixels, `out_width` apart
template <int K, int D, int S, typename T>
void gradient(const T* image, int64_t width, const T* out, int64_t out_width, int64_t rows,
              int64_t columns, T* taps) {
  constexpr int L = kVector<T>, lines = K == 3 ? 3 : 1;  // of taps at once, as registers allow
  RDARTS_UNROLL
  for (int y = 0; y < K; y += lines) {
    Vec<T> sum[lines * K];
    RDARTS_UNROLL
    for (int t = 0; t < lines * K; ++t) sum[t] = load(taps + (y * K + t) * L);
    for (int64_t row = 0; row < rows; ++row) {
      const T* const line = image + (row * S + y * D) * width * L;
      for (int64_t column = 0; column < columns; ++column) {
        const T* const from = line + column * S * L;
        const Vec<T> g = load(out + (row * out_width + column) * L);
        RDARTS_UNROLL
        for (int t = 0; t < lines * K; ++t) {
          sum[t] += g * load(from + (t / K * width * D + t % K * D) * L);
        }
      }
    }
    RDARTS_UNROLL
    for (int t = 0; t < lines * K; ++t) store(taps + (y * K + t) * L, sum[t]);
  }
}

template <int K, int D, int S, typename T>
void scatter_row(T* image, int64_t width, const T* taps, const T* out, int64_t columns) {
  constexpr int L = kVector<T>;
  for (int t = 0; t < K * K; ++t) {
    const Vec<T> tap = load(taps + t * L);
    T* const to = image + (t / K * width * D + t % K * D) * L;
    for (int64_t column = 0; column < columns; ++column) {
      T* const pixel = to + column * S * L;
      store<T>(pixel, load(pixel) + tap * load(out + column * L));
    }
  }
}

// The functions of a kernel's size, dilation and stride.
template <typename T>
struct Depthwise {
  void (*convolve)(const T* image, int64_t width, const T* taps, int64_t rows, int64_t columns,
                   T* out);
  void (*gradient)(const T* image, int64_t width, const T* out, int64_t out_width, int64_t rows,
                   int64_t columns, T* taps);
  void (*scatter)(T* image, int64_t width, const T* taps, const T* out, int64_t columns);  // at 2
};

template <typename T, int K, int D>
Depthwise<T> depthwise_of(int stride) {
  if (stride == 1) {
    return {convolve<K, D, 1, T>, gradient<K, D, 1, T>, nullptr};
  }
  return {convolve<K, D, 2, T>, gradient<K, D, 2, T>, scatter_row<K, D, 2, T>};
}

template <typename T>
Depthwise<T> depthwise_of(int kernel, int dilation, int stride) {
  const bool wide = dilation == 2;
  if (kernel == 3) return wide ? depthwise_of<T, 3, 2>(stride) : depthwise_of<T, 3, 1>(stride);
  if (kernel == 5) return wide ? depthwise_of<T, 5, 2>(stride) : depthwise_of<T, 5, 1>(stride);
  return wide ? depthwise_of<T, 7, 2>(stride) : depthwise_of<T, 7, 1>(stride);
}

}  // namespace
}  // namespace rdarts
