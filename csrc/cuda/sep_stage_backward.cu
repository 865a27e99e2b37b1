// The backward of half a separable convolution (stage.h). Three kernels: dd, the gradient of the
// depthwise result, which goes through memory; dv from it; the gradients of the weights from both,
// with the depthwise result computed again. Sums are added as in sep_stage.cu.
#include "launchers.h"
#include "stage_views.h"
#include "sums.h"

namespace rdarts {
namespace {

constexpr int64_t kMostWeightParts = 64;

// What gradient_of_d_kernel takes.
template <typename T>
struct GradientOfD {
  Tiling tiling;  // of an image of d
  GradientViews<T, kTogether> gradient;
  Span<const SumOf<T>> pointwise[kTogether];
  Span<SumOf<T>> dd;  // [edges, N, H', W', C]
  int64_t samples;
  bool whole;
};

// dd = pointwise^T dz. One block per tile of a sample, block of channels of d, and edge.
template <typename T>
__global__ void __launch_bounds__(kStageThreads, 1)
gradient_of_d_kernel(const __grid_constant__ GradientOfD<T> a) {
  using Sum = SumOf<T>;
  const Tiling& t = a.tiling;
  const int e = static_cast<int>(blockIdx.z);
  const Region region(t, blockIdx.x, blockIdx.y);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> dz = memory.take(t.slots() * (t.depth + kPad));
  const SharedSpan<Sum> weights = memory.take(t.depth * t.channels);
  Cell<Sum> cell(t);
  for (int64_t o = 0; o < a.gradient.channels; o += t.depth) {
    __syncthreads();  // the last channels have been read
    fill_gradient(a.gradient, e, t, region, o, t.depth, dz);
    over(t.depth * t.channels, [&](int i) {
      const int64_t from = o + i / t.channels, c = region.channel + i % t.channels;
      const bool live = from < a.gradient.channels && c < t.of;
      weights[i] = live ? a.pointwise[e][from * t.of + c] : Sum(0);
    });
    __syncthreads();
    cell.multiply(dz, weights, t);
  }
  const int64_t live = min(t.of - region.channel, int64_t{t.channels});
  const int64_t image = a.samples * t.height * t.width * t.of;
  const Span<Sum> dd = {a.dd.data + e * image, image};
  store_results(cell, t, region, dd, t.of, region.channel, live, a.whole);
}

template <typename T>
struct GradientOfV {
  StageViews<T> stage;
  Tiling tiling;  // of an image of x
  Span<T> dv[kTogether];
  Span<const SumOf<T>> dd;  // [edges, N, H', W', C]
  int64_t samples;
  int out_height, out_width;
  uint32_t adds;  // bit e
  // Edges that share dv stand side by side in `order`; a group ends where the next begins.
  unsigned char order[kTogether], begin[kTogether + 1];
  int64_t first, edges;  // of the launch, of all
  Span<double> partial;  // [2, G, C, parts] or null
};

// Numbers of dd below so many of v.
template <int K>
RDARTS_METHOD int reach_back(int count, int stride, int dilation) {
  return (count - 1 + (K - 1) * dilation) / stride + stride;
}

// Shared memory of gradient_of_v_kernel, in numbers.
template <int K>
struct BackMemory {
  int rows, columns, image, taps;

