// Sums per channel, about a pivot, and what a batch norm makes of them:
//   channel_sums   sum (z_k - pivot),  sum (z_k - pivot)^2
//   node_sum_dq    sum f g (z_k - pivot),  sum f g,  sum f_j g N(0, 1)
#include <algorithm>

#include "cell.h"
#include "last.h"
#include "launch.h"
#include "launchers.h"
#include "normalization.h"
#include "sums.h"
#include "tile.h"

namespace rdarts {
namespace {

template <typename T>
struct ChannelViews {
  Walk walk;
  Split split;
  View<const T> z[kMostInputs];
  Span<const double> pivot;  // [K, C] or null
  Span<double> pivots;       // [K, C], filled where `pivot` is null
  Span<double> partial, sums;  // [2, K, C, parts] and [2, K, C]
  Span<uint32_t> counters;
};

// One block per part of a group of channels of an input.
template <typename Tile, typename Index, typename T = typename Tile::Type,
          typename Sum = typename Tile::Sum>
__global__ void __launch_bounds__(kThreads, 1)
channel_sums_kernel(const __grid_constant__ ChannelViews<T> a) {
  constexpr int count = kSums<Tile>;
  __shared__ Shared<double, 2 * count * kThreads> shared;
  const Walk& walk = a.walk;
  const Split& split = a.split;
  const Share<Tile> share(split, walk);
  const int k = static_cast<int>(blockIdx.y);
  const View<const T>& z = a.z[k];
  const int64_t first = k * walk.channels + share.channel, plane = gridDim.y * walk.channels;
  Sum pivot[count] = {}, sum[count] = {}, square[count] = {};
  if (share.active) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (a.pivot.data) pivot[i] = static_cast<Sum>(a.pivot[first + i]);
      else if (split.positions > 0) pivot[i] = z.memory[(share.channel + i) * z.steps.channel];
      if (!a.pivot.data && share.part == 0 && share.row == 0) a.pivots[first + i] = pivot[i];
    }
    const Index end = share.template end<Index>(split);
#pragma unroll 4
    for (Index at = share.template begin<Index>(split); at < end; at += split.rows) {
      Sum values[1][Tile::kLanes], squares[Tile::kLanes];
      load<Tile>(z, spot_of<Tile>(at, share.channel, walk), walk, values);
#pragma unroll
      for (int i = 0; i < Tile::kLanes; ++i) {
        values[0][i] -= pivot[Tile::kInner ? i : 0];
        squares[i] = values[0][i] * values[0][i];
      }
      accumulate<Tile>(sum, values[0]);
      accumulate<Tile>(square, squares);
    }
  }
  double sums[2 * count];
#pragma unroll
  for (int i = 0; i < count; ++i) sums[i] = sum[i], sums[count + i] = square[i];
  add_rows(sums, split, shared);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (!share.active || share.row > 0) continue;
    a.partial[(first + i) * split.parts + share.part] = sums[i];
    a.partial[(plane + first + i) * split.parts + share.part] = sums[count + i];
  }
  if (!comes_last(a.counters, k, gridDim.x)) return;
  for (int half = 0; half < 2; ++half) {
    const int64_t from = half * plane + k * walk.channels;
    add_parts(a.partial, split.parts, from, from + walk.channels, a.sums);
  }
}

template <typename T, typename Sum>
struct ProductViews {
  Walk walk;
  Split split;
  View<const T> g[kMostOwn];
  bool own;  // whether each input has its own g
  View<const T> z[kMostInputs];
  int inputs;
  Span<const double> pivot;  // [K, C] or null
  Span<const Sum> factors;   // [K, N] or null
  Span<double> partial, sums;  // [2, K, C, parts] and [2, K, C]
  TermGradients terms;         // of no inputs: none to be filled
  Span<uint32_t> counters;
};

// Inputs that a block sums at once, so that g is read as rarely as registers allow.
template <typename Tile>
constexpr int kTogether = Tile::kLanes == 8 ? 2 : 4;

