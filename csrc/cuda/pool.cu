// The 3x3 pools of padding 1, both kinds in one pass, with the sums of their results:
//   pool          out[0] = max over the window, out[1] = mean over the window inside the image
//   pool_tangent  out[0] = x at the maximum's place, out[1] = mean of x
//   pool_adjoint  dx = the adjoint of both
// A thread works on a tile of results (of dx in the adjoint) and reads what lies under its windows;
// what neighbours share comes from the cache.
#include <cmath>

#include "last.h"
#include "launch.h"
#include "launchers.h"
#include "pool.h"
#include "sums.h"
#include "tile.h"

namespace rdarts {
namespace {

// values[i] = pixel first + i of the row at `offset`, zero outside; whole vectors of `width` lie
// from the pixel first + lead on.
template <int lead, int width, typename T, typename Value, int count>
__device__ __forceinline__ void load_pixels(const View<const T>& view, int64_t offset,
                                            int64_t first, int64_t pixels, Value (&values)[count]) {
  constexpr int vectors = (count - lead) / width;
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    const int64_t pixel = first + lead + v * width;
    Vector<T, width> vector = {};
    if (pixel >= 0 && pixel < pixels) {
      vector = view.memory.template load<Vector<T, width>>(offset + pixel * view.steps.pixel);
    }
#pragma unroll
    for (int i = 0; i < width; ++i) {
      values[lead + v * width + i] = static_cast<Value>(vector.lane[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (i >= lead && i < lead + vectors * width) continue;
    const int64_t pixel = first + i;
    values[i] = Value(0);
    if (pixel >= 0 && pixel < pixels) {
      values[i] = static_cast<Value>(view.memory[offset + pixel * view.steps.pixel]);
    }
  }
}

// The columns under the windows of a tile of results.
template <typename Tile, int stride>
constexpr int kColumns = stride * (Tile::kPixels - 1) + 3;

// A row of x under the windows of the tile at `spot`, zeros outside.
template <typename Tile, int stride, typename T, typename Sum>
__device__ __forceinline__ void load_row(const View<const T>& x, const Spot& spot, int64_t row,
                                         int64_t width,
                                         Sum (&values)[kColumns<Tile, stride>][kSums<Tile>]) {
  constexpr int count = kColumns<Tile, stride>;
  const int64_t first = stride * spot.pixel - 1;
  if constexpr (Tile::kInner) {
    const Walk walk = {0, 0, 0, width};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      Sum lanes[1][Tile::kLanes] = {};
      if (first + i >= 0 && first + i < width) {
        load<Tile>(x, Spot{spot.sample, row, spot.channel, first + i}, walk, lanes);
      }
#pragma unroll
      for (int c = 0; c < Tile::kLanes; ++c) values[i][c] = lanes[0][c];
    }
  } else {
    const int64_t offset = offset_of(Spot{spot.sample, row, spot.channel, 0}, x.steps);
    Sum pixels[count];
    load_pixels<1, Tile::kLanes>(x, offset, first, width, pixels);
#pragma unroll
    for (int i = 0; i < count; ++i) values[i][0] = pixels[i];
  }
}

template <typename T>
struct PoolViews {
  Walk walk;  // over results
  Split split;
  int64_t height, width;  // of x
  View<const T> x;
  View<T> out[kPools];
  View<uint8_t> place;
  View<const uint8_t> given;  // the places in the tangent
  int kinds;
  Span<double> partial, sums;  // [2, kinds, C, parts] and [2, kinds, C]
  Span<double> pivots;         // [kinds, C]
  Span<uint32_t> counters;
};

// A tile of results.
template <typename Tile>
struct Windows {
  using Sum = typename Tile::Sum;
  Sum best[1][Tile::kLanes], mean[1][Tile::kLanes];
  int place[1][Tile::kLanes];

  // best holds minus infinity and place the first one in the image, or in the tangent zero and the
  // maximum's place.
  template <int stride, bool tangent, typename T>
  __device__ __forceinline__ void fill(const PoolViews<T>& a, const Spot& spot) {
    const bool has_left = spot.pixel > 0;  // of the first window
    const bool has_right = stride * (spot.pixel + Tile::kPixels - 1) + 1 < a.width;  // of the last
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      const int64_t h = stride * spot.row - 1 + row;
      if (h < 0 || h >= a.height) continue;
      Sum values[kColumns<Tile, stride>][kSums<Tile>];
      load_row<Tile, stride>(a.x, spot, h, a.width, values);
#pragma unroll
      for (int i = 0; i < Tile::kLanes; ++i) {
        const int pixel = Tile::kInner ? 0 : i;
#pragma unroll
        for (int column = 0; column < 3; ++column) {
          const Sum value = values[stride * pixel + column][Tile::kInner ? i : 0];
          mean[0][i] += value;
          if (column == 0 && pixel == 0 && !has_left) continue;
          if (column == 2 && pixel == Tile::kPixels - 1 && !has_right) continue;
          const int at = 3 * row + column;
          if (tangent ? place[0][i] == at : takes(value, best[0][i])) {
            best[0][i] = value, place[0][i] = at;
          }
        }
      }
    }
    const Sum part = inverse_of<Sum>(counted(spot.row, stride, a.height));
#pragma unroll
    for (int i = 0; i < Tile::kLanes; ++i) {
      const int64_t pixel = spot.pixel + (Tile::kInner ? 0 : i);
      mean[0][i] *= part * inverse_of<Sum>(counted(pixel, stride, a.width));
    }
  }
};

// One block per part of a group of channels.
template <typename Tile, int stride, typename T = typename Tile::Type,
          typename Sum = typename Tile::Sum>
__global__ void __launch_bounds__(kThreads, 1)
pool_kernel(const __grid_constant__ PoolViews<T> a) {
  constexpr int count = kSums<Tile>;
  __shared__ Shared<double, 2 * count * kThreads> shared;
  const Walk& walk = a.walk;
  const Share<Tile> share(a.split, walk);
  Sum pivot[count] = {}, sum[kPools][count] = {}, square[kPools][count] = {};
  if (share.active) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      pivot[i] = static_cast<Sum>(a.x.memory[(share.channel + i) * a.x.steps.channel]);
    }
    const int64_t end = share.template end<int64_t>(a.split);
    for (int64_t at = share.template begin<int64_t>(a.split); at < end; at += a.split.rows) {
      const Spot spot = spot_of<Tile>(at, share.channel, walk);
      Windows<Tile> windows = {};
#pragma unroll
      for (int i = 0; i < Tile::kLanes; ++i) {
        windows.best[0][i] = static_cast<Sum>(-INFINITY);
        windows.place[0][i] = 3 * (spot.row == 0) + (spot.pixel + (Tile::kInner ? 0 : i) == 0);
      }
      windows.template fill<stride, false>(a, spot);
      if (a.out[0].memory.data) store<Tile>(a.place, spot, walk, windows.place);
#pragma unroll
      for (int kind = 0; kind < kPools; ++kind) {
        if (!a.out[kind].memory.data) continue;
        const auto& values = kind == 0 ? windows.best : windows.mean;
        store<Tile>(a.out[kind], spot, walk, values);
        Sum centred[Tile::kLanes], squares[Tile::kLanes];
#pragma unroll
        for (int i = 0; i < Tile::kLanes; ++i) {  // the sums are those of what is stored
          centred[i] = static_cast<Sum>(static_cast<T>(values[0][i])) - pivot[Tile::kInner ? i : 0];
          squares[i] = centred[i] * centred[i];
        }
        accumulate<Tile>(sum[kind], centred);
        accumulate<Tile>(square[kind], squares);
      }
    }
  }
  int64_t first = share.channel;
  const int64_t plane = a.kinds * walk.channels;
#pragma unroll
  for (int kind = 0; kind < kPools; ++kind) {
    if (!a.out[kind].memory.data) continue;
    double sums[2 * count];
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] = sum[kind][i], sums[count + i] = square[kind][i];
    add_rows(sums, a.split, shared);
    if (share.active && share.row == 0) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (share.part == 0) a.pivots[first + i] = pivot[i];
        a.partial[(first + i) * a.split.parts + share.part] = sums[i];
        a.partial[(plane + first + i) * a.split.parts + share.part] = sums[count + i];
      }
    }
    first += walk.channels;
  }
  if (comes_last(a.counters, 0, gridDim.x)) {
    add_parts(a.partial, a.split.parts, 0, 2 * plane, a.sums);
  }
}

