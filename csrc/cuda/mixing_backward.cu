// The backward of 1x1 convolutions below a ReLU (mixing.h): one kernel for dv, which sums over all
// edges in registers and writes once, and one for the gradients of the weights, whose sums the last
// block of the few channels that they belong to adds in float64 and a fixed order.
#include "launchers.h"
#include "mixing_views.h"

namespace rdarts {
namespace {

constexpr int kSourcesBackward = 16;  // a launch, as edges
constexpr int kEdgesBackward = 20;
constexpr int64_t kMostWeightParts = 64;

template <typename T, typename Size>
struct GradientOfSources {
  SourceViews<T, kSourcesBackward> sources;
  Tiling<Size> tiling;  // of an image of z, a source's channels as results
  GradientViews<T, kEdgesBackward> gradient;
  Halves halves;
  Span<const SumOf<T>> weights[kEdgesBackward][2];
  Span<T> dv[kSourcesBackward];
  uint32_t adds;      // bit m
  int edges;          // of the launch
  int64_t first, all;  // sources: the first of the launch, how many in all
};

// Writes a pixel of dv: four of `live` channels from `channel` on.
template <typename T, typename Size>
__device__ __forceinline__ void write_pixel(const GradientOfSources<T, Size>& a, int source,
                                            int64_t sample, int h, int w, int64_t channel,
                                            int64_t live, const SumOf<T> (&values)[kCell]) {
  using Sum = SumOf<T>;
  const auto& s = a.sources;
  if (h >= s.height || w >= s.width) return;
  const int64_t pixel = (sample * s.height + h) * s.width + w, to = pixel * s.channels + channel;
  const bool adds = a.adds >> source & 1;
#pragma unroll
  for (int q = 0; q < kCell; ++q) {
    if (q >= live) continue;
    const Sum old = adds ? static_cast<Sum>(T(a.dv[source][to + q])) : Sum(0);
    a.dv[source][to + q] = static_cast<T>(old + values[q]);
  }
}

// dv, 0 where relu's argument is no more than that. One block per tile of a sample, block of a
// source's channels, and source and half; a block writes its half's pixels, and the first half
// those that are in none.
template <typename T, bool tensor, typename Size>
__global__ void __launch_bounds__(kStageThreads, kBlocksAtOnce<T>)
gradient_of_sources_kernel(const __grid_constant__ GradientOfSources<T, Size> a) {
  using Sum = SumOf<T>;
  const Tiling<Size>& t = a.tiling;
  const auto& s = a.sources;
  const int source = static_cast<int>(blockIdx.z) / a.halves.count;
  const int half = static_cast<int>(blockIdx.z) % a.halves.count;
  if (!a.dv[source].data) return;
  const Region region(t, blockIdx.x, blockIdx.y);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> dz = memory.take(t.slots() * (t.depth + kPad));
  const SharedSpan<Sum> lines = memory.take(t.depth * (t.channels + kLinePad));
  const int64_t live = min(t.of - region.channel, int64_t{t.channels});
  const int64_t own = a.halves.channels[half];
  Cell<Sum, Size> cell(t);
  for (int e = 0; e < a.edges; ++e) {
    for (int64_t o = 0; o < own; o += t.depth) {
      __syncthreads();  // the last channels have been read
      fill_gradient(a.gradient, e, t, region, a.halves.first[half] + o, t.depth, kPad, dz);
      over(t.depth * t.channels, [&](int i) {
        const int64_t from = o + i / t.channels, c = i % t.channels;
        const int64_t column = (a.first + source) * s.channels + region.channel + c;
        const int64_t row = from * a.all * s.channels;
        lines[i / t.channels * (t.channels + kLinePad) + i % t.channels] =
            from < own && c < live ? a.weights[e][half][row + column] : Sum(0);
      });
      __syncthreads();
      cell.template multiply<tensor>(dz, lines);
    }
  }
  const int64_t channel = region.channel + cell.channel, rest = live - cell.channel;
  const Sum nothing[kCell] = {};
#pragma unroll
  for (int i = 0; i < kCell; ++i) {
    if (!cell.in(region, i)) continue;
    const int h = s.stride * (region.first_row + cell.row(i)) + half;
    const int w = s.stride * (region.first_column + cell.column(i)) + half;
#pragma unroll
    for (int q = 0; q < kCell; ++q) {
      if (q >= rest || h >= s.height || w >= s.width) continue;
      const Sum x = value_at(s.x[source], region.sample, h, w, channel + q);
      const Sum v = scaled(x, s.scale, s.shift, source * s.channels + channel + q);
      if (v <= Sum(0)) cell.value[i][q] = 0;
    }
    write_pixel(a, source, region.sample, h, w, channel, rest, cell.value[i]);
    if (s.stride == 1 || half == 1 || (a.adds >> source & 1)) continue;
    write_pixel(a, source, region.sample, h, w + 1, channel, rest, nothing);
    write_pixel(a, source, region.sample, h + 1, w, channel, rest, nothing);
    if (a.halves.count == 2) continue;
    write_pixel(a, source, region.sample, h + 1, w + 1, channel, rest, nothing);
  }
}

template <typename T, typename Size>
struct GradientOfWeights {
  SourceViews<T, kSourcesBackward> sources;
  Tiling<Size> tiling;
  GradientViews<T, kEdgesBackward> gradient;
  Halves halves;
  int64_t items, each;                 // tiles of all samples, of a part
  int64_t parts;
  int64_t first_source, all;  // of the launch, sources of all
  Span<SumOf<T>> partial;     // [edges, parts, O, M C]
  Span<SumOf<T>> weights[kEdgesBackward][2];
  Span<uint32_t> counters;
};

// Adds the parts' gradients of few channels of a source, whose column of the weights is given, and
// of a block of channels of a half.
template <typename T, typename Size>
__device__ __forceinline__ void finish_weights(const GradientOfWeights<T, Size>& a, int e,
                                               int half, int64_t out, int64_t column,
                                               int64_t channel) {
  const Tiling<Size>& t = a.tiling;
  const int64_t row = a.all * a.sources.channels, own = a.gradient.channels * row;
  over(t.channels * t.depth, [&](int i) {
    const int64_t o = out + i / t.depth, c = i % t.depth;
    if (o >= a.halves.channels[half] || channel + c >= a.sources.channels) return;
    const int64_t from = (a.halves.first[half] + o) * row + column + c;
    double sum = 0;
    for (int64_t part = 0; part < a.parts; ++part) {
      sum += a.partial[(e * a.parts + part) * own + from];
    }
    a.weights[e][half][o * row + column + c] = static_cast<SumOf<T>>(sum);
  });
}

// One block per part of the tiles, few channels of a source and a block of channels of a half, and
// edge.
template <typename T, bool tensor, typename Size>
__global__ void __launch_bounds__(kStageThreads, kBlocksAtOnce<T>)
gradient_of_weights_kernel(const __grid_constant__ GradientOfWeights<T, Size> a) {
  using Sum = SumOf<T>;
  const Tiling<Size>& t = a.tiling;
  const auto& s = a.sources;
  const int e = static_cast<int>(blockIdx.z);
  const int64_t slices = (s.channels + t.depth - 1) / t.depth, columns = slices * s.sources;
  const int source = static_cast<int>(blockIdx.y % columns / slices);
  const int64_t channel = blockIdx.y % slices * t.depth, block = blockIdx.y / columns;
  const int half = block < a.halves.blocks[0] ? 0 : 1;
  const int64_t out = (block - half * a.halves.blocks[0]) * t.channels;
  const int64_t first = a.halves.first[half] + out;
  SharedParts<Sum> memory;
  const SharedSpan<Sum> y = memory.take(t.slots() * (t.depth + kLinePad));
  const SharedSpan<Sum> dz = memory.take(t.slots() * (t.channels + kLinePad));
  OuterCell<Sum, Size, tensor> cell;
  const int64_t end = min((blockIdx.x + int64_t{1}) * a.each, a.items);
  for (int64_t item = blockIdx.x * a.each; item < end; ++item) {
    const Region region(t, item, 0);
    __syncthreads();  // the last tile has been read
    fill_sources(s, source, half, t, region, channel, kLinePad, y);
    fill_gradient(a.gradient, e, t, region, first, t.channels, kLinePad, dz);
    __syncthreads();
    cell.add(dz, y, t.slots());
  }
  const int64_t row = a.all * s.channels, own = a.gradient.channels * row;
  const int64_t to = (e * a.parts + blockIdx.x) * own;
  const int64_t column = (a.first_source + source) * s.channels + channel;
  if (a.parts > 0) {
    cell.finish([&](int i, int j, Sum sum) {
      const bool live = out + i < a.halves.channels[half] && channel + j < s.channels;
      if (live) a.partial[to + (first + i) * row + column + j] = sum;
    });
  }
  const int64_t counter = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  if (comes_last(a.counters, counter, gridDim.x)) finish_weights(a, e, half, out, column, channel);
}

// ---- On the host.

template <typename T, bool tensor, typename Size>
void gradient_of_sources(const MixingBackward& a, const Tuned& row, int source, int edge,
                         const Place& place) {
  using Sum = SumOf<T>;
  const Mixing& m = a.mixing;
  const Array& g = a.g[0];
  GradientOfSources<T, Size> views = {};
  views.sources = views_of<T, kSourcesBackward>(m, source);
  const int64_t channels = views.sources.channels;
  views.tiling = tiling_of<Sum, Size>(row, shared_to_multiply<Size>);
  const Tiling<Size>& t = views.tiling;
  views.edges = std::min(kEdgesBackward, m.edges - edge);
  views.gradient = gradient_views<T, kEdgesBackward>(a, edge, views.edges);
  views.halves = halves_of(m, g.shape[1], t.channels);
  views.first = source, views.all = m.sources;
  for (int e = 0; e < views.edges; ++e) {
    for (int half = 0; half < m.halves; ++half) {
      views.weights[e][half] = coefficients<Sum>(m.weights[(edge + e) * m.halves + half],
                                                 weights_of(m, g.shape[1], half));
    }
  }
  bool wanted = false;
  for (int i = 0; i < views.sources.sources; ++i) {
    const Array& dv = a.dv[source + i];
    views.dv[i] = {static_cast<T*>(dv.data), dv.data ? elements_of(dv) : 0};
    views.adds |= static_cast<uint32_t>(a.adds[source + i] || edge > 0) << i;
    wanted = wanted || dv.data;
  }
  if (!wanted) return;
  const Grid grid = grid_of<Sum>(g.shape[0] * t.tiles(), parts_of(channels, t.channels),
                                 views.sources.sources * m.halves, shared_to_multiply(t));
  launch("mixing_backward", gradient_of_sources_kernel<T, tensor, Size>, grid, place, views);
}

// Parts of the gradients of the weights.
struct WeightParts {
  int64_t items, each, count;

