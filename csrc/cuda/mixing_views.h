// What the CUDA kernels of a mixing see of its arguments, forward and backward alike (mixing.h).
// Each half of the channels of z has tiles of its own.
#pragma once

#include "mixing.h"
#include "tile_sums.h"

namespace rdarts {

// What the kernels see of a few of the sources.
template <typename T, int most>
struct SourceViews {
  using Sum = SumOf<T>;
  View<const T> x[most];
  Span<const Sum> scale, shift;  // [sources, C] or null
  int sources;
  int64_t channels;  // of a source
  int height, width, stride;
};

// y[slots, depth] on a tile of the images of z, zeros outside; the rows lie `pad` further apart.
template <typename T, int most, typename Size, typename Sum = SumOf<T>>
__device__ __forceinline__ void fill_sources(const SourceViews<T, most>& s, int source, int half,
                                             const Tiling<Size>& t, const Region& region,
                                             int64_t channel, int pad, const SharedSpan<Sum>& y) {
  const View<const T>& x = s.x[source];
  const bool inner = x.steps.channel == 1;
  const auto line_of = [&](int c) {
    const int64_t at = source * s.channels + channel + c;
    return MapLine<Sum>(s.scale, s.shift, at, channel + c < s.channels);
  };
  over_pixels(t.rows, t.columns, t.depth, inner, line_of,
              [&](int row, int column, int c, const MapLine<Sum>& line) {
    const int h = s.stride * (region.first_row + row) + half;
    const int w = s.stride * (region.first_column + column) + half;
    Sum value = 0;
    if (region.holds(row, column) && h < s.height && w < s.width && channel + c < s.channels) {
      value = relu(line.of(value_at(x, region.sample, h, w, channel + c)));
    }
    y[(row * t.columns + column) * (t.depth + pad) + c] = value;
  });
}

// The halves of z's channels.
struct Halves {
  int count;
  int64_t channels[2], first[2];
  int64_t blocks[2];  // of channels
};

// ---- On the host.

// `tile`: channels of one.
inline Halves halves_of(const Mixing& m, int64_t channels, int tile) {
  Halves halves = {m.halves, {}, {}, {}};
  for (int half = 0; half < 2; ++half) {
    halves.channels[half] = channels_of_half(m, channels, half);
    halves.blocks[half] = parts_of(halves.channels[half], tile);
  }
  halves.first[1] = halves.channels[0];
  return halves;
}

// Of sources [first, first + most) or those that there are.
template <typename T, int most>
SourceViews<T, most> views_of(const Mixing& m, int first) {
  SourceViews<T, most> views = {};
  const Array& x = m.x[0];
  views.sources = std::min(most, m.sources - first), views.channels = x.shape[1];
  for (int i = 0; i < views.sources; ++i) {
    views.x[i] = view_of<const T>(m.x[first + i], walk_over(x, false));
  }
  views.scale = rows_from<SumOf<T>>(m.scale, first, views.sources, x.shape[1]);
  views.shift = rows_from<SumOf<T>>(m.shift, first, views.sources, x.shape[1]);
  views.height = static_cast<int>(x.shape[2]), views.width = static_cast<int>(x.shape[3]);
  views.stride = m.stride;
  return views;
}

// Numbers of weights of a half of an edge.
inline int64_t weights_of(const Mixing& m, int64_t channels, int half) {
  return channels_of_half(m, channels, half) * m.sources * m.x[0].shape[1];
}

inline int64_t largest_half(const Mixing& m, int64_t channels) { return channels_of_half(m, channels, 0); }

template <typename Size>
int shared_to_multiply(const Tiling<Size>& t) {
  const int weights = t.depth * (t.channels + kLinePad);
  return std::max(t.slots() * (t.depth + kPad) + weights, kTileSums);
}

template <typename Size>
int shared_for_weights(const Tiling<Size>& t) {
  return std::max(t.slots() * (t.depth + t.channels + 2 * kLinePad), kResults);
}

// The table's row for a half of z's channels.
template <typename T>
Tuned tuned_for_halves(const Mixing& m, const int64_t* out_shape) {
  return tuned_for(largest_half(m, out_shape[1]), out_shape[2], out_shape[3], kDTypeOf<T>);
}

}  // namespace rdarts
