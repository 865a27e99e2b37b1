// The arithmetic of a batch norm on one channel of one input, the same on every device.
#pragma once

#include <cmath>

#include "body.h"
#include "node_sum.h"

namespace rdarts {

// Fills the statistics, the running buffers and the coefficients at (k, c).
template <typename T>
RDARTS_BODY void normalize_channel(const Normalization& a, int k, int64_t c) {
  const int64_t i = k * a.channels + c;
  const double weight = a.weights ? static_cast<const T*>(a.weights)[k] : T(1);
  double mean = 0, rstd = 1;
  if (a.normalised >> k & 1) {
    T* const running_mean = static_cast<T*>(a.running_mean[k]);
    T* const running_var = static_cast<T*>(a.running_var[k]);
    double var;
    if (a.training) {
      const double* const sums = a.sums[k] + c;
      const double offset = sums[0] / a.count;
      mean = sums[2 * a.apart[k]] + offset;
      var = sums[a.apart[k]] / a.count - offset * offset;
      if (var < 0) var = 0;
      if (running_mean) {
        const double old = 1 - a.momentum, unbiased = var * (a.count / (a.count - 1));
        running_mean[c] = static_cast<T>(a.momentum * mean + old * running_mean[c]);
        running_var[c] = static_cast<T>(a.momentum * unbiased + old * running_var[c]);
      }
    } else {
      mean = running_mean[c];
      var = running_var[c];
    }
    rstd = 1 / std::sqrt(var + a.eps);
  }
  a.mean[i] = mean;
  a.rstd[i] = rstd;
  if (!a.scale) return;
  // The shift belongs to the rounded scale, so that a large mean does not show its rounding.
  const T scale = static_cast<T>(weight * rstd);
  static_cast<T*>(a.scale)[i] = scale;
  static_cast<T*>(a.shift)[i] = static_cast<T>(-scale * mean);
}

// What a normalised tensor's gradient has beside by_g f g, given sum f g and sum f g z^: by_z z +
// constant.
template <typename T>
struct NormGradient {
  T by_z, constant;
};

template <typename T>
RDARTS_BODY NormGradient<T> norm_gradient(double by_g, double mean, double rstd, double sum,
                                          double along, double count) {
  const T by_z = static_cast<T>(-by_g * rstd * along / count);
  return {by_z, static_cast<T>(-by_g * sum / count - by_z * mean)};
}

// Fills the coefficients of the backward at (k, c) and returns the channel's part of dweights[k].
template <typename T>
RDARTS_BODY double normalize_channel_backward(const NormalizationBackward& a, int k, int64_t c) {
  const int64_t i = k * a.channels + c, all = a.inputs * a.channels;
  const double mean = a.mean[i], rstd = a.rstd[i];
  const double weight = static_cast<const T*>(a.weights)[k];
  const double pivot = static_cast<T>(mean), sum_g = a.sums[all + i];
  const double along = rstd * (a.sums[i] + (pivot - mean) * sum_g);  // sum f g z^
  const double by_g = weight * rstd;
  NormGradient<T> rest = {T(0), T(0)};
  if (a.training && (a.normalised >> k & 1)) {
    rest = norm_gradient<T>(by_g, mean, rstd, sum_g, along, a.count);
  }
  static_cast<T*>(a.by_g)[i] = static_cast<T>(by_g);
  static_cast<T*>(a.by_z)[i] = rest.by_z;
  static_cast<T*>(a.constant)[i] = rest.constant;
  return along;
}

}  // namespace rdarts
