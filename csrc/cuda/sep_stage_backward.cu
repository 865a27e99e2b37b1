// The backward of half a separable convolution (stage.h). Two kernels: dd, the gradient of the
// depthwise result, which goes through memory; then dv from it and, in other blocks, the gradients of
// the weights, with the depthwise result computed again. Sums are added as in sep_stage.cu, those of
// the weights' gradients by the last block of the few channels that they belong to.
#include "launchers.h"
#include "stage_weights.h"

namespace rdarts {
namespace {

constexpr int64_t kMostWeightParts = 64;

// What gradient_of_d_kernel takes.
template <typename T, typename Size>
struct GradientOfD {
  Tiling<Size> tiling;  // of an image of d
  GradientViews<T, kTogether> gradient;
  Span<const SumOf<T>> pointwise[kTogether];
  Span<SumOf<T>> dd;  // [edges, N, H', W', C]
  int64_t samples;
  bool whole;
};

// dd = pointwise^T dz. One block per tile of a sample, block of channels of d, and edge.
template <typename T, bool tensor, typename Size>
__global__ void __launch_bounds__(kStageThreads, kBlocksAtOnce<T>)
gradient_of_d_kernel(const __grid_constant__ GradientOfD<T, Size> a) {
  using Sum = SumOf<T>;
  const Tiling<Size>& t = a.tiling;
  const int e = static_cast<int>(blockIdx.z);
  const Region region(t, blockIdx.x, blockIdx.y);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> dz = memory.take(t.slots() * (t.depth + kPad));
  const SharedSpan<Sum> weights = memory.take(t.depth * (t.channels + kLinePad));
  Cell<Sum, Size> cell(t);
  for (int64_t o = 0; o < a.gradient.channels; o += t.depth) {
    __syncthreads();  // the last channels have been read
    fill_gradient(a.gradient, e, t, region, o, t.depth, kPad, dz);
    over(t.depth * t.channels, [&](int i) {
      const int64_t from = o + i / t.channels, c = region.channel + i % t.channels;
      const bool live = from < a.gradient.channels && c < t.of;
      weights[i / t.channels * (t.channels + kLinePad) + i % t.channels] =
          live ? a.pointwise[e][from * t.of + c] : Sum(0);
    });
    __syncthreads();
    cell.template multiply<tensor>(dz, weights);
  }
  const int64_t live = min(t.of - region.channel, int64_t{t.channels});
  const int64_t image = a.samples * t.height * t.width * t.of;
  const Span<Sum> dd = {a.dd.data + e * image, image};
  store_results<Sum>(cell, t, region, dd, t.of, region.channel, live, a.whole);
}

// Each channel stands alone: a tile has as many as it goes over at a time.
template <typename T>
using SizeOfV = TileSize<16, sizeof(T) == 8 ? 8 : 16>;

template <typename T>
struct GradientOfV {
  StageViews<T> stage;
  Tiling<SizeOfV<T>> tiling;  // of an image of x
  Span<T> dv[kTogether];
  Span<const SumOf<T>> dd;  // [edges, N, H', W', C]
  int64_t samples;
  int out_height, out_width;
  uint32_t adds;  // bit e
  // Edges that share dv stand side by side in `order`; a group ends where the next begins.
  unsigned char order[kTogether], begin[kTogether + 1];
  int64_t first, edges;  // of the launch, of all
  int64_t parts;         // tiles of all samples
  Span<double> partial, sums;  // [2, G, C, parts] and [2, G, C], or null
  Table table;                 // null where no rows are to be filled
  int64_t row;                 // the first edge's
  Span<uint32_t> counters;
};

// Numbers of dd below so many of v.
template <int K>
RDARTS_METHOD int reach_back(int count, int stride, int dilation) {
  return (count - 1 + (K - 1) * dilation) / stride + stride;
}

// Shared memory that dv takes, in numbers.
template <int K>
struct BackMemory {
  int rows, columns, image, taps;

