// The moments of a batch norm's tangents (moments.h):
//   pairs[j, k] = sum w[c] x_j x_k,  and per channel sum r x_v, sum g x_v, sum x_v
// Two kernels read x. In the one a block multiplies 32 directions by 32, over a run of numbers that
// pass through shared memory a piece at a time; in the other it sums a direction's channels. The
// blocks' sums are added by a second launch in float64 and a fixed order.
#include "moments.h"

#include <algorithm>

#include "launch.h"
#include "launchers.h"
#include "sums.h"
#include "tile.h"

namespace rdarts {
namespace {

constexpr int kSide = 32;  // directions of a block, down and across
constexpr int kCell = 4;   // those of a thread
constexpr int kPiece = 64;                       // numbers of a direction in shared memory
constexpr int kPitch = kPiece + 4;               // keeps directions out of one another's banks
constexpr int kTurns = kThreads * kCell * kCell / (kSide * kSide);  // threads that share a cell
constexpr int64_t kLeastRun = 1024, kMostPartials = int64_t{1} << 20;
static_assert(32 % kTurns == 0 && kPiece % (kTurns * kCell) == 0 && kThreads % kPiece == 0);

template <typename T>
struct PairViews {
  Span<const T> x;            // [V, size]
  Span<const SumOf<T>> weights;  // [C]
  int64_t size, run;          // of a direction: numbers, and those of a block
  int directions, channels, side;  // side: blocks that the directions make
  int parts;
  Span<double> partial;       // [V, V, parts]
};

// piece[kSide, kPiece] = the numbers from `at` on, below `end`, of the directions from `first` on;
// zeros where there are none.
template <typename T, typename Sum = SumOf<T>>
__device__ __forceinline__ void fill_piece(const PairViews<T>& a, int first, int64_t at,
                                           int64_t end, Sum weight,
                                           Shared<Sum, kSide * kPitch>& piece) {
  const int column = static_cast<int>(threadIdx.x) % kPiece;
  for (int row = static_cast<int>(threadIdx.x) / kPiece; row < kSide; row += kThreads / kPiece) {
    const bool live = first + row < a.directions && at + column < end;
    piece[row * kPitch + column] =
        live ? weight * static_cast<Sum>(T(a.x[(first + row) * a.size + at + column])) : Sum(0);
  }
}

// One block per run of numbers and per kSide x kSide pairs on or above the diagonal.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
moment_pairs_kernel(const __grid_constant__ PairViews<T> a) {
  using Sum = SumOf<T>;
  using Four = Vector<Sum, kCell>;
  __shared__ Shared<Sum, kSide * kPitch> left, right;
  int down = 0, across = static_cast<int>(blockIdx.y);
  while (across >= a.side - down) across -= a.side - down, ++down;
  across += down;
  const int thread = static_cast<int>(threadIdx.x), turn = thread % kTurns;
  const int cell = thread / kTurns, row = cell / (kSide / kCell) * kCell;
  const int column = cell % (kSide / kCell) * kCell;
  const int64_t begin = blockIdx.x * a.run, end = min(begin + a.run, a.size);
  int channel = static_cast<int>((begin + thread % kPiece) % a.channels);
  double total[kCell][kCell] = {};
  for (int64_t at = begin; at < end; at += kPiece) {
    __syncthreads();  // the last piece has been read
    fill_piece<T>(a, down * kSide, at, end, a.weights[channel], left);
    fill_piece<T>(a, across * kSide, at, end, Sum(1), right);
    channel = (channel + kPiece) % a.channels;
    __syncthreads();
    Sum sum[kCell][kCell] = {};
#pragma unroll
    for (int i = turn * kCell; i < kPiece; i += kTurns * kCell) {
      Four x[kCell], y[kCell];
#pragma unroll
      for (int q = 0; q < kCell; ++q) {
        x[q] = left.template load<Four>((row + q) * kPitch + i);
        y[q] = right.template load<Four>((column + q) * kPitch + i);
      }
#pragma unroll
      for (int j = 0; j < kCell; ++j) {
#pragma unroll
        for (int k = 0; k < kCell; ++k) {
#pragma unroll
          for (int q = 0; q < kCell; ++q) sum[j][k] += x[j].lane[q] * y[k].lane[q];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kCell; ++j) {
#pragma unroll
      for (int k = 0; k < kCell; ++k) total[j][k] += sum[j][k];
    }
  }
#pragma unroll
  for (int j = 0; j < kCell; ++j) {
#pragma unroll
    for (int k = 0; k < kCell; ++k) {
      for (int step = 1; step < kTurns; step *= 2) {
        total[j][k] += __shfl_xor_sync(~0u, total[j][k], step);
      }
      const int one = down * kSide + row + j, other = across * kSide + column + k;
      if (turn > 0 || one > other || other >= a.directions) continue;
      a.partial[(int64_t{one} * a.directions + other) * a.parts + blockIdx.x] = total[j][k];
      if (one == other) continue;
      a.partial[(int64_t{other} * a.directions + one) * a.parts + blockIdx.x] = total[j][k];
    }
  }
}

template <typename T>
struct ProductViews {
  Walk walk;
  Split split;
  View<const T> x, result, gradient;  // [V N, C, P, 1], [N, C, P, 1] each
  Span<double> partial;               // [3, V, C, parts]
};

// One block per part of a group of channels of a direction.
template <typename Tile, typename Index, typename T = typename Tile::Type,
          typename Sum = typename Tile::Sum>
__global__ void __launch_bounds__(kThreads, 1)
moment_products_kernel(const __grid_constant__ ProductViews<T> a) {
  constexpr int count = kSums<Tile>;
  __shared__ Shared<double, 3 * count * kThreads> shared;
  const Walk& walk = a.walk;
  const Split& split = a.split;
  const Share<Tile> share(split, walk);
  const int64_t v = blockIdx.y;
  Sum by_result[count] = {}, by_gradient[count] = {}, plain[count] = {};
  if (share.active) {
    const Index end = share.template end<Index>(split);
    for (Index at = share.template begin<Index>(split); at < end; at += split.rows) {
      Spot spot = spot_of<Tile>(at, share.channel, walk);
      Sum r[1][Tile::kLanes], g[1][Tile::kLanes], x[1][Tile::kLanes];
      load<Tile>(a.result, spot, walk, r);
      load<Tile>(a.gradient, spot, walk, g);
      spot.sample += v * walk.samples;
      load<Tile>(a.x, spot, walk, x);
#pragma unroll
      for (int i = 0; i < Tile::kLanes; ++i) r[0][i] *= x[0][i], g[0][i] *= x[0][i];
      accumulate<Tile>(by_result, r[0]);
      accumulate<Tile>(by_gradient, g[0]);
      accumulate<Tile>(plain, x[0]);
    }
  }
  double sums[3 * count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    sums[i] = by_result[i], sums[count + i] = by_gradient[i], sums[2 * count + i] = plain[i];
  }
  add_rows(sums, split, shared);
  if (!share.active || share.row > 0) return;
  const int64_t first = v * walk.channels + share.channel, plane = gridDim.y * walk.channels;
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
      a.partial[(kind * plane + first + i) * split.parts + share.part] = sums[kind * count + i];
    }
  }
}

// ---- On the host.

// Blocks that share the numbers of a direction: few where the pairs are many.
int64_t pair_parts(const TangentMoments& a) {
  const int64_t most = std::max<int64_t>(1, kMostPartials / (a.directions * a.directions));
  const int64_t numbers = a.samples * a.pixels * a.channels;
  return std::clamp<int64_t>((numbers + kLeastRun - 1) / kLeastRun, 1, most);
}

template <typename T>
void pairs_of(const TangentMoments& a, const Place& place) {
  PairViews<T> views = {};
  const int64_t parts = pair_parts(a), pairs = a.directions * a.directions;
  views.size = a.samples * a.pixels * a.channels;
  views.run = (views.size + parts - 1) / parts;
  views.x = {static_cast<const T*>(a.x), a.directions * views.size};
  views.weights = coefficients<SumOf<T>>(a.weights, a.channels);
  views.directions = static_cast<int>(a.directions);
  views.channels = static_cast<int>(a.channels), views.parts = static_cast<int>(parts);
  views.side = (views.directions + kSide - 1) / kSide;
  views.partial = partial_of(a.sums, a.workspace, pairs, parts);
  const Grid grid = {blocks_of(parts, views.side * (views.side + 1) / 2), dim3(kThreads)};
  launch("tangent_moments", moment_pairs_kernel<T>, grid, place, views);
  combine("tangent_moments", views.partial, parts, {a.sums, pairs}, place);
}

void products_of(const TangentMoments& a, const Place& place) {
  const int64_t c = a.channels, pairs = a.directions * a.directions, size = 3 * a.directions * c;
  const auto dense = [&](const void* data, int64_t samples) {
    return Array{const_cast<void*>(data), a.dtype, {samples, c, a.pixels, 1}, {a.pixels * c, 1, c, c}};
  };
  const Array x = dense(a.x, a.directions * a.samples);
  const Array result = dense(a.result, a.samples), gradient = dense(a.gradient, a.samples);
  const Layout layout = layout_of({result, gradient, x});
  on_tile<1>(a.dtype, layout, [&](auto tile) {
    using Tile = decltype(tile);
    using T = typename Tile::Type;
    ProductViews<T> views = {};
    views.walk = layout.walk, views.split = split_of<Tile>(layout.walk);
    views.x = view_of<const T>(x, layout.walk);
    views.result = view_of<const T>(result, layout.walk);
    views.gradient = view_of<const T>(gradient, layout.walk);
    const Split& split = views.split;
    views.partial = partial_of(a.sums + pairs, a.workspace, size, split.parts);
    const dim3 blocks = blocks_of(split.groups * split.parts, a.directions);
    const auto kernel = split.positions <= kMost32 ? moment_products_kernel<Tile, uint32_t>
                                                   : moment_products_kernel<Tile, uint64_t>;
    launch("tangent_moments", kernel, Grid{blocks, kThreads}, place, views);
    combine("tangent_moments", views.partial, split.parts, {a.sums + pairs, size}, place);
  });
}

}  // namespace

namespace cuda {

int64_t moments_workspace(const TangentMoments& a) {
  const int64_t shape[4] = {a.samples, a.channels, a.pixels, 1};
  const int64_t products = 2 * workspace(shape, static_cast<int>(a.directions), 0);
  return std::max(products, a.directions * a.directions * pair_parts(a));
}

void tangent_moments(const TangentMoments& a, const Place& place) {
  if (a.directions == 0) return;
  if (a.dtype == DType::kFloat64) pairs_of<double>(a, place);
  else if (a.dtype == DType::kFloat32) pairs_of<float>(a, place);
  else pairs_of<__nv_bfloat16>(a, place);
  products_of(a, place);
}

}  // namespace cuda
}  // namespace rdarts