  RDARTS_METHOD BackMemory(const Tiling& t, int stride, int dilation)
      : rows(reach_back<K>(t.rows, stride, dilation)),
        columns(reach_back<K>(t.columns, stride, dilation)),
        image(rows * columns * t.depth), taps(K * K * t.depth) {}
};

// dv_e of a thread's channel on a tile from dd's image there, and the thread's sums of it.
template <typename T, int K, typename Sum = SumOf<T>>
__device__ __forceinline__ void back_through_depthwise(const GradientOfV<T>& a, int e,
                                                       const Region& region, int64_t channel,
                                                       int top, int left,
                                                       const BackMemory<K>& sizes,
                                                       const SharedSpan<Sum>& image,
                                                       const SharedSpan<Sum>& taps, Sum& sum,
                                                       Sum& product) {
  const Tiling& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const int c = static_cast<int>(threadIdx.x) % t.depth, lanes = kStageThreads / t.depth;
  const int half = s.stride - 1;  // a division by the stride is a shift, below zero too
  if (channel + c >= s.channels) return;
  for (int slot = static_cast<int>(threadIdx.x) / t.depth; slot < t.slots(); slot += lanes) {
    const int row = slot / t.columns, column = slot % t.columns;
    if (!region.holds(row, column)) continue;
    const int h = region.first_row + row, w = region.first_column + column;
    Sum value = 0;
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const int down = h + s.pad - tap / K * s.dilation, right = w + s.pad - tap % K * s.dilation;
      if (((down | right) & half) != 0) continue;
      const int at = ((down >> half) - top) * sizes.columns + (right >> half) - left;
      value += Sum(taps[tap * t.depth + c]) * Sum(image[at * t.depth + c]);
    }
    const Sum x = value_at(s.x[e], region.sample, h, w, channel + c);
    const Sum y = relu(scaled(x, s.scale, s.shift, e * s.channels + channel + c));
    if (y <= Sum(0)) value = 0;
    sum += value, product += value * y;
    if (!a.dv[e].data) continue;
    const int64_t pixel = (region.sample * t.height + h) * t.width + w;
    const int64_t to = pixel * s.channels + channel + c;
    const Sum old = a.adds >> e & 1 ? static_cast<Sum>(T(a.dv[e][to])) : Sum(0);
    a.dv[e][to] = static_cast<T>(old + value);
  }
}

// Adds the threads' sums of each channel and leaves them in `partial`.
template <typename T, typename Sum = SumOf<T>>
__device__ void sum_back(const GradientOfV<T>& a, int e, int64_t channel, Sum sum, Sum product,
                         Shared<Sum, 2 * kStageThreads>& shared) {
  const StageViews<T>& s = a.stage;
  const int thread = static_cast<int>(threadIdx.x), depth = a.tiling.depth;
  shared[thread] = sum, shared[kStageThreads + thread] = product;
  __syncthreads();
  const int c = thread % depth;
  if (thread >= 2 * depth || channel + c >= s.channels) return;
  double total = 0;
  for (int i = c; i < kStageThreads; i += depth) {
    total += shared[thread / depth * kStageThreads + i];
  }
  const int64_t parts = gridDim.x, row = (a.first + e) * s.channels + channel + c;
  const int64_t plane = a.edges * s.channels * parts;
  a.partial[thread / depth * plane + row * parts + blockIdx.x] = total;
}

// One block per tile of a sample, few channels, and group of edges that share dv.
template <typename T, int K>
__global__ void __launch_bounds__(kStageThreads, 1)
gradient_of_v_kernel(const __grid_constant__ GradientOfV<T> a) {
  using Sum = SumOf<T>;
  __shared__ Shared<Sum, 2 * kStageThreads> shared;
  const Tiling& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const Region region(t, blockIdx.x, 0);
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * t.depth;
  const BackMemory<K> sizes(t, s.stride, s.dilation);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> image = memory.take(sizes.image), taps = memory.take(sizes.taps);
  const int back = s.pad - (K - 1) * s.dilation, half = s.stride - 1;
  const int top = (region.first_row + back) >> half, left = (region.first_column + back) >> half;
  for (int i = a.begin[blockIdx.z]; i < a.begin[blockIdx.z + 1]; ++i) {
    const int e = a.order[i];
    __syncthreads();  // what the last edge left has been read
    fill_taps<K>(s.depthwise[e], s.channels, channel, t.depth, taps);
    over_pixels(sizes.rows, sizes.columns, t.depth, true, [&](int row, int column, int c) {
      const int h = top + row, w = left + column;
      const int64_t pixel = ((e * a.samples + region.sample) * a.out_height + h) * a.out_width + w;
      const bool live = h >= 0 && h < a.out_height && w >= 0 && w < a.out_width &&
                        channel + c < s.channels;
      image[(row * sizes.columns + column) * t.depth + c] =
          live ? a.dd[pixel * s.channels + channel + c] : Sum(0);
    });
    __syncthreads();
    Sum sum = 0, product = 0;
    back_through_depthwise<T, K>(a, e, region, channel, top, left, sizes, image, taps, sum,
                                 product);
    if (a.partial.data) sum_back(a, e, channel, sum, product, shared);
  }
}

template <typename T>
struct GradientOfWeights {
  StageViews<T> stage;
  Tiling tiling;  // of an image of z
  GradientViews<T, kTogether> gradient;
  Span<const SumOf<T>> dd;  // [edges, N, H', W', C]
  int64_t items, each;      // tiles of all samples, of a part
  int64_t first;            // of the launch's edges
  Span<SumOf<T>> partial;   // [G, parts, C * K * K + O * C]
};

// Shared memory of gradient_of_weights_kernel, in numbers.
template <int K>
struct WeightMemory {
  int columns, image, taps, d, dz;

