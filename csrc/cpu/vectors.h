// Vectors of channels: the unit's registers, in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

#include "wide.h"

namespace rdarts {
namespace {

template <typename T>
constexpr int kVector = kWideBytes / static_cast<int>(sizeof(T));  // elements a vector

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kWideBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kWideBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::Type;

template <typename T>
RDARTS_METHOD Vec<T> load(const T* from) {
  Vec<T> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename T>
RDARTS_METHOD void store(T* to, const Vec<T>& vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// To memory that is not read soon: its old contents are not fetched. `to` is aligned to a vector.
template <typename T>
RDARTS_METHOD void store_past_cache(T* to, const Vec<T>& vector) {
  store_wide_past_cache(to, &vector);
}

// `count` numbers, fewer than a vector has, and zeros.
template <typename T>
RDARTS_METHOD Vec<T> load_part(const T* from, int64_t count) {
  return load_words<Vec<T>>(from, count * int64_t{sizeof(T) / 4});
}

template <typename T>
RDARTS_METHOD void store_part(T* to, const Vec<T>& vector, int64_t count) {
  store_words(to, vector, count * int64_t{sizeof(T) / 4});
}

// NaN stays NaN, as in torch.
template <typename T>
RDARTS_METHOD Vec<T> relu(const Vec<T>& a) {
  return a <= Vec<T>{} ? Vec<T>{} : a;
}

// a where y, a result of relu, is not 0.
template <typename T>
RDARTS_METHOD Vec<T> where_passed(const Vec<T>& a, const Vec<T>& y) {
  return y <= Vec<T>{} ? Vec<T>{} : a;
}

// The sum of `count` numbers, a multiple of a vector of doubles; in pairs, none waits for the last.
template <int count, typename T>
RDARTS_METHOD double sum_of(const T* numbers) {
  constexpr int L = kVector<double>;
  Vec<double> total = {};
  for (int first = 0; first < count; first += L) {
    Vec<double> part;
    for (int i = 0; i < L; ++i) part[i] = numbers[first + i];
    total += part;
  }
  if constexpr (L == 2) return total[0] + total[1];
  else if constexpr (L == 4) return (total[0] + total[1]) + (total[2] + total[3]);
  else return ((total[0] + total[1]) + (total[2] + total[3])) +
              ((total[4] + total[5]) + (total[6] + total[7]));
}

// Adds the lanes to doubles.
template <typename T>
RDARTS_METHOD void add_to(double* sums, Vec<T> vector, int64_t count = kVector<T>) {
  for (int64_t i = 0; i < count; ++i) sums[i] += vector[i];
}

}  // namespace
}  // namespace rdarts
