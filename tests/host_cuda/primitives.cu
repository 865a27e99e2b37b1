// What each primitive gives, for the tests to compare with a model of it.
#include <cuda_bf16.h>

#include "faults/faults.h"
#include "../../csrc/cuda/tensor_core.h"

namespace faults::primitives {
namespace {

// out[10 * thread ...]: what a thread of two warps gets.
__global__ void every_primitive(Output out, Input in) {
  const int i = threadIdx.x + blockDim.x * threadIdx.y, lane = i % 32;
  const unsigned all = 0xFFFFFFFFu;
  const float value = in[i];
  out[10 * i] = __shfl_sync(all, value, 5);
  out[10 * i + 1] = __shfl_sync(all, value, 9, 8);
  out[10 * i + 2] = __shfl_up_sync(all, value, 3, 16);
  out[10 * i + 3] = static_cast<float>(__shfl_down_sync(all, static_cast<double>(value), 2));
  out[10 * i + 4] = __shfl_xor_sync(all, value, 4, 4);
  const unsigned ballot = __ballot_sync(all, value > 0.0f);
  out[10 * i + 5] = static_cast<float>(ballot >> 16) + static_cast<float>(ballot & 0xFFFFu);
  out[10 * i + 6] = static_cast<float>(__any_sync(all, lane == 7 && value > 0.0f) +
                                       2 * __all_sync(all, value > 0.0f || lane != 9));
  out[10 * i + 7] = static_cast<float>(__syncthreads_count(value > 0.0f));
  out[10 * i + 8] = static_cast<float>(__syncthreads_or(value > 2.5f) +
                                       2 * __syncthreads_and(value < 2.5f));
  out[10 * i + 9] = __nv_bfloat16(value);
}

__global__ void bfloat16s(Output out, Input in) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < in.size) out[i] = __bfloat162float(__float2bfloat16(in[i]));
}

// Integers, whose sum is exact in any order, and the largest of them.
__global__ void atomics(Output out, Input in) {
  __shared__ rdarts::Shared<int, 2> found;
  const int i = threadIdx.x;
  if (i == 0) found[0] = 0, found[1] = -1000;
  __syncthreads();
  atomicAdd(&found[0], static_cast<int>(in[i]));
  atomicMax(&found[1], static_cast<int>(in[i]));
  __syncthreads();
  if (i < 2) out[i] = static_cast<float>(found[i]);
}

// Vectors to and from both kinds of memory.
__global__ void vectors(Output out, Input in) {
  __shared__ rdarts::Shared<float, 64> values;
  const int i = threadIdx.x;
  values.store<float2>(2 * i, in.load<float2>(2 * i));
  __syncthreads();
  if (i < 16) out.store<float4>(4 * i, values.load<float4>(60 - 4 * i));
}

__global__ void tf32s(Output out, Input in) {
  const int i = threadIdx.x;
  out[i] = __uint_as_float(rdarts::tf32_of(in[i]).bits);
}

// out [16, 8] = a b + c, of a [16, 8], b [8, 8] and c [16, 8], which follow one another.
__global__ void tensor_core(Output out, Input in) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const auto a = [&](int row, int k) { return rdarts::tf32_of(in[8 * row + k]); };
  const auto b = [&](int k, int column) { return rdarts::tf32_of(in[128 + 8 * k + column]); };
  const rdarts::Tf32 left[4] = {a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4)};
  const rdarts::Tf32 right[2] = {b(t, g), b(t + 4, g)};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = in[192 + 8 * (g + i / 2 * 8) + 2 * t + i % 2];
  rdarts::multiply_add(left, right, sum);
  for (int i = 0; i < 4; ++i) out[8 * (g + i / 2 * 8) + 2 * t + i % 2] = sum[i];
}

// What each block finds in shared memory, behind the back of the checks.
__global__ void poison(Output out, Input in) {
  __shared__ rdarts::Shared<float, 1> fixed;
  const auto dynamic = rdarts::dynamic_shared<float>(1);
  const int64_t i = 2 * blockIdx.x;
  out[i] = *fixed.span().data;
  out[i + 1] = *dynamic.data;
  fixed[0] = in[i];
  dynamic[0] = in[i];
}

// Every block reads every element, of which one block overwrites the first.
__global__ void overwritten(Output out, Input in) {
  float sum = in[0];
  for (int64_t i = 0; i < out.size; ++i) sum += out[i];
  if (blockIdx.x == 1) out[0] = sum;
}

// The halves of a warp go separate ways, each with shuffles of its own.
__global__ void halves(Output out, Input in) {
  const int i = threadIdx.x;
  const unsigned mask = i < 16 ? 0xFFFFu : 0xFFFF0000u;
  float sum = in[i];
  if (i < 16) {
    for (int bit = 1; bit < 16; bit *= 2) sum += __shfl_xor_sync(mask, sum, bit);
  } else {
    for (int bit = 8; bit > 0; bit /= 2) sum += __shfl_xor_sync(mask, sum, bit);
    __syncwarp(mask);
  }
  out[i] = sum;
}