// Adds the parts of inputs [first, end), and fills their rows of a cell's table where it is to. No
// two terms share a weight.
template <typename T, typename Sum>
__device__ void finish_products(const ProductViews<T, Sum>& a, int first, int end) {
  __shared__ Shared<double, kThreads> shared;
  const int64_t channels = a.walk.channels, plane = a.inputs * channels;
  for (int half = 0; half < 2; ++half) {
    const int64_t from = half * plane + first * channels;
    add_parts(a.partial, a.split.parts, from, from + (end - first) * channels, a.sums);
  }
  if (a.terms.terms.inputs == 0) return;
  __syncthreads();
  Sum* const dweights = static_cast<Sum*>(a.terms.dweights);
  for (int k = first; k < end; ++k) {
    double along[1] = {0};
    for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
      along[0] += term_gradients_at<Sum>(a.terms, k, c);
    }
    add_rows(along, Split{1, kThreads, 0, 0, 0}, shared);
    if (dweights && threadIdx.x == 0) dweights[a.terms.terms.weight[k]] = static_cast<Sum>(along[0]);
  }
}

// The products of inputs [k, last) with g.
template <typename Tile, typename Index, typename T = typename Tile::Type,
          typename Sum = typename Tile::Sum>
__device__ __forceinline__ void make_products(const ProductViews<T, Sum>& a, int k, int last) {
  constexpr int count = kSums<Tile>, together = kTogether<Tile>;
  __shared__ Shared<double, 2 * count * kThreads> shared;
  const Walk& walk = a.walk;
  const Split& split = a.split;
  const Share<Tile> share(split, walk);
  Sum pivot[together][count] = {}, product[together][count] = {}, plain[together][count] = {};
  if (share.active) {
#pragma unroll
    for (int i = 0; i < together; ++i) {
#pragma unroll
      for (int c = 0; c < count; ++c) {
        if (!a.pivot.data || k + i >= last) continue;
        pivot[i][c] = static_cast<Sum>(a.pivot[(k + i) * walk.channels + share.channel + c]);
      }
    }
    const Index end = share.template end<Index>(split);
    for (Index at = share.template begin<Index>(split); at < end; at += split.rows) {
      const Spot spot = spot_of<Tile>(at, share.channel, walk);
      Sum g[1][Tile::kLanes];
      load<Tile>(a.g[a.own ? k : 0], spot, walk, g);
#pragma unroll
      for (int i = 0; i < together; ++i) {
        if (k + i >= last) continue;
        Sum z[1][Tile::kLanes], weighted[Tile::kLanes];
        load<Tile>(a.z[k + i], spot, walk, z);
        const Sum factor = value_or(a.factors, (k + i) * walk.samples + spot.sample, Sum(1));
#pragma unroll
        for (int c = 0; c < Tile::kLanes; ++c) {
          weighted[c] = factor * g[0][c];
          z[0][c] = weighted[c] * (z[0][c] - pivot[i][Tile::kInner ? c : 0]);
        }
        accumulate<Tile>(product[i], z[0]);
        accumulate<Tile>(plain[i], weighted);
      }
    }
  }
  const int64_t plane = a.inputs * walk.channels;
#pragma unroll
  for (int i = 0; i < together; ++i) {
    if (k + i >= last) continue;
    double sums[2 * count];
#pragma unroll
    for (int c = 0; c < count; ++c) sums[c] = product[i][c], sums[count + c] = plain[i][c];
    add_rows(sums, split, shared);
    if (!share.active || share.row > 0) continue;
    const int64_t first = (k + i) * walk.channels + share.channel;
#pragma unroll
    for (int c = 0; c < count; ++c) {
      a.partial[(first + c) * split.parts + share.part] = sums[c];
      a.partial[(plane + first + c) * split.parts + share.part] = sums[count + c];
    }
  }
}

// One block per part of a group of channels of a few inputs.
template <typename Tile, typename Index, typename T = typename Tile::Type,
          typename Sum = typename Tile::Sum>
__global__ void __launch_bounds__(kThreads, 1)
node_sum_dq_kernel(const __grid_constant__ ProductViews<T, Sum> a) {
  const int together = a.own ? 1 : kTogether<Tile>;
  const int k = static_cast<int>(blockIdx.y) * together, last = min(k + together, a.inputs);
  make_products<Tile, Index>(a, k, last);
  if (comes_last(a.counters, blockIdx.y, gridDim.x)) finish_products(a, k, last);
}

constexpr unsigned kTiles = 4;  // a thread

int64_t drawn_parts(int64_t tiles) {
  return std::max<int64_t>(1, (tiles + kThreads * kTiles - 1) / (kThreads * kTiles));
}

