// A copy by vectors, from an element that no vector may start at.
#include "faults.h"

namespace faults::misaligned_vector {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int64_t i = 4 * threadIdx.x;
  const float4 four = in.load<float4>(planted ? i + 1 : i);
  out.store<float4>(i, four);
}

const Entry entry("misaligned_vector", [](bool planted, Output out, Input in) {
  run("misaligned_vector", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(8)}, out, in);
});

}  // namespace
}  // namespace faults::misaligned_vector