  RDARTS_METHOD WeightMemory(const Tiling& t, int stride, int dilation)
      : columns(reach<K>(t.columns, stride, dilation)),
        image(reach<K>(t.rows, stride, dilation) * columns * t.depth), taps(K * K * t.depth),
        d(t.slots() * (t.depth + kPad)), dz(t.slots() * (t.channels + kPad)) {}
  RDARTS_METHOD int total() const {
    const int all = image + taps + d + dz;
    return all < kResults ? kResults : all;
  }
};

// d[slots, depth] as `convolve` makes it; dtaps += what the thread's channel gets of dd there.
template <int K, typename T, typename Sum = SumOf<T>>
__device__ __forceinline__ void convolve_and_collect(
    const GradientOfWeights<T>& a, int e, const Region& region, int64_t channel,
    const WeightMemory<K>& sizes, const SharedSpan<Sum>& y, const SharedSpan<Sum>& taps,
    const SharedSpan<Sum>& d, Sum (&dtaps)[K * K]) {
  const Tiling& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const int c = static_cast<int>(threadIdx.x) % t.depth, lanes = kStageThreads / t.depth;
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
    d[slot * (t.depth + kPad) + c] = sum;
  }
}

// Adds the threads' gradients of the taps and leaves them in `partial` from `to` on.
template <int K, typename Sum>
__device__ __forceinline__ void store_taps(const Sum (&dtaps)[K * K], const Tiling& t,
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

// One block per part of the tiles, few channels of d and a block of channels of z, and edge.
template <typename T, int K>
__global__ void __launch_bounds__(kStageThreads, 1)
gradient_of_weights_kernel(const __grid_constant__ GradientOfWeights<T> a) {
  using Sum = SumOf<T>;
  const Tiling& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const int e = static_cast<int>(blockIdx.z);
  const int64_t slices = (s.channels + t.depth - 1) / t.depth;
  const int64_t channel = blockIdx.y % slices * t.depth, block = blockIdx.y / slices;
  const WeightMemory<K> sizes(t, s.stride, s.dilation);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> y = memory.take(sizes.image), taps = memory.take(sizes.taps);
  const SharedSpan<Sum> d = memory.take(sizes.d), dz = memory.take(sizes.dz);
  fill_taps<K>(s.depthwise[e], s.channels, channel, t.depth, taps);
  OuterCell<Sum> cell(t);
  Sum dtaps[K * K] = {};
  const int64_t end = min((blockIdx.x + int64_t{1}) * a.each, a.items);
  for (int64_t item = blockIdx.x * a.each; item < end; ++item) {
    const Region region(t, item, block);
    __syncthreads();  // the last tile has been read
    fill_image(s, e, region.sample, channel, region.first_row * s.stride - s.pad,
               region.first_column * s.stride - s.pad,
               reach<K>(region.rows, s.stride, s.dilation), sizes.columns, t.depth, y);
    fill_gradient(a.gradient, e, t, region, region.channel, t.channels, dz);
    __syncthreads();
    convolve_and_collect<K>(a, e, region, channel, sizes, y, taps, d, dtaps);
    __syncthreads();
    cell.add(dz, d, t);
  }
  const int64_t own = s.channels * K * K + t.of * s.channels;
  const int64_t to = ((a.first + e) * gridDim.x + blockIdx.x) * own;
  cell.finish(t, [&](int i, int j, Sum sum) {
    const int64_t o = block * t.channels + i, c = channel + j;
    if (o < t.of && c < s.channels) a.partial[to + s.channels * K * K + o * s.channels + c] = sum;
  });
  if (block == 0) store_taps<K>(dtaps, t, s.channels, channel, a.partial, to);
}

template <typename Sum>
struct WeightResults {
  Span<Sum> depthwise[kTogether], pointwise[kTogether];
  int64_t first, parts;
  Span<const Sum> partial;  // [G, parts, depthwise, pointwise]
};

// Adds the parts' gradients; one thread per number of an edge.
template <typename Sum>
__global__ void __launch_bounds__(kStageThreads, 1)
combine_weights_kernel(const __grid_constant__ WeightResults<Sum> a) {
  const int e = static_cast<int>(blockIdx.y);
  const int64_t taps = a.depthwise[e].size, own = taps + a.pointwise[e].size;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kStageThreads + threadIdx.x;
  if (i >= own) return;
  double sum = 0;
  for (int64_t part = 0; part < a.parts; ++part) {
    sum += a.partial[((a.first + e) * a.parts + part) * own + i];
  }
  if (i < taps) a.depthwise[e][i] = static_cast<Sum>(sum);
  else a.pointwise[e][i - taps] = static_cast<Sum>(sum);
}

// ---- On the host.

// The parts of a backward's workspace, in numbers of the sums' type, and its tilings.
template <typename Sum, int K>
struct BackwardPlan {
  Tiling of_d, of_v, of_weights;
  int64_t sum_parts, items, each, weight_parts;
  int64_t sums, dd, weights, own;  // doubles, and numbers; gradients of an edge's weights

  BackwardPlan(const Stage& s, const int64_t* out_shape) {
    const int64_t* const shape = s.x[0].shape;
    const int64_t channels = shape[1], out = out_shape[1];
    const int64_t height = out_shape[2], width = out_shape[3];
    of_d = tiling_of<Sum>(height, width, channels, out, shared_of_d);
    of_v = tiling_of<Sum>(shape[2], shape[3], 16, channels, [&](const Tiling& t) {
      const BackMemory<K> sizes(t, s.stride, s.dilation);
      return sizes.image + sizes.taps;
    });
    of_weights = tiling_of<Sum>(height, width, out, channels, [&](const Tiling& t) {
      return WeightMemory<K>(t, s.stride, s.dilation).total();
    });
    sum_parts = shape[0] * of_v.tiles();
    items = shape[0] * of_weights.tiles();
    each = parts_of(items, kMostWeightParts);
    weight_parts = each ? parts_of(items, each) : 0;
    sums = 2 * s.edges * channels * sum_parts;
    dd = s.edges * shape[0] * height * width * channels;
    own = channels * K * K + out * channels;
    weights = s.edges * weight_parts * own;
  }
  static int shared_of_d(const Tiling& t) {
    return t.slots() * (t.depth + kPad) + t.depth * t.channels;
  }
  // Doubles; the sums' type may be one.
  int64_t total() const { return sums + dd + weights + 2; }
};

template <typename T, int K>
class Backward {
 public:
  using Sum = SumOf<T>;

  Backward(const StageBackward& a, const Place& place)
      : a_(a), s_(a.stage), place_(place), plan_(s_, a.g[0].shape) {
    const int64_t even = (plan_.sums + 1) / 2 * 2;  // dd is read and written in vectors
    dd_ = reinterpret_cast<Sum*>(a.workspace + even);
    weights_ = {dd_ + (plan_.dd + 1) / 2 * 2, plan_.weights};
  }

  void run() const {
    const bool wants_v = a_.sums || std::any_of(a_.dv, a_.dv + s_.edges,
                                                [](const Array& dv) { return dv.data != nullptr; });
    for (int first = 0; first < s_.edges; first += kTogether) {
      gradient_of_d(first);
      if (wants_v) gradient_of_v(first);
      if (a_.ddepthwise) gradient_of_weights(first);
    }
    if (!a_.sums) return;
    const int64_t size = 2 * s_.edges * s_.x[0].shape[1];
    combine("sep_stage_backward", sums(), plan_.sum_parts, {a_.sums, size}, place_);
  }

 private:
  Span<double> sums() const {
    const int64_t size = 2 * s_.edges * s_.x[0].shape[1];
    return partial_of(a_.sums, a_.workspace, size, plan_.sum_parts);
  }
  Span<Sum> dd_of(int first) const {
    const int64_t one = plan_.dd / s_.edges;
    return {dd_ + first * one, edges_of(s_, first) * one};
  }
  Span<const Sum> read_dd(int first) const {
    const Span<Sum> dd = dd_of(first);
    return {dd.data, dd.size};
  }

  void gradient_of_d(int first) const {
    GradientOfD<T> views = {};
    const Tiling& t = views.tiling = plan_.of_d;
    const int64_t samples = a_.g[0].shape[0], out = a_.g[0].shape[1];
    const int edges = edges_of(s_, first);
    views.gradient = gradient_views<T, kTogether>(a_, first, edges);
    for (int e = 0; e < edges; ++e) {
      views.pointwise[e] = coefficients<Sum>(s_.pointwise[first + e], out * t.of);
    }
    views.dd = dd_of(first), views.samples = samples;
    views.whole = whole_rows(views.dd.data, t.of);
    const Grid grid = grid_of<Sum>(t, samples * t.tiles(), parts_of(t.of, t.channels), edges,
                                   plan_.shared_of_d(t));
    launch("sep_stage_backward", gradient_of_d_kernel<T>, grid, place_, views);
  }

  void gradient_of_v(int first) const {
    GradientOfV<T> views = {};
    const Tiling& t = views.tiling = plan_.of_v;
    const int64_t channels = s_.x[0].shape[1];
    views.stage = views_of<T>(s_, first);
    views.dd = read_dd(first), views.samples = a_.g[0].shape[0];
    views.out_height = static_cast<int>(a_.g[0].shape[2]);
    views.out_width = static_cast<int>(a_.g[0].shape[3]);
    views.first = first, views.edges = s_.edges;
    if (a_.sums) views.partial = sums();
    const int groups = group(first, views);
    const BackMemory<K> sizes(t, s_.stride, s_.dilation);
    const Grid grid = grid_of<Sum>(t, plan_.sum_parts, parts_of(channels, t.depth), groups,
                                   sizes.image + sizes.taps);
    launch("sep_stage_backward", gradient_of_v_kernel<T, K>, grid, place_, views);
  }

  // Sets dv and brings the edges that share one together, in their order; returns the groups.
  int group(int first, GradientOfV<T>& views) const {
    const int edges = edges_of(s_, first);
    int groups = 0, placed = 0;
    for (int e = 0; e < edges; ++e) {
      const Array& dv = a_.dv[first + e];
      views.dv[e] = {static_cast<T*>(dv.data), dv.data ? elements_of(dv) : 0};
      views.adds |= static_cast<uint32_t>(a_.adds[first + e]) << e;
    }
    const auto leads = [&](int e) {  // no edge before it has its dv
      for (int i = 0; i < e; ++i) {
        if (views.dv[i].data && views.dv[i].data == views.dv[e].data) return false;
      }
      return views.dv[e].data != nullptr || a_.sums != nullptr;
    };
    for (int e = 0; e < edges; ++e) {
      if (!leads(e)) continue;
      views.begin[groups++] = static_cast<unsigned char>(placed);
      for (int i = e; i < edges; ++i) {
        const bool shares = i == e || (views.dv[e].data && views.dv[i].data == views.dv[e].data);
        if (shares) views.order[placed++] = static_cast<unsigned char>(i);
      }
    }
    views.begin[groups] = static_cast<unsigned char>(placed);
    return groups;
  }

  void gradient_of_weights(int first) const {
    GradientOfWeights<T> views = {};
    const Tiling& t = views.tiling = plan_.of_weights;
    const int64_t channels = s_.x[0].shape[1];
    const int edges = edges_of(s_, first);
    views.stage = views_of<T>(s_, first);
    views.gradient = gradient_views<T, kTogether>(a_, first, edges);
    views.dd = read_dd(first), views.items = plan_.items, views.each = plan_.each;
    views.first = first, views.partial = weights_;
    const int64_t blocks = parts_of(channels, t.depth) * parts_of(t.of, t.channels);
    const Grid grid = grid_of<Sum>(t, plan_.weight_parts, blocks, edges,
                                   WeightMemory<K>(t, s_.stride, s_.dilation).total());
    launch("sep_stage_backward", gradient_of_weights_kernel<T, K>, grid, place_, views);
    WeightResults<Sum> results = {};
    for (int e = 0; e < edges; ++e) {
      results.depthwise[e] = {static_cast<Sum*>(a_.ddepthwise[first + e]), channels * K * K};
      results.pointwise[e] = {static_cast<Sum*>(a_.dpointwise[first + e]), t.of * channels};
    }
    results.first = first, results.parts = plan_.weight_parts;
    results.partial = {weights_.data, weights_.size};
    Grid combined = grid_of(plan_.own, kStageThreads);
    combined.blocks.y = static_cast<unsigned>(edges);
    launch("sep_stage_backward", combine_weights_kernel<Sum>, combined, place_, results);
  }

  const StageBackward& a_;
  const Stage& s_;
  const Place& place_;
  const BackwardPlan<Sum, K> plan_;
  Sum* dd_;
  Span<Sum> weights_;
};

}  // namespace

namespace cuda {

// As if every sum were a double's. Tiles are the same for all types.
int64_t stage_workspace(const Stage& s, const int64_t* out_shape, bool backward) {
  int64_t size = 0;
  on_kernel(s.kernel, [&](auto kernel) {
    constexpr int K = decltype(kernel)::value;
    if (backward) {
      size = BackwardPlan<double, K>(s, out_shape).total();
    } else {
      const Tiling t = tiling_of<double>(out_shape[2], out_shape[3], out_shape[1], 1,
                                         [](const Tiling&) { return 0; });
      size = 3 * s.edges * out_shape[1] * out_shape[0] * t.tiles();
    }
  });
  return size;
}

void sep_stage_backward(const StageBackward& a, const Place& place) {
  on_dtype(a.g[0].dtype, [&](auto number) {
    on_kernel(a.stage.kernel, [&](auto kernel) {
      Backward<decltype(number), decltype(kernel)::value>(a, place).run();
    });
  });
}

}  // namespace cuda
}  // namespace rdarts