template <typename Sum>
struct DrawnSums {
  Span<double> partial, sums;  // [J, parts] and [J]
  Sum* dweights;               // [E, O] or null
  uint16_t weight[kMostInputs];
  Span<uint32_t> counters;
};

// One block per part of the tiles of a site.
template <typename Tile, typename Index, typename T = typename Tile::Type,
          typename Sum = typename Tile::Sum>
__global__ void __launch_bounds__(kThreads, 1)
drawn_sums_kernel(View<const T> g, const Walk walk, Index tiles,
                  const __grid_constant__ Sites<Sum> drawn,
                  const __grid_constant__ DrawnSums<Sum> a) {
  __shared__ Shared<double, kThreads> shared;
  const int j = static_cast<int>(blockIdx.y);
  const PhiloxStart start = drawn.start_of(j);
  const Index first = static_cast<Index>(blockIdx.x) * kTiles * kThreads + threadIdx.x;
  Sum sum = 0;
  for (unsigned i = 0; i < kTiles; ++i) {
    if (first + i * kThreads >= tiles) continue;
    const Spot spot = spot_of<Tile>(first + i * kThreads, walk);
    const Sum factor = value_or(drawn.factors, j * walk.samples + spot.sample, Sum(1));
    if (factor == Sum(0)) continue;
    Sum values[Tile::kRows][Tile::kLanes], product = 0;
    load<Tile>(g, spot, walk, values);
    draw<Tile>(index_of(spot, walk), walk, start, [&](int row, int lane, float number) {
      product += values[row][lane] * static_cast<Sum>(number);
    });
    sum += factor * product;
  }
  double sums[1] = {sum};
  add_rows(sums, Split{1, kThreads, 0, 0, 0}, shared);
  if (threadIdx.x == 0) a.partial[static_cast<int64_t>(j) * gridDim.x + blockIdx.x] = sums[0];
  if (!comes_last(a.counters, j, gridDim.x)) return;
  add_parts(a.partial, gridDim.x, j, j + 1, a.sums);
  if (a.dweights && threadIdx.x == 0) a.dweights[a.weight[j]] = static_cast<Sum>(double(a.sums[j]));
}

template <typename Tile>
void drawn_sums(const NodeSumDq& a, const Walk& walk, double* workspace, const Place& place) {
  using T = typename Tile::Type;
  const int64_t tiles = tiles_of<Tile>(walk), parts = drawn_parts(tiles);
  using Sum = typename Tile::Sum;
  DrawnSums<Sum> sums = {};
  sums.partial = {workspace, a.drawn.count * parts}, sums.sums = {a.drawn_sums, a.drawn.count};
  sums.counters = counters_of(place);
  if (a.terms && a.terms->dweights) {
    sums.dweights = static_cast<Sum*>(a.terms->dweights);
    std::copy_n(a.terms->drawn_weight, a.drawn.count, sums.weight);
  }
  const dim3 blocks = blocks_of(parts, a.drawn.count);
  const auto start = [&](auto kernel) {
    launch("node_sum_dq", kernel, Grid{blocks, kThreads}, place, view_of<const T>(a.g, walk), walk,
           tiles, sites_of<Sum>(a.drawn, walk.samples), sums);
  };
  if (tiles <= kMost32) start(drawn_sums_kernel<Tile, uint32_t>);
  else start(drawn_sums_kernel<Tile, uint64_t>);
}

// One thread per channel of an input.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
normalize_kernel(const __grid_constant__ Normalization a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.inputs * a.channels) return;
  normalize_channel<T>(a, static_cast<int>(i / a.channels), i % a.channels);
}

// One block per input.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
normalize_backward_kernel(const __grid_constant__ NormalizationBackward a) {
  __shared__ Shared<double, kThreads> shared;
  const int k = static_cast<int>(blockIdx.x);
  double sums[1] = {0};
  for (int64_t c = threadIdx.x; c < a.channels; c += kThreads) {
    sums[0] += normalize_channel_backward<T>(a, k, c);
  }
  add_rows(sums, Split{1, kThreads, 0, 0, 0}, shared);
  if (threadIdx.x == 0) a.dweights[k] = sums[0];
}

}  // namespace

