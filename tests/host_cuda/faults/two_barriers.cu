// A reversal whose halves wait at barriers of their own.
#include "faults.h"

namespace faults::two_barriers {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  __shared__ rdarts::Shared<float, 64> values;
  const int i = threadIdx.x;
  values[i] = in[i];
  if (planted && i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[i] = values[63 - i];
}

const Entry entry("two_barriers", [](bool planted, Output out, Input in) {
  run("two_barriers", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(64)}, out, in);
});

}  // namespace
}  // namespace faults::two_barriers
