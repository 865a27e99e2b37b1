// The positive elements in a row: in the order of their indices, not first come.
#include "faults.h"

namespace faults::first_come {
namespace {

template <bool planted>
__global__ void kernel(Output out, Input in) {
  __shared__ rdarts::Shared<unsigned, 1> tickets;
  const unsigned i = threadIdx.x;
  const bool chosen = in[i] > 0.0f;
  const unsigned ballot = __ballot_sync(0xFFFFFFFFu, chosen);
  if (i == 0) tickets[0] = 0;
  __syncthreads();
  const unsigned place = planted && chosen ? atomicAdd(&tickets[0], 1)
                                           : __popc(ballot & ((1u << i) - 1));
  if (chosen) out[place] = in[i];
}

const Entry entry("first_come", [](bool planted, Output out, Input in) {
  run("first_come", planted, kernel<true>, kernel<false>, rdarts::Grid{dim3(1), dim3(32)}, out, in);
});

}  // namespace
}  // namespace faults::first_come