namespace cuda {

// The most that any tile needs: rows are 16 or more, tiles no more than elements.
int64_t workspace(const int64_t* shape, int inputs, int sites) {
  const int64_t positions = shape[0] * shape[2] * shape[3], channels = shape[1];
  const int64_t least = static_cast<int64_t>(kThreads) / kMostColumns * kRun;
  return 2 * inputs * channels * std::max<int64_t>(1, (positions + least - 1) / least) +
         sites * drawn_parts(positions * channels);
}

void channel_sums(const ChannelSums& a, const Place& place) {
  const Layout layout = layout_of({a.z, a.z + a.inputs});
  on_tile<1>(a.z[0].dtype, layout, [&](auto tile) {
    using Tile = decltype(tile);
    using T = typename Tile::Type;
    const int64_t plane = a.inputs * layout.walk.channels;
    ChannelViews<T> views = {};
    views.walk = layout.walk, views.split = split_of<Tile>(layout.walk);
    for (int k = 0; k < a.inputs; ++k) views.z[k] = view_of<const T>(a.z[k], layout.walk);
    views.pivot = coefficients<double>(a.pivot, plane);
    views.pivots = {a.pivot ? nullptr : a.sums + 2 * plane, a.pivot ? 0 : plane};
    const Split& split = views.split;
    views.partial = {a.workspace, 2 * plane * split.parts}, views.sums = {a.sums, 2 * plane};
    views.counters = counters_of(place);
    const dim3 blocks = blocks_of(split.groups * split.parts, a.inputs);
    const auto kernel = split.positions <= kMost32 ? channel_sums_kernel<Tile, uint32_t>
                                                   : channel_sums_kernel<Tile, uint64_t>;
    launch("channel_sums", kernel, Grid{blocks, kThreads}, place, views);
  });
}

void node_sum_dq(const NodeSumDq& a, const Place& place) {
  const std::vector<Array> g(a.own ? a.own : &a.g, (a.own ? a.own + a.inputs : &a.g + 1));
  std::vector<Array> tensors(a.z, a.z + a.inputs);
  tensors.insert(tensors.end(), g.begin(), g.end());
  const Layout layout = layout_of(tensors);
  const Walk& walk = layout.walk;
  int64_t used = 0;
  on_tile<1>(g[0].dtype, layout, [&](auto tile) {
    using Tile = decltype(tile);
    using T = typename Tile::Type;
    using Sum = typename Tile::Sum;
    const int64_t plane = a.inputs * walk.channels;
    ProductViews<T, Sum> views = {};
    views.walk = walk, views.split = split_of<Tile>(walk), views.inputs = a.inputs;
    views.own = a.own != nullptr;
    for (size_t i = 0; i < g.size(); ++i) views.g[i] = view_of<const T>(g[i], walk);
    for (int k = 0; k < a.inputs; ++k) views.z[k] = view_of<const T>(a.z[k], walk);
    views.pivot = coefficients<double>(a.pivot, plane);
    views.factors = coefficients<Sum>(a.factors, a.inputs * walk.samples);
    const Split& split = views.split;
    views.partial = {a.workspace, 2 * plane * split.parts}, views.sums = {a.sums, 2 * plane};
    used = views.partial.size;
    views.counters = counters_of(place);
    if (a.terms) views.terms = *a.terms;
    const int together = a.own ? 1 : kTogether<Tile>;
    const int64_t rows = (a.inputs + together - 1) / together;
    const dim3 blocks = blocks_of(split.groups * split.parts, rows);
    const auto kernel = split.positions <= kMost32 ? node_sum_dq_kernel<Tile, uint32_t>
                                                   : node_sum_dq_kernel<Tile, uint64_t>;
    launch("node_sum_dq", kernel, Grid{blocks, kThreads}, place, views);
  });
  if (a.drawn.count == 0) return;
  const Layout drawn = layout_of({a.g}, true);
  on_tile<4>(a.g.dtype, drawn, [&](auto tile) {
    drawn_sums<decltype(tile)>(a, drawn.walk, a.workspace + used, place);
  });
}

void normalize(const Normalization& a, const Place& place) {
  const auto kernel =
      a.dtype == DType::kFloat64 ? normalize_kernel<double> : normalize_kernel<float>;
  launch("normalize", kernel, grid_of(a.inputs * a.channels, kThreads), place, a);
}

void normalize_backward(const NormalizationBackward& a, const Place& place) {
  const auto kernel = a.dtype == DType::kFloat64 ? normalize_backward_kernel<double>
                                                 : normalize_backward_kernel<float>;
  launch("normalize_backward", kernel, Grid{a.inputs, kThreads}, place, a);
}

}  // namespace cuda
}  // namespace rdarts
