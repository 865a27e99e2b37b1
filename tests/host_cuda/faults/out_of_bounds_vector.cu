// A copy by vectors; the last vector of an odd size reaches beyond the end.
#include "faults.h"

namespace faults::out_of_bounds_vector {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const int64_t i = 4 * threadIdx.x;
  if (i + 4 <= in.size || planted) {
    out.store<float4>(i, in.load<float4>(i));
  } else {
    for (int64_t j = i; j < in.size; ++j) out[j] = in[j];
  }
}

const Entry entry("out_of_bounds_vector", [](bool planted, Output out, Input in) {
  run("out_of_bounds_vector", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(8)}, out, in);
});

}  // namespace
}  // namespace faults::out_of_bounds_vector
