// Differences of neighbours; the last element has no right neighbour.
#include "faults.h"

namespace faults::out_of_bounds_read {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= out.size) return;
  const int64_t next = planted || i + 1 < in.size ? i + 1 : i;
  out[i] = in[next] - in[i];
}

const Entry entry("out_of_bounds_read", [](bool planted, Output out, Input in) {
  run("out_of_bounds_read", planted, kernel<true>, kernel<false>,
      rdarts::grid_of(out.size, 64), out, in);
});

}  // namespace
}  // namespace faults::out_of_bounds_read