  template <typename Size>
  RDARTS_METHOD BackMemory(const Tiling<Size>& t, int stride, int dilation)
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
  const Tiling<SizeOfV<T>>& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const int c = static_cast<int>(threadIdx.x) % t.depth, lanes = kStageThreads / t.depth;
  const int half = s.stride - 1;  // a division by the stride is a shift, below zero too
  if (channel + c >= s.channels) return;
  const MapLine<Sum> line(s.scale, s.shift, e * s.channels + channel + c, true);
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
    const Sum y = relu(line.of(x));
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
__device__ void sum_back(const GradientOfV<T>& a, int e, int64_t channel, unsigned part, Sum sum,
                         Sum product, Shared<Sum, 2 * kStageThreads>& shared) {
  const StageViews<T>& s = a.stage;
  constexpr int depth = SizeOfV<T>::depth;
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = sum, shared[kStageThreads + thread] = product;
  __syncthreads();
  const int c = thread % depth;
  if (thread >= 2 * depth || channel + c >= s.channels) return;
  double total = 0;
  for (int i = c; i < kStageThreads; i += depth) {
    total += shared[thread / depth * kStageThreads + i];
  }
  const int64_t parts = a.parts, row = (a.first + e) * s.channels + channel + c;
  const int64_t plane = a.edges * s.channels * parts;
  a.partial[thread / depth * plane + row * parts + part] = total;
}

// Adds what sum_back has left of edge e, a warp a channel, and fills the edge's row of the table.
template <typename T>
__device__ void finish_back(const GradientOfV<T>& a, int e) {
  const int64_t channels = a.stage.channels, plane = a.edges * channels;
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  for (int64_t c = threadIdx.x / warpSize; c < channels; c += kWarps) {
    const int64_t i = (a.first + e) * channels + c;
    double sum = 0, product = 0;
    for (int64_t part = lane; part < a.parts; part += warpSize) {
      sum += a.partial[i * a.parts + part];
      product += a.partial[(plane + i) * a.parts + part];
    }
    for (int step = warpSize / 2; step > 0; step /= 2) {
      sum += __shfl_down_sync(~0u, sum, step);
      product += __shfl_down_sync(~0u, product, step);
    }
    if (lane > 0) continue;
    a.sums[i] = sum, a.sums[plane + i] = product;
    const int64_t to = a.row * channels + i;
    if (a.table.by_g) fill_row<SumOf<T>>(a.table, to, true, 1.0, sum, product);
  }
}

// dv of a block's tile.
template <typename T, int K>
__device__ __forceinline__ void make_tile(const GradientOfV<T>& a, const BlockAt& block) {
  using Sum = SumOf<T>;
  __shared__ Shared<Sum, 2 * kStageThreads> shared;
  const Tiling<SizeOfV<T>>& t = a.tiling;
  const StageViews<T>& s = a.stage;
  const Region region(t, block.x, 0);
  const int64_t channel = static_cast<int64_t>(block.y) * t.depth;
  const BackMemory<K> sizes(t, s.stride, s.dilation);
  SharedParts<Sum> memory;
  const SharedSpan<Sum> image = memory.take(sizes.image), taps = memory.take(sizes.taps);
  const int back = s.pad - (K - 1) * s.dilation, half = s.stride - 1;
  const int top = (region.first_row + back) >> half, left = (region.first_column + back) >> half;
  for (int i = a.begin[block.z]; i < a.begin[block.z + 1]; ++i) {
    const int e = a.order[i];
    __syncthreads();  // what the last edge left has been read
    fill_taps<K>(s.depthwise[e], s.channels, channel, t.depth, taps);
    const auto no_line = [](int) { return 0; };
    over_pixels(sizes.rows, sizes.columns, t.depth, true, no_line,
                [&](int row, int column, int c, int) {
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
    if (a.sums.data) sum_back(a, e, channel, block.x, sum, product, shared);
  }
}

// One block per tile of a sample, few channels, and group of edges that share dv.
template <typename T, int K>
__device__ __forceinline__ void gradient_of_v(const GradientOfV<T>& a, const BlockAt& block) {
  if (a.parts > 0) make_tile<T, K>(a, block);
  if (!a.sums.data || !comes_last(a.counters, block.z, block.across * block.down)) return;
  for (int i = a.begin[block.z]; i < a.begin[block.z + 1]; ++i) finish_back(a, a.order[i]);
}

template <typename T, typename Size>
struct GradientsBelow {
  GradientOfV<T> v;
  GradientOfWeights<T, Size> weights;
  Jobs<2> jobs;
};

// 49 gradients of taps do not fit 128 registers beside the rest.
template <typename T, int K>
constexpr int kBlocksBelow = K == 7 ? 1 : kBlocksAtOnce<T>;

// What is made of dd.
template <typename T, int K, bool tensor, typename Size>
__global__ void __launch_bounds__(kStageThreads, kBlocksBelow<T, K>)
gradients_below_kernel(const __grid_constant__ GradientsBelow<T, Size> a) {
  BlockAt block;
  if (a.jobs.find(block) == 0) gradient_of_v<T, K>(a.v, block);
  else gradient_of_weights<T, K, tensor>(a.weights, block);
}

// ---- On the host.

// The parts of a backward's workspace, in numbers of the sums' type, and its tilings.
template <typename T, int K, typename Size>
struct BackwardPlan {
  using Sum = SumOf<T>;
  Tiling<Size> of_d, of_weights;
  Tiling<SizeOfV<T>> of_v;
  int64_t sum_parts, items, each, weight_parts;
  int64_t sums, dd, weights, own;  // doubles, and numbers; gradients of an edge's weights

  BackwardPlan(const Stage& s, const int64_t* out_shape, const Tuned& row) {
    const int64_t* const shape = s.x[0].shape;
    const int64_t channels = shape[1], out = out_shape[1];
    const int64_t height = out_shape[2], width = out_shape[3];
    of_d = tiling_of<Sum, Size>(row, shared_of_d), of_d.of = channels;
    const Tuned back = tuned_for(SizeOfV<T>::channels, shape[2], shape[3], kDTypeOf<T>);
    of_v = tiling_of<Sum, SizeOfV<T>>(back, [&](const Tiling<SizeOfV<T>>& t) {
      const BackMemory<K> sizes(t, s.stride, s.dilation);
      return sizes.image + sizes.taps;
    });
    of_weights = tiling_of<Sum, Size>(row, [&](const Tiling<Size>& t) {
      return WeightMemory<K>(t, s.stride, s.dilation).total();
    });
    sum_parts = shape[0] * of_v.tiles();
    items = shape[0] * of_weights.tiles();
    const int64_t counters =
        kTogether + weight_blocks(channels) * std::min(s.edges, kTogether);
    each = most_a_part(items, kMostWeightParts, counters);
    weight_parts = each ? parts_of(items, each) : 0;
    sums = 2 * s.edges * channels * sum_parts;
    dd = s.edges * shape[0] * height * width * channels;
    own = channels * K * K + out * channels;
    weights = s.edges * weight_parts * own;
  }
  // Blocks of a part of an edge.
  int64_t weight_blocks(int64_t channels) const {
    return parts_of(channels, Size::depth) * parts_of(of_weights.of, Size::channels);
  }
  static int shared_of_d(const Tiling<Size>& t) {
    return t.slots() * (t.depth + kPad) + t.depth * (t.channels + kLinePad);
  }
  // Doubles; the sums' type may be one.
  int64_t total() const { return sums + dd + weights + 2; }
};

template <typename T, int K, bool tensor, typename Size>
class Backward {
 public:
  using Sum = SumOf<T>;

  Backward(const StageBackward& a, const Tuned& row, const Place& place)
      : a_(a), s_(a.stage), place_(place), plan_(s_, a.g[0].shape, row) {
    const int64_t even = (plan_.sums + 1) / 2 * 2;  // dd is read and written in vectors
    dd_ = reinterpret_cast<Sum*>(a.workspace + even);
    weights_ = {dd_ + (plan_.dd + 1) / 2 * 2, plan_.weights};
  }

  void run() const {
    const bool wants_v = a_.sums || std::any_of(a_.dv, a_.dv + s_.edges,
                                                [](const Array& dv) { return dv.data != nullptr; });
    for (int first = 0; first < s_.edges; first += kTogether) {
      gradient_of_d(first);
      GradientsBelow<T, Size> views = {};
      const Grid of_v = wants_v ? gradient_of_v(first, views.v) : kNoGrid;
      const Grid of_weights = a_.ddepthwise ? gradient_of_weights(first, views.weights) : kNoGrid;
      const Grid grid = join(views.jobs, {of_v, of_weights});
      launch("sep_stage_backward", gradients_below_kernel<T, K, tensor, Size>, grid, place_, views);
    }
  }

 private:
  Span<Sum> dd_of(int first) const {
    const int64_t one = plan_.dd / s_.edges;
    return {dd_ + first * one, edges_of(s_, first) * one};
  }
  Span<const Sum> read_dd(int first) const {
    const Span<Sum> dd = dd_of(first);
    return {dd.data, dd.size};
  }

  void gradient_of_d(int first) const {
    GradientOfD<T, Size> views = {};
    const Tiling<Size>& t = views.tiling = plan_.of_d;
    const int64_t samples = a_.g[0].shape[0], out = a_.g[0].shape[1];
    const int edges = edges_of(s_, first);
    views.gradient = gradient_views<T, kTogether>(a_, first, edges);
    for (int e = 0; e < edges; ++e) {
      views.pointwise[e] = coefficients<Sum>(s_.pointwise[first + e], out * t.of);
    }
    views.dd = dd_of(first), views.samples = samples;
    views.whole = whole_rows(views.dd.data, t.of);
    const Grid grid = grid_of<Sum>(samples * t.tiles(), parts_of(t.of, t.channels), edges,
                                   plan_.shared_of_d(t));
    launch("sep_stage_backward", gradient_of_d_kernel<T, tensor, Size>, grid, place_, views);
  }

  Grid gradient_of_v(int first, GradientOfV<T>& views) const {
    const Tiling<SizeOfV<T>>& t = views.tiling = plan_.of_v;
    const int64_t channels = s_.x[0].shape[1];
    views.stage = views_of<T>(s_, first);
    views.dd = read_dd(first), views.samples = a_.g[0].shape[0];
    views.out_height = static_cast<int>(a_.g[0].shape[2]);
    views.out_width = static_cast<int>(a_.g[0].shape[3]);
    views.first = first, views.edges = s_.edges, views.parts = plan_.sum_parts;
    if (a_.sums) sum_to(views);
    const int groups = group(first, views);
    const BackMemory<K> sizes(t, s_.stride, s_.dilation);
    return grid_of<Sum>(blocks_for(plan_.sum_parts), parts_of(channels, t.depth), groups,
                        sizes.image + sizes.taps);
  }

  void sum_to(GradientOfV<T>& views) const {
    const int64_t size = 2 * s_.edges * s_.x[0].shape[1];
    views.sums = {a_.sums, size}, views.partial = {a_.workspace, size * plan_.sum_parts};
    views.counters = counters_of(place_);
    if (a_.rows) views.table = a_.rows->table, views.row = a_.rows->first;
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

  Grid gradient_of_weights(int first, GradientOfWeights<T, Size>& views) const {
    const Tiling<Size>& t = views.tiling = plan_.of_weights;
    const int64_t channels = s_.x[0].shape[1];
    const int edges = edges_of(s_, first);
    views.stage = views_of<T>(s_, first);
    views.gradient = gradient_views<T, kTogether>(a_, first, edges);
    views.dd = read_dd(first), views.items = plan_.items, views.each = plan_.each;
    const int64_t part = plan_.weight_parts * plan_.own;
    const Span<uint32_t> counters = counters_of(place_);  // the first are those of dv
    views.parts = plan_.weight_parts;
    views.counters = {counters.data + kTogether, counters.size - kTogether};
    views.partial = {weights_.data + first * part, edges * part};
    for (int e = 0; e < edges; ++e) {
      views.depthwise[e] = {static_cast<Sum*>(a_.ddepthwise[first + e]), channels * K * K};
      views.pointwise[e] = {static_cast<Sum*>(a_.dpointwise[first + e]), t.of * channels};
    }
    return grid_of<Sum>(blocks_for(views.parts), plan_.weight_blocks(channels), edges,
                        WeightMemory<K>(t, s_.stride, s_.dilation).total());
  }

  const StageBackward& a_;
  const Stage& s_;
  const Place& place_;
  const BackwardPlan<T, K, Size> plan_;
  Sum* dd_;
  Span<Sum> weights_;
};

}  // namespace

namespace cuda {

// As if every sum were a double's.
int64_t stage_backward_workspace(const Stage& s, const int64_t* out_shape) {
  int64_t doubles = 0;
  on_kernel(s.kernel, [&](auto kernel) {
    doubles = most_of_dtypes([&](auto number) {
      using T = decltype(number);
      const Tuned row = tuned_for<T>(out_shape);
      int64_t found = 0;
      on_size<T>(row, [&](auto size) {
        found = BackwardPlan<T, decltype(kernel)::value, decltype(size)>(s, out_shape, row).total();
      });
      return found;
    });
  });
  return doubles;
}

void sep_stage_backward(const StageBackward& a, const Place& place) {
  on_dtype(a.g[0].dtype, [&](auto number) {
    on_kernel(a.stage.kernel, [&](auto kernel) {
      using T = decltype(number);
      constexpr int K = decltype(kernel)::value;
      const Tuned row = tuned_for<T>(a.g[0].shape);
      on_size<T>(row, [&](auto size) {
        on_products<T>(row, place, [&](auto tensor) {
          Backward<T, K, decltype(tensor)::value, decltype(size)>(a, row, place).run();
        });
      });
    });
  });
}

}  // namespace cuda
}  // namespace rdarts
