// Stands in for CUDA's header of this name: bfloat16, computed in float32 and rounded to the
// nearest, ties to even.
#pragma once

#include <cstdint>

#include "on_host/arithmetic.h"
#include "on_host/vectors.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits(rounded(value)) {}
  __nv_bfloat16(double) = delete;  // would be rounded twice
  operator float() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

 private:
  static uint16_t rounded(float value) {
    const uint32_t word = __float_as_uint(value);
    if ((word & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
    return static_cast<uint16_t>((word + 0x7FFFu + (word >> 16 & 1u)) >> 16);
  }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) { return {value.x, value.y}; }
