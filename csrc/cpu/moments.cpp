// The moments of a batch norm's tangents (moments.h) in one pass: a tile of pixels of all directions
// lies in the second-level cache, where the products of each two directions are summed in registers.
// Sums belong to a fixed chunk of samples and are added in their order, so that no bit depends on
// the number of threads.
#include "moments.h"

#include <algorithm>
#include <vector>

#include "images.h"
#include "launchers.h"
#include "parallel.h"

namespace rdarts {
namespace {

constexpr int64_t kTileBytes = 192 * 1024;  // of all directions
constexpr int kBlock = 4;                   // directions whose products share registers

template <typename T>
double total_of(const Vec<T>& v) {
  double sum = 0;
  for (int i = 0; i < kVector<T>; ++i) sum += v[i];
  return sum;
}

// pairs[j + a, k + b] += sum over i of left[a, i] * right[b, i], for rows x columns of them.
template <typename T, int rows, int columns>
void multiply_block(const T* left, int64_t left_step, const T* right, int64_t right_step,
                    int64_t size, double* pairs, int64_t directions) {
  constexpr int L = kVector<T>;
  Vec<T> sum[rows][columns] = {};
  int64_t i = 0;
  for (; i + L <= size; i += L) {
    Vec<T> value[columns];
    RDARTS_UNROLL
    for (int b = 0; b < columns; ++b) value[b] = load(right + b * right_step + i);
    RDARTS_UNROLL
    for (int a = 0; a < rows; ++a) {
      const Vec<T> x = load(left + a * left_step + i);
      RDARTS_UNROLL
      for (int b = 0; b < columns; ++b) sum[a][b] += x * value[b];
    }
  }
  for (int a = 0; a < rows; ++a) {
    for (int b = 0; b < columns; ++b) {
      double total = total_of<T>(sum[a][b]);
      for (int64_t r = i; r < size; ++r) {
        total += double(left[a * left_step + r]) * double(right[b * right_step + r]);
      }
      pairs[a * directions + b] += total;
    }
  }
}

// The products of all pairs j <= k; whole blocks below the diagonal come along.
template <typename T>
void multiply_pairs(const T* scaled, int64_t scaled_step, const T* x, int64_t step, int64_t size,
                    int64_t directions, double* pairs) {
  const auto rows_of = [&](int64_t j) { return std::min<int64_t>(kBlock, directions - j); };
  for (int64_t j = 0; j < directions; j += kBlock) {
    for (int64_t k = j; k < directions; k += kBlock) {
      double* const to = pairs + j * directions + k;
      if (rows_of(j) == kBlock && rows_of(k) == kBlock) {
        multiply_block<T, kBlock, kBlock>(scaled + j * scaled_step, scaled_step, x + k * step, step,
                                          size, to, directions);
        continue;
      }
      for (int64_t a = 0; a < rows_of(j); ++a) {
        for (int64_t b = 0; b < rows_of(k); ++b) {
          multiply_block<T, 1, 1>(scaled + (j + a) * scaled_step, 0, x + (k + b) * step, 0, size,
                                  to + a * directions + b, directions);
        }
      }
    }
  }
}

// Adds the sums over a tile's pixels of one direction, by channel.
template <typename T>
void add_products(const T* x, const T* result, const T* gradient, int64_t pixels, int64_t channels,
                  double* by_result, double* by_gradient, double* plain) {
  constexpr int L = kVector<T>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    Vec<T> r = {}, g = {}, s = {};
    for (int64_t p = 0; p < pixels; ++p) {
      const Vec<T> value = load(x + p * channels + c);
      r += value * load(result + p * channels + c);
      g += value * load(gradient + p * channels + c);
      s += value;
    }
    add_to<T>(by_result + c, r), add_to<T>(by_gradient + c, g), add_to<T>(plain + c, s);
  }
  for (; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) {
      const double value = x[p * channels + c];
      by_result[c] += value * result[p * channels + c];
      by_gradient[c] += value * gradient[p * channels + c];
      plain[c] += value;
    }
  }
}

template <typename T>
void moments_of(const TangentMoments& a, int threads) {
  const int64_t directions = a.directions, channels = a.channels, chunk = moments_chunk(a);
  const int64_t image = a.pixels * channels, step = a.samples * image, size = a.size();
  const int64_t row = std::max<int64_t>(1, directions * channels);  // of a pixel
  const int64_t aim = kTileBytes / static_cast<int64_t>(sizeof(T)) / row;
  const int64_t tile = std::clamp<int64_t>(aim, 1, std::max<int64_t>(1, a.pixels));  // pixels
  const T* const weights = static_cast<const T*>(a.weights);
  parallel_for(a.samples, chunk, threads, [&](int64_t from, int64_t to) {
    double* const pairs = a.workspace + from / chunk * size;
    double* const by_result = pairs + directions * directions;
    double* const by_gradient = by_result + directions * channels;
    double* const plain = by_gradient + directions * channels;
    std::fill_n(pairs, size, 0.0);
    T* const scaled = scratch<T>(directions * tile * channels);
    for (int64_t n = from; n < to; ++n) {
      for (int64_t first = 0; first < a.pixels; first += tile) {
        const int64_t pixels = std::min(tile, a.pixels - first), count = pixels * channels;
        const int64_t at = n * image + first * channels;
        const T* const x = static_cast<const T*>(a.x) + at;
        const T* const result = static_cast<const T*>(a.result) + at;
        const T* const gradient = static_cast<const T*>(a.gradient) + at;
        for (int64_t v = 0; v < directions; ++v) {
          const T* const own = x + v * step;
          T* const row = scaled + v * tile * channels;
          for (int64_t p = 0; p < pixels; ++p) {
            for (int64_t c = 0; c < channels; ++c) row[p * channels + c] = own[p * channels + c] * weights[c];
          }
          add_products(own, result, gradient, pixels, channels, by_result + v * channels,
                       by_gradient + v * channels, plain + v * channels);
        }
        multiply_pairs(scaled, tile * channels, x, step, count, directions, pairs);
      }
    }
  });
  std::fill_n(a.sums, size, 0.0);
  for (int64_t part = 0; part * chunk < a.samples; ++part) {
    const double* const own = a.workspace + part * size;
    for (int64_t i = 0; i < size; ++i) a.sums[i] += own[i];
  }
  for (int64_t j = 0; j < directions; ++j) {
    for (int64_t k = 0; k < j; ++k) a.sums[j * directions + k] = a.sums[k * directions + j];
  }
}

}  // namespace

template <>
void tangent_moments<RDARTS_UNIT>(const TangentMoments& a, int threads) {
  if (a.dtype == DType::kFloat64) moments_of<double>(a, threads);
  else moments_of<float>(a, threads);
}

}  // namespace rdarts
