// A vector of 64-bit words as wide as the unit's registers. This header is where the instruction
// sets differ.
#pragma once

#include <cstdint>

#include "body.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace rdarts {

#if defined(__AVX512F__)
constexpr int kWideBytes = 64;
#elif defined(__AVX2__)
constexpr int kWideBytes = 32;
#else
constexpr int kWideBytes = 16;
#endif

struct WideLane {
  typedef uint64_t Word __attribute__((vector_size(kWideBytes), may_alias));
  // The products of the low halves.
  RDARTS_BODY Word product(Word a, Word b) {
#if defined(__AVX512F__)
    return (Word)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Word)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Word)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
  }
};

}  // namespace rdarts
