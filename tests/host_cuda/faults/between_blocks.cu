// Sums of neighbouring blocks: what another block of the launch wrote must not be read.
#include "faults.h"

namespace faults::between_blocks {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int64_t i = blockIdx.x;
  out[i] = in[i];
  const float other = planted ? static_cast<float>(out[i ^ 1]) : in[i ^ 1];
  out[i] += other;
}

const Entry entry("between_blocks", [](bool planted, Output out, Input in) {
  run("between_blocks", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(static_cast<unsigned>(out.size)), dim3(1)}, out, in);
});

}  // namespace
}  // namespace faults::between_blocks
