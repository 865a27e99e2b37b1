// Several jobs in one launch, each with a grid of its own: their blocks follow one another.
#pragma once

#include <algorithm>

#include "launch.h"

namespace rdarts {

// A block's place in the grid of its job, and how many there are along x and y.
struct BlockAt {
  unsigned x, y, z, across, down;
};

template <int count>
struct Jobs {
  unsigned across[count], down[count], deep[count];  // blocks of each

  // Returns the job of this block, and where in that it stands.
  __device__ __forceinline__ int find(BlockAt& at) const {
    unsigned i = blockIdx.x;
    int job = 0;
    for (; job + 1 < count && i >= blocks(job); ++job) i -= blocks(job);
    at.across = across[job], at.down = down[job];
    at.x = i % at.across, at.y = i / at.across % at.down, at.z = i / at.across / at.down;
    return job;
  }

 private:
  __device__ unsigned blocks(int job) const { return across[job] * down[job] * deep[job]; }
};

// ---- On the host.

constexpr Grid kNoGrid = {dim3(0, 1, 1), dim3(1), 0};  // of a job that has nothing to do

// Tells the jobs their grids; returns that of all.
template <int count>
Grid join(Jobs<count>& jobs, const Grid (&grids)[count]) {
  int64_t all = 0;
  Grid joined = kNoGrid;
  for (int job = 0; job < count; ++job) {
    const Grid& grid = grids[job];
    jobs.across[job] = grid.blocks.x, jobs.down[job] = grid.blocks.y;
    jobs.deep[job] = grid.blocks.z;
    all += int64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
    if (grid.blocks.x > 0) joined.threads = grid.threads;
    joined.shared = std::max(joined.shared, grid.shared);
  }
  joined.blocks = blocks_of(all);
  return joined;
}

}  // namespace rdarts
