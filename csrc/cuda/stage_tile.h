// What the CUDA kernels of the convolution stages share. A block makes a tile of an image of
// results, some pixels x some channels, going over the channels that it sums along, `depth` at a
// time: they lie in shared memory, channels innermost, in the type that sums are held in, and each
// thread holds 4 x 4 results in registers. The kernels differ in what they lay there and in what
// becomes of the results.
#pragma once

#include <algorithm>

#include "launch.h"
#include "tile.h"

namespace rdarts {

constexpr int kStageThreads = 256;
constexpr int kCell = 4;                                      // pixels and channels of a thread
constexpr int kResults = kStageThreads * kCell * kCell;       // of a block
constexpr int kWarps = kStageThreads / 32;
constexpr int kPad = 4;             // keeps rows of a tile out of one another's banks
constexpr int kMostColumns = 16;    // of a tile
constexpr int kLeastDepth = 4;
constexpr int kSharedAim = 100 * 1024;  // bytes, so that a multiprocessor holds two blocks

// Hands out the block's dynamic shared memory, part after part.
template <typename Sum>
class SharedParts {
 public:
  __device__ SharedSpan<Sum> take(int count) {
    const SharedSpan<Sum> part = dynamic_shared<Sum>(count, used_);
    used_ += count * static_cast<int>(sizeof(Sum));
    return part;
  }

 private:
  int used_ = 0;  // bytes
};

// How images [height, width] of `of` channels are cut into tiles.
struct Tiling {
  int height, width;
  int64_t of;
  int rows, columns;  // pixels of a tile
  int channels;       // of a tile: 16, 32 or 64; a power of two, as is `depth`
  int depth;          // channels that are summed along at a time: 4, 8 or 16
  int64_t down, across;

  RDARTS_METHOD int64_t tiles() const { return down * across; }
  RDARTS_METHOD int slots() const { return rows * columns; }
};

// The tile of a block: its sample, and the pixels and channels that lie in the image.
struct Region {
  int64_t sample, channel;
  int first_row, first_column, rows, columns;

  __device__ Region(const Tiling& t, int64_t item, int64_t block_of_channels)
      : sample(item / t.tiles()), channel(block_of_channels * t.channels) {
    const int64_t tile = item % t.tiles();
    first_row = static_cast<int>(tile / t.across) * t.rows;
    first_column = static_cast<int>(tile % t.across) * t.columns;
    rows = min(t.rows, t.height - first_row);
    columns = min(t.columns, t.width - first_column);
  }
  __device__ bool holds(int row, int column) const { return row < rows && column < columns; }
};

// body(row, column, c, line) over rows x columns pixels and a power of two of channels, by all
// threads; line is line_of(c), the coefficients of a channel, read once for all of a thread's pixels.
// Neighbouring threads take what lies side by side in memory: channels where they are `inner`.
template <typename LineOf, typename Body>
__device__ __forceinline__ void over_pixels(int rows, int columns, int channels, bool inner,
                                            const LineOf& line_of, const Body& body) {
  const int thread = static_cast<int>(threadIdx.x);
  const int together = inner ? channels : 1, step = kStageThreads / together;
  const int down = step / columns, right = step % columns;
  for (int c = inner ? thread % channels : 0; c < channels; c += together) {
    const auto line = line_of(c);
    int row = thread / together / columns, column = thread / together % columns;
    while (row < rows) {
      body(row, column, c, line);
      row += down, column += right;
      if (column >= columns) column -= columns, ++row;
    }
  }
}

// A channel's scale and shift, where a table has such.
template <typename Sum>
struct MapLine {
  bool maps;
  Sum scale, shift;

  __device__ MapLine(const Span<const Sum>& scales, const Span<const Sum>& shifts, int64_t at,
                     bool live)
      : maps(scales.data != nullptr && live), scale(0), shift(0) {
    if (maps) scale = scales[at], shift = shifts[at];
  }
  __device__ __forceinline__ Sum of(Sum x) const { return maps ? scale * x + shift : x; }
};

// body(i) for i in [0, count), by all threads.
template <typename Body>
__device__ __forceinline__ void over(int count, const Body& body) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kStageThreads) body(i);
}

// NaN stays NaN, as in torch.
template <typename Sum>
__device__ __forceinline__ Sum relu(Sum a) {
  return a <= Sum(0) ? Sum(0) : a;
}

