// Each lane reads its right neighbour, which the last lane of the mask does not have.
#include "faults.h"

namespace faults::absent_lane {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int i = threadIdx.x;
  if (i < 16) {
    const float value = in[i];
    out[i] = __shfl_sync(0xFFFFu, value, planted ? i + 1 : (i + 1) % 16);
  }
}

const Entry entry("absent_lane", [](bool planted, Output out, Input in) {
  run("absent_lane", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(32)}, out, in);
});

}  // namespace
}  // namespace faults::absent_lane
