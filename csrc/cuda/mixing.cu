// 1x1 convolutions below a ReLU and their backward; what they compute stands in mixing.h:
//   z_g = weights_g relu(scale x + shift), x the channels of all sources, with z's sums per channel
// The forward is one kernel. The backward has one for dv, which sums over all edges in registers
// and writes once, and one for the gradients of the weights, whose sums a second launch adds in
// float64 and a fixed order. Each half of the channels of z has tiles of its own.
#include "mixing.h"

#include "launchers.h"
#include "stage_tile.h"

namespace rdarts {
namespace {

constexpr int kMostMixed = 64;     // sources of a forward
constexpr int kEdgesForward = 8;   // edges a launch: what its parameters hold beside the sources
constexpr int kSourcesBackward = 16;
constexpr int kEdgesBackward = 20;
constexpr int64_t kMostWeightParts = 64;

// What the kernels see of a few of the sources.
template <typename T, int most>
struct SourceViews {
  using Sum = SumOf<T>;
  View<const T> x[most];
  Span<const Sum> scale, shift;  // [sources, C] or null
  int sources;
  int64_t channels;  // of a source
  int height, width, stride;
};

// y[slots, depth] on a tile of the images of z, zeros outside; the rows lie kPad further apart.
template <typename T, int most, typename Sum = SumOf<T>>
__device__ __forceinline__ void fill_sources(const SourceViews<T, most>& s, int source, int half,
                                             const Tiling& t, const Region& region,
                                             int64_t channel, const SharedSpan<Sum>& y) {
  const View<const T>& x = s.x[source];
  const bool inner = x.steps.channel == 1;
  over_pixels(t.rows, t.columns, t.depth, inner, [&](int row, int column, int c) {
    const int h = s.stride * (region.first_row + row) + half;
    const int w = s.stride * (region.first_column + column) + half;
    Sum value = 0;
    if (region.holds(row, column) && h < s.height && w < s.width && channel + c < s.channels) {
      value = value_at(x, region.sample, h, w, channel + c);
      value = relu(scaled(value, s.scale, s.shift, source * s.channels + channel + c));
    }
    y[(row * t.columns + column) * (t.depth + kPad) + c] = value;
  });
}

// The halves of z's channels.
struct Halves {
  int count;
  int64_t channels[2], first[2];
  int64_t blocks[2];  // of channels
};

template <typename T>
struct ForwardViews {
  SourceViews<T, kMostMixed> sources;
  Tiling tiling;
  Halves halves;
  Span<const SumOf<T>> weights[kEdgesForward][2];  // [O of the half, M C]
  Span<T> z[kEdgesForward];
  bool whole;
  int64_t first, edges;  // of the launch, of all
  Span<double> partial;  // [3, G, O, parts]
};

// One block per tile of a sample, block of channels of a half, and edge.
template <typename T>
__global__ void __launch_bounds__(kStageThreads, 1)
mixing_kernel(const __grid_constant__ ForwardViews<T> a) {
  using Sum = SumOf<T>;
  const Tiling& t = a.tiling;
  const auto& s = a.sources;
  const int e = static_cast<int>(blockIdx.z), half = blockIdx.y < a.halves.blocks[0] ? 0 : 1;
  const Region region(t, blockIdx.x, blockIdx.y - half * a.halves.blocks[0]);
  const int tile = t.slots() * (t.depth + kPad);
  const SharedSpan<Sum> y = dynamic_shared<Sum>(tile);
  const SharedSpan<Sum> lines =
      dynamic_shared<Sum>(t.depth * t.channels, tile * static_cast<int>(sizeof(Sum)));
  const int64_t live = min(a.halves.channels[half] - region.channel, int64_t{t.channels});
  Cell<Sum> cell(t);
  for (int source = 0; source < s.sources; ++source) {
    for (int64_t channel = 0; channel < s.channels; channel += t.depth) {
      __syncthreads();  // the last channels have been read
      fill_sources(s, source, half, t, region, channel, y);
      over(t.depth * t.channels, [&](int i) {
        const int64_t c = channel + i % t.depth, o = i / t.depth;
        const int64_t row = (region.channel + o) * s.sources + source;
        lines[i % t.depth * t.channels + i / t.depth] =
            c < s.channels && o < live ? a.weights[e][half][row * s.channels + c] : Sum(0);
      });
      __syncthreads();
      cell.multiply(y, lines, t);
    }
  }
  const int64_t parts = gridDim.x, first = a.halves.first[half] + region.channel;
  store_results(cell, t, region, a.z[e], t.of, first, live, a.whole);
  sum_tile(cell, t, region, live, a.partial, a.edges * t.of * parts,
           (a.first + e) * t.of + first, parts, blockIdx.x);
}

template <typename T>
struct GradientOfSources {
  SourceViews<T, kSourcesBackward> sources;
  Tiling tiling;  // of an image of z, a source's channels as results
  GradientViews<T, kEdgesBackward> gradient;
  Halves halves;
  Span<const SumOf<T>> weights[kEdgesBackward][2];
  Span<T> dv[kSourcesBackward];
  uint32_t adds;      // bit m
  int edges;          // of the launch
  int64_t first, all;  // sources: the first of the launch, how many in all
};

// Writes a pixel of dv: four of `live` channels from `channel` on.
template <typename T>
__device__ __forceinline__ void write_pixel(const GradientOfSources<T>& a, int source,
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
template <typename T>
__global__ void __launch_bounds__(kStageThreads, 1)
gradient_of_sources_kernel(const __grid_constant__ GradientOfSources<T> a) {
  using Sum = SumOf<T>;
  const Tiling& t = a.tiling;
  const auto& s = a.sources;
  const int source = static_cast<int>(blockIdx.z) / a.halves.count;
  const int half = static_cast<int>(blockIdx.z) % a.halves.count;
  if (!a.dv[source].data) return;
  const Region region(t, blockIdx.x, blockIdx.y);
  const int tile = t.slots() * (t.depth + kPad);
  const SharedSpan<Sum> dz = dynamic_shared<Sum>(tile);
  const SharedSpan<Sum> lines =
      dynamic_shared<Sum>(t.depth * t.channels, tile * static_cast<int>(sizeof(Sum)));
  const int64_t live = min(t.of - region.channel, int64_t{t.channels});
  const int64_t own = a.halves.channels[half];
  Cell<Sum> cell(t);
  for (int e = 0; e < a.edges; ++e) {
    for (int64_t o = 0; o < own; o += t.depth) {
      __syncthreads();  // the last channels have been read
      fill_gradient(a.gradient, e, t, region, a.halves.first[half] + o, t.depth, dz);
      over(t.depth * t.channels, [&](int i) {
        const int64_t from = o + i / t.channels, c = i % t.channels;
        const int64_t column = (a.first + source) * s.channels + region.channel + c;
        const int64_t row = from * a.all * s.channels;
        lines[i] = from < own && c < live ? a.weights[e][half][row + column] : Sum(0);
      });
      __syncthreads();
      cell.multiply(dz, lines, t);
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

template <typename T>
struct GradientOfWeights {
  SourceViews<T, kSourcesBackward> sources;
  Tiling tiling;
  GradientViews<T, kEdgesBackward> gradient;
  Halves halves;
  int64_t items, each;                 // tiles of all samples, of a part
  int64_t first_source, all, first_edge;  // of the launch, sources of all, of the launch
  Span<SumOf<T>> partial;              // [G, parts, O, M C]
};

// One block per part of the tiles, few channels of a source and a block of channels of a half, and
// edge.
template <typename T>
__global__ void __launch_bounds__(kStageThreads, 1)
gradient_of_weights_kernel(const __grid_constant__ GradientOfWeights<T> a) {
  using Sum = SumOf<T>;
  const Tiling& t = a.tiling;
  const auto& s = a.sources;
  const int e = static_cast<int>(blockIdx.z);
  const int64_t slices = (s.channels + t.depth - 1) / t.depth, columns = slices * s.sources;
  const int source = static_cast<int>(blockIdx.y % columns / slices);
  const int64_t channel = blockIdx.y % slices * t.depth, block = blockIdx.y / columns;
  const int half = block < a.halves.blocks[0] ? 0 : 1;
  const int64_t out = (block - half * a.halves.blocks[0]) * t.channels;
  const int64_t first = a.halves.first[half] + out;
  const int tile = t.slots() * (t.depth + kPad);
  const SharedSpan<Sum> y = dynamic_shared<Sum>(tile);
  const SharedSpan<Sum> dz = dynamic_shared<Sum>(t.slots() * (t.channels + kPad),
                                                 tile * static_cast<int>(sizeof(Sum)));
  OuterCell<Sum> cell(t);
  const int64_t end = min((blockIdx.x + int64_t{1}) * a.each, a.items);
  for (int64_t item = blockIdx.x * a.each; item < end; ++item) {
    const Region region(t, item, 0);
    __syncthreads();  // the last tile has been read
    fill_sources(s, source, half, t, region, channel, y);
    fill_gradient(a.gradient, e, t, region, first, t.channels, dz);
    __syncthreads();
    cell.add(dz, y, t);
  }
  const int64_t row = a.all * s.channels, own = a.gradient.channels * row;
  const int64_t to = ((a.first_edge + e) * gridDim.x + blockIdx.x) * own;
  const int64_t column = (a.first_source + source) * s.channels + channel;
  cell.finish(t, [&](int i, int j, Sum sum) {
    const bool live = out + i < a.halves.channels[half] && channel + j < s.channels;
    if (live) a.partial[to + (first + i) * row + column + j] = sum;
  });
}

template <typename Sum>
struct WeightResults {
  Span<Sum> weights[kEdgesBackward][2];
  int64_t first, parts;
  Span<const Sum> partial;  // [G, parts, both halves]
};

// Adds the parts' gradients; one thread per number of an edge.
template <typename Sum>
__global__ void __launch_bounds__(kStageThreads, 1)
combine_weights_kernel(const __grid_constant__ WeightResults<Sum> a) {
  const int e = static_cast<int>(blockIdx.y);
  const int64_t half = a.weights[e][0].size, own = half + a.weights[e][1].size;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kStageThreads + threadIdx.x;
  if (i >= own) return;
  double sum = 0;
  for (int64_t part = 0; part < a.parts; ++part) {
    sum += a.partial[((a.first + e) * a.parts + part) * own + i];
  }
  if (i < half) a.weights[e][0][i] = static_cast<Sum>(sum);
  else a.weights[e][1][i - half] = static_cast<Sum>(sum);
}

// ---- On the host.

// `tile`: channels of one.
Halves halves_of(const Mixing& m, int64_t channels, int tile) {
  Halves halves = {m.halves, {}, {}, {}};
  for (int half = 0; half < 2; ++half) {
    halves.channels[half] = channels_of_half(m, channels, half);
    halves.blocks[half] = parts_of(halves.channels[half], tile);
  }
  halves.first[1] = halves.channels[0];
  return halves;
}

// Of sources [first, first + most) or those that there are.
template <typename T, int most>
SourceViews<T, most> views_of(const Mixing& m, int first) {
  SourceViews<T, most> views = {};
  const Array& x = m.x[0];
  views.sources = std::min(most, m.sources - first), views.channels = x.shape[1];
  for (int i = 0; i < views.sources; ++i) {
    views.x[i] = view_of<const T>(m.x[first + i], walk_over(x, false));
  }
  views.scale = rows_from<SumOf<T>>(m.scale, first, views.sources, x.shape[1]);
  views.shift = rows_from<SumOf<T>>(m.shift, first, views.sources, x.shape[1]);
  views.height = static_cast<int>(x.shape[2]), views.width = static_cast<int>(x.shape[3]);
  views.stride = m.stride;
  return views;
}

// Numbers of weights of a half of an edge.
int64_t weights_of(const Mixing& m, int64_t channels, int half) {
  return channels_of_half(m, channels, half) * m.sources * m.x[0].shape[1];
}

int64_t largest_half(const Mixing& m, int64_t channels) { return channels_of_half(m, channels, 0); }

int shared_to_multiply(const Tiling& t) {
  return std::max(t.slots() * (t.depth + kPad) + t.depth * t.channels, kTileSums);
}

int shared_for_weights(const Tiling& t) {
  return std::max(t.slots() * (t.depth + t.channels + 2 * kPad), kResults);
}

// A tiling by halves of an image of so many channels.
template <typename Sum, typename Numbers>
Tiling tiling_of_halves(const Mixing& m, const int64_t* out_shape, const Numbers& shared) {
  Tiling t = tiling_of<Sum>(out_shape[2], out_shape[3], largest_half(m, out_shape[1]),
                            m.x[0].shape[1], shared);
  t.of = out_shape[1];
  return t;
}

template <typename T>
void forward_of(const MixingForward& a, const Place& place) {
  using Sum = SumOf<T>;
  const Mixing& m = a.mixing;
  const Array& z = a.z[0];
  const int64_t out = z.shape[1], size = m.edges * out;
  ForwardViews<T> views = {};
  views.tiling = tiling_of_halves<Sum>(m, z.shape, shared_to_multiply);
  const Tiling& t = views.tiling;
  const int64_t parts = z.shape[0] * t.tiles();
  views.sources = views_of<T, kMostMixed>(m, 0), views.halves = halves_of(m, out, t.channels);
  views.partial = {a.workspace, 3 * size * parts}, views.edges = m.edges;
  views.whole = whole_rows(nullptr, views.halves.first[1]);
  for (int e = 0; e < m.edges; ++e) views.whole = views.whole && whole_rows(a.z[e].data, out);
  for (int first = 0; first < m.edges; first += kEdgesForward) {
    const int edges = std::min(kEdgesForward, m.edges - first);
    views.first = first;
    for (int e = 0; e < edges; ++e) {
      for (int half = 0; half < m.halves; ++half) {
        views.weights[e][half] = coefficients<Sum>(m.weights[(first + e) * m.halves + half],
                                                   weights_of(m, out, half));
      }
      views.z[e] = {static_cast<T*>(a.z[first + e].data), elements_of(z)};
    }
    const Grid grid = grid_of<Sum>(t, parts, views.halves.blocks[0] + views.halves.blocks[1],
                                   edges, shared_to_multiply(t));
    launch("mixing", mixing_kernel<T>, grid, place, views);
  }
  combine_moments("mixing", views.partial, t, parts, size, a.sums, place);
}

template <typename T>
void gradient_of_sources(const MixingBackward& a, int source, int edge, const Place& place) {
  using Sum = SumOf<T>;
  const Mixing& m = a.mixing;
  const Array& g = a.g[0];
  GradientOfSources<T> views = {};
  views.sources = views_of<T, kSourcesBackward>(m, source);
  const int64_t channels = views.sources.channels;
  Tiling& t = views.tiling;
  t = tiling_of<Sum>(g.shape[2], g.shape[3], channels, largest_half(m, g.shape[1]),
                     shared_to_multiply);
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
  const Grid grid = grid_of<Sum>(t, g.shape[0] * t.tiles(), parts_of(channels, t.channels),
                                 views.sources.sources * m.halves, shared_to_multiply(t));
  launch("mixing_backward", gradient_of_sources_kernel<T>, grid, place, views);
}

// Parts of the gradients of the weights.
struct WeightParts {
  int64_t items, each, count;

  WeightParts(const Tiling& t, int64_t samples)
      : items(samples * t.tiles()), each(parts_of(items, kMostWeightParts)),
        count(each ? parts_of(items, each) : 0) {}
};

template <typename T>
void gradient_of_weights(const MixingBackward& a, int source, int edge, const Place& place) {
  using Sum = SumOf<T>;
  const Mixing& m = a.mixing;
  const Array& g = a.g[0];
  GradientOfWeights<T> views = {};
  views.sources = views_of<T, kSourcesBackward>(m, source);
  views.tiling = tiling_of_halves<Sum>(m, g.shape, shared_for_weights);
  const Tiling& t = views.tiling;
  const WeightParts parts(t, g.shape[0]);
  const int edges = std::min(kEdgesBackward, m.edges - edge);
  views.gradient = gradient_views<T, kEdgesBackward>(a, edge, edges);
  views.halves = halves_of(m, g.shape[1], t.channels);
  views.items = parts.items, views.each = parts.each;
  views.first_source = source, views.all = m.sources, views.first_edge = edge;
  const int64_t own = g.shape[1] * m.sources * views.sources.channels;
  views.partial = {reinterpret_cast<Sum*>(a.workspace), m.edges * parts.count * own};
  const int64_t blocks = views.halves.blocks[0] + views.halves.blocks[1];
  const int64_t slices = parts_of(views.sources.channels, t.depth) * views.sources.sources;
  const Grid grid = grid_of<Sum>(t, parts.count, slices * blocks, edges, shared_for_weights(t));
  launch("mixing_backward", gradient_of_weights_kernel<T>, grid, place, views);
  if (source + kSourcesBackward < m.sources) return;
  WeightResults<Sum> results = {};
  for (int e = 0; e < edges; ++e) {
    for (int half = 0; half < m.halves; ++half) {
      results.weights[e][half] = {static_cast<Sum*>(a.dweights[(edge + e) * m.halves + half]),
                                  weights_of(m, g.shape[1], half)};
    }
  }
  results.first = edge, results.parts = parts.count;
  results.partial = {views.partial.data, views.partial.size};
  Grid combined = grid_of(own, kStageThreads);
  combined.blocks.y = static_cast<unsigned>(edges);
  launch("mixing_backward", combine_weights_kernel<Sum>, combined, place, results);
}

}  // namespace

namespace cuda {

// As if every sum were a double's. Tiles are the same for all types.
int64_t mixing_workspace(const Mixing& m, const int64_t* out_shape, bool backward) {
  const int64_t out = out_shape[1];
  const Tiling t = tiling_of_halves<double>(m, out_shape, shared_for_weights);
  if (!backward) return 3 * m.edges * out * out_shape[0] * t.tiles();
  return m.edges * WeightParts(t, out_shape[0]).count * out * m.sources * m.x[0].shape[1];
}

void mixing(const MixingForward& a, const Place& place) {
  on_dtype(a.z[0].dtype, [&](auto number) { forward_of<decltype(number)>(a, place); });
}

void mixing_backward(const MixingBackward& a, const Place& place) {
  on_dtype(a.g[0].dtype, [&](auto number) {
    for (int edge = 0; edge < a.mixing.edges; edge += kEdgesBackward) {
      for (int source = 0; source < a.mixing.sources; source += kSourcesBackward) {
        gradient_of_sources<decltype(number)>(a, source, edge, place);
        if (a.dweights) gradient_of_weights<decltype(number)>(a, source, edge, place);
      }
    }
  });
}

}  // namespace cuda
}  // namespace rdarts