// scale * x + shift, with row `at` of the tables, where there are any.
template <typename Sum>
__device__ __forceinline__ Sum scaled(Sum x, const Span<const Sum>& scale,
                                      const Span<const Sum>& shift, int64_t at) {
  return scale.data ? scale[at] * x + shift[at] : x;
}

template <typename T>
__device__ __forceinline__ SumOf<T> value_at(const View<const T>& view, int64_t sample, int row,
                                             int column, int64_t channel) {
  const Steps& s = view.steps;
  return static_cast<SumOf<T>>(
      view.memory[sample * s.sample + row * s.row + column * s.pixel + channel * s.channel]);
}

// A thread's results: pixels first_pixel + i * step of the tile's slots, four channels.
template <typename Sum>
struct Cell {
  int pixel, step, channel, slots, columns;
  Sum value[kCell][kCell];  // pixels, channels

  __device__ explicit Cell(const Tiling& t)
      : pixel(static_cast<int>(threadIdx.x) / (t.channels / kCell)),
        step(kStageThreads / (t.channels / kCell)),
        channel(static_cast<int>(threadIdx.x) % (t.channels / kCell) * kCell),
        slots(t.slots()), columns(t.columns), value{} {}

  __device__ int row(int i) const { return (pixel + i * step) / columns; }
  __device__ int column(int i) const { return (pixel + i * step) % columns; }
  __device__ bool in(const Region& region, int i) const {
    return pixel + i * step < slots && region.holds(row(i), column(i));
  }

  // Adds a[pixels, depth] b[depth, channels]; a's rows lie kPad further apart.
  __device__ __forceinline__ void multiply(const SharedSpan<Sum>& a, const SharedSpan<Sum>& b,
                                           const Tiling& t) {
    using Four = Vector<Sum, kCell>;
    int at[kCell];
#pragma unroll
    for (int i = 0; i < kCell; ++i) at[i] = min(pixel + i * step, slots - 1) * (t.depth + kPad);
    if (pixel >= slots) return;
    for (int k = 0; k < t.depth; k += kCell) {
      Four rows[kCell];
#pragma unroll
      for (int i = 0; i < kCell; ++i) rows[i] = a.template load<Four>(at[i] + k);
#pragma unroll
      for (int j = 0; j < kCell; ++j) {
        const Four line = b.template load<Four>((k + j) * t.channels + channel);
#pragma unroll
        for (int i = 0; i < kCell; ++i) {
#pragma unroll
          for (int q = 0; q < kCell; ++q) value[i][q] += rows[i].lane[j] * line.lane[q];
        }
      }
    }
  }
};

