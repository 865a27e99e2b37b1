// Half a separable convolution; what it computes stands in stage.h:
//   z = pointwise (depthwise relu(scale x + shift)), with its sums per channel
// One kernel, z the only tensor it writes. Sums go over a block's numbers in the type that sums
// are held in, then, by an edge's last block, over blocks in float64 and a fixed order.
#include "launchers.h"
#include "stage_views.h"

namespace rdarts {
namespace {

// Shared memory of the forward, in numbers.
template <int K>
struct ForwardMemory {
  int columns, image, taps, weights, tile;  // columns of the image of y, and sizes

  RDARTS_METHOD ForwardMemory(const Tiling& t, int stride, int dilation)
      : columns(reach<K>(t.columns, stride, dilation)),
        image(reach<K>(t.rows, stride, dilation) * columns * t.depth),
        taps(K * K * t.depth), weights(t.depth * t.channels),
        tile(t.slots() * (t.depth + kPad)) {}
  RDARTS_METHOD int total() const { return max(image + taps + weights + tile, kTileSums); }

 private:
  RDARTS_METHOD static int max(int a, int b) { return a < b ? b : a; }
};

template <typename T>
struct ForwardViews {
  StageViews<T> stage;
  Tiling tiling;
  Span<const SumOf<T>> pointwise[kTogether];  // [O, C]
  Span<T> z[kTogether];
  bool whole;
  FinishedSums<SumOf<T>, kTogether> sums;
};

// d[slots, depth] = the depthwise part on a tile, zeros outside of the region.
template <int K, typename Sum>
__device__ __forceinline__ void convolve(const SharedSpan<Sum>& y, const SharedSpan<Sum>& taps,
                                         const Tiling& t, const Region& region, int image_columns,
                                         int stride, int dilation, const SharedSpan<Sum>& d) {
  constexpr int together = 4;
  const int c = static_cast<int>(threadIdx.x) % t.depth, lanes = kStageThreads / t.depth;
  const int first = static_cast<int>(threadIdx.x) / t.depth, slots = t.slots();
  for (int slot = first; slot < slots; slot += together * lanes) {
    int from[together];
    bool live[together];
    Sum sum[together] = {};
#pragma unroll
    for (int q = 0; q < together; ++q) {
      const int row = (slot + q * lanes) / t.columns, column = (slot + q * lanes) % t.columns;
      live[q] = region.holds(row, column);
      from[q] = live[q] ? (row * image_columns + column) * stride * t.depth + c : c;
    }
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const Sum weight = taps[tap * t.depth + c];
      const int at = (tap / K * image_columns + tap % K) * dilation * t.depth;
#pragma unroll
      for (int q = 0; q < together; ++q) sum[q] += weight * Sum(y[from[q] + at]);
    }
#pragma unroll
    for (int q = 0; q < together; ++q) {
      if (slot + q * lanes >= slots) continue;
      d[(slot + q * lanes) * (t.depth + kPad) + c] = live[q] ? sum[q] : Sum(0);
    }
  }
}

// z of edge e on a block's tile, and its sums.
template <typename T, int K>
__device__ __forceinline__ void make_tile(const ForwardViews<T>& a, int e) {
  using Sum = SumOf<T>;
  const Tiling& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const Region region(t, blockIdx.x, blockIdx.y);
  const ForwardMemory<K> sizes(t, s.stride, s.dilation);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> y = memory.take(sizes.image), taps = memory.take(sizes.taps);
  const SharedSpan<Sum> weights = memory.take(sizes.weights), d = memory.take(sizes.tile);
  Cell<Sum> cell(t);
  for (int64_t channel = 0; channel < s.channels; channel += t.depth) {
    __syncthreads();  // the last channels have been read
    fill_image(s, e, region.sample, channel, region.first_row * s.stride - s.pad,
               region.first_column * s.stride - s.pad,
               reach<K>(region.rows, s.stride, s.dilation), sizes.columns, t.depth, y);
    fill_taps<K>(s.depthwise[e], s.channels, channel, t.depth, taps);
    over(t.depth * t.channels, [&](int i) {
      const int64_t c = channel + i % t.depth, o = region.channel + i / t.depth;
      const bool live = c < s.channels && o < t.of;
      const Sum weight = live ? a.pointwise[e][o * s.channels + c] : Sum(0);
      weights[i % t.depth * t.channels + i / t.depth] = weight;
    });
    __syncthreads();
    convolve<K>(y, taps, t, region, sizes.columns, s.stride, s.dilation, d);
    __syncthreads();
    cell.multiply(d, weights, t);
  }
  const int64_t parts = gridDim.x, live = min(t.of - region.channel, int64_t{t.channels});
  store_results(cell, t, region, a.z[e], t.of, region.channel, live, a.whole);
  sum_tile(cell, t, region, live, a.sums.partial, a.sums.edges * t.of * parts,
           (a.sums.first + e) * t.of + region.channel, parts, blockIdx.x);
}

// One block per tile of a sample, block of channels of z, and edge.
template <typename T, int K>
__global__ void __launch_bounds__(kStageThreads, 1)
sep_stage_kernel(const __grid_constant__ ForwardViews<T> a) {
  const int e = static_cast<int>(blockIdx.z);
  if (a.sums.parts > 0) make_tile<T, K>(a, e);
  if (comes_last(a.sums.counters, e, gridDim.x * gridDim.y)) a.sums.finish(e, a.tiling.of, a.tiling);
}

// ---- On the host.

template <typename T, int K>
void forward_of(const StageForward& a, const Place& place) {
  using Sum = SumOf<T>;
  const Stage& s = a.stage;
  const Array& z = a.z[0];
  const int64_t channels = s.x[0].shape[1], out = z.shape[1];
  const auto shared = [&](const Tiling& t) {
    return ForwardMemory<K>(t, s.stride, s.dilation).total();
  };
  ForwardViews<T> views = {};
  views.tiling = tiling_of<Sum>(z.shape[2], z.shape[3], out, channels, shared);
  const Tiling& t = views.tiling;
  views.sums = finished_sums<Sum, kTogether>(a, s.edges, t, place);
  const int64_t blocks = blocks_for(views.sums.parts);
  views.whole = true;
  for (int e = 0; e < s.edges; ++e) views.whole = views.whole && whole_rows(a.z[e].data, out);
  for (int first = 0; first < s.edges; first += kTogether) {
    const int edges = edges_of(s, first);
    views.stage = views_of<T>(s, first);
    at_edges(views.sums, a.norms, first, edges);
    for (int e = 0; e < edges; ++e) {
      views.pointwise[e] = coefficients<Sum>(s.pointwise[first + e], out * channels);
      views.z[e] = {static_cast<T*>(a.z[first + e].data), elements_of(z)};
    }
    const Grid grid = grid_of<Sum>(t, blocks, parts_of(out, t.channels), edges, shared(t));
    launch("sep_stage", sep_stage_kernel<T, K>, grid, place, views);
  }
}

}  // namespace

namespace cuda {

void sep_stage(const StageForward& a, const Place& place) {
  on_dtype(a.z[0].dtype, [&](auto number) {
    on_kernel(a.stage.kernel, [&](auto kernel) {
      forward_of<decltype(number), decltype(kernel)::value>(a, place);
    });
  });
}

}  // namespace cuda
}  // namespace rdarts
