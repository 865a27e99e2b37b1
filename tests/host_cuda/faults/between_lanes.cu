// A reversal within a warp. A shuffle brings the lanes together, but orders no memory.
#include "faults.h"

namespace faults::between_lanes {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const auto values = rdarts::dynamic_shared<float>(32);
  const int i = threadIdx.x;
  values[i] = in[i];
  if (planted) {
    __shfl_xor_sync(0xFFFFFFFFu, i, 1);
  } else {
    __syncwarp();
  }
  out[i] = values[31 - i];
}

const Entry entry("between_lanes", [](bool planted, Output out, Input in) {
  run("between_lanes", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(32), 32 * sizeof(float)}, out, in);
});

}  // namespace
}  // namespace faults::between_lanes
