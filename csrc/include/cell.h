// What ties the kernels of a cell together: the arithmetic of its batch norms (Ioffe & Szegedy,
// 2015, without affine), one channel of one tensor at a time and the same on every device.
//
// A cell numbers the tensors that it sums or normalises. The table has a row for each: mean and rstd
// and, in the backward, what its gradient is made of,
//   dz = by_g[row, c] * f g + by_z[row, c] * z + constant[row, c]
// with g the gradient of what the tensor enters. Where a row is not normalised, 0 and 1 stand for its
// mean and rstd, which nobody fills.
#pragma once

#include <cmath>
#include <cstdint>

#include "body.h"
#include "node_sum.h"
#include "normalization.h"

namespace rdarts {

// [R, C] each; mean and rstd are float64, the rest coefficients (node_sum.h).
struct Table {
  DType dtype;
  int64_t channels;
  double count;   // elements a channel
  bool training;  // the batch's own statistics: they have gradients
  double* mean;
  double* rstd;
  void* by_g;
  void* by_z;
  void* constant;
};

// The terms of a node: out = sum_k factors[k, n] weights[weight[k]] (z_k - mean) rstd.
struct Terms {
  Table table;
  int inputs;
  uint64_t normalised;  // bit k
  uint16_t row[kMostInputs];
  uint16_t weight[kMostInputs];
  const void* weights;  // [E, O]; null for ones
};

// scale = weight * rstd, shift = -scale * mean; the means again, for node_sum_dq.
struct TermCoefficients {
  Terms terms;
  double* pivot;  // [K, C] each
  void* scale;
  void* shift;
};

// Fills the terms' rows and dweights[weight[k]] = sum f g z^, dweights[drawn_weight[j]] likewise.
struct TermGradients {
  Terms terms;
  const double* sums;        // [2, K, C] of node_sum_dq about the means
  const double* drawn_sums;  // [J]
  int drawn;                 // J
  uint16_t drawn_weight[kMostInputs];
  void* dweights;  // [E, O]; null: not wanted
  int one = -1;    // a row whose by_g is to be 1; below 0: none
};

// Fills rows [first, first + inputs): v = (z - mean) rstd, and g is the gradient of v.
struct RowGradients {
  Table table;
  int first, inputs;
  const double* sums;  // [2, G, C]: sum of g, of g v
};

RDARTS_BODY double mean_of(const Terms& a, int k, int64_t c) {
  return a.normalised >> k & 1 ? a.table.mean[a.row[k] * a.table.channels + c] : 0.0;
}

RDARTS_BODY double rstd_of(const Terms& a, int k, int64_t c) {
  return a.normalised >> k & 1 ? a.table.rstd[a.row[k] * a.table.channels + c] : 1.0;
}

template <typename T>
RDARTS_BODY double weight_of(const Terms& a, int k) {
  return a.weights ? static_cast<const T*>(a.weights)[a.weight[k]] : T(1);
}

template <typename T>
RDARTS_BODY void term_coefficients_at(const TermCoefficients& a, int k, int64_t c) {
  const int64_t i = k * a.terms.table.channels + c;
  const Statistics s = {mean_of(a.terms, k, c), rstd_of(a.terms, k, c)};
  const MapOf<T> map(weight_of<T>(a.terms, k), s);
  a.pivot[i] = s.mean;
  static_cast<T*>(a.scale)[i] = map.scale;
  static_cast<T*>(a.shift)[i] = map.shift;
}

// The row of a tensor whose normalised value has the gradient weight * f g, given sum f g and
// sum f g z^.
template <typename T>
RDARTS_BODY void fill_row(const Table& t, int64_t i, bool normalised, double weight, double sum,
                          double along) {
  const double rstd = normalised ? t.rstd[i] : 1.0, by_g = weight * rstd;
  NormGradient<T> rest = {T(0), T(0)};
  if (normalised && t.training) {
    rest = norm_gradient<T>(by_g, t.mean[i], rstd, sum, along, t.count);
  }
  static_cast<T*>(t.by_g)[i] = static_cast<T>(by_g);
  static_cast<T*>(t.by_z)[i] = rest.by_z;
  static_cast<T*>(t.constant)[i] = rest.constant;
}

// Returns the channel's part of dweights.
template <typename T>
RDARTS_BODY double term_gradients_at(const TermGradients& a, int k, int64_t c) {
  const Terms& terms = a.terms;
  const Table& table = terms.table;
  const int64_t i = k * table.channels + c, plane = terms.inputs * table.channels;
  const double mean = mean_of(terms, k, c), pivot = static_cast<T>(mean), sum = a.sums[plane + i];
  const double along = rstd_of(terms, k, c) * (a.sums[i] + (pivot - mean) * sum);
  fill_row<T>(table, terms.row[k] * table.channels + c, terms.normalised >> k & 1,
              weight_of<T>(terms, k), sum, along);
  if (k == 0 && a.one >= 0) static_cast<T*>(table.by_g)[a.one * table.channels + c] = T(1);
  return along;
}

template <typename T>
RDARTS_BODY void row_gradients_at(const RowGradients& a, int64_t i) {
  const int64_t plane = a.inputs * a.table.channels;
  fill_row<T>(a.table, a.first * a.table.channels + i, true, 1.0, a.sums[i], a.sums[plane + i]);
}

}  // namespace rdarts