__device__ float block_sum(float value, const rdarts::SharedSpan<float>& sums) {
  const int warp = threadIdx.x / 32;
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, bit);
  if (threadIdx.x % 32 == 0) sums[warp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) total += sums[i];
  return total;
}

// One sum a block, by shuffles and shared memory.
__global__ void __launch_bounds__(256) block_sums(Output out, Input in) {
  const auto sums = rdarts::dynamic_shared<float>(8);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const float sum = block_sum(i < in.size ? in[i] : 0.0f, sums);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// More dynamic shared memory than a launch gives unasked, or all of it, which leaves none for static.
template <int count>
__global__ void large(Output out, Input in) {
  const auto values = rdarts::dynamic_shared<float>(count);
  const int i = threadIdx.x;
  values[count - 1 - i] = in[i];
  __syncthreads();
  out[i] = values[count - 64 + i];
}

const Entry entries[] = {
    {"primitives",
     [](bool, Output out, Input in) {
       rdarts::launch("primitives", every_primitive, rdarts::Grid{dim3(1), dim3(32, 2)}, kPlace,
                      out, in);
     }},
    {"bfloat16s",
     [](bool, Output out, Input in) {
       rdarts::launch("bfloat16s", bfloat16s, rdarts::grid_of(in.size), kPlace, out, in);
     }},
    {"atomics",
     [](bool, Output out, Input in) {
       rdarts::launch("atomics", atomics, rdarts::Grid{dim3(1), dim3(64)}, kPlace, out, in);
     }},
    {"vectors",
     [](bool, Output out, Input in) {
       rdarts::launch("vectors", vectors, rdarts::Grid{dim3(1), dim3(32)}, kPlace, out, in);
     }},
    {"tf32s",
     [](bool, Output out, Input in) {
       const auto threads = static_cast<unsigned>(in.size);
       rdarts::launch("tf32s", tf32s, rdarts::Grid{dim3(1), dim3(threads)}, kPlace, out, in);
     }},
    {"tensor_core",
     [](bool, Output out, Input in) {
       rdarts::launch("tensor_core", tensor_core, rdarts::Grid{dim3(1), dim3(32)}, kPlace, out, in);
     }},
    {"poison",
     [](bool, Output out, Input in) {
       rdarts::launch("poison", poison, rdarts::Grid{dim3(2), dim3(1), sizeof(float)}, kPlace, out,
                      in);
     }},
    {"overwritten",
     [](bool, Output out, Input in) {
       rdarts::launch("overwritten", overwritten, rdarts::Grid{dim3(2), dim3(1)}, kPlace, out, in);
     }},
    {"halves",
     [](bool, Output out, Input in) {
       rdarts::launch("halves", halves, rdarts::Grid{dim3(1), dim3(32)}, kPlace, out, in);
     }},
    {"block_sums",
     [](bool, Output out, Input in) {
       const auto blocks = static_cast<unsigned>(out.size);
       rdarts::launch("block_sums", block_sums,
                      rdarts::Grid{dim3(blocks), dim3(256), 8 * sizeof(float)}, kPlace, out, in);
     }},
    {"large",
     [](bool, Output out, Input in) {
       const rdarts::Grid grid = {dim3(1), dim3(64), 64 * 1024};
       rdarts::launch("large", large<16 * 1024>, grid, kPlace, out, in);
     }},
    {"all_unasked",
     [](bool, Output out, Input in) {
       const rdarts::Grid grid = {dim3(1), dim3(64), rdarts::kSharedByDefault};
       rdarts::launch("all_unasked", large<12 * 1024>, grid, kPlace, out, in);
     }},
    {"too_many_threads",
     [](bool, Output out, Input in) {
       rdarts::launch("too_many_threads", halves, rdarts::Grid{dim3(1), dim3(2048)}, kPlace, out,
                      in);
     }},
    {"most_blocks",
     [](bool, Output out, Input) {
       const dim3 blocks = rdarts::blocks_of(INT32_MAX, UINT16_MAX, UINT16_MAX);
       const unsigned sizes[] = {blocks.x, blocks.y, blocks.z};
       for (int i = 0; i < 3; ++i) out.data[i] = static_cast<float>(sizes[i]);
     }},
    {"too_many_blocks",
     [](bool, Output, Input in) {
       const auto size = [&](int i) { return static_cast<int64_t>(in.data[i]); };
       rdarts::blocks_of(size(0), size(1), size(2));
     }},
    {"too_many_items",
     [](bool, Output, Input) { rdarts::grid_of(int64_t{256} * INT32_MAX + 1); }},
    {"no_such_device",
     [](bool, Output out, Input in) {
       const rdarts::Place place = {rdarts::Unit::kBase, 1, 1000, 0};
       rdarts::launch("no_such_device", halves, rdarts::Grid{dim3(1), dim3(32)}, place, out, in);
     }},
};

}  // namespace
}  // namespace faults::primitives
