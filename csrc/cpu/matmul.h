// Products of small matrices in registers:  C[m, n] (+)= sum_k A[m, k] * B[k, n].
//
// A is read number by number, B and C in vectors of L. Rows are pixels or channels, and what runs
// along them lies in blocks of L channels:
//   A[m, k]  at a[k / L * a_block + m * L + k % L];  transposed, at a[m / L * a_block + k * L + m % L]
//   B[k, .]  block j at b[j * b_block + k * L]
//   C[m, .]  block j at c[j * c_block + offset[m]]
#pragma once

#include <algorithm>

#include "vectors.h"

namespace rdarts {
namespace {

#define RDARTS_UNROLL _Pragma("GCC unroll 32")

// Memory that comes into the cache while products are computed, a line at every step of their depth:
// all at once, they would be waited for.
class Ahead {
 public:
  // What some steps fetch: a line each, `step` bytes from the last.
  struct Lines {
    const char* at;
    int64_t step;
  };

  void add(const void* from, int64_t bytes) {
    if (count_ == kMost || bytes <= 0) return;
    const char* const begin = static_cast<const char*>(from);
    runs_[count_++] = {begin, begin + bytes};
    lines_ += (bytes + kLine - 1) / kLine;
  }
  // What was added is fetched in so many steps.
  void spread(int64_t steps) {
    each_ = static_cast<float>(lines_) / static_cast<float>(std::max<int64_t>(1, steps));
  }

  // The lines of the next `steps` steps, `idle` where none is left. What the plan has beyond them is
  // fetched now.
  RDARTS_METHOD Lines take(int steps, const void* idle) {
    if (run_ == count_) return {static_cast<const char*>(idle), 0};
    const char* const at = runs_[run_].at;
    const int64_t left = (runs_[run_].end - at + kLine - 1) / kLine;
    const int64_t own = left < steps ? left : steps;
    skip(own);
    fetch_now(each_ * static_cast<float>(steps) - static_cast<float>(own));
    return {at, own == steps ? kLine : own * kLine / steps};
  }

 private:
  static constexpr int kMost = 96;
  static constexpr int64_t kLine = 64;
  struct Run {
    const char *at, *end;
  };

  void skip(int64_t lines) {
    runs_[run_].at += lines * kLine;
    if (runs_[run_].at >= runs_[run_].end) ++run_;
  }
  void fetch_now(float lines) {
    for (owed_ += lines; owed_ >= 1.0f && run_ < count_; owed_ -= 1.0f, skip(1)) {
      __builtin_prefetch(runs_[run_].at);
    }
  }

