// CUDA's words that C++ does not have.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __constant__ static
// One object for all blocks, which run one after another; span.h's Shared notices a new block.
#define __shared__ static

#define threadIdx (::on_host::running.thread)
#define blockIdx (::on_host::running.block)
#define blockDim (::on_host::running.threads)
#define gridDim (::on_host::running.blocks)
constexpr int warpSize = 32;
