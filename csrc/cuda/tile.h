// How the CUDA kernels walk over tensors [N, C, H, W] and draw noise.
//
// A thread works on a tile: kRows vectors of kLanes elements. Where the channels lie innermost a
// vector holds neighbouring channels and the rows are neighbouring pixels, so that the four numbers
// of a Philox block, which belong to four pixels, stay in one thread; else a vector holds pixels.
// Any strides will do where kLanes is 1. Offsets have 64 bits; an Index, which is divided, has 32
// where all of them fit: around a division of 64 the compiler puts branches, and loads of several
// turns of a loop no longer go out together.
#pragma once

#include <cuda_bf16.h>

#include <cstring>
#include <type_traits>
#include <vector>

#include "node_sum.h"
#include "span.h"
#include "walk.h"

namespace rdarts {

// 16 bytes, but no less than a Philox block.
template <typename T>
constexpr int kMostLanes = sizeof(T) == 2 ? 8 : 4;

template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int lanes, bool inner, int rows>
struct Tile {
  using Type = T;
  using Sum = SumOf<T>;  // and coefficients
  static constexpr int kLanes = lanes, kRows = rows;
  static constexpr bool kInner = inner;
  static constexpr int kPixels = inner ? rows : lanes, kChannels = inner ? lanes : 1;
  static_assert(rows == 1 || inner, "rows are pixels");
};

template <typename T, int lanes>
struct alignas(lanes * sizeof(T) < 16 ? lanes * sizeof(T) : 16) Vector {
  T lane[lanes];
};

// What a vector is stored as: nvcc may split the store of a struct, but none of a number.
template <int bytes>
using Chunk = std::conditional_t<
    bytes >= 16, unsigned __int128,
    std::conditional_t<bytes == 8, uint64_t,
                       std::conditional_t<bytes == 4, uint32_t,
                                          std::conditional_t<bytes == 2, uint16_t, uint8_t>>>>;

template <typename Chunk, typename T>
__device__ __forceinline__ Chunk chunk_of(const T* lanes) {
  if constexpr (sizeof(Chunk) == 16) {
    const uint64_t low = chunk_of<uint64_t>(lanes);
    return Chunk{chunk_of<uint64_t>(lanes + 8 / sizeof(T))} << 64 | low;
  } else {
    Chunk chunk;
    std::memcpy(&chunk, lanes, sizeof chunk);
    return chunk;
  }
}

// 48 bytes: a table of 64 leaves a quarter of the 4 KB that a kernel's parameters may take.
template <typename T>
struct View {
  Span<T> memory;
  Steps steps;
};

// Tiles beside one another in a row of pixels.
template <typename Tile>
RDARTS_BODY int64_t across_of(const Walk& walk) {
  return (walk.pixels + Tile::kPixels - 1) / Tile::kPixels;
}

// Where a tile begins.
struct Spot {
  int64_t sample, row, channel, pixel;
};

// Divides `index` by `count` and returns the rest.
template <typename Index>
__device__ __forceinline__ Index split_off(Index& index, int64_t count) {
  const Index whole = index, size = static_cast<Index>(count);
  index = whole / size;
  return whole - index * size;
}

template <typename Tile, typename Index>
__device__ __forceinline__ Spot spot_of(Index tile, const Walk& walk) {
  const int64_t deep = walk.channels / Tile::kChannels;
  Spot spot;
  if (Tile::kInner) spot.channel = int64_t{Tile::kChannels} * split_off(tile, deep);
  spot.pixel = int64_t{Tile::kPixels} * split_off(tile, across_of<Tile>(walk));
  spot.row = split_off(tile, walk.rows);
  if (!Tile::kInner) spot.channel = split_off(tile, deep);
  spot.sample = tile;
  return spot;
}

// The same for the tiles of one channel.
template <typename Tile, typename Index>
__device__ __forceinline__ Spot spot_of(Index position, int64_t channel, const Walk& walk) {
  Spot spot;
  spot.channel = channel;
  spot.pixel = int64_t{Tile::kPixels} * split_off(position, across_of<Tile>(walk));
  spot.row = split_off(position, walk.rows);
  spot.sample = position;
  return spot;
}

constexpr int64_t kMost32 = INT32_MAX;  // of an Index of 32 bits, so that no block passes its end

template <typename Tile>
int64_t tiles_of(const Walk& walk) {
  return walk.samples * walk.rows * across_of<Tile>(walk) * (walk.channels / Tile::kChannels);
}

// The tile's first logical index.
__device__ __forceinline__ int64_t index_of(const Spot& spot, const Walk& walk) {
  return ((spot.sample * walk.channels + spot.channel) * walk.rows + spot.row) * walk.pixels +
         spot.pixel;
}

__device__ __forceinline__ int64_t offset_of(const Spot& spot, const Steps& steps) {
  return spot.sample * steps.sample + spot.row * steps.row + spot.channel * steps.channel +
         spot.pixel * steps.pixel;
}

// Whether the tile's row lies in the tensor.
template <typename Tile>
__device__ __forceinline__ bool reaches(const Spot& spot, int row, const Walk& walk) {
  return Tile::kRows == 1 || spot.pixel + row < walk.pixels;
}

// Zeros outside of the tensor.
template <typename Tile, typename T, typename Value>
__device__ __forceinline__ void load(const View<const T>& view, const Spot& spot, const Walk& walk,
                                     Value (&values)[Tile::kRows][Tile::kLanes]) {
  const int64_t offset = offset_of(spot, view.steps);
#pragma unroll
  for (int row = 0; row < Tile::kRows; ++row) {
    Vector<T, Tile::kLanes> vector = {};
    if (reaches<Tile>(spot, row, walk)) {
      vector = view.memory.template load<Vector<T, Tile::kLanes>>(offset + row * view.steps.pixel);
    }
#pragma unroll
    for (int i = 0; i < Tile::kLanes; ++i) {
      values[row][i] = static_cast<Value>(vector.lane[i]);
    }
  }
}

template <typename Tile, typename T, typename Value>
__device__ __forceinline__ void store(const View<T>& view, const Spot& spot, const Walk& walk,
                                      const Value (&values)[Tile::kRows][Tile::kLanes]) {
  const int64_t offset = offset_of(spot, view.steps);
#pragma unroll
  for (int row = 0; row < Tile::kRows; ++row) {
    if (!reaches<Tile>(spot, row, walk)) continue;
    Vector<T, Tile::kLanes> vector;
#pragma unroll
    for (int i = 0; i < Tile::kLanes; ++i) vector.lane[i] = static_cast<T>(values[row][i]);
    using Part = Chunk<sizeof vector>;
    constexpr int each = sizeof(Part) / sizeof(T);
#pragma unroll
    for (int i = 0; i < Tile::kLanes; i += each) {
      view.memory.store(offset + row * view.steps.pixel + i, chunk_of<Part>(&vector.lane[i]));
    }
  }
}

// `absent` for a null span.
template <typename T>
__device__ __forceinline__ T value_or(const Span<const T>& values, int64_t index, T absent) {
  return values.data ? values[index] : absent;
}

// Device views of a call's Drawn.
template <typename Sum>
struct Sites {
  int count;
  PhiloxStart start;
  uint32_t sites[kMostInputs];
  Span<const Sum> weights;  // [J]
  Span<const Sum> factors;  // [J, N] or null
  Span<const uint32_t> clock;