  int64_t slices, blocks;  // of an edge: of the sources' channels, of those and of the halves

  template <typename Size>
  WeightParts(const Mixing& m, const int64_t* out_shape, const Tiling<Size>& t)
      : items(out_shape[0] * t.tiles()) {
    const Halves halves = halves_of(m, out_shape[1], t.channels);
    slices = parts_of(m.x[0].shape[1], t.depth);
    blocks = slices * (halves.blocks[0] + halves.blocks[1]);
    const int64_t launch = std::min(m.sources, kSourcesBackward) * std::min(m.edges, kEdgesBackward);
    each = most_a_part(items, kMostWeightParts, blocks * launch);
    count = each ? parts_of(items, each) : 0;
  }
};

template <typename T, bool tensor, typename Size>
void gradient_of_weights(const MixingBackward& a, const Tuned& row, int source, int edge,
                         const Place& place) {
  using Sum = SumOf<T>;
  const Mixing& m = a.mixing;
  const Array& g = a.g[0];
  GradientOfWeights<T, Size> views = {};
  views.sources = views_of<T, kSourcesBackward>(m, source);
  views.tiling = tiling_of<Sum, Size>(row, shared_for_weights<Size>);
  views.tiling.of = g.shape[1];
  const Tiling<Size>& t = views.tiling;
  const WeightParts parts(m, g.shape, t);
  const int edges = std::min(kEdgesBackward, m.edges - edge);
  views.gradient = gradient_views<T, kEdgesBackward>(a, edge, edges);
  views.halves = halves_of(m, g.shape[1], t.channels);
  views.items = parts.items, views.each = parts.each;
  views.first_source = source, views.all = m.sources, views.parts = parts.count;
  views.counters = counters_of(place);
  const int64_t part = parts.count * g.shape[1] * m.sources * views.sources.channels;
  views.partial = {reinterpret_cast<Sum*>(a.workspace) + edge * part, edges * part};
  for (int e = 0; e < edges; ++e) {
    for (int half = 0; half < m.halves; ++half) {
      views.weights[e][half] = {static_cast<Sum*>(a.dweights[(edge + e) * m.halves + half]),
                                weights_of(m, g.shape[1], half)};
    }
  }
  const Grid grid = grid_of<Sum>(blocks_for(parts.count), parts.blocks * views.sources.sources,
                                 edges, shared_for_weights(t));
  launch("mixing_backward", gradient_of_weights_kernel<T, tensor, Size>, grid, place, views);
}

template <typename T>
void backward_of(const MixingBackward& a, int source, int edge, const Place& place) {
  const int64_t* const out = a.g[0].shape;
  const Tuned back = tuned_for(a.mixing.x[0].shape[1], out[2], out[3], kDTypeOf<T>);
  on_size<T>(back, [&](auto size) {
    on_products<T>(back, place, [&](auto tensor) {
      gradient_of_sources<T, decltype(tensor)::value, decltype(size)>(a, back, source, edge, place);
    });
  });
  if (!a.dweights) return;
  const Tuned row = tuned_for_halves<T>(a.mixing, out);
  on_size<T>(row, [&](auto size) {
    on_products<T>(row, place, [&](auto tensor) {
      gradient_of_weights<T, decltype(tensor)::value, decltype(size)>(a, row, source, edge, place);
    });
  });
}

}  // namespace

namespace cuda {

// As if every sum were a double's.
int64_t mixing_backward_workspace(const Mixing& m, const int64_t* out_shape) {
  const int64_t parts = most_of_dtypes([&](auto number) {
    using T = decltype(number);
    const Tuned row = tuned_for_halves<T>(m, out_shape);
    int64_t found = 0;
    on_size<T>(row, [&](auto size) {
      using Size = decltype(size);
      const Tiling<Size> t = tiling_of<SumOf<T>, Size>(row, shared_for_weights<Size>);
      found = WeightParts(m, out_shape, t).count;
    });
    return found;
  });
  return m.edges * parts * out_shape[1] * m.sources * m.x[0].shape[1];
}

void mixing_backward(const MixingBackward& a, const Place& place) {
  on_dtype(a.g[0].dtype, [&](auto number) {
    for (int edge = 0; edge < a.mixing.edges; edge += kEdgesBackward) {
      for (int source = 0; source < a.mixing.sources; source += kSourcesBackward) {
        backward_of<decltype(number)>(a, source, edge, place);
      }
    }
  });
}

}  // namespace cuda
}  // namespace rdarts
