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

  template <typename Size>
  RDARTS_METHOD ForwardMemory(const Tiling<Size>& t, int stride, int dilation)
      : columns(reach<K>(t.columns, stride, dilation)),
        image(reach<K>(t.rows, stride, dilation) * columns * t.depth),
        taps(K * K * t.depth), weights(t.depth * (t.channels + kLinePad)),
        tile(t.slots() * (t.depth + kPad)) {}
  RDARTS_METHOD int total() const { return max(image + taps + weights + tile, kTileSums); }

 private:
  RDARTS_METHOD static int max(int a, int b) { return a < b ? b : a; }
};

template <typename T, typename Size>
struct ForwardViews {
  StageViews<T> stage;
  Tiling<Size> tiling;
  Span<const SumOf<T>> pointwise[kTogether];  // [O, C]
  Span<T> z[kTogether];
  bool whole;
  FinishedSums<SumOf<T>, kTogether> sums;
};

// d[slots, depth] = the depthwise part on a tile, zeros outside of the region.
template <int K, typename Sum, typename Size>
__device__ __forceinline__ void convolve(const SharedSpan<Sum>& y, const SharedSpan<Sum>& taps,
                                         const Tiling<Size>& t, const Region& region,
                                         int image_columns, int stride, int dilation,
                                         const SharedSpan<Sum>& d) {
  constexpr int together = 4, lanes = kStageThreads / Size::depth;
  const int c = static_cast<int>(threadIdx.x) % t.depth;
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
template <typename T, int K, bool tensor, typename Size>
__device__ __forceinline__ void make_tile(const ForwardViews<T, Size>& a, int e) {
  using Sum = SumOf<T>;
  const Tiling<Size>& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const Region region(t, blockIdx.x, blockIdx.y);
  const ForwardMemory<K> sizes(t, s.stride, s.dilation);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> y = memory.take(sizes.image), taps = memory.take(sizes.taps);
  const SharedSpan<Sum> weights = memory.take(sizes.weights), d = memory.take(sizes.tile);
  Cell<Sum, Size> cell(t);
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
      weights[i % t.depth * (t.channels + kLinePad) + i / t.depth] = weight;
    });
    __syncthreads();
    convolve<K>(y, taps, t, region, sizes.columns, s.stride, s.dilation, d);
    __syncthreads();
    cell.template multiply<tensor>(d, weights);
  }
  const int64_t parts = gridDim.x, live = min(t.of - region.channel, int64_t{t.channels});
  store_results<T>(cell, t, region, a.z[e], t.of, region.channel, live, a.whole);
  sum_tile(cell, region, live, a.sums.partial, a.sums.edges * t.of * parts,
           (a.sums.first + e) * t.of + region.channel, parts, blockIdx.x);
}

// One block per tile of a sample, block of channels of z, and edge.
template <typename T, int K, bool tensor, typename Size>
__global__ void __launch_bounds__(kStageThreads, kBlocksAtOnce<T>)
sep_stage_kernel(const __grid_constant__ ForwardViews<T, Size> a) {
  const int e = static_cast<int>(blockIdx.z);
  if (a.sums.parts > 0) make_tile<T, K, tensor>(a, e);
  if (comes_last(a.sums.counters, e, gridDim.x * gridDim.y)) a.sums.finish(e, a.tiling.of, a.tiling);
}

// ---- On the host.

template <int K, typename Sum, typename Size>
Tiling<Size> forward_tiling(const Stage& s, const Tuned& row) {
  return tiling_of<Sum, Size>(row, [&](const Tiling<Size>& t) {
    return ForwardMemory<K>(t, s.stride, s.dilation).total();
  });
}

template <typename T, int K, bool tensor, typename Size>
void forward_of(const StageForward& a, const Tuned& row, const Place& place) {
  using Sum = SumOf<T>;
  const Stage& s = a.stage;
  const Array& z = a.z[0];
  const int64_t channels = s.x[0].shape[1], out = z.shape[1];
  ForwardViews<T, Size> views = {};
  views.tiling = forward_tiling<K, Sum, Size>(s, row);
  const Tiling<Size>& t = views.tiling;
  views.sums = finished_sums<Sum, kTogether>(a, s.edges, t.tiles(), place);
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
    const Grid grid = grid_of<Sum>(blocks, parts_of(out, t.channels), edges,
                                   ForwardMemory<K>(t, s.stride, s.dilation).total());
    launch("sep_stage", sep_stage_kernel<T, K, tensor, Size>, grid, place, views);
  }
}

}  // namespace

namespace cuda {

// As if every sum were a double's.
int64_t stage_workspace(const Stage& s, const int64_t* out_shape) {
  int64_t tiles = 0;
  on_kernel(s.kernel, [&](auto kernel) {
    tiles = most_of_dtypes([&](auto number) {
      using T = decltype(number);
      const Tuned row = tuned_for<T>(out_shape);
      int64_t found = 0;
      on_size<T>(row, [&](auto size) {
        found = forward_tiling<decltype(kernel)::value, SumOf<T>, decltype(size)>(s, row).tiles();
      });
      return found;
    });
  });
  return 3 * s.edges * out_shape[1] * out_shape[0] * tiles;
}

void sep_stage(const StageForward& a, const Place& place) {
  on_dtype(a.z[0].dtype, [&](auto number) {
    on_kernel(a.stage.kernel, [&](auto kernel) {
      using T = decltype(number);
      constexpr int K = decltype(kernel)::value;
      const Tuned row = tuned_for<T>(a.z[0].shape);
      on_size<T>(row, [&](auto size) {
        forward_of<T, K, kForwardRounds<T>, decltype(size)>(a, row, place);
      });
    });
  });
}

}  // namespace cuda
}  // namespace rdarts