  // Read for each site: kept in registers, the clock would cost a block its place beside another.
  __device__ PhiloxStart start_of(int site) const {
    PhiloxStart s = read_clock(start, clock);
    s.c1 = sites[site];
    return s;
  }
};

__device__ __forceinline__ Four<float> normals(int64_t block, const PhiloxStart& start) {
  return Normal::numbers(philox4x32(static_cast<uint32_t>(block), start));
}

// add(row, lane, number) for every number of a tile, by the logical index of its first element. A
// single element draws the whole block and takes its own.
template <typename Tile, typename Add>
__device__ __forceinline__ void draw(int64_t first, const Walk& walk, const PhiloxStart& start,
                                     const Add& add) {
  if constexpr (Tile::kLanes == 1) {
    const Four<float> four = normals(first / 4, start);
    const int own = static_cast<int>(first % 4);
    add(0, 0, own == 0 ? four.a : own == 1 ? four.b : own == 2 ? four.c : four.d);
  } else if constexpr (Tile::kInner) {
    static_assert(Tile::kRows == 4, "a block is four pixels");
    const int64_t plane = walk.rows * walk.pixels;
#pragma unroll
    for (int i = 0; i < Tile::kLanes; ++i) {
      const Four<float> four = normals((first + i * plane) / 4, start);
      add(0, i, four.a), add(1, i, four.b), add(2, i, four.c), add(3, i, four.d);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Tile::kLanes; i += 4) {
      const Four<float> four = normals((first + i) / 4, start);
      add(0, i, four.a), add(0, i + 1, four.b), add(0, i + 2, four.c), add(0, i + 3, four.d);
    }
  }
}

// ---- On the host: views, and the tile that a call's tensors allow.

template <typename T>
Span<const T> coefficients(const void* data, int64_t size) {
  return {static_cast<const T*>(data), data ? size : 0};
}

// Rows [first, first + rows) of a table; null stays null.
template <typename Sum>
Span<const Sum> rows_from(const void* data, int64_t first, int64_t rows, int64_t row) {
  return coefficients<Sum>(data ? static_cast<const Sum*>(data) + first * row : nullptr,
                           rows * row);
}

inline Span<const uint32_t> clock_of(const PhiloxStart& start) {
  return {start.clock, start.clock ? 2 : 0};
}

template <typename Sum>
Sites<Sum> sites_of(const Drawn& drawn, int64_t samples) {
  Sites<Sum> sites = {drawn.count, drawn.start, {}, {}, {}, clock_of(drawn.start)};
  for (int j = 0; j < drawn.count; ++j) sites.sites[j] = drawn.sites[j];
  sites.weights = coefficients<Sum>(drawn.weights, drawn.count);
  sites.factors = coefficients<Sum>(drawn.factors, drawn.count * samples);
  return sites;
}

template <typename T>
View<T> view_of(const Array& a, const Walk& walk) {
  int64_t size = 1;
  for (int d = 0; d < 4; ++d) {
    size = a.shape[d] == 0 ? 0 : size == 0 ? 0 : size + (a.shape[d] - 1) * a.strides[d];
  }
  return {{static_cast<T*>(a.data), a.data ? size : 0}, steps_of(a, walk)};
}

// How the tensors of a call are walked over together.
struct Layout {
  Walk walk;
  bool inner;
  int lanes;
};

inline int64_t size_of(DType dtype) {
  if (dtype == DType::kUInt8) return 1;
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Whether every vector of so many lanes is whole and aligned.
inline bool fits(const Array& a, const Walk& walk, bool inner, int lanes) {
  const Steps steps = steps_of(a, walk);
  const int64_t size = size_of(a.dtype);
  const int64_t bytes = lanes * size < 16 ? lanes * size : 16;
  const int64_t extent = inner ? walk.channels : walk.pixels;
  const int64_t next = inner ? steps.pixel : steps.channel;
  const bool apart = (walk.samples == 1 || steps.sample % lanes == 0) &&
                     (walk.rows == 1 || steps.row % lanes == 0) &&
                     ((inner ? walk.pixels : walk.channels) == 1 || next % lanes == 0);
  return (inner ? steps.channel : steps.pixel) == 1 && extent % lanes == 0 && apart &&
         reinterpret_cast<uintptr_t>(a.data) % bytes == 0;
}

// The tensors that are absent play no part. Drawn numbers come in fours of pixels.
inline Layout layout_of(const std::vector<Array>& tensors, bool drawn = false) {
  bool even = true;
  int present = 0, deep = 0;
  const Array* first = nullptr;
  for (const Array& a : tensors) {
    if (!a.data) continue;
    even = even && even_pixels(a);
    deep += channels_inner(a), ++present;
    if (!first) first = &a;
  }
  if (!first) first = &tensors[0];  // nothing but empty tensors
  Layout layout = {walk_over(*first, even), 2 * deep > present, 1};
  const bool fours = !drawn || layout.walk.pixels % 4 == 0;
  for (int lanes = first->dtype == DType::kBFloat16 ? 8 : 4; lanes >= 4 && fours; lanes /= 2) {
    bool all = true;
    for (const Array& a : tensors) {
      all = all && (!a.data || fits(a, layout.walk, layout.inner, lanes));
    }
    if (!all) continue;
    layout.lanes = lanes;
    break;
  }
  return layout;
}

template <typename T, int lanes, int rows, typename Call>
void on_order(const Layout& layout, const Call& call) {
  if (layout.inner) call(Tile<T, lanes, true, lanes == 1 ? 1 : rows>{});
  else call(Tile<T, lanes, false, 1>{});
}

template <typename T, int rows, typename Call>
void on_lanes(const Layout& layout, const Call& call) {
  if constexpr (kMostLanes<T> == 8) {
    if (layout.lanes == 8) return on_order<T, 8, rows>(layout, call);
  }
  if (layout.lanes == 4) return on_order<T, 4, rows>(layout, call);
  on_order<T, 1, rows>(layout, call);
}

// call(Tile{}) for the layout's tile of so many rows.
template <int rows, typename Call>
void on_tile(DType dtype, const Layout& layout, const Call& call) {
  if (dtype == DType::kFloat64) return on_lanes<double, rows>(layout, call);
  if (dtype == DType::kFloat32) return on_lanes<float, rows>(layout, call);
  on_lanes<__nv_bfloat16, rows>(layout, call);
}

}  // namespace rdarts
