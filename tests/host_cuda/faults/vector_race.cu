// A rotation by five in shared memory that is filled by vectors.
#include "faults.h"

namespace faults::vector_race {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  const auto values = rdarts::dynamic_shared<float>(64, 16);
  const int i = threadIdx.x;
  values.store<float4>(4 * i, in.load<float4>(4 * i));
  if (!planted) __syncthreads();
  for (int j = 4 * i; j < 4 * i + 4; ++j) out[j] = values[(j + 59) % 64];
}

const Entry entry("vector_race", [](bool planted, Output out, Input in) {
  run("vector_race", planted, kernel<true>, kernel<false>,
      rdarts::Grid{dim3(1), dim3(16), 16 + 64 * sizeof(float)}, out, in);
});

}  // namespace
}  // namespace faults::vector_race
