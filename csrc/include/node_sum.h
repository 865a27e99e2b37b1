// What the launchers of the node sum, its adjoints and the channel sums take. Arrays of one call
// share shape and dtype. Coefficients are packed, float64 for float64 arrays, else float32; sums
// are float64. A null pointer is an absent argument.
#pragma once

#include <cstdint>

#include "array.h"
#include "philox.h"

namespace rdarts {

constexpr int kMostInputs = 64;

struct TermCoefficients;  // cell.h
struct TermGradients;

// sum_j factors[j, n] * weights[j] * N(0, 1) of site j at the logical index ((n C + c) H + h) W + w.
struct Drawn {
  int count;
  PhiloxStart start;  // c1 comes from `sites`
  uint32_t sites[kMostInputs];
  const void* weights;  // [J]
  const void* factors;  // [J, N] or null
  float* kept;          // [J, N C H W] or null: on the CPU node_sum leaves the numbers there for
                        // node_sum_dq, which takes them instead of drawing again
};

constexpr int kMostSums = 2;  // of the same tensors

// out = sum_k factors[k, n] * (scale[k, c] * z_k + shift[k, c]) + drawn; out may be one of the z
struct NodeSum {
  Array out;
  const Array* z;
  int inputs;
  const void* scale;    // [K, C]
  const void* shift;    // [K, C] or null
  const void* factors;  // [K, N] or null
  Drawn drawn;
  // What fills scale and shift (cell.h): on a GPU the same launch, where they need not be there.
  const TermCoefficients* terms = nullptr;
  // On a GPU, without terms and noise: several sums of the same z, whose rows of scale, shift and
  // factors follow one another; the first of outs is out.
  int sums = 1;
  const Array* outs = nullptr;
};

// out_k = factors[k, n] * by_g[k, c] * g + by_z[k, c] * z_k + constant[k, c]
struct Affine {
  Array g;             // absent: no such term
  const Array* z;      // one absent: no such term in this out_k
  const Array* out;    // one absent: not wanted
  int inputs;
  const void* by_g;      // [K, C]
  const void* by_z;      // [K, C] or null
  const void* constant;  // [K, C] or null
  const void* factors;   // [K, N] or null
};

// sums[0] = sum of (z_k - pivot),  sums[1] = sum of (z_k - pivot)^2, over n, h, w
struct ChannelSums {
  const Array* z;
  int inputs;
  const double* pivot;  // [K, C], rounded to the coefficients' dtype; null: each channel's first element
  double* sums;         // [3 or 2, K, C]; the pivots come third where `pivot` is null
  double* workspace;
};

constexpr int kMostOwn = 2;  // inputs of gradients of their own

// sums[0] = sum of f g (z_k - pivot),  sums[1] = sum of f g,  drawn_sums[j] = sum of f_j g N(0, 1)
struct NodeSumDq {
  Array g;
  const Array* z;
  int inputs;
  const double* pivot;  // [K, C], rounded to the coefficients' dtype; null: zeros
  const void* factors;  // [K, N] or null
  Drawn drawn;
  double* sums;        // [2, K, C]
  double* drawn_sums;  // [J]
  double* workspace;
  const TermGradients* terms = nullptr;  // of these sums: on a GPU the same launches fill them
  const Array* own = nullptr;  // [K] or null: each input's g, in place of the one; on a GPU alone
};

struct NormRule {
  double count;  // elements a channel
  double eps, momentum;
  bool training;
};

// Coefficients of the node sum from the sums of its normalised inputs, and what the backward needs.
struct Normalization {
  DType dtype;
  int inputs;
  int64_t channels;
  NormRule rule;
  uint64_t normalised;              // bit k
  const double* sums[kMostInputs];  // [3, C] of channel_sums, in training
  int64_t apart[kMostInputs];       // from one of the three to the next
  void* running_mean[kMostInputs];  // [C] or null
  void* running_var[kMostInputs];
  int64_t* tracked[kMostInputs];  // batches counted, or null
  const void* weights;  // [K]; null for ones
  double* mean;         // [K, C] each
  double* rstd;
  void* scale;  // [K, C] each, or null: not wanted
  void* shift;
};

// Coefficients of the affine map that is the backward of the normalised sum.
struct NormalizationBackward {
  DType dtype;
  int inputs;
  int64_t channels;
  double count;
  bool training;
  uint64_t normalised;       // bit k
  const void* weights;  // [K]
  const double* sums;   // [2, K, C] of node_sum_dq about the mean
  const double* mean;   // [K, C] each
  const double* rstd;
  double* dweights;  // [K]
  void* by_g;        // [K, C] each
  void* by_z;
  void* constant;
};

}  // namespace rdarts
