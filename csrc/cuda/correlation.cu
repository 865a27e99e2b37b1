// The correlation of two images along their rows and its adjoints (correlation.h). A block makes a
// tile of one row of results, kColumns pixels x kResults displacements (channels in the adjoints),
// going over the channels (displacements) kDepth at a time. Both factors of these lie in shared
// memory; of the one that is moved, all pixels that the tile's displacements reach.
#include "launch.h"
#include "launchers.h"
#include "tile.h"

namespace rdarts {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 64;
constexpr int kGroups = kThreads / kColumns;  // of threads; a warp lies in one
constexpr int kOwn = 8;                       // results of a thread
constexpr int kResults = kGroups * kOwn;
constexpr int kDepth = 16;
constexpr int kPitch = kColumns + 1;  // odd: also where neighbouring threads go down the rows
constexpr int kMovedPitch = kColumns + kResults + 1;
static_assert(kDepth <= kResults && kMovedPitch % 2 == 1, "the adjoints' window is the shorter");

template <typename T>
using Fixed = Shared<T, kDepth * kPitch>;
template <typename T>
using Moved = Shared<T, kResults * kMovedPitch>;

// A row of a sample of every channel.
template <typename T>
struct Row {
  View<const T> view;
  int64_t offset, channels, pixels;

  __device__ T at(int64_t channel, int64_t pixel) const {
    if (channel >= channels || pixel < 0 || pixel >= pixels) return T(0);
    return view.memory[offset + channel * view.steps.channel + pixel * view.steps.pixel];
  }
};

// A block's place: its row, and the first pixel and result.
struct Corner {
  int64_t sample, row, pixel, result;

  __device__ Corner(int64_t height, int64_t across)
      : result(static_cast<int64_t>(blockIdx.y) * kResults) {
    int64_t index = blockIdx.x;
    pixel = index % across * kColumns;
    index /= across;
    row = index % height;
    sample = index / height;
  }
};

template <typename T>
__device__ Row<T> row_of(const View<const T>& view, const Corner& p, int64_t channels,
                         int64_t pixels) {
  return {view, p.sample * view.steps.sample + p.row * view.steps.row, channels, pixels};
}

// call(row, column) once for each of rows x columns; neighbouring threads take neighbouring
// elements of memory, which are those of a column where the channels lie innermost.
template <typename Call>
__device__ void share_out(int rows, int columns, bool inner, const Call& call) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kThreads) {
    if (inner) call(i % rows, i / rows);
    else call(i / columns, i % columns);
  }
}

template <typename T>
struct CorrelationViews {
  View<const T> left, right;
  View<T> out;
  bool left_inner, right_inner;  // whether the channels lie innermost
  int64_t height, width, across;
  int64_t channels, first, count;
};

// Writes a thread's results, means over the channels, where there are such a pixel and such results.
template <typename Views, typename T>
__device__ void write(const Views& a, int64_t results, const Corner& place, int x, int own,
                      const T (&sum)[kOwn]) {
  const T part = T(1) / static_cast<T>(a.channels);
  const int64_t pixel = place.pixel + x;
  const int64_t offset = place.sample * a.out.steps.sample + place.row * a.out.steps.row +
                         pixel * a.out.steps.pixel;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int64_t result = place.result + own + j;
    if (pixel < a.width && result < results) {
      a.out.memory[offset + result * a.out.steps.channel] = sum[j] * part;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
correlation_kernel(const __grid_constant__ CorrelationViews<T> a) {
  __shared__ Shared<T, kDepth * kPitch> fixed;
  __shared__ Shared<T, kResults * kMovedPitch> moved;
  const Corner place(a.height, a.across);
  const int x = static_cast<int>(threadIdx.x) % kColumns;
  const int own = static_cast<int>(threadIdx.x) / kColumns * kOwn;
  const Row<T> left = row_of(a.left, place, a.channels, a.width);
  const Row<T> right = row_of(a.right, place, a.channels, a.width);
  const int64_t from = place.pixel + a.first + place.result;
  T sum[kOwn] = {};
  for (int64_t channel = 0; channel < a.channels; channel += kDepth) {
    share_out(kDepth, kColumns, a.left_inner, [&](int k, int i) {
      fixed[k * kPitch + i] = left.at(channel + k, place.pixel + i);
    });
    share_out(kDepth, kColumns + kResults, a.right_inner, [&](int k, int i) {
      moved[k * kMovedPitch + i] = right.at(channel + k, from + i);
    });
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const T factor = fixed[k * kPitch + x];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) sum[j] += factor * moved[k * kMovedPitch + x + own + j];
    }
    __syncthreads();  // the next channels go there
  }
  write(a, a.count, place, x, own, sum);
}

