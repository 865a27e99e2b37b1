// The module's functions of the node sum.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace rdarts {
namespace {

void run(const Affine& arguments, const Place& place) {
  RDARTS_LAUNCH(affine, arguments, place.threads);
}
void run(const ChannelSums& arguments, const Place& place) {
  RDARTS_LAUNCH(channel_sums, arguments, place.threads);
}
void run(const Rounding& arguments, const Place& place) {
  RDARTS_LAUNCH(rounding, arguments, place.threads);
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

// z, out: K addresses each, of `count` numbers, channels innermost.
void rounding_at(const Addresses& z, const Addresses& out, int64_t count, int64_t channels,
                 Address scale, Address shift, const Place& place) {
  if (z.empty() || z.size() > kMostInputs || out.size() != z.size()) {
    throw std::invalid_argument("z: expected 1 to 64 tensors and as many results, got " +
                                std::to_string(z.size()) + " and " + std::to_string(out.size()));
  }
  Rounding a = {};
  a.inputs = static_cast<int>(z.size()), a.count = count, a.channels = channels;
  for (int k = 0; k < a.inputs; ++k) {
    a.z[k] = pointer<const float>(z[k]), a.out[k] = pointer<uint16_t>(out[k]);
  }
  a.scale = pointer<const float>(scale), a.shift = pointer<const float>(shift);
  run(a, place);
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

void fill_ones(void* data, DType dtype, int64_t count) {
  if (dtype == DType::kFloat64) std::fill_n(static_cast<double*>(data), count, 1.0);
  else std::fill_n(static_cast<float*>(data), count, 1.0f);
}

// The node sum of a later group: what is there already comes first, as it is.
void add_to(const Array& out, const Array* z, int inputs, void* scale, void* shift, void* factors,
            const Place& place) {
  const int64_t samples = out.shape[0], channels = out.shape[1];
  const size_t width = width_of(out.dtype), row = channels * width, all = inputs * row;
  std::vector<Array> tensors(z, z + inputs);
  tensors.insert(tensors.begin(), out);
  std::vector<char> scales(row + all), shifts(row + all), kept((1 + inputs) * samples * width);
  fill_ones(scales.data(), out.dtype, channels);
  std::memcpy(&scales[row], scale, all);
  std::memcpy(&shifts[row], shift, all);
  if (factors) {
    fill_ones(kept.data(), out.dtype, samples);
    std::memcpy(&kept[samples * width], factors, inputs * samples * width);
  }
  run(NodeSum{out, tensors.data(), 1 + inputs, scales.data(), shifts.data(),
              factors ? kept.data() : nullptr, Drawn{}},
      place);
}

void normalized_sum_at(int dtype, const Shape& shape, const Numbers& tensors, Address weights,
                       const std::vector<bool>& normalised, const std::vector<Address>& running,
                       const Numbers& known, Address factors, const Seeds& noise,
                       const Rule& rule, Address statistics, Address space, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  check_cpu_dtype(a[0].dtype, place);
  const int all = static_cast<int>(a.size() - 1), together = group_of(a[0], all, 1, place);
  const int64_t channels = shape[1];
  double* const scale = pointer<double>(space);
  double* const shift = scale + together * channels;
  double* const sums = shift + together * channels;
  Normalization n = {};
  n.dtype = a[0].dtype, n.channels = channels, n.scale = scale, n.shift = shift;
  n.rule.count = static_cast<double>(shape[0] * shape[2] * shape[3]);
  std::tie(n.rule.eps, n.rule.momentum, n.rule.training) = rule;
  for (int first = 0; first < all; first += n.inputs) {
    n.inputs = std::min(together, all - first), n.normalised = 0;
    std::vector<Array> chosen;  // whose sums are still to be had
    std::vector<int> summed;
    for (int k = 0; k < n.inputs; ++k) {
      const int input = first + k;
      if (normalised[input]) n.normalised |= uint64_t{1} << k;
      // An address, and what lies between its rows.
      n.sums[k] = known.empty() ? nullptr : pointer<const double>(known[2 * input]);
      n.apart[k] = known.empty() ? 0 : known[2 * input + 1];
      if (n.rule.training && normalised[input] && !n.sums[k]) {
        chosen.push_back(a[1 + input]), summed.push_back(k);
      }
      if (running.empty()) continue;
      n.running_mean[k] = pointer(running[2 * input]);
      n.running_var[k] = pointer(running[2 * input + 1]);
    }
    const int rows = static_cast<int>(chosen.size());
    for (int row = 0; row < rows; ++row) {
      n.sums[summed[row]] = sums + row * channels, n.apart[summed[row]] = rows * channels;
    }
    double* const rest = sums + 3 * rows * channels;
    if (rows > 0) run(ChannelSums{chosen.data(), rows, nullptr, sums, rest}, place);
    n.weights = moved(pointer(weights), n.dtype, first);
    n.mean = pointer<double>(statistics) + first * channels;
    n.rstd = n.mean + all * channels;
    run(n, place);
    void* const kept = moved(pointer(factors), n.dtype, first * shape[0]);
    const Array* const z = &a[1 + first];
    if (first > 0) add_to(a[0], z, n.inputs, scale, shift, kept, place);
    else run(NodeSum{a[0], z, n.inputs, scale, shift, kept, drawn_of(noise)}, place);
  }
}

void normalized_sum_backward_at(int dtype, const Shape& shape, const Numbers& tensors,
                                Address weights, const std::vector<bool>& normalised,
                                Address factors, const Seeds& noise, bool training,
                                Address statistics, Address buffer, const Place& place) {
  std::vector<Array> a = arrays_of(dtype, shape, tensors);  // g, K inputs, K outputs
  check_cpu_dtype(a[0].dtype, place);
  const int all = static_cast<int>(a.size() / 2), together = group_of(a[0], all, 2, place);
  const int64_t channels = shape[1], plane = together * channels;
  Drawn drawn = drawn_of(noise);
  double* const dweights = pointer<double>(buffer);
  double* const drawn_sums = dweights + all;
  double* const sums = drawn_sums + drawn.count;
  double* const by_g = sums + 2 * plane;
  double* const by_z = by_g + plane;
  double* const constant = by_z + plane;
  NormalizationBackward n = {};
  n.dtype = a[0].dtype, n.channels = channels, n.training = training, n.sums = sums;
  n.by_g = by_g, n.by_z = by_z, n.constant = constant;
  n.count = static_cast<double>(shape[0] * shape[2] * shape[3]);
  for (int first = 0; first < all; first += n.inputs) {
    n.inputs = std::min(together, all - first);
    n.mean = pointer<double>(statistics) + first * channels;
    n.rstd = n.mean + all * channels;
    Array* const z = &a[1 + first];
    Array* const out = z + all;
    void* const kept = moved(pointer(factors), n.dtype, first * shape[0]);
    run(NodeSumDq{a[0], z, n.inputs, n.mean, kept, drawn, sums, drawn_sums, constant + plane},
        place);
    drawn.count = 0;
    bool wanted = false;
    n.normalised = 0;
    for (int k = 0; k < n.inputs; ++k) {
      if (normalised[first + k]) n.normalised |= uint64_t{1} << k;
      else z[k].data = nullptr;
      if (!training) z[k].data = nullptr;  // its gradient takes no part of z
      wanted = wanted || out[k].data;
    }
    n.weights = moved(pointer(weights), n.dtype, first);
    n.dweights = dweights + first;
    run(n, place);
    if (!wanted) continue;
    run(Affine{a[0], z, out, n.inputs, by_g, by_z, constant, kept}, place);
  }
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
  module.def("rounding", &rounding_at, "z..., out...; channels innermost.", released);
  module.def("normalized_sum_backward", &normalized_sum_backward_at, "g, z..., dz...", released);
}

}  // namespace rdarts
