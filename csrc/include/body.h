// What the bodies shared by the CPU and the CUDA side are made of. This header is where the
// compilers differ.
#pragma once

#include <cstdint>
#include <cstring>

// Bodies are static, so that no unit compiled for AVX-512 can lend its copy to the baseline.
#ifdef __CUDACC__
#define RDARTS_BODY static __host__ __device__ __forceinline__
#define RDARTS_METHOD __host__ __device__ __forceinline__
#else
#define RDARTS_BODY static inline __attribute__((always_inline))
#define RDARTS_METHOD inline __attribute__((always_inline))
#endif

namespace rdarts {

// Float32 operations rounded once, never contracted: everywhere the same bits. On the host the
// build passes -ffp-contract=off.
#ifdef __CUDA_ARCH__
RDARTS_BODY float mul(float a, float b) { return __fmul_rn(a, b); }
RDARTS_BODY float add(float a, float b) { return __fadd_rn(a, b); }
RDARTS_BODY float root(float a) { return __fsqrt_rn(a); }
RDARTS_BODY int32_t bits_of(float a) { return __float_as_int(a); }
RDARTS_BODY float float_of(int32_t a) { return __int_as_float(a); }
#else
RDARTS_BODY float mul(float a, float b) { return a * b; }
RDARTS_BODY float add(float a, float b) { return a + b; }
RDARTS_BODY float root(float a) { return __builtin_sqrtf(a); }
RDARTS_BODY int32_t bits_of(float a) {
  int32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
RDARTS_BODY float float_of(int32_t a) {
  float value;
  std::memcpy(&value, &a, sizeof value);
  return value;
}
#endif

}  // namespace rdarts