template <typename T>
struct AdjointViews {
  View<const T> g, other;
  View<T> out;
  bool g_inner, other_inner;  // whether the channels lie innermost
  int64_t height, width, across;
  int64_t channels, first, count;
  bool to_right;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
correlation_adjoint_kernel(const __grid_constant__ AdjointViews<T> a) {
  __shared__ Shared<T, kDepth * kPitch> fixed;
  __shared__ Shared<T, kResults * kMovedPitch> moved;
  const Corner place(a.height, a.across);
  const int x = static_cast<int>(threadIdx.x) % kColumns;
  const int own = static_cast<int>(threadIdx.x) / kColumns * kOwn;
  const Row<T> g = row_of(a.g, place, a.count, a.width);
  const Row<T> other = row_of(a.other, place, a.channels, a.width);
  T sum[kOwn] = {};
  for (int64_t i0 = 0; i0 < a.count; i0 += kDepth) {
    const int64_t d = a.first + i0;
    share_out(kDepth, kColumns, a.g_inner, [&](int k, int i) {
      fixed[k * kPitch + i] = g.at(i0 + k, place.pixel + i - (a.to_right ? d + k : 0));
    });
    // The pixels x + d + k, or to the right x - d - k, of which the last are the first.
    const int64_t from = place.pixel + (a.to_right ? 1 - d - kDepth : d);
    share_out(kResults, kColumns + kDepth, a.other_inner, [&](int c, int i) {
      moved[c * kMovedPitch + i] = other.at(place.result + c, from + i);
    });
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const T factor = fixed[k * kPitch + x];
      const int at = x + (a.to_right ? kDepth - 1 - k : k);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) sum[j] += factor * moved[(own + j) * kMovedPitch + at];
    }
    __syncthreads();  // the next displacements go there
  }
  write(a, a.channels, place, x, own, sum);
}

// ---- On the host.

template <typename T>
View<T> own_view(const Array& a) {
  return view_of<T>(a, walk_over(a, false));
}

int64_t tiles_across(const Array& a) { return (a.shape[3] + kColumns - 1) / kColumns; }

Grid grid_over(const Array& out) {
  return {blocks_of(out.shape[0] * out.shape[2] * tiles_across(out),
                    (out.shape[1] + kResults - 1) / kResults),
          dim3(kThreads)};
}

template <typename T>
void launch_correlation(const Correlation& a, const Place& place) {
  const CorrelationViews<T> views = {own_view<const T>(a.left), own_view<const T>(a.right),
                                     own_view<T>(a.out),        channels_inner(a.left),
                                     channels_inner(a.right),   a.left.shape[2],
                                     a.left.shape[3],           tiles_across(a.left),
                                     a.left.shape[1],           a.first,
                                     a.out.shape[1]};
  launch("correlation", correlation_kernel<T>, grid_over(a.out), place, views);
}

template <typename T>
void launch_adjoint(const CorrelationAdjoint& a, const Place& place) {
  const AdjointViews<T> views = {own_view<const T>(a.g), own_view<const T>(a.other),
                                 own_view<T>(a.out),     channels_inner(a.g),
                                 channels_inner(a.other), a.other.shape[2],
                                 a.other.shape[3],       tiles_across(a.other),
                                 a.other.shape[1],       a.first,
                                 a.g.shape[1],           a.to_right};
  launch("correlation_adjoint", correlation_adjoint_kernel<T>, grid_over(a.out), place, views);
}

}  // namespace

namespace cuda {

void correlation(const Correlation& a, const Place& place) {
  if (a.left.dtype == DType::kFloat64) launch_correlation<double>(a, place);
  else launch_correlation<float>(a, place);
}

void correlation_adjoint(const CorrelationAdjoint& a, const Place& place) {
  if (a.other.dtype == DType::kFloat64) launch_adjoint<double>(a, place);
  else launch_adjoint<float>(a, place);
}

}  // namespace cuda
}  // namespace rdarts
