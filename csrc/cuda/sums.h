// How the CUDA kernels sum per channel. A thread adds up to kRun numbers in the coefficients' type,
// a block its threads' sums in float64; the last block (last.h), or a second launch, adds the
// blocks' sums in a fixed order. How the work is split depends on the shapes and strides alone.
#pragma once

#include <algorithm>

#include "launch.h"
#include "tile.h"

namespace rdarts {
namespace {

constexpr unsigned kThreads = 256;  // one block a multiprocessor will do: nvcc spilled to fit more
constexpr int kMostColumns = 16;
constexpr int64_t kRun = 32;

// A block sums a few channels. Its threads stand in columns and rows: a column has the channels of
// a tile, its rows take turns at the positions, which several blocks may share.
struct Split {
  int columns, rows;
  int64_t groups;     // of columns
  int64_t positions;  // tiles of one column
  int64_t parts;      // blocks that share them
};

template <typename Tile>
Split split_of(const Walk& walk) {
  const int64_t deep = walk.channels / Tile::kChannels;
  Split s;
  s.groups = Tile::kInner ? (deep + kMostColumns - 1) / kMostColumns : deep;
  s.columns = Tile::kInner && deep > 0 ? static_cast<int>((deep + s.groups - 1) / s.groups) : 1;
  s.rows = static_cast<int>(kThreads) / s.columns;
  s.positions = walk.samples * walk.rows * across_of<Tile>(walk);
  s.parts = std::max<int64_t>(1, (s.positions + s.rows * kRun - 1) / (s.rows * kRun));
  return s;
}

// What a thread of the block sums.
template <typename Tile>
struct Share {
  int column, row;
  int64_t part, channel;
  bool active;

  __device__ Share(const Split& s, const Walk& walk)
      : column(static_cast<int>(threadIdx.x) % s.columns),
        row(static_cast<int>(threadIdx.x) / s.columns),
        part(blockIdx.x % s.parts),
        channel((blockIdx.x / s.parts * s.columns + column) * Tile::kChannels),
        active(row < s.rows && channel < walk.channels) {}

  // Its positions are begin, begin + rows, ... before end.
  template <typename Index>
  __device__ Index begin(const Split& s) const {
    return static_cast<Index>(part * s.rows * kRun + row);
  }
  template <typename Index>
  __device__ Index end(const Split& s) const {
    return static_cast<Index>(min((part + 1) * s.rows * kRun, s.positions));
  }
};

// Adds each of the values over the rows of every column; row 0 has the sums. All threads call it.
template <int count>
__device__ __forceinline__ void add_rows(double (&values)[count], const Split& s,
                                         Shared<double, count * kThreads>& shared) {
  const int thread = static_cast<int>(threadIdx.x), row = thread / s.columns;
  __syncthreads();  // what was there before has been read
#pragma unroll
  for (int i = 0; i < count; ++i) shared[i * kThreads + thread] = values[i];
  __syncthreads();
  for (int rows = s.rows; rows > 1; rows = (rows + 1) / 2) {
    const int half = (rows + 1) / 2;
    if (row + half < rows) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        values[i] += shared[i * kThreads + thread + half * s.columns];
        shared[i * kThreads + thread] = values[i];
      }
    }
    __syncthreads();
  }
}

// The lanes of a vector of pixels are one channel's.
template <typename Tile>
constexpr int kSums = Tile::kInner ? Tile::kLanes : 1;

template <typename Tile, typename Sum>
__device__ __forceinline__ void accumulate(Sum (&sums)[kSums<Tile>],
                                           const Sum (&values)[Tile::kLanes]) {
  if constexpr (Tile::kInner) {
#pragma unroll
    for (int i = 0; i < Tile::kLanes; ++i) sums[i] += values[i];
  } else {
    Sum sum = values[0];
#pragma unroll
    for (int i = 1; i < Tile::kLanes; ++i) sum += values[i];
    sums[0] += sum;
  }
}

// sums[i] = sum of partial[i, .] for i from `first` to `end`, a warp of the block each.
__device__ __forceinline__ void add_parts(const Span<double>& partial, int64_t parts, int64_t first,
                                          int64_t end, const Span<double>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  for (int64_t i = first + threadIdx.x / warpSize; i < end; i += kThreads / warpSize) {
    double sum = 0;
    for (int64_t part = lane; part < parts; part += warpSize) sum += partial[i * parts + part];
    for (int step = warpSize / 2; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
    if (lane == 0) sums[i] = sum;
  }
}

// sums[i] = sum of partial[i, .], one warp each.
__global__ void __launch_bounds__(kThreads, 1)
combine_kernel(Span<const double> partial, int64_t parts, Span<double> sums) {
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / warpSize;
  if (i >= sums.size) return;
  double sum = 0;
  for (int64_t part = lane; part < parts; part += warpSize) sum += partial[i * parts + part];
  for (int step = warpSize / 2; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (lane == 0) sums[i] = sum;
}

// Where the blocks' sums go; a single part is the sum itself.
inline Span<double> partial_of(double* sums, double* workspace, int64_t size, int64_t parts) {
  return {parts == 1 ? sums : workspace, size * parts};
}

// Fills `sums` from partial[sums.size, parts], which partial_of has placed.
inline void combine(const char* name, const Span<double>& partial, int64_t parts,
             const Span<double>& sums, const Place& place) {
  if (parts == 1) return;
  launch(name, combine_kernel, grid_of(32 * sums.size, kThreads), place,
         Span<const double>{partial.data, partial.size}, parts, sums);
}

}  // namespace
}  // namespace rdarts
