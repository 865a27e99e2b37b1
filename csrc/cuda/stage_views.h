// What the CUDA kernels of a stage of separable convolutions see of its arguments, forward and
// backward alike (stage.h).
#pragma once

#include "stage.h"
#include "tile_sums.h"

namespace rdarts {

constexpr int kTogether = 12;  // edges a launch: what its parameters hold

// What the kernels see of x and of the depthwise part, for the edges of a launch.
template <typename T>
struct StageViews {
  using Sum = SumOf<T>;
  View<const T> x[kTogether];
  Span<const Sum> depthwise[kTogether];  // [C, K * K]
  Span<const Sum> scale, shift;          // [edges, C] or null
  View<const T> gate;                    // or null: relu's tangent, where it opens
  Span<const Sum> by_gate;               // [edges, C], where gate and scale are
  int64_t channels;
  int height, width, dilation, stride, pad;
};

// Rows or columns of x below so many of the result.
template <int K>
RDARTS_METHOD int reach(int count, int stride, int dilation) {
  return (count - 1) * stride + (K - 1) * dilation + 1;
}

// y[rows, columns, depth] = the stage's y (stage.h) from (top, left) of a sample on, zeros outside.
template <typename T, typename Sum = SumOf<T>>
__device__ __forceinline__ void fill_image(const StageViews<T>& s, int e, int64_t sample,
                                           int64_t channel, int top, int left, int rows,
                                           int columns, int depth, const SharedSpan<Sum>& y) {
  const View<const T>& x = s.x[e];
  const auto line_of = [&](int c) {
    const int64_t at = e * s.channels + channel + c;
    return MapLine<Sum>(s.scale, s.shift, at, channel + c < s.channels);
  };
  over_pixels(rows, columns, depth, x.steps.channel == 1, line_of,
              [&](int row, int column, int c, const MapLine<Sum>& line) {
    const int h = top + row, w = left + column;
    Sum value = 0;
    if (h >= 0 && h < s.height && w >= 0 && w < s.width && channel + c < s.channels) {
      value = line.of(value_at(x, sample, h, w, channel + c));
      if (s.gate.memory.data) {
        const Sum gate = value_at(s.gate, sample, h, w, channel + c);
        if (s.by_gate.data) value += s.by_gate[e * s.channels + channel + c] * gate;
        value = gate > Sum(0) ? value : Sum(0);
      } else {
        value = relu(value);
      }
    }
    y[(row * columns + column) * depth + c] = value;
  });
}

// taps[K * K, depth] of the channels from `channel` on.
template <int K, typename Sum>
__device__ __forceinline__ void fill_taps(const Span<const Sum>& depthwise, int64_t channels,
                                          int64_t channel, int depth,
                                          const SharedSpan<Sum>& taps) {
  over(K * K * depth, [&](int i) {
    const int c = i / (K * K), t = i % (K * K);
    taps[t * depth + c] = channel + c < channels ? depthwise[(channel + c) * K * K + t] : Sum(0);
  });
}

// ---- On the host.

// Calls what takes the kernel's size as a constant.
template <typename Call>
void on_kernel(int kernel, const Call& call) {
  if (kernel == 3) call(std::integral_constant<int, 3>{});
  else if (kernel == 5) call(std::integral_constant<int, 5>{});
  else call(std::integral_constant<int, 7>{});
}

inline int edges_of(const Stage& s, int first) { return std::min(kTogether, s.edges - first); }

template <typename T>
StageViews<T> views_of(const Stage& s, int first) {
  using Sum = SumOf<T>;
  StageViews<T> views = {};
  const Array& x = s.x[0];
  const int64_t channels = x.shape[1], taps = channels * s.kernel * s.kernel;
  const int edges = edges_of(s, first);
  for (int e = 0; e < edges; ++e) {
    views.x[e] = view_of<const T>(s.x[first + e], walk_over(x, false));
    views.depthwise[e] = coefficients<Sum>(s.depthwise[first + e], taps);
  }
  views.scale = rows_from<Sum>(s.scale, first, edges, channels);
  views.shift = rows_from<Sum>(s.shift, first, edges, channels);
  if (s.gate) views.gate = view_of<const T>(*s.gate, walk_over(x, false));
  views.by_gate = rows_from<Sum>(s.by_gate, first, edges, channels);
  views.channels = channels;
  views.height = static_cast<int>(x.shape[2]), views.width = static_cast<int>(x.shape[3]);
  views.dilation = s.dilation, views.stride = s.stride;
  views.pad = s.dilation * (s.kernel / 2);
  return views;
}

}  // namespace rdarts
