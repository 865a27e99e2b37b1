// Sums per channel, in float64 from short blocks in the arrays' type:
//   channel_sums   sum (z_k - pivot),  sum (z_k - pivot)^2
//   node_sum_dq    sum f g (z_k - pivot),  sum f g,  sum f_j g N(0, 1)
// A piece of the samples, the same for any number of threads, has its own sums; then they are added
// in the order of the pieces.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "launchers.h"
#include "normalization.h"
#include "parallel.h"
#include "tiles.h"

namespace rdarts {
namespace {

// body(first, length) over a tile's repetitions of the pattern of sums; the length of all but the
// last is a constant where a channel's plane is summed.
template <bool inner, typename Body>
inline void repeat(int64_t size, int64_t period, const Body& body) {
  if constexpr (inner) {
    for (int64_t first = 0; first < size; first += period) body(first, std::min(period, size - first));
  } else {
    int64_t first = 0;
    for (; first + kLanes <= size; first += kLanes) body(first, kLanes);
    if (first < size) body(first, size - first);
  }
}

// Elements of which each sum in the array's type has kFlushed.
template <typename T>
int64_t flushed(const Runs& r) {
  return kFlushed * (in_blocks<T>(r) ? r.channels : r.period);
}

// sum += z - pivot, square += (z - pivot)^2
template <typename T, bool inner>
void centred_tile(const T* __restrict z, const T* __restrict pivot, T* __restrict sum,
                  T* __restrict square, int64_t size, int64_t period) {
  repeat<inner>(size, period, [&](int64_t first, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
      const T x = z[first + i] - pick<inner>(pivot, i);
      sum[i] += x;
      square[i] += x * x;
    }
  });
}

// The same where channels lie innermost in whole vectors: a block of them at a time, so that its
// sums and pivots stay in registers.
template <typename T>
void centred_blocks(const T* z, const T* pivot, T* sum, T* square, int64_t size, int64_t channels) {
  constexpr int L = kVector<T>;
  for (int64_t block = 0; block < channels; block += L) {
    const Vec<T> middle = load(pivot + block);
    Vec<T> s = load(sum + block), q = load(square + block);
    for (int64_t i = block; i < size; i += channels) {
      __builtin_prefetch(z + i + kTile, 0, 2);
      const Vec<T> x = load(z + i) - middle;
      s += x, q += x * x;
    }
    store<T>(sum + block, s), store<T>(square + block, q);
  }
}

// sums: [2, K, C], those of samples [from, to).
template <typename T>
void sums_of_samples(const ChannelSums& a, const Runs& r, int64_t from, int64_t to,
                     const double* pivots, double* sums) {
  const int64_t plane = a.inputs * r.channels;
  std::fill_n(sums, 2 * plane, 0.0);
  std::vector<T> pivot(r.period), sum(r.period, T(0)), square(r.period, T(0));
  const auto add = r.inner ? centred_tile<T, true> : centred_tile<T, false>;
  const bool blocks = in_blocks<T>(r);
  const int64_t most = flushed<T>(r);
  for (int k = 0; k < a.inputs; ++k) {
    Reader<T> z(a.z[k], r);
    const int64_t row = k * r.channels;
    double* const own = sums + row;
    for (int64_t n = from; n < to; ++n) {
      for (int64_t run = 0; run < r.count; ++run) {
        if (n == from || r.count > 1) {
          spread(r, run, pivot.data(), [&](int64_t c) { return static_cast<T>(pivots[row + c]); });
        }
        int64_t since = 0;
        const auto flush_both = [&] {
          flush(r, run, sum.data(), own);
          flush(r, run, square.data(), own + plane);
          since = 0;
        };
        for_tiles(r, [&](int64_t begin, int64_t size) {
          const T* const tile = z.tile(n, run, begin, size);
          if (blocks) centred_blocks(tile, pivot.data(), sum.data(), square.data(), size, r.channels);
          else add(tile, pivot.data(), sum.data(), square.data(), size, r.period);
          since += size;
          if (since >= most) flush_both();
        });
        flush_both();
      }
    }
  }
}

template <typename T>
void first_elements(const ChannelSums& a, const Runs& r, double* pivots /* [K, C] */) {
  for (int k = 0; k < a.inputs; ++k) {
    for (int64_t c = 0; c < r.channels; ++c) {
      const T* data = static_cast<const T*>(a.z[k].data);
      pivots[k * r.channels + c] = data[c * a.z[k].strides[1]];
    }
  }
}

template <typename T>
void channel_sums_of(const ChannelSums& a, const Runs& r, int threads) {
  const int64_t plane = a.inputs * r.channels;
  const double* pivots = a.pivot;
  if (!pivots) {
    first_elements<T>(a, r, a.sums + 2 * plane);
    pivots = a.sums + 2 * plane;
  }
  const int64_t grain = samples_of(r);
  parallel_for(r.samples, grain, threads, [&](int64_t from, int64_t to) {
    sums_of_samples<T>(a, r, from, to, pivots, a.workspace + from / grain * 2 * plane);
  });
  combine(a.workspace, pieces_of(r), 2 * plane, a.sums);
}

// sum += g (z - pivot)
template <typename T, bool inner>
void product_tile(const T* __restrict g, const T* __restrict z, const T* __restrict pivot,
                  T* __restrict sum, int64_t size, int64_t period) {
  repeat<inner>(size, period, [&](int64_t first, int64_t length) {
    fetch_next_tile(z + first, length);
    for (int64_t i = 0; i < length; ++i) {
      sum[i] += g[first + i] * (z[first + i] - pick<inner>(pivot, i));
    }
  });
}

// The same for `count` tensors at once, where channels lie innermost in whole vectors: a block of
// them at a time, so that its sums and pivots stay in registers.
template <typename T, int count>
void product_blocks(const T* g, const T* const* z, const T* pivot, T* sum, int64_t size,
                    int64_t channels, int64_t period) {
  constexpr int L = kVector<T>;
  for (int64_t block = 0; block < channels; block += L) {
    Vec<T> total[count], middle[count];
    for (int k = 0; k < count; ++k) {
      total[k] = load(sum + k * period + block), middle[k] = load(pivot + k * period + block);
    }
    for (int64_t i = block; i < size; i += channels) {
      const Vec<T> gradient = load(g + i);
      for (int k = 0; k < count; ++k) total[k] += gradient * (load(z[k] + i) - middle[k]);
      for (int k = 0; k < count; ++k) __builtin_prefetch(z[k] + i + kTile, 0, 2);
    }
    for (int k = 0; k < count; ++k) store<T>(sum + k * period + block, total[k]);
  }
}

// sums[k] += g (z[k] - pivots[k]) on a tile; a pattern of `period` for each tensor.
template <typename T>
void product_tiles(const T* g, const std::vector<const T*>& z, const T* pivots, T* sums,
                   int64_t size, const Runs& r) {
  size_t k = 0;
  if (in_blocks<T>(r)) {
    const auto some = [&](auto count) {
      for (; k + count() <= z.size(); k += count()) {
        const int64_t row = static_cast<int64_t>(k) * r.period;
        product_blocks<T, count()>(g, &z[k], pivots + row, sums + row, size, r.channels, r.period);
      }
    };
    some(std::integral_constant<int, 4>()), some(std::integral_constant<int, 2>());
    some(std::integral_constant<int, 1>());
    return;
  }
  const auto multiply = r.inner ? product_tile<T, true> : product_tile<T, false>;
  for (; k < z.size(); ++k) {
    const int64_t row = static_cast<int64_t>(k) * r.period;
    multiply(g, z[k], pivots + row, sums + row, size, r.period);
  }
}

// sum += g
template <typename T, bool inner>
void plain_tile(const T* __restrict g, T* __restrict sum, int64_t size, int64_t period) {
  repeat<inner>(size, period, [&](int64_t first, int64_t length) {
    fetch_next_tile(g + first, length);
    for (int64_t i = 0; i < length; ++i) sum[i] += g[first + i];
  });
}

// The products of samples [from, to), [2, K, C].
template <typename T>
void products_of_samples(const NodeSumDq& a, const Runs& r, int64_t from, int64_t to,
                         double* sums) {
  const int64_t plane = a.inputs * r.channels;
  std::vector<double> plain(r.channels), product(plane);  // without the factors
  std::fill_n(sums, 2 * plane, 0.0);
  std::vector<T> pivots(a.inputs * r.period), products(a.inputs * r.period, T(0));
  std::vector<T> once(r.period, T(0));
  std::vector<Reader<T>> z;
  for (int k = 0; k < a.inputs; ++k) z.emplace_back(a.z[k], r);
  Reader<T> g(a.g, r);
  const auto add = r.inner ? plain_tile<T, true> : plain_tile<T, false>;
  std::vector<const T*> tiles(a.inputs);
  const int64_t most = flushed<T>(r);
  const T* const factors = static_cast<const T*>(a.factors);
  const auto add_products = [&](int64_t n) {
    for (int k = 0; k < a.inputs; ++k) {
      const double factor = factors ? factors[k * r.samples + n] : 1.0;
      for (int64_t c = 0; c < r.channels; ++c) {
        sums[k * r.channels + c] += factor * product[k * r.channels + c];
        sums[plane + k * r.channels + c] += factor * plain[c];
      }
    }
    std::fill(product.begin(), product.end(), 0.0), std::fill(plain.begin(), plain.end(), 0.0);
  };
  for (int64_t n = from; n < to; ++n) {
    for (int64_t run = 0; run < r.count; ++run) {
      for (int k = 0; k < a.inputs && (n == from || r.count > 1); ++k) {
        spread(r, run, &pivots[k * r.period], [&](int64_t c) {
          return a.pivot ? static_cast<T>(a.pivot[k * r.channels + c]) : T(0);
        });
      }
      int64_t since = 0;
      const auto flush_all = [&] {
        for (int k = 0; k < a.inputs; ++k) {
          flush(r, run, &products[k * r.period], &product[k * r.channels]);
        }
        flush(r, run, once.data(), plain.data());
        since = 0;
      };
      for_tiles(r, [&](int64_t begin, int64_t length) {
        const T* const gradient = g.tile(n, run, begin, length);
        add(gradient, once.data(), length, r.period);
        for (int k = 0; k < a.inputs; ++k) tiles[k] = z[k].tile(n, run, begin, length);
        product_tiles(gradient, tiles, pivots.data(), products.data(), length, r);
        since += length;
        if (since >= most) flush_all();
      });
      flush_all();
    }
    if (factors || n + 1 == to) add_products(n);
  }
}

// sums[j] += f_j * sum of g N(0, 1) over one sample.
template <typename T>
void drawn_of_sample(const NodeSumDq& a, const Runs& r, int64_t n, double* sums /* [J] */) {
  if (a.drawn.count == 0) return;
  const int64_t size = r.channels * r.pixels();
  std::vector<float> numbers(a.drawn.kept ? 0 : size);
  std::vector<T> g(size), turned(r.inner ? size : 0);  // g in the order in which numbers are drawn
  T* const run_by_run = r.inner ? turned.data() : g.data();
  Reader<T> reader(a.g, r);
  for (int64_t run = 0; run < r.count; ++run) {
    for_tiles(r, [&](int64_t begin, int64_t length) {
      std::copy_n(reader.tile(n, run, begin, length), length, run_by_run + run * r.length + begin);
    });
  }
  if (r.inner) transpose(turned.data(), r.pixels(), r.channels, g.data());
  for (int j = 0; j < a.drawn.count; ++j) {
    const T* const factors = static_cast<const T*>(a.drawn.factors);
    const double factor = factors ? factors[j * r.samples + n] : 1.0;
    if (factor == 0.0) continue;
    PhiloxStart start = a.drawn.start;
    start.c1 = a.drawn.sites[j];
    const float* drawn = numbers.data();
    if (a.drawn.kept) drawn = a.drawn.kept + (j * r.samples + n) * size;
    else draw_normals<RDARTS_UNIT>(numbers.data(), n * size, size, start);
    for (int64_t begin = 0; begin < size; begin += kTile) {
      const int64_t length = std::min(kTile, size - begin);
      T parts[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= length; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          parts[lane] += g[begin + i + lane] * static_cast<T>(drawn[begin + i + lane]);
        }
      }
      for (; i < length; ++i) parts[i % kLanes] += g[begin + i] * static_cast<T>(drawn[begin + i]);
      for (const T part : parts) sums[j] += factor * part;
    }
  }
}

