// The nodes of a recurrent cell (recurrent.h). A block has kColumns columns and takes turns at
// their rows; with a batch norm it has all rows of them, else blocks share the rows.
#include "launchers.h"
#include "recurrent_body.h"
#include "sums.h"

namespace rdarts {
namespace {

constexpr int kColumns = 8;  // 32 bytes of float32: what memory is read in
constexpr int kTurn = static_cast<int>(kThreads) / kColumns;  // rows that a block works on at once
constexpr int64_t kTurns = 4;  // of a block that shares its rows with others

// The Math of recurrent_body.h.
template <typename T>
struct ScalarMath {
  using Number = T;
  RDARTS_BODY float exp(float x) { return ::expf(x); }
  RDARTS_BODY double exp(double x) { return ::exp(x); }
  RDARTS_BODY float expm1(float x) { return ::expm1f(x); }
  RDARTS_BODY double expm1(double x) { return ::expm1(x); }
};

template <typename T>
struct RowsView {
  Span<T> span;
  int64_t stride;
  __device__ std::remove_const_t<T> at(int64_t b, int64_t i) const { return span[b * stride + i]; }
  __device__ void set(int64_t b, int64_t i, T value) const { span[b * stride + i] = value; }
};

template <typename T>
RowsView<T> view_of(const Rows& rows, int64_t batch, int64_t columns) {
  const int64_t size = batch > 0 ? (batch - 1) * rows.stride + columns : 0;
  return {{static_cast<T*>(rows.data), rows.data ? size : 0}, rows.stride};
}

template <typename T, typename Void>
Span<T> span_of(Void* data, int64_t size) {
  return {static_cast<T*>(data), data ? size : 0};
}

template <typename T>
struct NodeViews {
  int64_t batch, hidden;
  int sources;
  Span<const T> mix;
  RowsView<const T> states[kMostSources], gates[kMostSources];
};

template <typename T>
NodeViews<T> views_of(const RecurrentNode& n) {
  NodeViews<T> v = {};
  v.batch = n.batch, v.hidden = n.hidden, v.sources = n.sources;
  v.mix = span_of<const T>(n.mix, n.sources * kCurves);
  for (int j = 0; j < n.sources; ++j) {
    v.states[j] = view_of<const T>(n.states[j], n.batch, n.hidden);
    v.gates[j] = view_of<const T>(n.gates[j], n.batch, 2 * n.hidden);
  }
  return v;
}

template <typename T>
__device__ CurveMix<T> mix_at(const NodeViews<T>& n, int j) {
  const int64_t i = int64_t{kCurves} * j;
  const T tanh = n.mix[i], relu = n.mix[i + 1], sigmoid = n.mix[i + 2], identity = n.mix[i + 3];
  return {tanh, relu, sigmoid, identity, tanh + relu + sigmoid + identity};
}

// What a thread works on: one column, rows first, first + kTurn, ... before end.
struct Part {
  int64_t column, first, end;
  bool active;

