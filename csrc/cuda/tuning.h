// The one table of tile sizes of the convolution stages' kernels.
//
// A block of 256 threads makes 4096 results, 16 a thread. `channels` and `depth` are constants of
// the kernels, whose inner loops and divisions hang on them; rows and columns are numbers: a kernel
// divides by them a few times a tile.
//
// Chosen by arithmetic, not measured on a GPU. A tile has all channels of a published cell, so that
// a pixel's depthwise part is computed once. At a depth of 16 the forward of a 3x3 stage takes 42,
// 24 and 16 KB of shared memory at 16, 32 and 64 channels, its weights' gradient 69, 44 and 31: two
// blocks or more on a multiprocessor. A depth of 32 would halve the barriers, and leave room for one
// block alone in dilated stages and at stride 2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "array.h"
#include "place.h"

namespace rdarts {

constexpr int kStageThreads = 256;
constexpr int kCell = 4;                                 // pixels and channels of a thread
constexpr int kResults = kStageThreads * kCell * kCell;  // of a block
constexpr int kMostColumns = 16;                         // of a tile
constexpr int kSharedAim = 78 * 1024;  // bytes: two blocks with their static ones on a multiprocessor of an A100

// Blocks that the registers of a multiprocessor are to be enough for: 128 a thread, with which
// kernels of float64 would spill.
template <typename T>
constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 1 : 2;

struct Tuned {
  int64_t of, height, width;  // what it is for: channels of the result, its image
  DType dtype;
  int rows, columns;  // pixels of a tile
  int channels;       // of a tile
  int depth;          // channels that are summed along at a time
  bool tensor_cores;  // whether they lower the backward's floor: bench/roofline.py
};

constexpr Tuned kTuned[] = {
    {16, 32, 32, DType::kFloat32, 16, 16, 16, 16, false},
    {32, 16, 16, DType::kFloat32, 8, 16, 32, 16, true},
    {64, 8, 8, DType::kFloat32, 8, 8, 64, 16, true},
    {16, 32, 32, DType::kBFloat16, 16, 16, 16, 16, true},
    {32, 16, 16, DType::kBFloat16, 8, 16, 32, 16, true},
    {64, 8, 8, DType::kBFloat16, 8, 8, 64, 16, true},
    // For checks, which are no faster for other tiles: numbers of 8 bytes.
    {16, 32, 32, DType::kFloat64, 16, 16, 16, 8, false},
    {32, 16, 16, DType::kFloat64, 16, 16, 16, 8, false},
    {64, 8, 8, DType::kFloat64, 8, 8, 16, 8, false},
};

// The table's row, or by rule: all of the channels up to 64, columns up to 16, rows until the block
// has its results; tensor cores as in the table.
inline Tuned tuned_for(int64_t of, int64_t height, int64_t width, DType dtype) {
  for (const Tuned& row : kTuned) {
    if (row.of == of && row.height == height && row.width == width && row.dtype == dtype) {
      return row;
    }
  }
  Tuned t = {of, height, width, dtype, 1, 1, 16, 8, false};
  if (dtype != DType::kFloat64) {
    t.channels = of <= 16 ? 16 : of <= 32 ? 32 : 64, t.depth = 16;
    t.tensor_cores = of > 16 || dtype == DType::kBFloat16;
  }
  const int64_t across = (width + kMostColumns - 1) / kMostColumns;
  if (across > 0) t.columns = static_cast<int>((width + across - 1) / across);
  const int64_t most = kResults / t.channels / t.columns;
  t.rows = static_cast<int>(std::clamp<int64_t>(height, 1, most));
  return t;
}

// The constants of a kernel.
template <int of_channels, int of_depth>
struct TileSize {
  static constexpr int channels = of_channels, depth = of_depth;
  static_assert(channels % 16 == 0 && depth % 8 == 0 && kResults % channels == 0, "");
};

// call(size) for a size that kernels of tensors of type T are compiled for.
template <typename T, typename Call>
void on_size(const Tuned& row, const Call& call) {
  if constexpr (std::is_same_v<T, double>) {
    call(TileSize<16, 8>{});
  } else {
    if (row.channels == 16) call(TileSize<16, 16>{});
    else if (row.channels == 32) call(TileSize<32, 16>{});
    else call(TileSize<64, 16>{});
  }
}

// Whether the products of a forward are rounded and go to tensor cores. Those of float32 never do:
// they decide signs below the next ReLU (rdarts_fast/networks/precision.py).
template <typename T>
constexpr bool kForwardRounds = sizeof(T) == 2;

// call(tensor): the same of a backward, for float32 where the caller lets it.
template <typename T, typename Call>
void on_products(const Tuned& row, const Place& place, const Call& call) {
  if constexpr (std::is_same_v<T, float>) {
    if (place.tf32 && row.tensor_cores) return call(std::true_type{});
  }
  call(std::bool_constant<kForwardRounds<T>>{});
}

// Whether a kernel of that size is compiled for every row.
constexpr bool all_compiled() {
  for (const Tuned& row : kTuned) {
    const bool wide = row.dtype == DType::kFloat64;
    const bool whole = row.channels == 16 || row.channels == 32 || row.channels == 64;
    if (!whole || row.depth != (wide ? 8 : 16) || (wide && row.channels != 16)) return false;
    if (row.rows * row.columns * row.channels > kResults) return false;
  }
  return true;
}
static_assert(all_compiled(), "kTuned: a row that on_size has no kernels for");

}  // namespace rdarts