template <typename T>
void node_sum_dq_of(const NodeSumDq& a, const Runs& r, int threads) {
  const int64_t plane = a.inputs * r.channels, size = 2 * plane + a.drawn.count;
  const int64_t grain = samples_of(r);
  parallel_for(r.samples, grain, threads, [&](int64_t from, int64_t to) {
    double *const own = a.workspace + from / grain * size, *const drawn = own + 2 * plane;
    products_of_samples<T>(a, r, from, to, own);
    std::fill_n(drawn, a.drawn.count, 0.0);
    for (int64_t n = from; n < to; ++n) drawn_of_sample<T>(a, r, n, drawn);
  });
  std::vector<double> total(size);
  combine(a.workspace, pieces_of(r), size, total.data());
  std::copy_n(total.data(), 2 * plane, a.sums);
  std::copy_n(total.data() + 2 * plane, a.drawn.count, a.drawn_sums);
}

template <typename T>
void normalize_all(const Normalization& a) {
  for (int k = 0; k < a.inputs; ++k) {
    for (int64_t c = 0; c < a.channels; ++c) normalize_channel<T>(a, k, c);
  }
}

template <typename T>
void normalize_backward_all(const NormalizationBackward& a) {
  for (int k = 0; k < a.inputs; ++k) {
    a.dweights[k] = 0.0;
    for (int64_t c = 0; c < a.channels; ++c) {
      a.dweights[k] += normalize_channel_backward<T>(a, k, c);
    }
  }
}

}  // namespace

