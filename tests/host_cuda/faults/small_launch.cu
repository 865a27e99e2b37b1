// A reversal in dynamic shared memory, of which the launch gave too little.
#include "faults.h"

namespace faults::small_launch {
namespace {

__global__ void kernel(Output out, Input in) {
  const auto values = rdarts::dynamic_shared<float>(64);
  const int i = threadIdx.x;
  values[i] = in[i];
  __syncthreads();
  out[i] = values[63 - i];
}

const Entry entry("small_launch", [](bool planted, Output out, Input in) {
  const size_t bytes = (planted ? 63 : 64) * sizeof(float);
  run("small_launch", planted, kernel, kernel, rdarts::Grid{dim3(1), dim3(64), bytes}, out, in);
});

}  // namespace
}  // namespace faults::small_launch
