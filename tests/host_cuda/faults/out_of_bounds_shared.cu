// A reversal in shared memory, one element off.
#include "faults.h"

namespace faults::out_of_bounds_shared {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  __shared__ rdarts::Shared<float, 64> values;
  const int i = threadIdx.x;
  values[i] = in[i];
  __syncthreads();
  out[i] = values[planted ? 64 - i : 63 - i];
}

const Entry entry("out_of_bounds_shared", [](bool planted, Output out, Input in) {
  run("out_of_bounds_shared", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(64)}, out, in);
});

}  // namespace
}  // namespace faults::out_of_bounds_shared
