// A count by atomics, which has its value only behind a barrier.
#include "faults.h"

namespace faults::atomic_race {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  __shared__ rdarts::Shared<int, 1> positive;
  const int i = threadIdx.x;
  if (i == 0) positive[0] = 0;
  __syncthreads();
  if (in[i] > 0.0f) atomicAdd(&positive[0], 1);
  if (!planted) __syncthreads();
  if (i == 63) out[0] = static_cast<float>(positive[0]);
}

const Entry entry("atomic_race", [](bool planted, Output out, Input in) {
  run("atomic_race", planted, kernel<true>, kernel<false>, rdarts::Grid{dim3(1), dim3(64)}, out,
      in);
});

}  // namespace
}  // namespace faults::atomic_race
