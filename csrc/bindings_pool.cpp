// The module's functions of the pools.
#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;

namespace rdarts {
namespace {

void run_pool(const Pool& arguments, const Place& place) {
  RDARTS_LAUNCH(pool, arguments, place.threads);
}
void run_tangent(const Pool& arguments, const Place& place) {
  RDARTS_LAUNCH(pool_tangent, arguments, place.threads);
}
void run_adjoint(const PoolAdjoint& arguments, const Place& place) {
  RDARTS_LAUNCH(pool_adjoint, arguments, place.threads);
}

// What the maximum, the mean, their places (as flat numbers) and the source have in common.
Pool pool_of(int dtype, const Shape& shape, int stride, const Numbers& tensors,
             const Place& place) {
  std::vector<Array> a = arrays_of(dtype, shape, tensors);
  if (a.size() != 4 || (stride != 1 && stride != 2)) {
    throw std::invalid_argument("expected four tensors and a stride of 1 or 2");
  }
  check_cpu_dtype(a[0].dtype, place);
  for (size_t i = 1; i < a.size(); ++i) {
    for (int d = 2; d < 4; ++d) a[i].shape[d] = pooled(shape[d], stride);
  }
  a[3].dtype = DType::kUInt8;
  return {a[0], {a[1], a[2]}, a[3], stride, nullptr, nullptr};
}

void pool_at(int dtype, const Shape& shape, int stride, const Numbers& tensors, Address buffer,
             const Place& place) {
  Pool pool = pool_of(dtype, shape, stride, tensors, place);
  pool.sums = pointer<double>(buffer);
  pool.workspace = pool.sums + 3 * kinds_of(pool.out) * shape[1];
  run_pool(pool, place);
}

void pool_tangent_at(int dtype, const Shape& shape, int stride, const Numbers& tensors,
                     const Place& place) {
  run_tangent(pool_of(dtype, shape, stride, tensors, place), place);
}

void pool_adjoint_at(int dtype, const Shape& shape, int stride, const Numbers& tensors,
                     const Place& place) {
  const Pool pool = pool_of(dtype, shape, stride, tensors, place);
  run_adjoint({{pool.out[0], pool.out[1]}, pool.place, pool.x, stride}, place);
}

}  // namespace

void define_pools(py::module_& module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def("pool", &pool_at, "x, max, mean, places; sums, then workspace.", released);
  module.def("pool_tangent", &pool_tangent_at, "x, max, mean, places.", released);
  module.def("pool_adjoint", &pool_adjoint_at, "dx, g of max, g of mean, places.", released);
}

}  // namespace rdarts
