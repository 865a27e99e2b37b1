// The gradients of a stage's weights: a block's part of them, with the depthwise result computed
// again, and what the last block makes of all parts.
#pragma once

#include "jobs.h"
#include "stage_views.h"

namespace rdarts {

template <typename T, typename Size>
struct GradientOfWeights {
  StageViews<T> stage;
  Tiling<Size> tiling;  // of an image of z
  GradientViews<T, kTogether> gradient;
  Span<const SumOf<T>> dd;  // [edges, N, H', W', C]
  int64_t items, each;      // tiles of all samples, of a part
  int64_t parts;
  Span<SumOf<T>> partial;  // [edges, parts, C * K * K + O * C]
  Span<SumOf<T>> depthwise[kTogether], pointwise[kTogether];
  Span<uint32_t> counters;
};

// Shared memory that they take, in numbers.
template <int K>
struct WeightMemory {
  int columns, image, taps, d, dz;

  template <typename Size>
  RDARTS_METHOD WeightMemory(const Tiling<Size>& t, int stride, int dilation)
      : columns(reach<K>(t.columns, stride, dilation)),
        image(reach<K>(t.rows, stride, dilation) * columns * t.depth), taps(K * K * t.depth),
        d(t.slots() * (t.depth + kLinePad)), dz(t.slots() * (t.channels + kLinePad)) {}
  RDARTS_METHOD int total() const {
    const int all = image + taps + d + dz;
    return all < kResults ? kResults : all;
  }
};

// d[slots, depth] as `convolve` makes it; dtaps += what the thread's channel gets of dd there.
template <int K, typename T, typename Size, typename Sum = SumOf<T>>
__device__ __forceinline__ void convolve_and_collect(
    const GradientOfWeights<T, Size>& a, int e, const Region& region, int64_t channel,
    const WeightMemory<K>& sizes, const SharedSpan<Sum>& y, const SharedSpan<Sum>& taps,
    const SharedSpan<Sum>& d, Sum (&dtaps)[K * K]) {
  constexpr int lanes = kStageThreads / Size::depth;
  const Tiling<Size>& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const int c = static_cast<int>(threadIdx.x) % t.depth;
  const int64_t samples = a.gradient.samples;
  for (int slot = static_cast<int>(threadIdx.x) / t.depth; slot < t.slots(); slot += lanes) {
    const int row = slot / t.columns, column = slot % t.columns;
    Sum sum = 0;
    if (region.holds(row, column) && channel + c < s.channels) {
      const int h = region.first_row + row, w = region.first_column + column;
      const int64_t pixel = ((e * samples + region.sample) * t.height + h) * t.width + w;
      const Sum gradient = a.dd[pixel * s.channels + channel + c];
      const int from = (row * sizes.columns + column) * s.stride * t.depth + c;
#pragma unroll
      for (int tap = 0; tap < K * K; ++tap) {
        const int at = (tap / K * sizes.columns + tap % K) * s.dilation * t.depth;
        const Sum value = y[from + at];
        sum += Sum(taps[tap * t.depth + c]) * value;
        dtaps[tap] += gradient * value;
      }
    }
    d[slot * (t.depth + kLinePad) + c] = sum;
  }
}

// Adds the threads' gradients of the taps and leaves them in `partial` from `to` on.
template <int K, typename Sum, typename Size>
__device__ __forceinline__ void store_taps(const Sum (&dtaps)[K * K], const Tiling<Size>& t,
                                           int64_t channels, int64_t channel,
                                           const Span<Sum>& partial, int64_t to) {
  constexpr int together = kCell * kCell;
  const SharedSpan<Sum> shared = dynamic_shared<Sum>(kResults);
#pragma unroll
  for (int first = 0; first < K * K; first += together) {
    __syncthreads();  // what lay there has been read
#pragma unroll
    for (int i = 0; i < together && first + i < K * K; ++i) {
      shared[i * kStageThreads + static_cast<int>(threadIdx.x)] = dtaps[first + i];
    }
    __syncthreads();
    const int count = K * K - first < together ? K * K - first : together;
    over(count * t.depth, [&](int number) {
      const int i = number / t.depth, c = number % t.depth;
      if (channel + c >= channels) return;
      Sum sum = 0;
      for (int k = c; k < kStageThreads; k += t.depth) sum += shared[i * kStageThreads + k];
      partial[to + (channel + c) * K * K + first + i] = sum;
    });
  }
}

// Adds the parts of the gradients of few channels of d and a block of channels of z.
template <int K, typename T, typename Size>
__device__ __forceinline__ void finish_weights(const GradientOfWeights<T, Size>& a, int e,
                                               int64_t channel, int64_t block) {
  const Tiling<Size>& t = a.tiling;
  const int64_t channels = a.stage.channels, taps = channels * K * K;
  const int64_t own = taps + t.of * channels, first = e * a.parts * own;
  const auto total = [&](int64_t i) {
    double sum = 0;
    for (int64_t part = 0; part < a.parts; ++part) sum += a.partial[first + part * own + i];
    return static_cast<SumOf<T>>(sum);
  };
  over(t.channels * t.depth, [&](int i) {
    const int64_t o = block * t.channels + i / t.depth, c = channel + i % t.depth;
    if (o >= t.of || c >= channels) return;
    a.pointwise[e][o * channels + c] = total(taps + o * channels + c);
  });
  if (block > 0) return;
  over(t.depth * K * K, [&](int i) {
    const int64_t tap = channel * K * K + i;
    if (tap < taps) a.depthwise[e][tap] = total(tap);
  });
}

// A part of the gradients of few channels of d and a block of channels of z.
template <typename T, int K, bool tensor, typename Size>
__device__ __forceinline__ void make_part(const GradientOfWeights<T, Size>& a, int e,
                                          int64_t channel, int64_t block, unsigned part) {
  using Sum = SumOf<T>;
  const Tiling<Size>& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const WeightMemory<K> sizes(t, s.stride, s.dilation);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> y = memory.take(sizes.image), taps = memory.take(sizes.taps);
  const SharedSpan<Sum> d = memory.take(sizes.d), dz = memory.take(sizes.dz);
  fill_taps<K>(s.depthwise[e], s.channels, channel, t.depth, taps);
  OuterCell<Sum, Size, tensor> cell;
  Sum dtaps[K * K] = {};
  const int64_t end = min((part + int64_t{1}) * a.each, a.items);
  for (int64_t item = part * a.each; item < end; ++item) {
    const Region region(t, item, block);
    __syncthreads();  // the last tile has been read
    fill_image(s, e, region.sample, channel, region.first_row * s.stride - s.pad,
               region.first_column * s.stride - s.pad,
               reach<K>(region.rows, s.stride, s.dilation), sizes.columns, t.depth, y);
    fill_gradient(a.gradient, e, t, region, region.channel, t.channels, kLinePad, dz);
    __syncthreads();
    convolve_and_collect<K>(a, e, region, channel, sizes, y, taps, d, dtaps);
    __syncthreads();
    cell.add(dz, d, t.slots());
  }
  const int64_t own = s.channels * K * K + t.of * s.channels;
  const int64_t to = (e * a.parts + part) * own;
  cell.finish([&](int i, int j, Sum sum) {
    const int64_t o = block * t.channels + i, c = channel + j;
    if (o < t.of && c < s.channels) a.partial[to + s.channels * K * K + o * s.channels + c] = sum;
  });
  if (block == 0) store_taps<K>(dtaps, t, s.channels, channel, a.partial, to);
}

// One block per part of the tiles, few channels of d and a block of channels of z, and edge.
template <typename T, int K, bool tensor, typename Size>
__device__ __forceinline__ void gradient_of_weights(const GradientOfWeights<T, Size>& a,
                                                    const BlockAt& at) {
  constexpr int depth = Size::depth;
  const int e = static_cast<int>(at.z);
  const int64_t slices = (a.stage.channels + depth - 1) / depth;
  const int64_t channel = at.y % slices * depth, block = at.y / slices;
  if (a.parts > 0) make_part<T, K, tensor>(a, e, channel, block, at.x);
  const int64_t counter = static_cast<int64_t>(at.z) * at.down + at.y;
  if (comes_last(a.counters, counter, at.across)) finish_weights<K>(a, e, channel, block);
}

}  // namespace rdarts
