// The backward of 1x1 convolutions below a ReLU (mixing.h), in one launch: blocks for dv, which sum
// over all edges in registers and write once, and blocks for the gradients of the weights, whose sums
// the last block of the few channels that they belong to adds in float64 and a fixed order.
#include "jobs.h"
#include "launchers.h"
#include "mixing_views.h"

namespace rdarts {
namespace {

constexpr int kSourcesBackward = 12;  // a launch, as edges
constexpr int kEdgesBackward = 8;
constexpr int kFewSources = 8;  // of each of two calls of an edge that share a launch
constexpr int64_t kMostWeightParts = 64;

template <typename T, int most, int most_edges, typename Size>
struct GradientOfSources {
  SourceViews<T, most> sources;
  Tiling<Size> tiling;  // of an image of z, a source's channels as results
  GradientViews<T, most_edges> gradient;
  Halves halves;
  Span<const SumOf<T>> weights[most_edges][2];
  Span<T> dv[most];
  uint32_t adds;      // bit m
  int edges;          // of the launch
  int64_t first, all;  // sources: the first of the launch, how many in all
};

// Writes a pixel of dv: four of `live` channels from `channel` on.
template <typename T, int most, int most_edges, typename Size>
__device__ __forceinline__ void write_pixel(const GradientOfSources<T, most, most_edges, Size>& a,
                                            int source, int64_t sample, int h, int w, int64_t channel,
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
template <typename T, bool tensor, int most, int most_edges, typename Size>
__device__ __forceinline__ void gradient_of_sources(
    const GradientOfSources<T, most, most_edges, Size>& a, const BlockAt& block) {
  using Sum = SumOf<T>;
  const Tiling<Size>& t = a.tiling;
  const auto& s = a.sources;
  const int source = static_cast<int>(block.z) / a.halves.count;
  const int half = static_cast<int>(block.z) % a.halves.count;
  if (!a.dv[source].data) return;
  const Region region(t, block.x, block.y);
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

template <typename T, int most, int most_edges, typename Size>
struct GradientOfWeights {
  SourceViews<T, most> sources;
  Tiling<Size> tiling;
  GradientViews<T, most_edges> gradient;
  Halves halves;
  int64_t items, each;                 // tiles of all samples, of a part
  int64_t parts;
  int64_t first_source, all;  // of the launch, sources of all
  Span<SumOf<T>> partial;     // [edges, parts, O, M C]
  Span<SumOf<T>> weights[most_edges][2];
  Span<uint32_t> counters;
};

// Adds the parts' gradients of few channels of a source, whose column of the weights is given, and
// of a block of channels of a half.
template <typename T, int most, int most_edges, typename Size>
__device__ __forceinline__ void finish_weights(const GradientOfWeights<T, most, most_edges, Size>& a,
                                               int e, int half, int64_t out, int64_t column,
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
template <typename T, bool tensor, int most, int most_edges, typename Size>
__device__ __forceinline__ void gradient_of_weights(
    const GradientOfWeights<T, most, most_edges, Size>& a, const BlockAt& at) {
  using Sum = SumOf<T>;
  const Tiling<Size>& t = a.tiling;
  const auto& s = a.sources;
  const int e = static_cast<int>(at.z);
  const int64_t slices = (s.channels + t.depth - 1) / t.depth, columns = slices * s.sources;
  const int source = static_cast<int>(at.y % columns / slices);
  const int64_t channel = at.y % slices * t.depth, block = at.y / columns;
  const int half = block < a.halves.blocks[0] ? 0 : 1;
  const int64_t out = (block - half * a.halves.blocks[0]) * t.channels;
  const int64_t first = a.halves.first[half] + out;
  SharedParts<Sum> memory;
  const SharedSpan<Sum> y = memory.take(t.slots() * (t.depth + kLinePad));
  const SharedSpan<Sum> dz = memory.take(t.slots() * (t.channels + kLinePad));
  OuterCell<Sum, Size, tensor> cell;
  const int64_t end = min((at.x + int64_t{1}) * a.each, a.items);
  for (int64_t item = at.x * a.each; item < end; ++item) {
    const Region region(t, item, 0);
    __syncthreads();  // the last tile has been read
    fill_sources(s, source, half, t, region, channel, kLinePad, y);
    fill_gradient(a.gradient, e, t, region, first, t.channels, kLinePad, dz);
    __syncthreads();
    cell.add(dz, y, t.slots());
  }
  const int64_t row = a.all * s.channels, own = a.gradient.channels * row;
  const int64_t to = (e * a.parts + at.x) * own;
  const int64_t column = (a.first_source + source) * s.channels + channel;
  if (a.parts > 0) {
    cell.finish([&](int i, int j, Sum sum) {
      const bool live = out + i < a.halves.channels[half] && channel + j < s.channels;
      if (live) a.partial[to + (first + i) * row + column + j] = sum;
    });
  }
  const int64_t counter = static_cast<int64_t>(at.z) * at.down + at.y;
  if (comes_last(a.counters, counter, at.across)) {
    finish_weights(a, e, half, out, column, channel);
  }
}

template <typename T, int most, int most_edges, typename Size, int count>
struct Calls {
  GradientOfSources<T, most, most_edges, Size> of_sources[count];
  GradientOfWeights<T, most, most_edges, Size> of_weights[count];
  Jobs<2 * count> jobs;
};

template <typename T, bool tensor, int most, int most_edges, typename Size, int count>
__global__ void __launch_bounds__(kStageThreads, kBlocksAtOnce<T>)
mixing_backward_kernel(const __grid_constant__ Calls<T, most, most_edges, Size, count> a) {
  BlockAt block;
  const int job = a.jobs.find(block);
  if (job % 2 == 0) gradient_of_sources<T, tensor>(a.of_sources[job / 2], block);
  else gradient_of_weights<T, tensor>(a.of_weights[job / 2], block);
}

// ---- On the host.

// Tells what a launch takes of sources and edges from these on.
template <typename T, int most, int most_edges, typename Size>
Grid tell(const MixingBackward& a, const Tuned& row, int source, int edge,
          GradientOfSources<T, most, most_edges, Size>& views) {
  using Sum = SumOf<T>;
  const Mixing& m = a.mixing;
  const Array& g = a.g[0];
  views.sources = views_of<T, most>(m, source);
  const int64_t channels = views.sources.channels;
  views.tiling = tiling_of<Sum, Size>(row, shared_to_multiply<Size>), views.tiling.of = channels;
  const Tiling<Size>& t = views.tiling;
  views.edges = std::min(most_edges, m.edges - edge);
  views.gradient = gradient_views<T, most_edges>(a, edge, views.edges);
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
  if (!wanted) return kNoGrid;
  return grid_of<Sum>(g.shape[0] * t.tiles(), parts_of(channels, t.channels),
                      views.sources.sources * m.halves, shared_to_multiply(t));
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
    each = most_a_part(items, kMostWeightParts, 2 * blocks * launch);  // two may share a launch
    count = each ? parts_of(items, each) : 0;
  }
};

// The same; of counters the launch has half, from `counter` on.
template <typename T, int most, int most_edges, typename Size>
Grid tell(const MixingBackward& a, const Tuned& row, int source, int edge, int counter,
          const Place& place, GradientOfWeights<T, most, most_edges, Size>& views) {
  using Sum = SumOf<T>;
  if (!a.dweights) return kNoGrid;
  const Mixing& m = a.mixing;
  const Array& g = a.g[0];
  views.sources = views_of<T, most>(m, source);
  views.tiling = tiling_of<Sum, Size>(row, shared_for_weights<Size>);
  views.tiling.of = g.shape[1];
  const Tiling<Size>& t = views.tiling;
  const WeightParts parts(m, g.shape, t);
  const int edges = std::min(most_edges, m.edges - edge);
  views.gradient = gradient_views<T, most_edges>(a, edge, edges);
  views.halves = halves_of(m, g.shape[1], t.channels);
  views.items = parts.items, views.each = parts.each;
  views.first_source = source, views.all = m.sources, views.parts = parts.count;
  views.counters = {counters_of(place).data + counter, kCounters / 2};
  const int64_t part = parts.count * g.shape[1] * m.sources * views.sources.channels;
  views.partial = {reinterpret_cast<Sum*>(a.workspace) + edge * part, edges * part};
  for (int e = 0; e < edges; ++e) {
    for (int half = 0; half < m.halves; ++half) {
      views.weights[e][half] = {static_cast<Sum*>(a.dweights[(edge + e) * m.halves + half]),
                                weights_of(m, g.shape[1], half)};
    }
  }
  return grid_of<Sum>(blocks_for(parts.count), parts.blocks * views.sources.sources, edges,
                      shared_for_weights(t));
}

template <typename T, bool tensor, typename Size>
void mix_backward(const MixingBackward& a, const Tuned& row, const Place& place) {
  constexpr int most = kSourcesBackward, edges = kEdgesBackward;
  for (int edge = 0; edge < a.mixing.edges; edge += edges) {
    for (int source = 0; source < a.mixing.sources; source += most) {
      Calls<T, most, edges, Size, 1> views = {};
      const Grid grid =
          join(views.jobs, {tell(a, row, source, edge, views.of_sources[0]),
                            tell(a, row, source, edge, 0, place, views.of_weights[0])});
      launch("mixing_backward", mixing_backward_kernel<T, tensor, most, edges, Size, 1>, grid,
             place, views);
    }
  }
}

template <typename T, bool tensor, typename Size>
void mix_backward(const MixingBackward& a, const Tuned& row, const MixingBackward& b,
                  const Tuned& other, const Place& place) {
  constexpr int half = kCounters / 2;
  Calls<T, kFewSources, 1, Size, 2> views = {};
  const Grid grid = join(views.jobs, {tell(a, row, 0, 0, views.of_sources[0]),
                                      tell(a, row, 0, 0, 0, place, views.of_weights[0]),
                                      tell(b, other, 0, 0, views.of_sources[1]),
                                      tell(b, other, 0, 0, half, place, views.of_weights[1])});
  launch("mixing_backward", mixing_backward_kernel<T, tensor, kFewSources, 1, Size, 2>, grid, place,
         views);
}

bool shares(const MixingBackward& a) {
  return a.mixing.sources <= kFewSources && a.mixing.edges == 1;
}

// The table's row for both: the fewer of a source's channels and a half's of z, so that no tile has
// channels that are in neither.
template <typename T>
Tuned tuned_backward(const Mixing& m, const int64_t* out_shape) {
  const int64_t channels = std::min(m.x[0].shape[1], largest_half(m, out_shape[1]));
  return tuned_for(channels, out_shape[2], out_shape[3], kDTypeOf<T>);
}

}  // namespace

namespace cuda {

// As if every sum were a double's.
int64_t mixing_backward_workspace(const Mixing& m, const int64_t* out_shape) {
  const int64_t parts = most_of_dtypes([&](auto number) {
    using T = decltype(number);
    const Tuned row = tuned_backward<T>(m, out_shape);
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
    using T = decltype(number);
    const Tuned row = tuned_backward<T>(a.mixing, a.g[0].shape);
    on_size<T>(row, [&](auto size) {
      on_products<T>(row, place, [&](auto tensor) {
        mix_backward<T, decltype(tensor)::value, decltype(size)>(a, row, place);
      });
    });
  });
}

void mixing_backward(const MixingBackward& a, const MixingBackward& b, const Place& place) {
  bool shared = false;
  on_dtype(a.g[0].dtype, [&](auto number) {
    using T = decltype(number);
    const Tuned row = tuned_backward<T>(a.mixing, a.g[0].shape);
    const Tuned other = tuned_backward<T>(b.mixing, b.g[0].shape);
    shared = shares(a) && shares(b) && row.channels == other.channels;
    if (!shared) return;
    on_size<T>(row, [&](auto size) {
      on_products<T>(row, place, [&](auto tensor) {
        mix_backward<T, decltype(tensor)::value, decltype(size)>(a, row, b, other, place);
      });
    });
  });
  if (!shared) mixing_backward(a, place), mixing_backward(b, place);
}

}  // namespace cuda
}  // namespace rdarts