// One thread per tile.
template <typename Tile, int stride, typename T = typename Tile::Type>
__global__ void __launch_bounds__(kThreads, 1)
pool_tangent_kernel(const __grid_constant__ PoolViews<T> a, int64_t tiles) {
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tile >= tiles) return;
  const Spot spot = spot_of<Tile>(tile, a.walk);
  Windows<Tile> windows = {};
  if (a.given.memory.data) load<Tile>(a.given, spot, a.walk, windows.place);
  windows.template fill<stride, true>(a, spot);
  if (a.out[0].memory.data) store<Tile>(a.out[0], spot, a.walk, windows.best);
  if (a.out[1].memory.data) store<Tile>(a.out[1], spot, a.walk, windows.mean);
}

template <typename T>
struct AdjointViews {
  Walk walk;  // over dx
  int64_t rows, columns;  // of results
  View<const T> g[kPools];
  View<const uint8_t> place;
  View<T> dx;
};

// Adds what the results of row `from.row` hand back to a tile of one pixel, whose row of their
// windows is `row`.
template <typename Tile, int stride, typename T, typename Sum>
__device__ __forceinline__ void add_pixel(const AdjointViews<T>& a, const Spot& from, int row,
                                          Sum (&dx)[1][Tile::kLanes]) {
  const Walk walk = {0, 0, 0, a.columns};
#pragma unroll
  for (int column = 0; column < 3; ++column) {
    const int64_t ahead = from.pixel + 1 - column;
    Spot spot = from;
    spot.pixel = ahead / stride;
    if (ahead < 0 || ahead % stride != 0 || spot.pixel >= a.columns) continue;
    Sum g[1][Tile::kLanes];
    if (a.g[0].memory.data) {
      int place[1][Tile::kLanes];
      load<Tile>(a.g[0], spot, walk, g);
      load<Tile>(a.place, spot, walk, place);
#pragma unroll
      for (int i = 0; i < Tile::kLanes; ++i) {
        if (place[0][i] == 3 * row + column) dx[0][i] += g[0][i];
      }
    }
    if (a.g[1].memory.data) {
      load<Tile>(a.g[1], spot, walk, g);
      const Sum part = inverse_of<Sum>(counted(spot.row, stride, a.walk.rows)) *
                       inverse_of<Sum>(counted(spot.pixel, stride, a.walk.pixels));
#pragma unroll
      for (int i = 0; i < Tile::kLanes; ++i) dx[0][i] += part * g[0][i];
    }
  }
}

