// Depthwise convolutions on images in blocks of L channels, some rows of a block at a time:
//   forward    out[r, c] = sum_yx taps[y, x] * image[S r + D y, S c + D x]
//   gradient   taps[y, x] += sum_rc out[r, c] * image[S r + D y, S c + D x]
//   transposed image[r, c] = sum_yx taps[y, x] * out[(r - D y) / 2, (c - D x) / 2] where these are whole
// r, c count from the corner of the padding. `image` points to the first row's first pixel under tap 0,
// a step from row to row is `width` pixels; for transposed, `out` points to its own pixel 0.
#pragma once

#include "matmul.h"
#include "vectors.h"

namespace rdarts {
namespace {

// `count` pixels of a row from `from` on, lines of taps `line` numbers apart; a pixel of the image is
// loaded once for all results that it enters.
template <int K, int D, int S, int count, typename T>
RDARTS_METHOD void convolve_pixels(const T* from, int64_t line, const T* taps, T* out) {
  constexpr int L = kVector<T>, reach = (K - 1) * D + (count - 1) * S + 1;
  Vec<T> sum[count];
  RDARTS_UNROLL
  for (int q = 0; q < count; ++q) sum[q] = Vec<T>{};
  RDARTS_UNROLL
  for (int y = 0; y < K; ++y) {
    Vec<T> tap[K];
    RDARTS_UNROLL
    for (int x = 0; x < K; ++x) tap[x] = load(taps + (y * K + x) * L);
    RDARTS_UNROLL
    for (int i = 0; i < reach; ++i) {
      Vec<T> pixel = load(from + y * line + i * L);
      keep(pixel);
      RDARTS_UNROLL
      for (int q = 0; q < count; ++q) {
        const int at = i - q * S;
        if (at >= 0 && at % D == 0 && at / D < K) sum[q] += tap[at / D] * pixel;
      }
    }
  }
  RDARTS_UNROLL
  for (int q = 0; q < count; ++q) store<T>(out + q * L, sum[q]);
}

// out: [rows, columns, L]
template <int K, int D, int S, typename T>
void convolve(const T* image, int64_t width, const T* taps, int64_t rows, int64_t columns, T* out) {
  constexpr int L = kVector<T>;
  const int64_t line = width * L * D;
  for (int64_t r = 0; r < rows; ++r, image += S * width * L, out += columns * L) {
    int64_t column = 0;
    if constexpr (K > 3) {  // four sums of so many terms would wait for each other
      for (; column + 8 <= columns; column += 8) {
        convolve_pixels<K, D, S, 8>(image + column * S * L, line, taps, out + column * L);
      }
    }
    for (; column + 4 <= columns; column += 4) {
      convolve_pixels<K, D, S, 4>(image + column * S * L, line, taps, out + column * L);
    }
    for (; column < columns; ++column) {
      convolve_pixels<K, D, S, 1>(image + column * S * L, line, taps, out + column * L);
    }
  }
}

// `lines` lines of taps at once, from line y on.
template <int K, int D, int S, int lines, typename T>
RDARTS_METHOD void gradient_lines(const T* image, int64_t width, const T* out, int64_t out_width,
                                  int64_t rows, int64_t columns, int y, T* taps) {
  constexpr int L = kVector<T>;
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

// out: rows of `columns` pixels, `out_width` apart
template <int K, int D, int S, typename T>
void gradient(const T* image, int64_t width, const T* out, int64_t out_width, int64_t rows,
              int64_t columns, T* taps) {
  // Lines at once: of 5x5 taps one took 1.4 times as long as three, and all five 1.7 times.
  constexpr int most = (kWideBytes < 64 ? 9 : 15) / K;
  constexpr int lines = most < K ? most : K;
  int y = 0;
  for (; y + lines <= K; y += lines) {
    gradient_lines<K, D, S, lines>(image, width, out, out_width, rows, columns, y, taps);
  }
  if constexpr (K % lines > 0) {
    gradient_lines<K, D, S, K % lines>(image, width, out, out_width, rows, columns, y, taps);
  }
}

// `count` pixels of row `row` of transposed(), every other one: the first lies under `out` and column
// `tap` of the taps.
template <int K, int D, int tap, int count, typename T>
RDARTS_METHOD void transposed_pixels(const T* out, int64_t out_width, const T* taps, int64_t row,
                                     T* to) {
  constexpr int L = kVector<T>, step = D == 1 ? 2 : 1;
  Vec<T> sum[count];
  RDARTS_UNROLL
  for (int q = 0; q < count; ++q) sum[q] = Vec<T>{};
  for (int64_t y = row % step; y < K; y += step) {
    const T* const line = out + (row - y * D) / 2 * out_width * L;
    RDARTS_UNROLL
    for (int x = tap; x < K; x += step) {
      const Vec<T> weight = load(taps + (y * K + x) * L);
      RDARTS_UNROLL
      for (int q = 0; q < count; ++q) {
        sum[q] += weight * load(line + (q - (x - tap) / step) * L);
      }
    }
  }
  RDARTS_UNROLL
  for (int q = 0; q < count; ++q) store<T>(to + 2 * q * L, sum[q]);
}

// The pixels start, start + 2, ... of a row of transposed().
template <int K, int D, int start, typename T>
void transposed_row(const T* out, int64_t out_width, const T* taps, int64_t row, int64_t columns,
                    T* to) {
  constexpr int L = kVector<T>, together = 4;
  constexpr int pad = D * (K / 2), tap = (start + pad) % 2;
  if (D == 2 && (tap > 0 || row % 2 > 0)) {  // under no tap
    for (int64_t column = start; column < columns; column += 2) store<T>(to + column * L, Vec<T>{});
    return;
  }
  const T* from = out + (start + pad - tap) / 2 * L;
  int64_t column = start;
  for (; column + 2 * together - 2 < columns; column += 2 * together, from += together * L) {
    transposed_pixels<K, D, tap, together>(from, out_width, taps, row, to + column * L);
  }
  for (; column < columns; column += 2, from += L) {
    transposed_pixels<K, D, tap, 1>(from, out_width, taps, row, to + column * L);
  }
}

// The gradient of `rows` rows of an image below a convolution of stride 2, inside of its padding, from
// row `first` on; to: [rows, columns, L]. out: its pixel 0, with a border of half the padding, rounded
// up.
template <int K, int D, typename T>
void transposed(const T* out, int64_t out_width, const T* taps, int64_t first, int64_t rows,
                int64_t columns, T* to) {
  constexpr int L = kVector<T>, pad = D * (K / 2);
  for (int64_t row = first + pad; row < first + pad + rows; ++row, to += columns * L) {
    transposed_row<K, D, 0>(out, out_width, taps, row, columns, to);
    transposed_row<K, D, 1>(out, out_width, taps, row, columns, to);
  }
}

// The functions of a kernel's size, dilation and stride.
template <typename T>
struct Depthwise {
  void (*convolve)(const T* image, int64_t width, const T* taps, int64_t rows, int64_t columns,
                   T* out);
  void (*gradient)(const T* image, int64_t width, const T* out, int64_t out_width, int64_t rows,
                   int64_t columns, T* taps);
  void (*transposed)(const T* out, int64_t out_width, const T* taps, int64_t first, int64_t rows,
                     int64_t columns, T* to);  // at stride 2
};

template <typename T, int K, int D>
Depthwise<T> depthwise_of(int stride) {
  if (stride == 1) {
    return {convolve<K, D, 1, T>, gradient<K, D, 1, T>, nullptr};
  }
  return {convolve<K, D, 2, T>, gradient<K, D, 2, T>, transposed<K, D, T>};
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
