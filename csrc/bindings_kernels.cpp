// The module's functions of the node sum.
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace rdarts {
namespace {

using Seeds = std::optional<std::vector<uint64_t>>;

// seed, step, branch and pass, addresses of weights and factors, then the sites.
Drawn drawn_of(const Seeds& noise) {
  Drawn drawn = {};
  if (!noise) return drawn;
  const std::vector<uint64_t>& n = *noise;
  if (n.size() < 5 || n.size() > 5 + kMostInputs) {
    throw std::invalid_argument("noise: expected 5 numbers and at most 64 sites");
  }
  drawn.start = {static_cast<uint32_t>(n[0]), static_cast<uint32_t>(n[0] >> 32), 0, 0,
                 static_cast<uint32_t>(n[1]), static_cast<uint32_t>(n[2])};
  drawn.weights = pointer(n[3]);
  drawn.factors = pointer(n[4]);
  drawn.count = static_cast<int>(n.size() - 5);
  for (int j = 0; j < drawn.count; ++j) drawn.sites[j] = static_cast<uint32_t>(n[5 + j]);
  return drawn;
}

void run(const NodeSum& arguments, const Place& place) {
  RDARTS_LAUNCH(node_sum, arguments, place.threads);
}
void run(const Affine& arguments, const Place& place) {
  RDARTS_LAUNCH(affine, arguments, place.threads);
}
void run(const ChannelSums& arguments, const Place& place) {
  RDARTS_LAUNCH(channel_sums, arguments, place.threads);
}
void run(const NodeSumDq& arguments, const Place& place) {
  RDARTS_LAUNCH(node_sum_dq, arguments, place.threads);
}
void run(const Normalization& arguments, const Place& place) {
  RDARTS_LAUNCH(normalize, arguments);
}
void run(const NormalizationBackward& arguments, const Place& place) {
  RDARTS_LAUNCH(normalize_backward, arguments);
}

// Doubles that the reductions need for their partial sums.
int64_t partial_sums(const Shape& shape, int64_t inputs, int64_t sites, const Place& place) {
  if (place.device >= 0) {
    if constexpr (kCuda) {
      return cuda::workspace(shape.data(), static_cast<int>(inputs), static_cast<int>(sites));
    }
  }
  return shape[0] * (2 * inputs * shape[1] + sites);
}

// Doubles of workspace of any function below: partial sums, sums and coefficients.
int64_t workspace(const Shape& shape, int64_t inputs, int64_t sites, const Place& place) {
  return partial_sums(shape, inputs, sites, place) + 5 * inputs * shape[1];
}

void node_sum_at(int dtype, const Shape& shape, const Numbers& tensors, Address scale,
                 Address shift, Address factors, const Seeds& noise, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  check_cpu_dtype(a[0].dtype, place);
  run(NodeSum{a[0], &a[1], static_cast<int>(a.size() - 1), pointer(scale), pointer(shift),
              pointer(factors), drawn_of(noise)},
      place);
}

void affine_at(int dtype, const Shape& shape, const Numbers& tensors, Address by_g, Address by_z,
               Address constant, Address factors, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  check_cpu_dtype(a[0].dtype, place);
  const size_t inputs = a.size() / 2;  // g, then K inputs, then K outputs
  run(Affine{a[0], &a[1], &a[1 + inputs], static_cast<int>(inputs), pointer(by_g), pointer(by_z),
             pointer(constant), pointer(factors)},
      place);
}

void channel_sums_at(int dtype, const Shape& shape, const Numbers& tensors, Address pivot,
                     Address buffer, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  check_cpu_dtype(a[0].dtype, place);
  double* const sums = pointer<double>(buffer);
  const int64_t size = 2 * static_cast<int64_t>(a.size()) * shape[1];
  run(ChannelSums{a.data(), static_cast<int>(a.size()), pointer<double>(pivot), sums, sums + size},
      place);
}

void node_sum_dq_at(int dtype, const Shape& shape, const Numbers& tensors, Address pivot,
                    Address factors, const Seeds& noise, Address buffer, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  check_cpu_dtype(a[0].dtype, place);
  const int inputs = static_cast<int>(a.size() - 1);
  const Drawn drawn = drawn_of(noise);
  double* const sums = pointer<double>(buffer);
  double* const drawn_sums = sums + 2 * inputs * shape[1];
  run(NodeSumDq{a[0], &a[1], inputs, pointer<double>(pivot), pointer(factors), drawn, sums,
                drawn_sums, drawn_sums + drawn.count},
      place);
}

using Rule = std::tuple<double, double, bool>;  // eps, momentum, training

void normalized_sum_at(int dtype, const Shape& shape, const Numbers& tensors, Address weights,
                       const std::vector<bool>& normalised, const std::vector<Address>& running,
                       const Numbers& known, Address factors, const Seeds& noise,
                       const Rule& rule, Address statistics, Address space, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  check_cpu_dtype(a[0].dtype, place);
  const int inputs = static_cast<int>(a.size() - 1);
  const int64_t plane = inputs * shape[1];
  double* const scale = pointer<double>(space);
  double* const shift = scale + plane;
  double* const sums = shift + plane;
  Normalization n = {};
  n.dtype = a[0].dtype, n.inputs = inputs, n.channels = shape[1];
  n.count = static_cast<double>(shape[0] * shape[2] * shape[3]);
  std::tie(n.eps, n.momentum, n.training) = rule;
  std::vector<Array> chosen;  // whose sums are still to be had
  std::vector<int> summed;
  for (int k = 0; k < inputs; ++k) {
    if (normalised[k]) n.normalised |= uint64_t{1} << k;
    if (!known.empty()) {  // an address and what lies between its rows
      n.sums[k] = pointer<const double>(known[2 * k]), n.apart[k] = known[2 * k + 1];
    }
    if (n.training && normalised[k] && !n.sums[k]) {
      chosen.push_back(a[1 + k]), summed.push_back(k);
    }
    if (!running.empty()) {
      n.running_mean[k] = pointer(running[2 * k]);
      n.running_var[k] = pointer(running[2 * k + 1]);
    }
  }
  const int rows = static_cast<int>(chosen.size());
  for (int row = 0; row < rows; ++row) {
    n.sums[summed[row]] = sums + row * shape[1], n.apart[summed[row]] = rows * shape[1];
  }
  if (rows > 0) run(ChannelSums{chosen.data(), rows, nullptr, sums, sums + 3 * plane}, place);
  n.weights = pointer(weights);
  n.statistics = pointer<double>(statistics), n.scale = scale, n.shift = shift;
  run(n, place);
  run(NodeSum{a[0], &a[1], inputs, scale, shift, pointer(factors), drawn_of(noise)}, place);
}

void normalized_sum_backward_at(int dtype, const Shape& shape, const Numbers& tensors,
                                Address weights, const std::vector<bool>& normalised,
                                Address factors, const Seeds& noise, bool training,
                                Address statistics, Address buffer, const Place& place) {
  std::vector<Array> a = arrays_of(dtype, shape, tensors);  // g, K inputs, K outputs
  check_cpu_dtype(a[0].dtype, place);
  const int inputs = static_cast<int>(a.size() / 2);
  const int64_t plane = inputs * shape[1];
  const Drawn drawn = drawn_of(noise);
  double* const dweights = pointer<double>(buffer);
  double* const drawn_sums = dweights + inputs;
  double* const sums = drawn_sums + drawn.count;
  double* const by_g = sums + 2 * plane;
  double* const by_z = by_g + plane;
  double* const constant = by_z + plane;
  const double* const means = pointer<double>(statistics);
  run(NodeSumDq{a[0], &a[1], inputs, means, pointer(factors), drawn, sums, drawn_sums,
                constant + plane},
      place);
  NormalizationBackward n = {};
  n.dtype = a[0].dtype, n.inputs = inputs, n.channels = shape[1];
  n.count = static_cast<double>(shape[0] * shape[2] * shape[3]);
  n.training = training;
  bool wanted = false;
  for (int k = 0; k < inputs; ++k) {
    if (normalised[k]) n.normalised |= uint64_t{1} << k;
    if (!normalised[k] || !training) a[1 + k].data = nullptr;  // its gradient takes no part of z
    wanted = wanted || a[1 + inputs + k].data;
  }
  n.weights = pointer(weights), n.sums = sums, n.statistics = means;
  n.dweights = dweights, n.by_g = by_g, n.by_z = by_z, n.constant = constant;
  run(n, place);
  if (!wanted) return;
  run(Affine{a[0], &a[1], &a[1 + inputs], inputs, by_g, by_z, constant, pointer(factors)}, place);
}

}  // namespace

void define_kernels(py::module_& module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def("workspace", &workspace, "Doubles of workspace that a function needs.");
  module.def("node_sum", &node_sum_at, "out, z...", released);
  module.def("affine", &affine_at, "g, z..., out...", released);
  module.def("channel_sums", &channel_sums_at, "z...; sums, then workspace.", released);
  module.def("node_sum_dq", &node_sum_dq_at, "g, z...; sums, then workspace.", released);
  module.def("normalized_sum", &normalized_sum_at, "out, z...", released);
  module.def("normalized_sum_backward", &normalized_sum_backward_at, "g, z..., dz...", released);
}

}  // namespace rdarts
