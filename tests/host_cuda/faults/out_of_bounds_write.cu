// A copy; the grid is rounded up, so the last block has threads to spare.
#include "faults.h"

namespace faults::out_of_bounds_write {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  const float value = i < in.size ? in[i] : 0.0f;
  if (planted || i < out.size) out[i] = value;
}

const Entry entry("out_of_bounds_write", [](bool planted, Output out, Input in) {
  run("out_of_bounds_write", planted, kernel<true>, kernel<false>,
      rdarts::grid_of(in.size, 64), out, in);
});

}  // namespace
}  // namespace faults::out_of_bounds_write
