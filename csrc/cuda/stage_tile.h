// What the CUDA kernels of the convolution stages share. A block makes a tile of an image of
// results, some pixels x some channels, going over the channels that it sums along, `depth` at a
// time: they lie in shared memory, channels innermost, in the type that sums are held in, and each
// thread holds 4 x 4 results in registers. The kernels differ in what they lay there and in what
// becomes of the results.
#pragma once

#include <algorithm>

#include "launch.h"
#include "tensor_core.h"
#include "tile.h"
#include "tuning.h"

namespace rdarts {

constexpr int kWarps = kStageThreads / 32;
constexpr int kWarpChannels = 16, kWarpPixels = 32;  // of the block's results, a warp's
constexpr int kPad = 4;      // keeps rows of a tile out of one another's banks, read along the rows
constexpr int kLinePad = 8;  // and read down the columns

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

// How images [height, width] of `of` channels are cut into tiles of a size, TileSize.
template <typename Size>
struct Tiling : Size {
  int height, width;
  int64_t of;
  int rows, columns;  // pixels of a tile
  int64_t down, across;

  RDARTS_METHOD int64_t tiles() const { return down * across; }
  RDARTS_METHOD int slots() const { return rows * columns; }
};

// The tile of a block: its sample, and the pixels and channels that lie in the image.
struct Region {
  int64_t sample, channel;
  int first_row, first_column, rows, columns;

  template <typename Size>
  __device__ Region(const Tiling<Size>& t, int64_t item, int64_t block_of_channels)
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

// A thread's results: pixels pixel + i * kStep of the tile's slots, four channels. A warp has 32
// pixels x 16 channels, in the order in which tensor cores leave them.
template <typename Sum, typename Size>
struct Cell {
  static constexpr int kStep = 8, kAcross = Size::channels / kWarpChannels;  // warps side by side
  int pixel, channel, slots, columns;
  Sum value[kCell][kCell];  // pixels, channels

  __device__ explicit Cell(const Tiling<Size>& t)
      : slots(t.slots()), columns(t.columns), value{} {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    pixel = warp / kAcross * kWarpPixels + lane / 4;
    channel = warp % kAcross * kWarpChannels + lane % 4 * kCell;
  }

  __device__ int row(int i) const { return (pixel + i * kStep) / columns; }
  __device__ int column(int i) const { return (pixel + i * kStep) % columns; }
  __device__ bool in(const Region& region, int i) const {
    return pixel + i * kStep < slots && region.holds(row(i), column(i));
  }

  // Adds a[pixels, depth] b[depth, channels], on tensor cores where `tensor`; a's rows lie kPad
  // further apart, those of b kLinePad.
  template <bool tensor>
  __device__ __forceinline__ void multiply(const SharedSpan<Sum>& a, const SharedSpan<Sum>& b) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (pixel - lane / 4 >= slots) return;  // the whole warp
    int at[kCell];
#pragma unroll
    for (int i = 0; i < kCell; ++i) {
      at[i] = min(pixel + i * kStep, slots - 1) * (Size::depth + kPad);
    }
    if constexpr (tensor) multiply_on_tensor_cores(a, b, at);
    else multiply_exactly(a, b, at);
  }

 private:
  static constexpr int kRow = Size::channels + kLinePad;  // of b

  __device__ __forceinline__ void multiply_exactly(const SharedSpan<Sum>& a,
                                                   const SharedSpan<Sum>& b,
                                                   const int (&at)[kCell]) {
    using Four = Vector<Sum, kCell>;
#pragma unroll 2
    for (int k = 0; k < Size::depth; k += kCell) {
      Four rows[kCell];
#pragma unroll
      for (int i = 0; i < kCell; ++i) rows[i] = a.template load<Four>(at[i] + k);
#pragma unroll
      for (int j = 0; j < kCell; ++j) {
        const Four line = b.template load<Four>((k + j) * kRow + channel);
#pragma unroll
        for (int i = 0; i < kCell; ++i) {
#pragma unroll
          for (int q = 0; q < kCell; ++q) value[i][q] += rows[i].lane[j] * line.lane[q];
        }
      }
    }
  }