// Stores `count` of four values, in vectors where the rows of memory are `whole`.
template <typename T>
__device__ __forceinline__ void store_four(const Span<T>& to, int64_t index, int64_t count,
                                           bool whole, const SumOf<T> (&values)[kCell]) {
  Vector<T, kCell> four;
#pragma unroll
  for (int i = 0; i < kCell; ++i) four.lane[i] = static_cast<T>(values[i]);
  if (whole && count >= kCell) {
    using Part = Chunk<sizeof four>;
    constexpr int each = sizeof(Part) / sizeof(T);
#pragma unroll
    for (int i = 0; i < kCell; i += each) to.store(index + i, chunk_of<Part>(&four.lane[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kCell; ++i) {
      if (i < count) to[index + i] = four.lane[i];
    }
  }
}

// The gradient of z of a few edges, dz = factors by_g g + by_z z + constant; rows of the tables are
// those edges'.
template <typename T, int edges>
struct GradientViews {
  using Sum = SumOf<T>;
  View<const T> g[edges];
  Span<const T> z[edges];              // dense, channels innermost; absent where by_z is
  Span<const Sum> by_g, by_z, constant;  // [edges, O] or null
  Span<const Sum> factors;               // [edges, N] or null
  int64_t samples, channels;
  int height, width;

  // A channel's, for a sample.
  struct Line {
    Sum by_g, by_z, constant;
  };

  __device__ __forceinline__ Line line_of(int e, int64_t sample, int64_t o) const {
    if (o >= channels) return {};
    const int64_t c = e * channels + o;
    const Sum factor = value_or(factors, e * samples + sample, Sum(1));
    return {factor * value_or(by_g, c, Sum(1)), value_or(by_z, c, Sum(0)),
            value_or(constant, c, Sum(0))};
  }

  __device__ __forceinline__ Sum at(int e, int64_t sample, int row, int column, int64_t o,
                                    const Line& line) const {
    const Sum value = value_at(g[e], sample, row, column, o) * line.by_g + line.constant;
    if (!by_z.data) return value;
    const int64_t pixel = (sample * height + row) * width + column;
    return value + line.by_z * static_cast<Sum>(T(z[e][pixel * channels + o]));
  }
};

// Rounds the results as memory holds them, and stores them: `live` of the tile's channels, which
// follow on channel `first` of dense images of `channels`, channels innermost.
template <typename T>
__device__ __forceinline__ void store_results(Cell<SumOf<T>>& cell, const Tiling& t,
                                              const Region& region, const Span<T>& to,
                                              int64_t channels, int64_t first, int64_t live,
                                              bool whole) {
#pragma unroll
  for (int i = 0; i < kCell; ++i) {
#pragma unroll
    for (int q = 0; q < kCell; ++q) {
      cell.value[i][q] = static_cast<SumOf<T>>(static_cast<T>(cell.value[i][q]));
    }
    if (!cell.in(region, i)) continue;
    const int row = region.first_row + cell.row(i), column = region.first_column + cell.column(i);
    const int64_t pixel = (region.sample * t.height + row) * t.width + column;
    store_four(to, pixel * channels + first + cell.channel, live - cell.channel, whole,
               cell.value[i]);
  }
}

// dz[slots, channels] of a tile and a power of two of channels from `first` on, zeros where there
// are none; the rows lie kPad further apart.
template <typename T, int edges>
__device__ __forceinline__ void fill_gradient(const GradientViews<T, edges>& gradient, int e,
                                              const Tiling& t, const Region& region, int64_t first,
                                              int channels, const SharedSpan<SumOf<T>>& dz) {
  using Line = typename GradientViews<T, edges>::Line;
  const bool inner = gradient.g[e].steps.channel == 1;
  const auto line_of = [&](int o) { return gradient.line_of(e, region.sample, first + o); };
  over_pixels(t.rows, t.columns, channels, inner, line_of,
              [&](int row, int column, int o, const Line& line) {
    const bool live = region.holds(row, column) && first + o < gradient.channels;
    dz[(row * t.columns + column) * (channels + kPad) + o] =
        live ? gradient.at(e, region.sample, region.first_row + row,
                           region.first_column + column, first + o, line)
             : SumOf<T>(0);
  });
}

// Gradients of weights: an outer product, tile channels x depth, summed along pixels. The threads
// stand in cells of 4 x 4 numbers, and several of a cell take turns at the pixels.
template <typename Sum>
struct OuterCell {
  int cell, cells, turn, turns;
  int row, column;  // among the tile's channels, along the depth
  Sum value[kCell][kCell];

  __device__ explicit OuterCell(const Tiling& t)
      : cells(t.channels / kCell * (t.depth / kCell)), value{} {
    const int thread = static_cast<int>(threadIdx.x);
    cell = thread % cells, turn = thread / cells, turns = kStageThreads / cells;
    row = cell / (t.depth / kCell) * kCell, column = cell % (t.depth / kCell) * kCell;
  }

  // a [slots, channels] and b [slots, depth], whose rows lie kPad further apart.
  __device__ __forceinline__ void add(const SharedSpan<Sum>& a, const SharedSpan<Sum>& b,
                                      const Tiling& t) {
    using Four = Vector<Sum, kCell>;
    for (int slot = turn; slot < t.slots(); slot += turns) {
      const Four left = a.template load<Four>(slot * (t.channels + kPad) + row);
      const Four right = b.template load<Four>(slot * (t.depth + kPad) + column);
#pragma unroll
      for (int i = 0; i < kCell; ++i) {
#pragma unroll
        for (int j = 0; j < kCell; ++j) value[i][j] += left.lane[i] * right.lane[j];
      }
    }
  }

  // finish(i, j, sum) for every number of the product, by all threads.
  template <typename Finish>
  __device__ __forceinline__ void finish(const Tiling& t, const Finish& finish) {
    const SharedSpan<Sum> shared = dynamic_shared<Sum>(kResults);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCell; ++i) {
#pragma unroll
      for (int j = 0; j < kCell; ++j) {
        shared[(i * kCell + j) * kStageThreads + static_cast<int>(threadIdx.x)] = value[i][j];
      }
    }
    __syncthreads();
    over(t.channels * t.depth, [&](int number) {
      const int i = number / t.depth, j = number % t.depth;
      const int from = i / kCell * (t.depth / kCell) + j / kCell;
      Sum sum = 0;
      for (int k = 0; k < turns; ++k) {
        sum += shared[(i % kCell * kCell + j % kCell) * kStageThreads + k * cells + from];
      }
      finish(i, j, sum);
    });
  }
};

// ---- On the host.

inline int64_t parts_of(int64_t size, int64_t each) { return (size + each - 1) / each; }

// Tiles for results of so many channels, summed along `along`; shared(tiling) is the numbers of
// shared memory that they take.
template <typename Sum, typename Shared>
Tiling tiling_of(int64_t height, int64_t width, int64_t channels, int64_t along,
                 const Shared& shared) {
  Tiling t = {};
  t.height = static_cast<int>(height), t.width = static_cast<int>(width), t.of = channels;
  t.channels = channels <= 16 ? 16 : channels <= 32 ? 32 : 64;
  t.across = parts_of(width, kMostColumns);
  t.columns = t.across ? static_cast<int>(parts_of(width, t.across)) : 1;
  const int64_t most = kResults / t.channels / t.columns;
  t.rows = static_cast<int>(std::clamp<int64_t>(height, 1, most));
  t.down = parts_of(height, t.rows);
  for (t.depth = 16; t.depth > kLeastDepth; t.depth /= 2) {
    if (along > t.depth / 2 && shared(t) * static_cast<int64_t>(sizeof(Sum)) <= kSharedAim) break;
  }
  return t;
}

template <typename Sum>
Grid grid_of(const Tiling& t, int64_t items, int64_t blocks_of_channels, int64_t edges,
             int64_t numbers) {
  return {blocks_of(items, blocks_of_channels, edges), dim3(kStageThreads),
          static_cast<size_t>(numbers) * sizeof(Sum)};
}

inline int64_t elements_of(const Array& a) {
  return a.shape[0] * a.shape[1] * a.shape[2] * a.shape[3];
}

// call(T{}) for the type of the tensors.
template <typename Call>
void on_dtype(DType dtype, const Call& call) {
  if (dtype == DType::kFloat64) call(double{});
  else if (dtype == DType::kFloat32) call(float{});
  else call(__nv_bfloat16{});
}

// Of the edges [first, first + edges) of a backward's arguments.
template <typename T, int most, typename Arguments>
GradientViews<T, most> gradient_views(const Arguments& a, int first, int edges) {
  using Sum = SumOf<T>;
  GradientViews<T, most> views = {};
  const int64_t* const shape = a.g[0].shape;
  for (int e = 0; e < edges; ++e) {
    views.g[e] = view_of<const T>(a.g[first + e], walk_over(a.g[0], false));
    if (a.by_z) views.z[e] = {static_cast<const T*>(a.z[first + e].data), elements_of(a.z[0])};
  }
  views.by_g = rows_from<Sum>(a.by_g, first, edges, shape[1]);
  views.by_z = rows_from<Sum>(a.by_z, first, edges, shape[1]);
  views.constant = rows_from<Sum>(a.constant, first, edges, shape[1]);
  views.factors = rows_from<Sum>(a.factors, first, edges, shape[0]);
  views.samples = shape[0], views.channels = shape[1];
  views.height = static_cast<int>(shape[2]), views.width = static_cast<int>(shape[3]);
  return views;
}

// Items of a part, for no more parts than `most`; one part where no counters are left to tell the
// last of several. `blocks`: of a part, at the least depth, so that all types have the same parts.
inline int64_t most_a_part(int64_t items, int64_t most, int64_t blocks) {
  return parts_of(items, blocks <= kCounters ? most : 1);
}

// Blocks for so many parts, of which there is one where there is no part: it finishes.
inline int64_t blocks_for(int64_t parts) { return std::max<int64_t>(1, parts); }

// Whether every row of channels is whole vectors.
inline bool whole_rows(const void* data, int64_t channels) {
  return channels % kCell == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace rdarts
