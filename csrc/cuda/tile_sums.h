// Sums per channel of the tiles that a stage's or a mixing's forward makes: a block's, about its own
// pivot, in the type that sums are held in; those of all blocks by an edge's last one, in float64 and
// a fixed order, and the batch norms that they make.
#pragma once

#include "last.h"
#include "normalization.h"
#include "stage_tile.h"

namespace rdarts {

// Numbers of shared memory that sum_tile takes, from its beginning on.
constexpr int kTileSums = 64 + 2 * kWarps * kWarpChannels;

// Adds the tile's results, less a pivot, over its pixels: the sums, those of their squares and the
// pivots go to partial[i * plane + (row + channel) * parts + part], i = 0, 1, 2. The pivot is the
// tile's first pixel. All threads call it; `live` is how many of the tile's channels there are.
template <typename Sum, typename Size>
__device__ void sum_tile(const Cell<Sum, Size>& cell, const Region& region, int64_t live,
                         const Span<double>& partial, int64_t plane, int64_t row, int64_t parts,
                         int64_t part) {
  constexpr int all = kWarps * kWarpChannels, groups = kWarpChannels / kCell;
  const SharedSpan<Sum> pivots = dynamic_shared<Sum>(64);
  const SharedSpan<Sum> sums = dynamic_shared<Sum>(2 * all, 64 * sizeof(Sum));
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the tiles that lay there have been read
  if (cell.pixel == 0) {
#pragma unroll
    for (int q = 0; q < kCell; ++q) pivots[cell.channel + q] = cell.value[0][q];
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < kCell; ++q) {
    const Sum pivot = pivots[cell.channel + q];
    Sum sum = 0, square = 0;
#pragma unroll
    for (int i = 0; i < kCell; ++i) {
      const Sum value = cell.in(region, i) ? cell.value[i][q] - pivot : Sum(0);
      sum += value, square += value * value;
    }
    for (int step = groups; step < 32; step *= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      square += __shfl_xor_sync(~0u, square, step);
    }
    if (thread % 32 < groups) {
      const int at = thread / 32 * kWarpChannels + thread % 32 * kCell + q;
      sums[at] = sum, sums[all + at] = square;
    }
  }
  __syncthreads();
  if (thread >= live) return;
  double sum = 0, square = 0;
  for (int warp = thread / kWarpChannels; warp < kWarps; warp += cell.kAcross) {
    sum += sums[warp * kWarpChannels + thread % kWarpChannels];
    square += sums[all + warp * kWarpChannels + thread % kWarpChannels];
  }
  const int64_t at = (row + thread) * parts + part;
  partial[at] = sum, partial[plane + at] = square;
  partial[2 * plane + at] = static_cast<Sum>(pivots[thread]);
}

// What a forward makes of its tiles' sums: those of all, and batch norms where it is to.
template <typename Sum, int most>
struct FinishedSums {
  Span<double> partial;  // [3, G, O, parts], as sum_tile leaves them
  int64_t parts, first, edges;  // tiles of all samples; edges: the launch's first, all
  Span<double> sums;            // [3, G, O]
  NormRule rule;
  bool normalises;
  Span<Sum> running_mean[most], running_var[most];  // [O] or null
  Span<int64_t> tracked[most];                      // [1] or null
  Span<double> mean, rstd;                          // [G, O] each
  Span<Sum> scale, shift;                           // [G, O] or null
  Span<uint32_t> counters;

  // `channels` of edge e of the launch; a warp each, by the launch's last block of that edge.
  template <typename Size>
  __device__ void finish(int e, int64_t channels, const Tiling<Size>& t) const {
    const int64_t plane = edges * channels;
    const int lane = static_cast<int>(threadIdx.x) % warpSize;
    for (int64_t c = threadIdx.x / warpSize; c < channels; c += kWarps) {
      const int64_t i = (first + e) * channels + c;
      const double pivot = parts > 0 ? partial[(2 * plane + i) * parts] : 0.0;
      double sum = 0, square = 0;
      for (int64_t part = lane; part < parts; part += warpSize) {
        const Region region(t, part, 0);
        const double own = partial[i * parts + part], count = region.rows * region.columns;
        const double by = partial[(2 * plane + i) * parts + part] - pivot;
        sum += own + by * count;
        square += partial[(plane + i) * parts + part] + by * (2 * own + by * count);
      }
      for (int step = warpSize / 2; step > 0; step /= 2) {
        sum += __shfl_down_sync(~0u, sum, step);
        square += __shfl_down_sync(~0u, square, step);
      }
      if (lane > 0) continue;
      sums[i] = sum, sums[plane + i] = square, sums[2 * plane + i] = pivot;
      if (normalises) normalise(e, i, c, sum, square, pivot);
    }
  }

 private:
  __device__ void normalise(int e, int64_t i, int64_t c, double sum, double square,
                            double pivot) const {
    RunningOf<Sum> running = {running_mean[e].data != nullptr, Sum(0), Sum(0)};
    if (running.exist) running.mean = running_mean[e][c], running.var = running_var[e][c];
    const Statistics s = statistics_of(rule, sum, square, pivot, running);
    if (running.exist && rule.training) {
      running_mean[e][c] = running.mean, running_var[e][c] = running.var;
    }
    if (c == 0 && tracked[e].data && rule.training) tracked[e][0] = tracked[e][0] + 1;
    mean[i] = s.mean, rstd[i] = s.rstd;
    if (!scale.data) return;
    const MapOf<Sum> map(1.0, s);
    scale[i] = map.scale, shift[i] = map.shift;
  }
};

// ---- On the host.

// Of a forward whose z have that shape; its edges from `first` on are still to be told.
template <typename Sum, int most, typename Forward>
FinishedSums<Sum, most> finished_sums(const Forward& a, int64_t edges, int64_t tiles,
                                      const Place& place) {
  FinishedSums<Sum, most> f = {};
  const Array& z = a.z[0];
  const int64_t size = edges * z.shape[1];
  f.parts = z.shape[0] * tiles, f.edges = edges;
  f.partial = {a.workspace, 3 * size * f.parts}, f.sums = {a.sums, 3 * size};
  f.counters = counters_of(place);
  if (!a.norms) return f;
  const Normalization& n = *a.norms;
  f.normalises = true, f.rule = n.rule;
  f.mean = {n.mean, size}, f.rstd = {n.rstd, size};
  f.scale = {static_cast<Sum*>(n.scale), n.scale ? size : 0};
  f.shift = {static_cast<Sum*>(n.shift), n.shift ? size : 0};
  return f;
}

// Tells them the launch's edges.
template <typename Sum, int most>
void at_edges(FinishedSums<Sum, most>& f, const Normalization* norms, int first, int edges) {
  f.first = first;
  for (int e = 0; norms && e < edges; ++e) {
    const int64_t channels = norms->running_mean[first + e] ? norms->channels : 0;
    f.running_mean[e] = {static_cast<Sum*>(norms->running_mean[first + e]), channels};
    f.running_var[e] = {static_cast<Sum*>(norms->running_var[first + e]), channels};
    f.tracked[e] = {norms->tracked[first + e], norms->tracked[first + e] ? 1 : 0};
  }
}

}  // namespace rdarts