  // Two products of 16 pixels times two of 8 channels, every second of the warp's 16: so a thread's
  // four stand side by side, and it reads its two of b at once.
  __device__ __forceinline__ void multiply_on_tensor_cores(const SharedSpan<float>& a,
                                                           const SharedSpan<float>& b,
                                                           const int (&at)[kCell]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, k = lane % 4;
    const int n = channel - k * kCell + lane / 4 * 2;
#pragma unroll
    for (int first = 0; first < Size::depth; first += 8) {
      const auto near = b.template load<Vector<float, 2>>((first + k) * kRow + n);
      const auto far = b.template load<Vector<float, 2>>((first + 4 + k) * kRow + n);
#pragma unroll
      for (int i = 0; i < kCell; i += 2) {
        const int upper = at[i] + first + k, lower = at[i + 1] + first + k;
        const Tf32 left[4] = {tf32_of(a[upper]), tf32_of(a[lower]), tf32_of(a[upper + 4]),
                              tf32_of(a[lower + 4])};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Tf32 right[2] = {tf32_of(near.lane[j]), tf32_of(far.lane[j])};
          float sum[4] = {value[i][j], value[i][2 + j], value[i + 1][j], value[i + 1][2 + j]};
          multiply_add(left, right, sum);
          value[i][j] = sum[0], value[i][2 + j] = sum[1];
          value[i + 1][j] = sum[2], value[i + 1][2 + j] = sum[3];
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
template <typename T, typename Size>
__device__ __forceinline__ void store_results(Cell<SumOf<T>, Size>& cell, const Tiling<Size>& t,
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
// are none; the rows lie `pad` further apart.
template <typename T, int edges, typename Size>
__device__ __forceinline__ void fill_gradient(const GradientViews<T, edges>& gradient, int e,
                                              const Tiling<Size>& t, const Region& region,
                                              int64_t first, int channels, int pad,
                                              const SharedSpan<SumOf<T>>& dz) {
  using Line = typename GradientViews<T, edges>::Line;
  const bool inner = gradient.g[e].steps.channel == 1;
  const auto line_of = [&](int o) { return gradient.line_of(e, region.sample, first + o); };
  over_pixels(t.rows, t.columns, channels, inner, line_of,
              [&](int row, int column, int o, const Line& line) {
    const bool live = region.holds(row, column) && first + o < gradient.channels;
    dz[(row * t.columns + column) * (channels + pad) + o] =
        live ? gradient.at(e, region.sample, region.first_row + row,
                           region.first_column + column, first + o, line)
             : SumOf<T>(0);
  });
}

// Gradients of weights: an outer product, tile channels x depth, summed along pixels. The threads
// stand in cells of 4 x 4 numbers, and several of a cell take turns at the pixels; on tensor cores
// warps stand in cells of 16 channels and the whole depth, and take turns at each 8 pixels.
template <typename Sum, typename Size, bool tensor>
struct OuterCell {
  static constexpr int kRows = tensor ? 2 : kCell, kColumns = tensor ? Size::depth / 4 : kCell;
  static constexpr int kCells =
      tensor ? Size::channels / 16 : Size::channels / kCell * (Size::depth / kCell);
  static constexpr int kTurns = (tensor ? kWarps : kStageThreads) / kCells;
  static constexpr int kNumbers = Size::channels * Size::depth;
  static_assert(kTurns > 0 && kTurns * kNumbers <= kResults, "finish() has no room");
  int turn, row, column;  // among the tile's channels, along the depth
  Sum value[kRows][kColumns];

  __device__ OuterCell() : value{} {
    const int thread = static_cast<int>(threadIdx.x), cell = thread / (tensor ? 32 : 1) % kCells;
    turn = thread / (tensor ? 32 : 1) / kCells;
    row = tensor ? cell * 16 + thread % 32 / 4 : cell / (Size::depth / kCell) * kCell;
    column = tensor ? thread % 4 * 2 : cell % (Size::depth / kCell) * kCell;
  }

  // a [slots, channels] and b [slots, depth], whose rows lie kLinePad further apart.
  __device__ __forceinline__ void add(const SharedSpan<Sum>& a, const SharedSpan<Sum>& b,
                                      int slots) {
    if constexpr (tensor) add_on_tensor_cores(a, b, slots);
    else add_exactly(a, b, slots);
  }

  // finish(i, j, sum) for every number of the product, by all threads.
  template <typename Finish>
  __device__ __forceinline__ void finish(const Finish& finish) {
    const SharedSpan<Sum> shared = dynamic_shared<Sum>(kTurns * kNumbers);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int down = row + (tensor ? 8 * i : i), right = column + (tensor ? j / 2 * 8 + j % 2 : j);
        shared[turn * kNumbers + down * Size::depth + right] = value[i][j];
      }
    }
    __syncthreads();
    over(kNumbers, [&](int number) {
      Sum sum = 0;
      for (int k = 0; k < kTurns; ++k) sum += shared[k * kNumbers + number];
      finish(number / Size::depth, number % Size::depth, sum);
    });
  }

 private:
  static constexpr int kRowOfA = Size::channels + kLinePad, kRowOfB = Size::depth + kLinePad;

  __device__ __forceinline__ void add_exactly(const SharedSpan<Sum>& a, const SharedSpan<Sum>& b,
                                              int slots) {
    using Four = Vector<Sum, kCell>;
    for (int slot = turn; slot < slots; slot += kTurns) {
      const Four left = a.template load<Four>(slot * kRowOfA + row);
      const Four right = b.template load<Four>(slot * kRowOfB + column);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) value[i][j] += left.lane[i] * right.lane[j];
      }
    }
  }

  __device__ __forceinline__ void add_on_tensor_cores(const SharedSpan<float>& a,
                                                      const SharedSpan<float>& b, int slots) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4;
    for (int first = 8 * turn; first < slots; first += 8 * kTurns) {
      const int near = first + lane % 4, far = near + 4;
      const auto of = [&](const SharedSpan<float>& from, int slot, int size, int at) {
        return tf32_of(slot < slots ? from[slot * size + at] : 0.0f);
      };
      const Tf32 left[4] = {of(a, near, kRowOfA, row), of(a, near, kRowOfA, row + 8),
                            of(a, far, kRowOfA, row), of(a, far, kRowOfA, row + 8)};
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        const Tf32 right[2] = {of(b, near, kRowOfB, 4 * j + g), of(b, far, kRowOfB, 4 * j + g)};
        float sum[4] = {value[0][j], value[0][j + 1], value[1][j], value[1][j + 1]};
        multiply_add(left, right, sum);
        value[0][j] = sum[0], value[0][j + 1] = sum[1];
        value[1][j] = sum[2], value[1][j + 1] = sum[3];
      }
    }
  }
};

