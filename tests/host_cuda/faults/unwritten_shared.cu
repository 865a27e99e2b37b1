// A sum over shared memory of which only the first half was filled.
#include "faults.h"

namespace faults::unwritten_shared {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  __shared__ rdarts::Shared<float, 64> values;
  const int i = threadIdx.x;
  values[i] = in[i];
  if (!planted) values[i + 32] = in[i + 32];
  __syncthreads();
  out[i] = values[i] + values[i + 32];
}

const Entry entry("unwritten_shared", [](bool planted, Output out, Input in) {
  run("unwritten_shared", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(32)}, out, in);
});

}  // namespace
}  // namespace faults::unwritten_shared
