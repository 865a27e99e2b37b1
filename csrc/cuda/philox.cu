// Fills device memory with Philox numbers; the formulas are in philox.h.
#include "philox.h"

#include "launch.h"
#include "launchers.h"
#include "tile.h"

namespace rdarts {
namespace {

// One thread per block of four numbers.
template <typename Kind>
__global__ void fill_kernel(Span<typename Kind::Value> out, PhiloxStart start,
                            Span<const uint32_t> clock) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (4 * block >= out.size) return;
  const PhiloxStart now = read_clock(start, clock);
  const auto four = Kind::numbers(philox4x32(static_cast<uint32_t>(block), now));
  const typename Kind::Value numbers[4] = {four.a, four.b, four.c, four.d};
  for (int i = 0; i < 4; ++i) {
    if (4 * block + i < out.size) out[4 * block + i] = numbers[i];
  }
}

template <typename Kind>
void fill(typename Kind::Value* out, int64_t count, PhiloxStart start, const Place& place) {
  launch("philox", fill_kernel<Kind>, grid_of((count + 3) / 4), place,
         Span<typename Kind::Value>{out, count}, start, clock_of(start));
}

}  // namespace

namespace cuda {

void philox_bits(int64_t* out, int64_t count, PhiloxStart start, const Place& place) {
  fill<Bits>(out, count, start, place);
}

void philox_uniform(float* out, int64_t count, PhiloxStart start, const Place& place) {
  fill<Uniform>(out, count, start, place);
}

void philox_normal(float* out, int64_t count, PhiloxStart start, const Place& place) {
  fill<Normal>(out, count, start, place);
}

}  // namespace cuda
}  // namespace rdarts
