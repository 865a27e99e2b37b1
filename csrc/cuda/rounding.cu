// float32 tensors rounded to bfloat16 (rounding.h).
#include "rounding.h"

#include "launch.h"
#include "launchers.h"
#include "span.h"

namespace rdarts {
namespace {

constexpr int kThreads = 256;

// Of tensor blockIdx.y; a thread takes `lanes` numbers that lie one behind the other.
template <int lanes>
__global__ void __launch_bounds__(kThreads)
rounding_kernel(const __grid_constant__ Rounding a) {
  const int k = static_cast<int>(blockIdx.y);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads * lanes;
  const int64_t first = base + threadIdx.x * lanes;
  if (first >= a.count) return;
  const Span<const float> z{a.z[k], a.count};
  const Span<uint16_t> out{a.out[k], a.count};
  float x[lanes];
  if constexpr (lanes == 4) {
    const float4 four = z.template load<float4>(first);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    x[0] = z[first];
  }
  uint16_t bits[lanes];
  if (a.scale) {
    const int64_t size = a.inputs * a.channels, row = k * a.channels;
    const Span<const float> scale{a.scale, size}, shift{a.shift, size};
    // The block's first channel by a division of 64 bits, the thread's by one of 32.
    const uint32_t channels = static_cast<uint32_t>(a.channels);
    uint32_t c = (static_cast<uint32_t>(base % a.channels) + threadIdx.x * lanes) % channels;
    for (int i = 0; i < lanes; ++i) {
      bits[i] = rounded_beside(x[i], scale[row + c], shift[row + c]);
      if (++c == channels) c = 0;
    }
  } else {
    for (int i = 0; i < lanes; ++i) bits[i] = nearest_bfloat16(x[i]);
  }
  if constexpr (lanes == 4) {  // as one number: nvcc may split the store of a struct
    const uint64_t low = bits[0] | static_cast<uint32_t>(bits[1]) << 16;
    const uint64_t high = bits[2] | static_cast<uint32_t>(bits[3]) << 16;
    out.store(first, low | high << 32);
  } else {
    out[first] = bits[0];
  }
}

bool in_fours(const Rounding& a) {
  uintptr_t addresses = 0;
  for (int k = 0; k < a.inputs; ++k) {
    addresses |= reinterpret_cast<uintptr_t>(a.z[k]) | 2 * reinterpret_cast<uintptr_t>(a.out[k]);
  }
  return a.count % 4 == 0 && addresses % sizeof(float4) == 0;
}

template <int lanes>
void run(const Rounding& a, const Place& place) {
  const int64_t blocks = (a.count + kThreads * lanes - 1) / (kThreads * lanes);
  launch("rounding", rounding_kernel<lanes>, Grid{blocks_of(blocks, a.inputs), dim3(kThreads)}, place, a);
}

}  // namespace

namespace cuda {

void rounding(const Rounding& a, const Place& place) {
  if (in_fours(a)) run<4>(a, place);
  else run<1>(a, place);
}

}  // namespace cuda
}  // namespace rdarts
