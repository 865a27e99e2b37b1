// A reversal of the first 48; the other threads must still come to the barrier.
#include "faults.h"

namespace faults::early_return {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  __shared__ rdarts::Shared<float, 64> values;
  const int i = threadIdx.x;
  if (planted && i >= 48) return;
  values[i] = in[i];
  __syncthreads();
  if (i < 48) out[i] = values[47 - i];
}

const Entry entry("early_return", [](bool planted, Output out, Input in) {
  run("early_return", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(64)}, out, in);
});

}  // namespace
}  // namespace faults::early_return
