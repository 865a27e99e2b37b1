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

template <typename T, int most>
struct ForwardViews {
  SourceViews<T, most> sources;
  Tiling tiling;
  Halves halves;
  Span<const SumOf<T>> weights[kEdgesForward][2];  // [O of the half, M C]
  Span<T> z[kEdgesForward];
  bool whole;
  FinishedSums<SumOf<T>, kEdgesForward> sums;
};

// z of edge e on a block's tile, and its sums.
template <typename T, int most>
__device__ __forceinline__ void make_tile(const ForwardViews<T, most>& a, int e,
                                          const BlockAt& block) {
  using Sum = SumOf<T>;
  const Tiling& t = a.tiling;
  const auto& s = a.sources;
  const int half = block.y < a.halves.blocks[0] ? 0 : 1;
  const Region region(t, block.x, block.y - half * a.halves.blocks[0]);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> y = memory.take(t.slots() * (t.depth + kPad));
  const SharedSpan<Sum> lines = memory.take(t.depth * t.channels);
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
  const int64_t parts = block.across, first = a.halves.first[half] + region.channel;
  store_results(cell, t, region, a.z[e], t.of, first, live, a.whole);
  sum_tile(cell, t, region, live, a.sums.partial, a.sums.edges * t.of * parts,
           (a.sums.first + e) * t.of + first, parts, block.x);
}

template <typename T, int most, int count>
struct Calls {
  ForwardViews<T, most> call[count];
  Jobs<count> jobs;
};

// One block per tile of a sample, block of channels of a half, and edge of a call.
template <typename T, int most, int count>
__global__ void __launch_bounds__(kStageThreads, 1)
mixing_kernel(const __grid_constant__ Calls<T, most, count> calls) {
  BlockAt block;
  const ForwardViews<T, most>& a = calls.call[calls.jobs.find(block)];
  const int e = static_cast<int>(block.z);
  if (a.sums.parts > 0) make_tile(a, e, block);
  if (comes_last(a.sums.counters, e, block.across * block.down)) {
    a.sums.finish(e, a.tiling.of, a.tiling);
  }
}

// Tells a launch of edges from `first` on; `counter` is its first.
template <typename T, int most>
Grid tell(const MixingForward& a, int first, int counter, const Place& place,
          ForwardViews<T, most>& views) {
  using Sum = SumOf<T>;
  const Mixing& m = a.mixing;
  const Array& z = a.z[0];
  const int64_t out = z.shape[1];
  views.tiling = tiling_of_halves<Sum>(m, z.shape, shared_to_multiply);
  const Tiling& t = views.tiling;
  views.sources = views_of<T, most>(m, 0), views.halves = halves_of(m, out, t.channels);
  views.sums = finished_sums<Sum, kEdgesForward>(a, m.edges, t, place);
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
  return grid_of<Sum>(t, blocks_for(views.sums.parts),
                      views.halves.blocks[0] + views.halves.blocks[1], edges,
                      shared_to_multiply(t));
}

template <typename T>
void mix(const MixingForward& a, const Place& place) {
  for (int first = 0; first < a.mixing.edges; first += kEdgesForward) {
    Calls<T, kMostMixed, 1> views = {};
    const Grid grid = join(views.jobs, {tell(a, first, 0, place, views.call[0])});
    launch("mixing", mixing_kernel<T, kMostMixed, 1>, grid, place, views);
  }
}

template <typename T>
void mix(const MixingForward& a, const MixingForward& b, const Place& place) {
  Calls<T, kFewMixed, 2> views = {};
  const Grid grid = join(views.jobs, {tell(a, 0, 0, place, views.call[0]),
                                      tell(b, 0, kEdgesForward, place, views.call[1])});
  launch("mixing", mixing_kernel<T, kFewMixed, 2>, grid, place, views);
}

bool shares(const MixingForward& a) {
  return a.mixing.sources <= kFewMixed && a.mixing.edges <= kEdgesForward;
}

}  // namespace

namespace cuda {

void mixing(const MixingForward& a, const Place& place) {
  on_dtype(a.z[0].dtype, [&](auto number) { mix<decltype(number)>(a, place); });
}

void mixing(const MixingForward& a, const MixingForward& b, const Place& place) {
  if (!shares(a) || !shares(b)) return mixing(a, place), mixing(b, place);
  on_dtype(a.z[0].dtype, [&](auto number) { mix<decltype(number)>(a, b, place); });
}

}  // namespace cuda
}  // namespace rdarts
