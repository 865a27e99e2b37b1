// 1x1 convolutions below a ReLU; what they compute stands in mixing.h:
//   z_g = weights_g relu(scale x + shift), x the channels of all sources, with z's sums per channel
#include "jobs.h"
#include "launchers.h"
#include "mixing_views.h"

namespace rdarts {
namespace {

constexpr int kMostMixed = 64;    // sources
constexpr int kFewMixed = 16;     // of each of two calls that share a launch
constexpr int kEdgesForward = 6;  // a launch: what its parameters hold beside the sources

template <typename T, int most, typename Size>
struct ForwardViews {
  SourceViews<T, most> sources;
  Tiling<Size> tiling;
  Halves halves;
  Span<const SumOf<T>> weights[kEdgesForward][2];  // [O of the half, M C]
  Span<T> z[kEdgesForward];
  bool whole;
  FinishedSums<SumOf<T>, kEdgesForward> sums;
};

// z of edge e on a block's tile, and its sums.
template <bool tensor, typename T, int most, typename Size>
__device__ __forceinline__ void make_tile(const ForwardViews<T, most, Size>& a, int e,
                                          const BlockAt& block) {
  using Sum = SumOf<T>;
  const Tiling<Size>& t = a.tiling;
  const auto& s = a.sources;
  const int half = block.y < a.halves.blocks[0] ? 0 : 1;
  const Region region(t, block.x, block.y - half * a.halves.blocks[0]);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> y = memory.take(t.slots() * (t.depth + kPad));
  const SharedSpan<Sum> lines = memory.take(t.depth * (t.channels + kLinePad));
  const int64_t live = min(a.halves.channels[half] - region.channel, int64_t{t.channels});
  Cell<Sum, Size> cell(t);
  for (int source = 0; source < s.sources; ++source) {
    for (int64_t channel = 0; channel < s.channels; channel += t.depth) {
      __syncthreads();  // the last channels have been read
      fill_sources(s, source, half, t, region, channel, kPad, y);
      over(t.depth * t.channels, [&](int i) {
        const int64_t c = channel + i % t.depth, o = i / t.depth;
        const int64_t row = (region.channel + o) * s.sources + source;
        lines[i % t.depth * (t.channels + kLinePad) + i / t.depth] =
            c < s.channels && o < live ? a.weights[e][half][row * s.channels + c] : Sum(0);
      });
      __syncthreads();
      cell.template multiply<tensor>(y, lines);
    }
  }
  const int64_t parts = block.across, first = a.halves.first[half] + region.channel;
  store_results<T>(cell, t, region, a.z[e], t.of, first, live, a.whole);
  sum_tile(cell, region, live, a.sums.partial, a.sums.edges * t.of * parts,
           (a.sums.first + e) * t.of + first, parts, block.x);
}

template <typename T, int most, typename Size, int count>
struct Calls {
  ForwardViews<T, most, Size> call[count];
  Jobs<count> jobs;
};

// One block per tile of a sample, block of channels of a half, and edge of a call.
template <typename T, bool tensor, int most, typename Size, int count>
__global__ void __launch_bounds__(kStageThreads, kBlocksAtOnce<T>)
mixing_kernel(const __grid_constant__ Calls<T, most, Size, count> calls) {
  BlockAt block;
  const ForwardViews<T, most, Size>& a = calls.call[calls.jobs.find(block)];
  const int e = static_cast<int>(block.z);
  if (a.sums.parts > 0) make_tile<tensor>(a, e, block);
  if (comes_last(a.sums.counters, e, block.across * block.down)) {
    a.sums.finish(e, a.tiling.of, a.tiling);
  }
}

// Tells a launch of edges from `first` on; `counter` is its first.
template <typename T, int most, typename Size>
Grid tell(const MixingForward& a, const Tuned& row, int first, int counter, const Place& place,
          ForwardViews<T, most, Size>& views) {
  using Sum = SumOf<T>;
  const Mixing& m = a.mixing;
  const Array& z = a.z[0];
  const int64_t out = z.shape[1];
  views.tiling = tiling_of<Sum, Size>(row, shared_to_multiply<Size>), views.tiling.of = out;
  const Tiling<Size>& t = views.tiling;
  views.sources = views_of<T, most>(m, 0), views.halves = halves_of(m, out, t.channels);
  views.sums = finished_sums<Sum, kEdgesForward>(a, m.edges, t.tiles(), place);
  views.sums.counters.data += counter, views.sums.counters.size -= counter;
  views.whole = whole_rows(nullptr, views.halves.first[1]);
  for (int e = 0; e < m.edges; ++e) views.whole = views.whole && whole_rows(a.z[e].data, out);
  const int edges = std::min(kEdgesForward, m.edges - first);
  at_edges(views.sums, a.norms, first, edges);
  for (int e = 0; e < edges; ++e) {
    for (int half = 0; half < m.halves; ++half) {
      views.weights[e][half] = coefficients<Sum>(m.weights[(first + e) * m.halves + half],
                                                 weights_of(m, out, half));
    }
    views.z[e] = {static_cast<T*>(a.z[first + e].data), elements_of(z)};
  }
  return grid_of<Sum>(blocks_for(views.sums.parts),
                      views.halves.blocks[0] + views.halves.blocks[1], edges,
                      shared_to_multiply(t));
}

template <typename T, typename Size>
void mix(const MixingForward& a, const Tuned& row, const Place& place) {
  for (int first = 0; first < a.mixing.edges; first += kEdgesForward) {
    Calls<T, kMostMixed, Size, 1> views = {};
    const Grid grid = join(views.jobs, {tell(a, row, first, 0, place, views.call[0])});
    launch("mixing", mixing_kernel<T, kForwardRounds<T>, kMostMixed, Size, 1>, grid, place, views);
  }
}

template <typename T, typename Size>
void mix(const MixingForward& a, const Tuned& row, const MixingForward& b, const Tuned& other,
         const Place& place) {
  Calls<T, kFewMixed, Size, 2> views = {};
  const Grid grid = join(views.jobs, {tell(a, row, 0, 0, place, views.call[0]),
                                      tell(b, other, 0, kEdgesForward, place, views.call[1])});
  launch("mixing", mixing_kernel<T, kForwardRounds<T>, kFewMixed, Size, 2>, grid, place, views);
}

bool shares(const MixingForward& a) {
  return a.mixing.sources <= kFewMixed && a.mixing.edges <= kEdgesForward;
}

}  // namespace

namespace cuda {

// As if every sum were a double's.
int64_t mixing_workspace(const Mixing& m, const int64_t* out_shape) {
  const int64_t tiles = most_of_dtypes([&](auto number) {
    using T = decltype(number);
    const Tuned row = tuned_for_halves<T>(m, out_shape);
    int64_t found = 0;
    on_size<T>(row, [&](auto size) {
      using Size = decltype(size);
      found = tiling_of<SumOf<T>, Size>(row, shared_to_multiply<Size>).tiles();
    });
    return found;
  });
  return 3 * m.edges * out_shape[1] * out_shape[0] * tiles;
}

void mixing(const MixingForward& a, const Place& place) {
  on_dtype(a.z[0].dtype, [&](auto number) {
    using T = decltype(number);
    const Tuned row = tuned_for_halves<T>(a.mixing, a.z[0].shape);
    on_size<T>(row, [&](auto size) { mix<T, decltype(size)>(a, row, place); });
  });
}

void mixing(const MixingForward& a, const MixingForward& b, const Place& place) {
  bool shared = false;
  on_dtype(a.z[0].dtype, [&](auto number) {
    using T = decltype(number);
    const Tuned row = tuned_for_halves<T>(a.mixing, a.z[0].shape);
    const Tuned other = tuned_for_halves<T>(b.mixing, b.z[0].shape);
    shared = shares(a) && shares(b) && row.channels == other.channels;
    if (!shared) return;
    on_size<T>(row, [&](auto size) { mix<T, decltype(size)>(a, row, b, other, place); });
  });
  if (!shared) mixing(a, place), mixing(b, place);
}

}  // namespace cuda
}  // namespace rdarts
