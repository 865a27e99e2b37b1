// A copy four at a time; the rest must not be forgotten.
#include "faults.h"

namespace faults::unwritten_output {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int64_t i = 4 * static_cast<int64_t>(threadIdx.x);
  const int64_t end = i + 4 <= out.size || !planted ? i + 4 : i;
  for (int64_t j = i; j < end && j < out.size; ++j) out[j] = in[j];
}

const Entry entry("unwritten_output", [](bool planted, Output out, Input in) {
  run("unwritten_output", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(static_cast<unsigned>((out.size + 3) / 4))}, out, in);
});

}  // namespace
}  // namespace faults::unwritten_output