// ---- On the host.

inline int64_t parts_of(int64_t size, int64_t each) { return (size + each - 1) / each; }

// Tiles of an image of results, as the row says; shared(tiling) is the numbers of shared memory that
// they take, for which they may have fewer rows.
template <typename Sum, typename Size, typename Shared>
Tiling<Size> tiling_of(const Tuned& row, const Shared& shared) {
  Tiling<Size> t = {};
  t.height = static_cast<int>(row.height), t.width = static_cast<int>(row.width), t.of = row.of;
  t.rows = row.rows, t.columns = row.columns;
  while (t.rows > 1 && shared(t) * static_cast<int64_t>(sizeof(Sum)) > kSharedAim) {
    t.rows = (t.rows + 1) / 2;
  }
  t.down = parts_of(row.height, t.rows), t.across = parts_of(row.width, t.columns);
  return t;
}

template <typename Sum>
Grid grid_of(int64_t items, int64_t blocks_of_channels, int64_t edges, int64_t numbers) {
  return {blocks_of(items, blocks_of_channels, edges), dim3(kStageThreads),
          static_cast<size_t>(numbers) * sizeof(Sum)};
}

inline int64_t elements_of(const Array& a) {
  return a.shape[0] * a.shape[1] * a.shape[2] * a.shape[3];
}

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == 8   ? DType::kFloat64
                           : sizeof(T) == 4 ? DType::kFloat32
                                            : DType::kBFloat16;

// The table's row of results of that shape, by tensors of type T.
template <typename T>
Tuned tuned_for(const int64_t* shape) {
  return tuned_for(shape[1], shape[2], shape[3], kDTypeOf<T>);
}

// The most that call(T{}) gives for any type of tensors.
template <typename Call>
int64_t most_of_dtypes(const Call& call) {
  return std::max({call(double{}), call(float{}), call(__nv_bfloat16{})});
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
// last of several. `blocks`: of a part.
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
