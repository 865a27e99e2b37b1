// Two rotations by one in one array: it must be read by all before it is overwritten.
#include "faults.h"

namespace faults::write_after_read {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  __shared__ rdarts::Shared<float, 64> values;
  const int i = threadIdx.x;
  values[i] = in[i];
  __syncthreads();
  const float first = values[(i + 1) % 64];
  if (!planted) __syncthreads();
  values[i] = first;
  __syncthreads();
  out[i] = values[(i + 1) % 64];
}

const Entry entry("write_after_read", [](bool planted, Output out, Input in) {
  run("write_after_read", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(64)}, out, in);
});

}  // namespace
}  // namespace faults::write_after_read
