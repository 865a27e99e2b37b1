// Sums over pairs of lanes; the mask must name the lanes that come, and no others.
#include "faults.h"

namespace faults::part_of_a_warp {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int i = threadIdx.x;
  if (i < 16) {
    const float value = in[i];
    out[i] = value + __shfl_xor_sync(planted ? 0xFFFFFFFFu : 0xFFFFu, value, 1);
  }
}

const Entry entry("part_of_a_warp", [](bool planted, Output out, Input in) {
  run("part_of_a_warp", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(32)}, out, in);
});

}  // namespace
}  // namespace faults::part_of_a_warp