  Run runs_[kMost];
  int count_ = 0, run_ = 0;
  int64_t lines_ = 0;
  float each_ = 0.0f, owed_ = 0.0f;  // lines a step, and those that are behind the plan
};

template <typename T>
struct Product {
  const T* a;
  int64_t a_block;
  const T* b;
  int64_t b_block;
  T* c;
  int64_t c_block;
  const int* offset;        // [M]
  int rows, depth, blocks;  // M, K, vectors in a row of C
  Ahead* ahead = nullptr;
};

// What becomes of a tile of sums: they replace C's numbers, or are added to them.
struct Replace {
  template <int rows, int wide, typename T>
  RDARTS_METHOD void operator()(const Product<T>& p, int m, int j, Vec<T> (&sum)[rows][wide]) const {
    RDARTS_UNROLL
    for (int r = 0; r < rows; ++r) {
      RDARTS_UNROLL
      for (int i = 0; i < wide; ++i) store(p.c + (j + i) * p.c_block + p.offset[m + r], sum[r][i]);
    }
  }
};

struct Add {
  template <int rows, int wide, typename T>
  RDARTS_METHOD void operator()(const Product<T>& p, int m, int j, Vec<T> (&sum)[rows][wide]) const {
    RDARTS_UNROLL
    for (int r = 0; r < rows; ++r) {
      RDARTS_UNROLL
      for (int i = 0; i < wide; ++i) {
        T* const c = p.c + (j + i) * p.c_block + p.offset[m + r];
        store<T>(c, load(c) + sum[r][i]);
      }
    }
  }
};

// `rows` rows from m on, `wide` vectors from block j on.
template <int rows, int wide, bool transposed, typename T, typename Finish>
RDARTS_METHOD void product_tile(const Product<T>& p, int m, int j, const Finish& finish) {
  constexpr int L = kVector<T>;
  Vec<T> sum[rows][wide];
  RDARTS_UNROLL
  for (int r = 0; r < rows; ++r) {
    RDARTS_UNROLL
    for (int i = 0; i < wide; ++i) sum[r][i] = Vec<T>{};
  }
  const T* b = p.b + j * p.b_block;
  const int64_t next = p.b_block;
  Ahead::Lines lines = {reinterpret_cast<const char*>(b), 0};
  const auto take_lines = [&](int steps) {
    if (p.ahead) lines = p.ahead->take(steps, b);
  };
  const auto step = [&](const auto& number) {
    __builtin_prefetch(lines.at);
    lines.at += lines.step;
    Vec<T> row[wide];
    RDARTS_UNROLL
    for (int i = 0; i < wide; ++i) row[i] = load(b + i * next);
    b += L;
    RDARTS_UNROLL
    for (int r = 0; r < rows; ++r) {
      const T value = number(r);
      RDARTS_UNROLL
      for (int i = 0; i < wide; ++i) sum[r][i] += value * row[i];
    }
  };
  if constexpr (transposed) {
    // m is a multiple of `rows`, so that no tile begins in one block and ends in the next but where
    // it has whole blocks.
    const T* const a = p.a + m / L * p.a_block + m % L;
    for (int begin = 0; begin < p.depth; begin += L) {
      const int end = p.depth - begin < L ? p.depth : begin + L;
      take_lines(end - begin);
      for (int64_t k = begin; k < end; ++k) {
        step([&](int r) { return a[r / L * p.a_block + r % L + k * L]; });
      }
    }
  } else {
    const T* block = p.a + m * L;
    for (int begin = 0; begin < p.depth; begin += L, block += p.a_block) {
      const int end = p.depth - begin < L ? p.depth - begin : L;
      take_lines(end);
      for (int k = 0; k < end; ++k) step([&](int r) { return block[r * L + k]; });
    }
  }
  finish.template operator()<rows, wide, T>(p, m, j, sum);
}

// As many rows at once as the registers hold: 16 of them, or 32 with AVX-512. Transposed, a power of
// two, or a tile could begin within a block and end in the next.
template <int wide, bool transposed>
constexpr int kMostRows = kWideBytes < 64 ? (wide == 1 ? 8 : transposed ? 4 : 6) : transposed ? 8 : 12;

template <int wide, bool transposed, typename T, typename Finish>
void product_columns(const Product<T>& p, int j, const Finish& finish) {
  constexpr int most = kMostRows<wide, transposed>;
  int m = 0;
  for (; m + most <= p.rows; m += most) product_tile<most, wide, transposed>(p, m, j, finish);
  if constexpr (most > 8) {
    if (m + 8 <= p.rows) product_tile<8, wide, transposed>(p, m, j, finish), m += 8;
  }
  if (m + 4 <= p.rows) product_tile<4, wide, transposed>(p, m, j, finish), m += 4;
  if (m + 2 <= p.rows) product_tile<2, wide, transposed>(p, m, j, finish), m += 2;
  if (m + 1 <= p.rows) product_tile<1, wide, transposed>(p, m, j, finish);
}

// Tiles of product_columns, and steps of a product.
template <int wide, bool transposed>
int64_t tiles_of(int64_t rows) {
  constexpr int most = kMostRows<wide, transposed>;
  const int64_t rest = rows % most;
  return rows / most + (rest >> 3) + (rest >> 2 & 1) + (rest >> 1 & 1) + (rest & 1);
}
template <bool transposed>
int64_t steps_of(int64_t rows, int64_t depth, int64_t blocks) {
  return (blocks / 2 * tiles_of<2, transposed>(rows) + blocks % 2 * tiles_of<1, transposed>(rows)) *
         depth;
}

template <bool transposed, typename T, typename Finish>
void multiply(const Product<T>& p, const Finish& finish) {
  int j = 0;
  for (; j + 2 <= p.blocks; j += 2) product_columns<2, transposed>(p, j, finish);
  if (j < p.blocks) product_columns<1, transposed>(p, j, finish);
}

}  // namespace
}  // namespace rdarts
