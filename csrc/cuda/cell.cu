// The arithmetic of a cell's batch norms (cell.h).
#include "cell.h"

#include "launch.h"
#include "launchers.h"
#include "sums.h"

namespace rdarts {
namespace {

// One thread per channel of a term.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
term_coefficients_kernel(const __grid_constant__ TermCoefficients a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t channels = a.terms.table.channels;
  if (i >= a.terms.inputs * channels) return;
  term_coefficients_at<T>(a, static_cast<int>(i / channels), i % channels);
}

// One block per term; no two terms share a weight.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
term_gradients_kernel(const __grid_constant__ TermGradients a) {
  __shared__ Shared<double, kThreads> shared;
  const int k = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  T* const dweights = static_cast<T*>(a.dweights);
  double sums[1] = {0};
  for (int64_t c = thread; c < a.terms.table.channels; c += kThreads) {
    sums[0] += term_gradients_at<T>(a, k, c);
  }
  add_rows(sums, Split{1, kThreads, 0, 0, 0}, shared);
  if (!dweights) return;
  if (thread == 0) dweights[a.terms.weight[k]] = static_cast<T>(sums[0]);
  if (k == 0 && thread < a.drawn) {
    dweights[a.drawn_weight[thread]] = static_cast<T>(a.drawn_sums[thread]);
  }
}

// One thread per channel of a row.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
row_gradients_kernel(const __grid_constant__ RowGradients a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < a.inputs * a.table.channels) row_gradients_at<T>(a, i);
}

}  // namespace

namespace cuda {

void term_coefficients(const TermCoefficients& a, const Place& place) {
  const auto kernel = a.terms.table.dtype == DType::kFloat64 ? term_coefficients_kernel<double>
                                                             : term_coefficients_kernel<float>;
  const int64_t count = a.terms.inputs * a.terms.table.channels;
  launch("term_coefficients", kernel, grid_of(count, kThreads), place, a);
}

void term_gradients(const TermGradients& a, const Place& place) {
  const auto kernel = a.terms.table.dtype == DType::kFloat64 ? term_gradients_kernel<double>
                                                             : term_gradients_kernel<float>;
  launch("term_gradients", kernel, Grid{blocks_of(a.terms.inputs), kThreads}, place, a);
}

void row_gradients(const RowGradients& a, const Place& place) {
  const auto kernel = a.table.dtype == DType::kFloat64 ? row_gradients_kernel<double>
                                                       : row_gradients_kernel<float>;
  launch("row_gradients", kernel, grid_of(a.inputs * a.table.channels, kThreads), place, a);
}

}  // namespace cuda
}  // namespace rdarts
