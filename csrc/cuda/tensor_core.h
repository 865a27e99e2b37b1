// Matrix products on tensor cores: the one file with instructions of PTX, and for the host bodies
// that give what those do. A warp multiplies [16, 8] by [8, 8]: factors are rounded to tf32 (10 bits
// of mantissa, ties away from zero), products are exact, sums are float32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rdarts {

// The bits of a float whose last 13 do not count.
struct Tf32 {
  uint32_t bits;
};

__device__ __forceinline__ Tf32 tf32_of(float value) {
  Tf32 rounded;
#ifdef RDARTS_ON_HOST
  const uint32_t word = __float_as_uint(value);
  const bool finite = (word & 0x7F800000u) != 0x7F800000u;
  rounded.bits = finite ? (word + 0x1000u) & ~0x1FFFu : word;
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded.bits) : "f"(value));
#endif
  return rounded;
}

// sum += a b, by all lanes of a warp. Of lane 4 g + t
//   a  [16, 8]   a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4]
//   b  [8, 8]    b[t, g], b[t + 4, g]
//   sum [16, 8]  sum[g, 2 t], sum[g, 2 t + 1], sum[g + 8, 2 t], sum[g + 8, 2 t + 1]
// (PTX ISA, mma.m16n8k8 of .tf32).
__device__ __forceinline__ void multiply_add(const Tf32 (&a)[4], const Tf32 (&b)[2],
                                             float (&sum)[4]) {
#ifdef RDARTS_ON_HOST
  const int lane = static_cast<int>(threadIdx.x) % warpSize, t = lane % 4;
  const auto of = [](Tf32 value, int from) {
    return __uint_as_float(__shfl_sync(~0u, value.bits, from));
  };
  for (int k = 0; k < 8; ++k) {
    const int near = lane - t + k % 4, across = 8 * t + k % 4;
    const float upper = of(a[k / 4 * 2], near), lower = of(a[k / 4 * 2 + 1], near);
    const float left = of(b[k / 4], across), right = of(b[k / 4], across + 4);
    sum[0] += upper * left, sum[1] += upper * right;
    sum[2] += lower * left, sum[3] += lower * right;
  }
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0].bits), "r"(a[1].bits), "r"(a[2].bits), "r"(a[3].bits), "r"(b[0].bits),
        "r"(b[1].bits));
#endif
}

}  // namespace rdarts
