// What the convolution stages make of a tile of results on the CPU: rows of z with their sums per
// channel, and the gradient of z from that of what z enters.
#pragma once

#include "images.h"
#include "matmul.h"

namespace rdarts {
namespace {

template <typename T>
const T* row_of(const void* table, int64_t row, int64_t size) {
  return static_cast<const T*>(table) + row * size;
}

// Stores rows of z and adds them, less the pivot, to sums in the array's type. A store to the cache
// waits for the line's old contents, so those of the next tile are fetched.
template <typename T>
struct Summed {
  const T* pivot;  // [blocks, L] each
  T* sum;
  T* square;
  int64_t channels;
  int64_t next;  // numbers from here to there in the next tile
  bool past_cache = false;  // then every vector of z is aligned

  template <int rows, int wide, typename>
  RDARTS_METHOD void operator()(const Product<T>& p, int m, int j, Vec<T> (&value)[rows][wide]) const {
    constexpr int L = kVector<T>;
    RDARTS_UNROLL
    for (int i = 0; i < wide; ++i) {
      const int at = (j + i) * L;
      const Vec<T> middle = load(pivot + at);
      Vec<T> s = load(sum + at), q = load(square + at);
      RDARTS_UNROLL
      for (int r = 0; r < rows; ++r) {
        const Vec<T> centred = value[r][i] - middle;
        s += centred, q += centred * centred;
      }
      store<T>(sum + at, s), store<T>(square + at, q);
      T* const c = p.c + at;
      const int* const offset = p.offset + m;
      if (past_cache) {
        RDARTS_UNROLL
        for (int r = 0; r < rows; ++r) store_past_cache<T>(c + offset[r], value[r][i]);
      } else if (channels - at >= L) {
        RDARTS_UNROLL
        for (int r = 0; r < rows; ++r) {
          __builtin_prefetch(c + offset[r] + next);
          store<T>(c + offset[r], value[r][i]);
        }
      } else {
        RDARTS_UNROLL
        for (int r = 0; r < rows; ++r) {
          __builtin_prefetch(c + offset[r] + next);
          store_part<T>(c + offset[r], value[r][i], channels - at);
        }
      }
    }
  }
};

// Adds a vector of sums to doubles and clears it.
template <typename T>
void drain(T* sum, int64_t channels, double* sums) {
  for (int64_t c = 0; c < channels; ++c) sums[c] += sum[c], sum[c] = T(0);
}

// The first row of a product as the pivot, which goes to `pivots` too.
template <typename T>
void take_pivot(const Product<T>& p, T* pivot, int64_t channels, double* pivots) {
  Product<T> one = p;
  const int zero = 0;
  one.c = pivot, one.c_block = kVector<T>, one.offset = &zero, one.rows = 1;
  multiply<false>(one, Replace{});
  for (int64_t o = 0; o < channels; ++o) pivots[o] = pivot[o];
}

// Moves every sample's sums over `pixels` pixels to the pivots of the first and adds them in their
// order.
inline void combine(const double* partial /* [N, G, 3, O] */, int64_t samples, int edges,
                    int64_t pixels, int64_t channels, double* sums /* [3, G, O] */) {
  const int64_t all = edges * channels;
  std::fill_n(sums, 3 * all, 0.0);
  if (pixels == 0) return;  // no pivots were taken
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t g = 0; g < edges; ++g) {
      const double* const own = partial + (n * edges + g) * 3 * channels;
      for (int64_t o = 0; o < channels; ++o) {
        double& pivot = sums[2 * all + g * channels + o];
        if (n == 0) pivot = own[2 * channels + o];
        const double by = own[2 * channels + o] - pivot;
        sums[g * channels + o] += own[o] + by * pixels;
        sums[all + g * channels + o] += own[channels + o] + by * (2 * own[o] + by * pixels);
      }
    }
  }
}

// total = the sum over chunks of the L numbers at partial[chunk * step], added in their order.
template <typename T>
void add_chunks(const T* partial, int64_t chunks, int64_t step, double (&total)[kVector<T>]) {
  constexpr int L = kVector<T>;
  for (int i = 0; i < L; ++i) total[i] = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk, partial += step) {
    for (int i = 0; i < L; ++i) total[i] += partial[i];
  }
}

// dz = factor * by_g * g + by_z * z + constant of one edge, its coefficients in blocks [blocks, L].
template <typename T>
struct GradientMap {
  int blocks = 0;
  T *by_g = nullptr, *by_z = nullptr, *constant = nullptr;

  GradientMap() = default;
  GradientMap(int count, Parts<T>& parts) : blocks(count) {
    constexpr int64_t L = kVector<T>;
    by_g = parts.take(blocks * L), by_z = parts.take(blocks * L);
    constant = parts.take(blocks * L);
  }

  // Takes `channels` numbers of each table from `first` on; a null table is ones, zeros, zeros.
  void pack(const void* g, const void* z, const void* rest, int64_t first, int64_t channels) const {
    const auto row = [&](const void* table, T absent, T* packed) {
      if (table) pack_row<T>(row_of<T>(table, first, 1), channels, packed);
      else std::fill_n(packed, blocks * kVector<T>, absent);
    };
    row(g, T(1), by_g), row(z, T(0), by_z), row(rest, T(0), constant);
  }
};

template <typename T>
T factor_at(const void* factors, int64_t at) {
  return factors ? *row_of<T>(factors, at, 1) : T(1);
}

// dz[blocks, tile, L] on `rows` rows of a sample.
template <typename T>
void gradient_rows(const Pixels<T>& g, const Pixels<T>* z, const GradientMap<T>& map, T factor,
                   int64_t first, int64_t rows, int64_t width, int64_t tile, T* dz) {
  constexpr int L = kVector<T>;
  for (int v = 0; v < map.blocks; ++v) {
    const Vec<T> by_g = load(map.by_g + v * L) * factor;
    const Vec<T> by_z = load(map.by_z + v * L), constant = load(map.constant + v * L);
    T* const to = dz + v * tile * L;
    const T *const dense_g = g.dense(first, v), *const dense_z = z ? z->dense(first, v) : nullptr;
    if (dense_g && dense_z) {
      const int64_t step = g.channels(), count = step - v * L;
      const auto fill = [&](const auto& get) {
        for (int64_t i = 0; i < rows * width; ++i) {
          const Vec<T> rest = by_z * get(dense_z + i * step) + constant;
          store<T>(to + i * L, by_g * get(dense_g + i * step) + rest);
        }
      };
      if (count < L) fill([&](const T* from) { return load_part(from, count); });
      else fill([&](const T* from) { return load(from); });
      continue;
    }
    for (int64_t row = 0; row < rows; ++row) {
      T* const line = to + row * width * L;
      g.along(first + row, width, v, [&](int64_t column, const Vec<T>& value) {
        store<T>(line + column * L, by_g * value + constant);
      });
      if (!z) continue;
      z->along(first + row, width, v, [&](int64_t column, const Vec<T>& value) {
        store<T>(line + column * L, load(line + column * L) + by_z * value);
      });
    }
  }
}

}  // namespace
}  // namespace rdarts