  __device__ Part(int64_t batch, int64_t hidden)
      : column(static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns) {
    const int64_t rows = (batch + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * rows;
    active = column < hidden;
    first = begin + threadIdx.x / kColumns;
    end = active ? min(begin + rows, batch) : 0;
  }
};

Grid grid_over(const RecurrentNode& n, bool whole_columns) {
  if (n.batch == 0 || n.hidden == 0) return {dim3(0), dim3(kThreads)};
  const int64_t shared = (n.batch + kTurn * kTurns - 1) / (kTurn * kTurns);
  return {blocks_of((n.hidden + kColumns - 1) / kColumns, whole_columns ? 1 : shared),
          dim3(kThreads)};
}

// Sums over the rows of each of the block's columns; all threads get their column's.
template <int count>
__device__ void sum_columns(double (&values)[count], Shared<double, count * kThreads>& shared) {
  add_rows(values, Split{kColumns, kTurn, 0, 0, 0}, shared);
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = shared[i * kThreads + threadIdx.x % kColumns];
}

// Puts the block's sums of a source's coefficients where combine_kernel adds them: [J, 4, blocks].
__device__ void put_mix(double (&sums)[kCurves], int j, const Span<double>& partial,
                        Shared<double, kCurves * kThreads>& shared) {
  add_rows(sums, Split{1, kThreads, 0, 0, 0}, shared);
  if (threadIdx.x > 0) return;
  const int64_t blocks = int64_t{gridDim.x} * gridDim.y;
  const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
#pragma unroll
  for (int f = 0; f < kCurves; ++f) partial[(int64_t{kCurves} * j + f) * blocks + block] = sums[f];
}

template <typename T>
struct ForwardViews {
  NodeViews<T> node;
  NodeNorm norm;
  double eps, momentum;
  Span<T> running_mean, running_var;
  Span<const T> mask;
  Span<T> value, masked;
  Span<double> statistics;
};

template <typename T, bool curved>
__global__ void __launch_bounds__(kThreads, 1)
recurrent_node_kernel(const __grid_constant__ ForwardViews<T> a) {
  __shared__ Shared<double, kThreads> shared;
  const NodeViews<T>& n = a.node;
  const Part part(n.batch, n.hidden);
  const int64_t i = part.column;
  double sum[1] = {0};
  for (int64_t b = part.first; b < part.end; b += kTurn) {
    T value = 0;
    for (int j = 0; j < n.sources; ++j) {
      value += node_term<ScalarMath<T>, curved>(mix_at(n, j), n.states[j].at(b, i),
                                                n.gates[j].at(b, i),
                                                n.gates[j].at(b, n.hidden + i));
    }
    a.value[b * n.hidden + i] = value;
    sum[0] += value;
  }
  double mean = 0, rstd = 1;
  if (a.norm == NodeNorm::kBatch) {
    sum_columns(sum, shared);
    mean = sum[0] / static_cast<double>(n.batch);
    double square[1] = {0};
    for (int64_t b = part.first; b < part.end; b += kTurn) {
      const double x = a.value[b * n.hidden + i] - mean;
      square[0] += x * x;
    }
    sum_columns(square, shared);
    rstd = 1.0 / sqrt(square[0] / static_cast<double>(n.batch) + a.eps);
    if (part.active && threadIdx.x < kColumns) {
      const double m = a.momentum, var = square[0] / (static_cast<double>(n.batch) - 1.0);
      a.running_mean[i] = static_cast<T>((1.0 - m) * a.running_mean[i] + m * mean);
      a.running_var[i] = static_cast<T>((1.0 - m) * a.running_var[i] + m * var);
    }
  } else if (a.norm == NodeNorm::kRunning && part.active) {
    mean = a.running_mean[i];
    rstd = 1.0 / sqrt(static_cast<double>(a.running_var[i]) + a.eps);
  }
  if (a.norm != NodeNorm::kNone && part.active && threadIdx.x < kColumns && blockIdx.y == 0) {
    a.statistics[i] = mean, a.statistics[n.hidden + i] = rstd;
  }
  if (a.norm == NodeNorm::kNone && a.masked.size == 0) return;
  const T from = static_cast<T>(mean), scale = static_cast<T>(rstd);
  for (int64_t b = part.first; b < part.end; b += kTurn) {
    const int64_t at = b * n.hidden + i;
    const T value = (a.value[at] - from) * scale;
    a.value[at] = value;
    if (a.masked.size > 0) a.masked[at] = value * a.mask[at];
  }
}

template <typename T>
struct BackwardViews {
  NodeViews<T> node;
  NodeNorm norm;
  Span<const double> statistics;
  Span<const T> value, dvalue, dmasked, mask, dall;
  T share;
  Span<T> total;
  bool adds;
  RowsView<T> dstates[kMostSources], dgates[kMostSources];
  Span<double> partial;  // [J, 4, blocks]
};

template <typename T, bool curved>
__global__ void __launch_bounds__(kThreads, 1)
recurrent_node_backward_kernel(const __grid_constant__ BackwardViews<T> a) {
  __shared__ Shared<double, kCurves * kThreads> mixes;
  __shared__ Shared<double, 2 * kThreads> shared;
  const NodeViews<T>& n = a.node;
  const Part part(n.batch, n.hidden);
  const int64_t i = part.column;
  double sums[2] = {0, 0};
  for (int64_t b = part.first; b < part.end; b += kTurn) {
    const int64_t at = b * n.hidden + i;
    T g = 0;
    if (a.dvalue.size > 0) g += a.dvalue[at];
    if (a.dmasked.size > 0) g += a.mask.size > 0 ? a.mask[at] * a.dmasked[at] : a.dmasked[at];
    if (a.dall.size > 0) g += a.share * a.dall[at];
    a.total[at] = g;
    sums[0] += g;
    if (a.norm == NodeNorm::kBatch) sums[1] += static_cast<double>(g) * a.value[at];
  }
  T plain = 0, along = 0, rstd = 1;
  if (a.norm == NodeNorm::kBatch) {
    sum_columns(sums, shared);
    plain = static_cast<T>(sums[0] / static_cast<double>(n.batch));
    along = static_cast<T>(sums[1] / static_cast<double>(n.batch));
  }
  if (a.norm != NodeNorm::kNone && part.active) {
    rstd = static_cast<T>(a.statistics[n.hidden + i]);
  }
  for (int j = 0; j < n.sources; ++j) {
    const CurveMix<T> mix = mix_at(n, j);
    double found[kCurves] = {};
    for (int64_t b = part.first; b < part.end; b += kTurn) {
      const int64_t at = b * n.hidden + i;
      T g = a.total[at];
      if (a.norm == NodeNorm::kBatch) g = g - plain - a.value[at] * along;
      const auto d = node_gradients<ScalarMath<T>, curved>(
          mix, n.states[j].at(b, i), n.gates[j].at(b, i), n.gates[j].at(b, n.hidden + i), rstd * g);
      a.dstates[j].set(b, i, a.adds ? a.dstates[j].at(b, i) + d.state : d.state);
      a.dgates[j].set(b, i, d.c);
      a.dgates[j].set(b, n.hidden + i, d.u);
#pragma unroll
      for (int f = 0; f < kCurves; ++f) found[f] += d.mix[f];
    }
    put_mix(found, j, a.partial, mixes);
  }
}

template <typename T>
struct SecondViews {
  NodeViews<T> node, along;
  Span<const T> g;
  Span<T> tangent;
  RowsView<T> dstates[kMostSources], dgates[kMostSources];
  Span<double> partial;  // [J, 4, blocks]
};

template <typename T, bool curved>
__global__ void __launch_bounds__(kThreads, 1)
recurrent_node_second_kernel(const __grid_constant__ SecondViews<T> a) {
  __shared__ Shared<double, kCurves * kThreads> mixes;
  const NodeViews<T>& n = a.node;
  const Part part(n.batch, n.hidden);
  const int64_t i = part.column;
  for (int j = 0; j < n.sources; ++j) {
    const CurveMix<T> mix = mix_at(n, j), change = mix_at(a.along, j);
    double found[kCurves] = {};
    for (int64_t b = part.first; b < part.end; b += kTurn) {
      const int64_t at = b * n.hidden + i;
      const auto d = second_gradients<ScalarMath<T>, curved>(
          mix, n.states[j].at(b, i), n.gates[j].at(b, i), n.gates[j].at(b, n.hidden + i), change,
          a.along.states[j].at(b, i), a.along.gates[j].at(b, i),
          a.along.gates[j].at(b, n.hidden + i), a.g[at]);
      a.tangent[at] = j == 0 ? d.tangent : a.tangent[at] + d.tangent;
      a.dstates[j].set(b, i, d.by.state);
      a.dgates[j].set(b, i, d.by.c);
      a.dgates[j].set(b, n.hidden + i, d.by.u);
#pragma unroll
      for (int f = 0; f < kCurves; ++f) found[f] += d.by.mix[f];
    }
    put_mix(found, j, a.partial, mixes);
  }
}

template <typename Arguments>
Span<double> partial_mix(const Arguments& a, const Grid& grid) {
  return partial_of(a.dmix, a.workspace, int64_t{a.node.sources} * kCurves,
                    int64_t{grid.blocks.x} * grid.blocks.y);
}

template <typename Arguments>
void combine_mix(const char* name, const Arguments& a, const Grid& grid, const Place& place) {
  const int64_t size = int64_t{a.node.sources} * kCurves;
  const int64_t parts = int64_t{grid.blocks.x} * grid.blocks.y;
  combine(name, partial_mix(a, grid), parts, {a.dmix, size}, place);
}

template <typename T>
void forward_of(const RecurrentForward& a, const Place& place) {
  const RecurrentNode& n = a.node;
  const int64_t size = n.batch * n.hidden;
  ForwardViews<T> v = {};
  v.node = views_of<T>(n), v.norm = a.norm, v.eps = a.eps, v.momentum = a.momentum;
  v.running_mean = span_of<T>(a.running_mean, n.hidden);
  v.running_var = span_of<T>(a.running_var, n.hidden);
  v.mask = span_of<const T>(a.mask, size), v.value = span_of<T>(a.value, size);
  v.masked = span_of<T>(a.masked, size), v.statistics = span_of<double>(a.statistics, 2 * n.hidden);
  const auto kernel = n.curved ? recurrent_node_kernel<T, true> : recurrent_node_kernel<T, false>;
  launch("recurrent_node", kernel, grid_over(n, a.norm == NodeNorm::kBatch), place, v);
}

template <typename T>
void backward_of(const RecurrentBackward& a, const Place& place) {
  const RecurrentNode& n = a.node;
  const int64_t size = n.batch * n.hidden;
  const Grid grid = grid_over(n, a.norm == NodeNorm::kBatch);
  BackwardViews<T> v = {};
  v.node = views_of<T>(n), v.norm = a.norm;
  v.statistics = span_of<const double>(a.statistics, 2 * n.hidden);
  v.value = span_of<const T>(a.value, size), v.dvalue = span_of<const T>(a.dvalue, size);
  v.dmasked = span_of<const T>(a.dmasked, size), v.mask = span_of<const T>(a.mask, size);
  v.dall = span_of<const T>(a.dall, size), v.share = static_cast<T>(a.share);
  v.total = span_of<T>(a.total, size), v.adds = a.adds, v.partial = partial_mix(a, grid);
  for (int j = 0; j < n.sources; ++j) {
    v.dstates[j] = view_of<T>(a.dstates[j], n.batch, n.hidden);
    v.dgates[j] = view_of<T>(a.dgates[j], n.batch, 2 * n.hidden);
  }
  const auto kernel =
      n.curved ? recurrent_node_backward_kernel<T, true> : recurrent_node_backward_kernel<T, false>;
  launch("recurrent_node_backward", kernel, grid, place, v);
  combine_mix("recurrent_node_backward", a, grid, place);
}

template <typename T>
void second_of(const RecurrentSecond& a, const Place& place) {
  const RecurrentNode& n = a.node;
  const int64_t size = n.batch * n.hidden;
  const Grid grid = grid_over(n, false);
  SecondViews<T> v = {};
  v.node = views_of<T>(n), v.along = views_of<T>(a.along);
  v.g = span_of<const T>(a.g, size), v.tangent = span_of<T>(a.tangent, size);
  v.partial = partial_mix(a, grid);
  for (int j = 0; j < n.sources; ++j) {
    v.dstates[j] = view_of<T>(a.dstates[j], n.batch, n.hidden);
    v.dgates[j] = view_of<T>(a.dgates[j], n.batch, 2 * n.hidden);
  }
  const auto kernel =
      n.curved ? recurrent_node_second_kernel<T, true> : recurrent_node_second_kernel<T, false>;
  launch("recurrent_node_second", kernel, grid, place, v);
  combine_mix("recurrent_node_second", a, grid, place);
}

}  // namespace

namespace cuda {

int64_t recurrent_workspace(const RecurrentNode& n) {
  const Grid grid = grid_over(n, false);
  return int64_t{grid.blocks.x} * grid.blocks.y * n.sources * kCurves;
}

void recurrent_node(const RecurrentForward& a, const Place& place) {
  if (a.node.dtype == DType::kFloat64) forward_of<double>(a, place);
  else forward_of<float>(a, place);
}

void recurrent_node_backward(const RecurrentBackward& a, const Place& place) {
  if (a.node.dtype == DType::kFloat64) backward_of<double>(a, place);
  else backward_of<float>(a, place);
}

void recurrent_node_second(const RecurrentSecond& a, const Place& place) {
  if (a.node.dtype == DType::kFloat64) second_of<double>(a, place);
  else second_of<float>(a, place);
}

}  // namespace cuda
}  // namespace rdarts
