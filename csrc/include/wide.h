// A vector of 64-bit words as wide as the unit's registers. This header is where the instruction
// sets differ.
#pragma once

#include <cstdint>
#include <cstring>

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

#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits of the first words set, none of the others.
RDARTS_BODY __m256i first_words(int64_t words) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(words)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// Copies kWideBytes to an address that is a multiple of it, past the cache where that can be done.
RDARTS_BODY void store_wide_past_cache(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#else
  std::memcpy(to, from, kWideBytes);
#endif
}

// The first `words` words of 32 bits of a vector, fewer than it has; a load makes the others 0. Memory
// past them is not touched.
template <typename Vector>
RDARTS_BODY Vector load_words(const void* from, int64_t words) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << words) - 1), from);
#elif defined(__AVX2__)
  return (Vector)_mm256_maskload_epi32(static_cast<const int*>(from), first_words(words));
#else
  Vector vector = {};
  std::memcpy(&vector, from, words * 4);
  return vector;
#endif
}

template <typename Vector>
RDARTS_BODY void store_words(void* to, Vector vector, int64_t words) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << words) - 1), (__m512i)vector);
#elif defined(__AVX2__)
  _mm256_maskstore_epi32(static_cast<int*>(to), first_words(words), (__m256i)vector);
#else
  std::memcpy(to, &vector, words * 4);
#endif
}

// Keeps a loaded vector in a register: a compiler that loads it anew at every use makes the loads, not
// the arithmetic, the limit.
template <typename Vector>
RDARTS_BODY void keep(Vector& vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#elif defined(__SSE2__)
  asm("" : "+x"(vector));
#endif
}

// Lets other threads see what was stored past the cache.
RDARTS_BODY void finish_stores() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

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