// The same for a tile of several pixels, which begins at an even one.
template <typename Tile, int stride, typename T, typename Sum>
__device__ __forceinline__ void add_pixels(const AdjointViews<T>& a, const Spot& from, int row,
                                           Sum (&dx)[1][Tile::kLanes]) {
  constexpr int lead = stride == 1, width = Tile::kLanes / stride, count = width + 1 + lead;
  const int64_t first = from.pixel / stride - lead;  // column of results that the tile meets
  const Spot line = {from.sample, from.row, from.channel, 0};
  Sum g[count];
  // add(i, at, column): the pixel i is in that column of the window of the result at first + at.
  const auto each = [](auto add) {
#pragma unroll
    for (int i = 0; i < Tile::kLanes; ++i) {
#pragma unroll
      for (int column = 0; column < 3; ++column) {
        const int ahead = i + 1 - column;
        if (ahead % stride == 0) add(i, ahead / stride + lead, column);
      }
    }
  };
  if (a.g[0].memory.data) {
    int place[count];
    load_pixels<lead, width>(a.g[0], offset_of(line, a.g[0].steps), first, a.columns, g);
    load_pixels<lead, width>(a.place, offset_of(line, a.place.steps), first, a.columns, place);
    each([&](int i, int at, int column) {
      if (place[at] == 3 * row + column) dx[0][i] += g[at];
    });
  }
  if (a.g[1].memory.data) {
    load_pixels<lead, width>(a.g[1], offset_of(line, a.g[1].steps), first, a.columns, g);
    const Sum part = inverse_of<Sum>(counted(from.row, stride, a.walk.rows));
#pragma unroll
    for (int at = 0; at < count; ++at) {
      g[at] *= part * inverse_of<Sum>(counted(first + at, stride, a.walk.pixels));
    }
    each([&](int i, int at, int) { dx[0][i] += g[at]; });
  }
}

// One thread per tile.
template <typename Tile, int stride, typename T = typename Tile::Type,
          typename Sum = typename Tile::Sum>
__global__ void __launch_bounds__(kThreads, 1)
pool_adjoint_kernel(const __grid_constant__ AdjointViews<T> a, int64_t tiles) {
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tile >= tiles) return;
  const Spot spot = spot_of<Tile>(tile, a.walk);
  Sum dx[1][Tile::kLanes] = {};
#pragma unroll
  for (int row = 0; row < 3; ++row) {
    const int64_t ahead = spot.row + 1 - row;
    Spot from = spot;
    from.row = ahead / stride;
    if (ahead < 0 || ahead % stride != 0 || from.row >= a.rows) continue;
    if constexpr (Tile::kPixels == 1) add_pixel<Tile, stride>(a, from, row, dx);
    else add_pixels<Tile, stride>(a, from, row, dx);
  }
  store<Tile>(a.dx, spot, a.walk, dx);
}

