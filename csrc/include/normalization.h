// The arithmetic of a batch norm on one channel of one input, the same on every device.
#pragma once

#include <cmath>

#include "body.h"
#include "node_sum.h"

namespace rdarts {

struct Statistics {
  double mean, rstd;
};

// A channel's running mean and variance, where there are such.
template <typename T>
struct RunningOf {
  bool exist;
  T mean, var;
};

// What a batch norm has of a channel, by its sums about a pivot, which move the running numbers; or,
// not in training, by those.
template <typename T>
RDARTS_BODY Statistics statistics_of(const NormRule& rule, double sum, double square, double pivot,
                                     RunningOf<T>& running) {
  if (!rule.training) return {running.mean, 1 / std::sqrt(running.var + rule.eps)};
  const double offset = sum / rule.count, mean = pivot + offset;
  double var = square / rule.count - offset * offset;
  if (var < 0) var = 0;
  if (running.exist) {
    const double old = 1 - rule.momentum, unbiased = var * (rule.count / (rule.count - 1));
    running.mean = static_cast<T>(rule.momentum * mean + old * running.mean);
    running.var = static_cast<T>(rule.momentum * unbiased + old * running.var);
  }
  return {mean, 1 / std::sqrt(var + rule.eps)};
}

// The shift belongs to the rounded scale, so that a large mean does not show its rounding.
template <typename T>
struct MapOf {
  T scale, shift;

  RDARTS_METHOD MapOf(double weight, const Statistics& s)
      : scale(static_cast<T>(weight * s.rstd)), shift(static_cast<T>(-scale * s.mean)) {}
};

// Fills the statistics, the running buffers and the coefficients at (k, c).
template <typename T>
RDARTS_BODY void normalize_channel(const Normalization& a, int k, int64_t c) {
  const int64_t i = k * a.channels + c;
  const double weight = a.weights ? static_cast<const T*>(a.weights)[k] : T(1);
  Statistics s = {0, 1};
  if (a.normalised >> k & 1) {
    T* const running_mean = static_cast<T*>(a.running_mean[k]);
    T* const running_var = static_cast<T*>(a.running_var[k]);
    RunningOf<T> running = {running_mean != nullptr, T(0), T(0)};
    if (running.exist) running.mean = running_mean[c], running.var = running_var[c];
    double sums[3] = {};
    for (int i = 0; a.rule.training && i < 3; ++i) sums[i] = a.sums[k][c + i * a.apart[k]];
    s = statistics_of(a.rule, sums[0], sums[1], sums[2], running);
    if (running.exist && a.rule.training) {
      running_mean[c] = running.mean, running_var[c] = running.var;
    }
    if (c == 0 && a.tracked[k] && a.rule.training) ++*a.tracked[k];
  }
  a.mean[i] = s.mean;
  a.rstd[i] = s.rstd;
  if (!a.scale) return;
  const MapOf<T> map(weight, s);
  static_cast<T*>(a.scale)[i] = map.scale;
  static_cast<T*>(a.shift)[i] = map.shift;
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
