// The arithmetic of a cell's batch norms (cell.h): a few values a channel, on the calling thread.
#include "cell.h"

#include "launchers.h"

namespace rdarts {
namespace {

template <typename T>
void coefficients_of(const TermCoefficients& a) {
  for (int k = 0; k < a.terms.inputs; ++k) {
    for (int64_t c = 0; c < a.terms.table.channels; ++c) term_coefficients_at<T>(a, k, c);
  }
}

template <typename T>
void gradients_of(const TermGradients& a) {
  T* const dweights = static_cast<T*>(a.dweights);
  for (int k = 0; k < a.terms.inputs; ++k) {
    double along = 0;
    for (int64_t c = 0; c < a.terms.table.channels; ++c) along += term_gradients_at<T>(a, k, c);
    if (dweights) dweights[a.terms.weight[k]] = static_cast<T>(along);
  }
  if (!dweights) return;
  for (int j = 0; j < a.drawn; ++j) dweights[a.drawn_weight[j]] = static_cast<T>(a.drawn_sums[j]);
}

template <typename T>
void gradients_of(const RowGradients& a) {
  for (int64_t i = 0; i < a.inputs * a.table.channels; ++i) row_gradients_at<T>(a, i);
}

}  // namespace

template <>
void term_coefficients<RDARTS_UNIT>(const TermCoefficients& a) {
  if (a.terms.table.dtype == DType::kFloat64) coefficients_of<double>(a);
  else coefficients_of<float>(a);
}

template <>
void term_gradients<RDARTS_UNIT>(const TermGradients& a) {
  if (a.terms.table.dtype == DType::kFloat64) gradients_of<double>(a);
  else gradients_of<float>(a);
}

template <>
void row_gradients<RDARTS_UNIT>(const RowGradients& a) {
  if (a.table.dtype == DType::kFloat64) gradients_of<double>(a);
  else gradients_of<float>(a);
}

}  // namespace rdarts