// ---- On the host.

// The tile that suits tensors of two sizes.
Layout layout_over(const Array& walked, const std::vector<Array>& tensors) {
  Layout layout = {walk_over(walked, false), false, 1};
  int present = 0, deep = 0;
  for (const Array& a : tensors) {
    if (a.data) ++present, deep += channels_inner(a);
  }
  layout.inner = 2 * deep > present;
  for (int lanes = walked.dtype == DType::kBFloat16 ? 8 : 4; lanes >= 4; lanes /= 2) {
    bool all = present > 0;
    for (const Array& a : tensors) {
      all = all && (!a.data || fits(a, walk_over(a, false), layout.inner, lanes));
    }
    if (!all) continue;
    layout.lanes = lanes;
    break;
  }
  return layout;
}

template <typename T>
View<T> own_view(const Array& a) {
  return view_of<T>(a, walk_over(a, false));
}

// call(tile, stride) for both as constants.
template <typename Call>
void on_stride(DType dtype, const Layout& layout, int stride, const Call& call) {
  on_tile<1>(dtype, layout, [&](auto tile) {
    if (stride == 1) call(tile, std::integral_constant<int, 1>{});
    else call(tile, std::integral_constant<int, 2>{});
  });
}

template <typename T>
PoolViews<T> views_of(const Pool& a, const Walk& walk) {
  PoolViews<T> views = {};
  views.walk = walk, views.height = a.x.shape[2], views.width = a.x.shape[3];
  views.x = own_view<const T>(a.x);
  for (int kind = 0; kind < kPools; ++kind) views.out[kind] = own_view<T>(a.out[kind]);
  views.kinds = kinds_of(a.out);
  return views;
}

Layout layout_of(const Pool& a) {
  return layout_over(a.out[1], {a.x, a.out[0], a.out[1], a.place});
}

}  // namespace

namespace cuda {

void pool(const Pool& a, const Place& place) {
  const Layout layout = layout_of(a);
  on_stride(a.x.dtype, layout, a.stride, [&](auto tile, auto stride) {
    using Tile = decltype(tile);
    PoolViews<typename Tile::Type> views = views_of<typename Tile::Type>(a, layout.walk);
    const int64_t plane = views.kinds * layout.walk.channels;
    views.split = split_of<Tile>(layout.walk);
    views.place = own_view<uint8_t>(a.place);
    views.partial = {a.workspace, 2 * plane * views.split.parts}, views.sums = {a.sums, 2 * plane};
    views.pivots = {a.sums + 2 * plane, plane}, views.counters = counters_of(place);
    launch("pool", pool_kernel<Tile, decltype(stride)::value>,
           Grid{static_cast<unsigned>(views.split.groups * views.split.parts), kThreads}, place,
           views);
  });
}

void pool_tangent(const Pool& a, const Place& place) {
  const Layout layout = layout_of(a);
  on_stride(a.x.dtype, layout, a.stride, [&](auto tile, auto stride) {
    using Tile = decltype(tile);
    PoolViews<typename Tile::Type> views = views_of<typename Tile::Type>(a, layout.walk);
    views.given = own_view<const uint8_t>(a.place);
    const int64_t tiles = tiles_of<Tile>(layout.walk);
    launch("pool_tangent", pool_tangent_kernel<Tile, decltype(stride)::value>,
           grid_of(tiles, kThreads), place, views, tiles);
  });
}

void pool_adjoint(const PoolAdjoint& a, const Place& place) {
  const Layout layout = layout_over(a.dx, {a.dx, a.g[0], a.g[1], a.place});
  on_stride(a.dx.dtype, layout, a.stride, [&](auto tile, auto stride) {
    using Tile = decltype(tile);
    using T = typename Tile::Type;
    AdjointViews<T> views = {};
    views.walk = layout.walk;
    views.rows = a.g[0].shape[2], views.columns = a.g[0].shape[3];
    for (int kind = 0; kind < kPools; ++kind) views.g[kind] = own_view<const T>(a.g[kind]);
    views.place = own_view<const uint8_t>(a.place);
    views.dx = own_view<T>(a.dx);
    const int64_t tiles = tiles_of<Tile>(layout.walk);
    launch("pool_adjoint", pool_adjoint_kernel<Tile, decltype(stride)::value>,
           grid_of(tiles, kThreads), place, views, tiles);
  });
}

}  // namespace cuda
}  // namespace rdarts
