// A shift by one in shared memory: right by luck where the threads run in ascending order.
#include "faults.h"

namespace faults::read_after_write {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  __shared__ rdarts::Shared<float, 64> values;
  const int i = threadIdx.x;
  values[i] = in[i];
  if (!planted) __syncthreads();
  out[i] = values[i > 0 ? i - 1 : 0];
}

const Entry entry("read_after_write", [](bool planted, Output out, Input in) {
  run("read_after_write", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(64)}, out, in);
});

}  // namespace
}  // namespace faults::read_after_write
