// The last block of a launch to come to an end goes on to add what all of them have left in memory,
// in place of a second launch. Which block that is hangs on luck, what it computes does not.
#pragma once

#include <stdexcept>

#include "place.h"
#include "span.h"

namespace rdarts {

// Of a place, zeros between launches; launches that share them run one after another.
inline Span<uint32_t> counters_of(const Place& place) {
  if (place.counters) return {place.counters, kCounters};
  throw std::runtime_error("counters: expected their address in the place of a CUDA launch");
}

// Whether this block is the last of `blocks` to come here with counter `which`, which is none where
// there is one block: it may then read what the others wrote before. All threads call it, once.
__device__ __forceinline__ bool comes_last(const Span<uint32_t>& counters, int64_t which,
                                           unsigned blocks) {
  __shared__ Shared<uint32_t, 1> before;
  if (blocks == 1) {
    __syncthreads();
    return true;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = atomicAdd(&counters[which], 1u);
    __threadfence();
  }
  __syncthreads();
  if (before[0] + 1 < blocks) return false;
  if (threadIdx.x == 0) atomicExch(&counters[which], 0u);
  return true;
}

}  // namespace rdarts
