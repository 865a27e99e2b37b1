// The last block adds what all have written: without a fence it may read what is not there yet.
#include <algorithm>

#include "faults.h"
#include "last.h"

namespace faults::last_block {
namespace {

using rdarts::Span;

// comes_last without its first fence.
__device__ bool comes_last_unfenced(const Span<uint32_t>& counters, unsigned blocks) {
  __shared__ rdarts::Shared<uint32_t, 1> before;
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = atomicAdd(&counters[0], 1u);
    __threadfence();
  }
  __syncthreads();
  return before[0] + 1 == blocks;
}

// out[0] = the sum of the rest, which the blocks write; out's last number counts them.
template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Span<uint32_t> counters = {reinterpret_cast<uint32_t*>(out.data + in.size + 1), 1};
  out[1 + i] = in[i];
  const bool last = planted ? comes_last_unfenced(counters, gridDim.x)
                            : rdarts::comes_last(counters, 0, gridDim.x);
  if (!last || threadIdx.x > 0) return;
  double sum = 0;
  for (int64_t k = 0; k < in.size; ++k) sum += out[1 + k];
  out[0] = static_cast<float>(sum);
}

const Entry entry("last_block", [](bool planted, Output out, Input in) {
  std::fill(out.data + in.size + 1, out.data + out.size, 0.0f);
  run("last_block", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(static_cast<unsigned>(in.size / 4)), dim3(4)}, out, in);
});

}  // namespace
}  // namespace faults::last_block