template <>
void channel_sums<RDARTS_UNIT>(const ChannelSums& a, int threads) {
  const int64_t plane = a.inputs * a.z[0].shape[1];
  if (is_empty(a.z[0])) return void(std::fill_n(a.sums, (a.pivot ? 2 : 3) * plane, 0.0));
  const Runs r = runs_of(a.z[0]);
  if (a.z[0].dtype == DType::kFloat64) channel_sums_of<double>(a, r, threads);
  else channel_sums_of<float>(a, r, threads);
}

template <>
void node_sum_dq<RDARTS_UNIT>(const NodeSumDq& a, int threads) {
  if (is_empty(a.g)) {
    std::fill_n(a.sums, 2 * a.inputs * a.g.shape[1], 0.0);
    std::fill_n(a.drawn_sums, a.drawn.count, 0.0);
    return;
  }
  const Runs r = runs_of(a.g);
  if (a.g.dtype == DType::kFloat64) node_sum_dq_of<double>(a, r, threads);
  else node_sum_dq_of<float>(a, r, threads);
}

template <>
void normalize<RDARTS_UNIT>(const Normalization& a) {
  if (a.dtype == DType::kFloat64) normalize_all<double>(a);
  else normalize_all<float>(a);
}

template <>
void normalize_backward<RDARTS_UNIT>(const NormalizationBackward& a) {
  if (a.dtype == DType::kFloat64) normalize_backward_all<double>(a);
  else normalize_backward_all<float>(a);
}

}  // namespace rdarts
