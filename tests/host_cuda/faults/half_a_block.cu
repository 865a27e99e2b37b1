// A vote of a warp that the block fills by half.
#include "faults.h"

namespace faults::half_a_block {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int i = threadIdx.x;
  const unsigned mask = planted ? 0xFFFFFFFFu : 0xFFFFu;
  out[i] = static_cast<float>(__popc(__ballot_sync(mask, in[i] > 0.0f)));
}

const Entry entry("half_a_block", [](bool planted, Output out, Input in) {
  run("half_a_block", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(16)}, out, in);
});

}  // namespace
}  // namespace faults::half_a_block
