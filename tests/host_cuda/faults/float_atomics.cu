// A sum by atomics, which rounds in the order in which the threads come.
#include "faults.h"

namespace faults::float_atomics {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  __shared__ rdarts::Shared<float, 256> values;
  const int i = threadIdx.x;
  if (planted) {
    atomicAdd(&out[0], in[i]);
    return;
  }
  values[i] = in[i];
  for (int stride = 128; stride > 0; stride /= 2) {
    __syncthreads();
    if (i < stride) values[i] += values[i + stride];
  }
  if (i == 0) out[0] += values[0];
}

const Entry entry("float_atomics", [](bool planted, Output out, Input in) {
  run("float_atomics", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(256)}, out, in);
});

}  // namespace
}  // namespace faults::float_atomics
