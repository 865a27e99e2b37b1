// The module's functions of the correlation.
#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;

namespace rdarts {
namespace {

void run_correlation(const Correlation& arguments, const Place& place) {
  RDARTS_LAUNCH(correlation, arguments, place.threads);
}
void run_adjoint(const CorrelationAdjoint& arguments, const Place& place) {
  RDARTS_LAUNCH(correlation_adjoint, arguments, place.threads);
}

// Three tensors of `shape`, but one of them has `count` channels.
std::vector<Array> three_of(int dtype, const Shape& shape, int64_t count, size_t which,
                            const Numbers& tensors) {
  std::vector<Array> a = arrays_of(dtype, shape, tensors);
  if (a.size() != 3 || dtype > 1 || count < 1) {
    throw std::invalid_argument("expected three float32 or float64 tensors and a displacement");
  }
  a[which].shape[1] = count;
  return a;
}

void correlation_at(int dtype, const Shape& shape, int64_t first, int64_t count,
                    const Numbers& tensors, const Place& place) {
  const std::vector<Array> a = three_of(dtype, shape, count, 2, tensors);
  run_correlation({a[0], a[1], a[2], first}, place);
}

void correlation_adjoint_at(int dtype, const Shape& shape, int64_t first, int64_t count,
                            bool to_right, const Numbers& tensors, const Place& place) {
  const std::vector<Array> a = three_of(dtype, shape, count, 0, tensors);
  run_adjoint({a[0], a[1], a[2], first, to_right}, place);
}

}  // namespace

void define_correlations(py::module_& module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def("correlation", &correlation_at, "left, right, out.", released);
  module.def("correlation_adjoint", &correlation_adjoint_at, "g, the other image, out.", released);
}

}  // namespace rdarts
