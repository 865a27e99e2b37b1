// The weighted sum of K tensors and noise, and the affine map of each:
//   node_sum   out = sum_k f[k, n] * (scale[k, c] * z_k + shift[k, c]) + sum_j f_j[n] w_j N(0, 1)
//   affine     out_k = f[k, n] * by_g[k, c] * g + by_z[k, c] * z_k + constant[k, c]
// Every tensor is read or written once, noise never leaves the registers.
#include <algorithm>

#include "cell.h"
#include "launch.h"
#include "launchers.h"
#include "tile.h"

namespace rdarts {
namespace {

constexpr unsigned kThreads = 256;  // one block a multiprocessor will do: nvcc spilled to fit more

template <typename T, typename Sum>
struct NodeSumViews {
  Walk walk;
  View<T> out[kMostSums];
  View<const T> z[kMostInputs];
  int inputs;
  Span<const Sum> scale, shift;  // [K, C], those of further sums after them
  Span<const Sum> factors;       // [K, N]
  Sites<Sum> drawn;
  Terms terms;         // whose coefficients every block makes, where it is to
  Span<double> pivot;  // [K, C]: their means
};

constexpr int64_t kMostShared = 16 * 1024;  // bytes of them

// Scales [K, C], then shifts, in shared memory.
template <typename T, typename Sum>
__device__ __forceinline__ SharedSpan<Sum> make_coefficients(const NodeSumViews<T, Sum>& a) {
  const int channels = static_cast<int>(a.walk.channels), plane = a.inputs * channels;
  const SharedSpan<Sum> made = dynamic_shared<Sum>(2 * plane);
  for (int i = static_cast<int>(threadIdx.x); i < plane; i += static_cast<int>(kThreads)) {
    const int k = i / channels, c = i % channels;
    const Statistics s = {mean_of(a.terms, k, c), rstd_of(a.terms, k, c)};
    const MapOf<Sum> map(weight_of<Sum>(a.terms, k), s);
    made[i] = map.scale, made[plane + i] = map.shift;
    if (blockIdx.x == 0) a.pivot[i] = s.mean;
  }
  __syncthreads();
  return made;
}

// One thread per tile of a sum. `makes`: whether the coefficients, of one sum, are made here.
template <typename Tile, typename Index, bool makes, typename T = typename Tile::Type,
          typename Sum = typename Tile::Sum>
__global__ void __launch_bounds__(kThreads, 1)
node_sum_kernel(const __grid_constant__ NodeSumViews<T, Sum> a, Index tiles) {
  SharedSpan<Sum> made;
  if constexpr (makes) made = make_coefficients(a);
  const Index tile = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (tile >= tiles) return;
  const Walk& walk = a.walk;
  const Spot spot = spot_of<Tile>(tile, walk);
  const int first = static_cast<int>(blockIdx.y) * a.inputs;
  Sum total[Tile::kRows][Tile::kLanes] = {};
#pragma unroll(Tile::kRows == 1 ? 4 : 1)
  for (int k = 0; k < a.inputs; ++k) {
    Sum z[Tile::kRows][Tile::kLanes];
    load<Tile>(a.z[k], spot, walk, z);
    const Sum factor = value_or(a.factors, (first + k) * walk.samples + spot.sample, Sum(1));
#pragma unroll
    for (int i = 0; i < Tile::kLanes; ++i) {
      const int64_t c = (first + k) * walk.channels + spot.channel + (Tile::kInner ? i : 0);
      Sum scale, shift;
      if constexpr (makes) {
        scale = made[c], shift = made[a.inputs * walk.channels + c];
      } else {
        scale = a.scale[c], shift = value_or(a.shift, c, Sum(0));
      }
#pragma unroll
      for (int row = 0; row < Tile::kRows; ++row) {
        total[row][i] += factor * (scale * z[row][i] + shift);
      }
    }
  }
  for (int j = 0; j < a.drawn.count; ++j) {
    const Sum factor = value_or(a.drawn.factors, j * walk.samples + spot.sample, Sum(1));
    const Sum weight = factor * a.drawn.weights[j];
    if (weight == Sum(0)) continue;
    const PhiloxStart start = a.drawn.start_of(j);
    draw<Tile>(index_of(spot, walk), walk, start, [&](int row, int i, float number) {
      total[row][i] += weight * static_cast<Sum>(number);
    });
  }
  store<Tile>(a.out[blockIdx.y], spot, walk, total);
}

constexpr int kMostMaps = 32;  // a launch: two tables of 64 views are more than its parameters hold

template <typename T, typename Sum>
struct AffineViews {
  Walk walk;
  View<const T> g;
  View<const T> z[kMostMaps];
  View<T> out[kMostMaps];
  int inputs;
  Span<const Sum> by_g, by_z, constant;  // [K, C]
  Span<const Sum> factors;               // [K, N]
};

template <typename Tile, typename Index, typename T = typename Tile::Type,
          typename Sum = typename Tile::Sum>
__global__ void __launch_bounds__(kThreads, 1)
affine_kernel(const __grid_constant__ AffineViews<T, Sum> a, Index tiles) {
  const Index tile = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (tile >= tiles) return;
  const Walk& walk = a.walk;
  const Spot spot = spot_of<Tile>(tile, walk);
  Sum g[Tile::kRows][Tile::kLanes] = {};
  if (a.g.memory.data) load<Tile>(a.g, spot, walk, g);
  for (int k = 0; k < a.inputs; ++k) {
    if (!a.out[k].memory.data) continue;
    Sum value[Tile::kRows][Tile::kLanes] = {};
    const bool reads = a.z[k].memory.data && a.by_z.data;
    if (reads) load<Tile>(a.z[k], spot, walk, value);
    const Sum factor = value_or(a.factors, k * walk.samples + spot.sample, Sum(1));
#pragma unroll
    for (int i = 0; i < Tile::kLanes; ++i) {
      const int64_t c = k * walk.channels + spot.channel + (Tile::kInner ? i : 0);
      const Sum by_g = factor * value_or(a.by_g, c, Sum(0));
      const Sum by_z = reads ? a.by_z[c] : Sum(0), constant = value_or(a.constant, c, Sum(0));
#pragma unroll
      for (int row = 0; row < Tile::kRows; ++row) {
        value[row][i] = by_g * g[row][i] + (by_z * value[row][i] + constant);
      }
    }
    store<Tile>(a.out[k], spot, walk, value);
  }
}

template <typename Tile>
void affine_of(const Affine& a, const Walk& walk, int first, int inputs, const Place& place) {
  using T = typename Tile::Type;
  using Sum = typename Tile::Sum;
  AffineViews<T, Sum> views = {};
  views.walk = walk, views.inputs = inputs;
  views.g = view_of<const T>(a.g, walk);
  for (int k = 0; k < inputs; ++k) {
    views.z[k] = view_of<const T>(a.z[first + k], walk);
    views.out[k] = view_of<T>(a.out[first + k], walk);
  }
  views.by_g = rows_from<Sum>(a.by_g, first, inputs, walk.channels);
  views.by_z = rows_from<Sum>(a.by_z, first, inputs, walk.channels);
  views.constant = rows_from<Sum>(a.constant, first, inputs, walk.channels);
  views.factors = rows_from<Sum>(a.factors, first, inputs, walk.samples);
  const int64_t tiles = tiles_of<Tile>(walk);
  const Grid grid = grid_of(tiles, kThreads);
  if (tiles <= kMost32) launch("affine", affine_kernel<Tile, uint32_t>, grid, place, views, tiles);
  else launch("affine", affine_kernel<Tile, uint64_t>, grid, place, views, tiles);
}

// Whether every block makes the terms' coefficients: they fit, and no empty sum leaves them unmade.
bool makes_here(const NodeSum& a, int64_t channels, int64_t tiles) {
  const int64_t width = a.out.dtype == DType::kFloat64 ? 8 : 4;
  return a.terms && tiles > 0 && 2 * a.inputs * channels * width <= kMostShared;
}

}  // namespace

namespace cuda {

void node_sum(const NodeSum& a, const Place& place) {
  const std::vector<Array> outs(a.outs ? a.outs : &a.out, (a.outs ? a.outs : &a.out) + a.sums);
  std::vector<Array> tensors(a.z, a.z + a.inputs);
  tensors.insert(tensors.end(), outs.begin(), outs.end());
  const Layout layout = layout_of(tensors, a.drawn.count > 0);
  on_tile<4>(a.out.dtype, layout, [&](auto tile) {
    using Tile = decltype(tile);
    using T = typename Tile::Type;
    using Sum = typename Tile::Sum;
    const Walk& walk = layout.walk;
    NodeSumViews<T, Sum> views = {};
    views.walk = walk, views.inputs = a.inputs;
    for (int j = 0; j < a.sums; ++j) views.out[j] = view_of<T>(outs[j], walk);
    for (int k = 0; k < a.inputs; ++k) views.z[k] = view_of<const T>(a.z[k], walk);
    const int64_t rows = a.sums * a.inputs;
    views.scale = coefficients<Sum>(a.scale, rows * walk.channels);
    views.shift = coefficients<Sum>(a.shift, rows * walk.channels);
    views.factors = coefficients<Sum>(a.factors, rows * walk.samples);
    views.drawn = sites_of<Sum>(a.drawn, walk.samples);
    const int64_t tiles = tiles_of<Tile>(walk), plane = a.inputs * walk.channels;
    Grid grid = grid_of(tiles, kThreads);
    grid.blocks.y = static_cast<unsigned>(a.sums);
    const bool small = tiles <= kMost32;
    const auto add = [&](auto kernel) { launch("node_sum", kernel, grid, place, views, tiles); };
    if (makes_here(a, walk.channels, tiles)) {
      views.terms = a.terms->terms, views.pivot = {a.terms->pivot, plane};
      grid.shared = 2 * plane * sizeof(Sum);
      if (small) add(node_sum_kernel<Tile, uint32_t, true>);
      else add(node_sum_kernel<Tile, uint64_t, true>);
      return;
    }
    if (a.terms) term_coefficients(*a.terms, place);
    if (small) add(node_sum_kernel<Tile, uint32_t, false>);
    else add(node_sum_kernel<Tile, uint64_t, false>);
  });
}

void affine(const Affine& a, const Place& place) {
  std::vector<Array> tensors(a.out, a.out + a.inputs);
  tensors.insert(tensors.end(), a.z, a.z + a.inputs);
  tensors.push_back(a.g);
  const Layout layout = layout_of(tensors);
  on_tile<4>(a.out[0].dtype, layout, [&](auto tile) {
    for (int first = 0; first < a.inputs; first += kMostMaps) {
      const int inputs = std::min(kMostMaps, a.inputs - first);
      affine_of<decltype(tile)>(a, layout.walk, first, inputs, place);
    }
  });
}

}  // namespace cuda
}  // namespace rdarts
