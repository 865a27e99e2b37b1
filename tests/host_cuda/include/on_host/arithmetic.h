// Intrinsics of arithmetic. Each rounds once: the build passes -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace on_host {

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace on_host

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }

inline int __float_as_int(float a) { return on_host::same_bits<int>(a); }
inline unsigned __float_as_uint(float a) { return on_host::same_bits<unsigned>(a); }
inline float __int_as_float(int a) { return on_host::same_bits<float>(a); }
inline float __uint_as_float(unsigned a) { return on_host::same_bits<float>(a); }
inline long long __double_as_longlong(double a) { return on_host::same_bits<long long>(a); }
inline double __longlong_as_double(long long a) { return on_host::same_bits<double>(a); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (a >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

#define ON_HOST_MIN_MAX(TYPE)                              \
  inline TYPE min(TYPE a, TYPE b) { return b < a ? b : a; } \
  inline TYPE max(TYPE a, TYPE b) { return a < b ? b : a; }
ON_HOST_MIN_MAX(int)
ON_HOST_MIN_MAX(unsigned)
ON_HOST_MIN_MAX(long)
ON_HOST_MIN_MAX(unsigned long)
ON_HOST_MIN_MAX(long long)
ON_HOST_MIN_MAX(unsigned long long)
#undef ON_HOST_MIN_MAX
// As on the device, a NaN loses against a number.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
