// exp and expm1 of vectors of numbers that are not above 0.
//   x = k ln 2 + r,  |r| <= ln 2 / 2;  expm1(r) by its series;  exp(x) = 2^k + 2^k expm1(r)
#pragma once

#include "vectors.h"

namespace rdarts {
namespace {

template <typename T>
struct ExpNumbers;
template <>
struct ExpNumbers<float> {
  typedef int32_t Integers __attribute__((vector_size(kWideBytes)));
  static constexpr float least = -87.0f, shift = 12582912.0f;  // 1.5 2^23: rounds to whole numbers
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int terms = 7, mantissa = 23;
  static constexpr int32_t one = 0x3F800000;
};
template <>
struct ExpNumbers<double> {
  typedef int64_t Integers __attribute__((vector_size(kWideBytes)));
  static constexpr double least = -708.0, shift = 6755399441055744.0;  // 1.5 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr int terms = 13, mantissa = 52;
  static constexpr int64_t one = 0x3FF0000000000000;
};

// expm1(r) = r (1 + r / 2 (1 + r / 3 (1 + ...)))
template <typename T, int n, int terms>
RDARTS_METHOD Vec<T> series(const Vec<T>& r) {
  if constexpr (n > terms) return Vec<T>{} + T(1);
  else return T(1) + r * T(1.0 / n) * series<T, n + 1, terms>(r);
}

template <typename T>
struct Exp {
  Vec<T> scale, rest;  // 2^k, expm1(r)

  RDARTS_METHOD explicit Exp(const Vec<T>& x) {
    using N = ExpNumbers<T>;
    const Vec<T> within = x < N::least ? Vec<T>{} + N::least : x;  // NaN stays NaN
    const Vec<T> shifted = within * T(1.4426950408889634) + N::shift, k = shifted - N::shift;
    const Vec<T> r = (within - k * N::ln2_high) - k * N::ln2_low;
    scale = (Vec<T>)(((typename N::Integers)shifted << N::mantissa) + N::one);
    rest = r * series<T, 2, N::terms>(r);
  }
};

// The Math of recurrent_body.h.
template <typename T>
struct VectorMath {
  using Number = T;
  RDARTS_BODY Vec<T> exp(const Vec<T>& x) {
    const Exp<T> e(x);
    return e.scale + e.scale * e.rest;
  }
  RDARTS_BODY Vec<T> expm1(const Vec<T>& x) {
    const Exp<T> e(x);
    return (e.scale - T(1)) + e.scale * e.rest;
  }
};

}  // namespace
}  // namespace rdarts
