// float32 tensors rounded to bfloat16 (rounding.h).
#include "rounding.h"

#include "launchers.h"
#include "parallel.h"

namespace rdarts {
namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers that a thread takes at once

void round_run(const Rounding& a, int k, int64_t begin, int64_t end) {
  const float* const z = a.z[k];
  uint16_t* const out = a.out[k];
  if (!a.scale) {
    for (int64_t i = begin; i < end; ++i) out[i] = nearest_bfloat16(z[i]);
    return;
  }
  const float* const scale = a.scale + k * a.channels;
  const float* const shift = a.shift + k * a.channels;
  int64_t c = begin % a.channels;
  for (int64_t i = begin; i < end; ++i) {
    out[i] = rounded_beside(z[i], scale[c], shift[c]);
    if (++c == a.channels) c = 0;
  }
}

}  // namespace

template <>
void rounding<RDARTS_UNIT>(const Rounding& a, int threads) {
  for (int k = 0; k < a.inputs; ++k) {
    parallel_for(a.count, kGrain, threads,
                 [&](int64_t begin, int64_t end) { round_run(a, k, begin, end); });
  }
}

}  // namespace rdarts
