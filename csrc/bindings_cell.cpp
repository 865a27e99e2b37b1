// The module's functions of a cell's batch norms and nodes (rdarts_fast/networks/cell_rows.py).
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace rdarts {
namespace {

void run(const TermCoefficients& arguments, const Place& place) {
  RDARTS_LAUNCH(term_coefficients, arguments);
}
void run(const TermGradients& arguments, const Place& place) {
  RDARTS_LAUNCH(term_gradients, arguments);
}
void run(const RowGradients& arguments, const Place& place) {
  RDARTS_LAUNCH(row_gradients, arguments);
}

// Addresses of [2, R, C] float64 (mean, rstd) and of [3, R, C] coefficients (by_g, by_z, constant),
// R, whether in training.
using TableAt = std::tuple<Address, Address, int64_t, bool>;

Table table_of(int dtype, const Shape& shape, const TableAt& at) {
  const auto [statistics, map, rows, training] = at;
  Table t = {};
  t.dtype = static_cast<DType>(dtype), t.channels = shape[1], t.training = training;
  t.count = static_cast<double>(shape[0] * shape[2] * shape[3]);
  t.mean = pointer<double>(statistics), t.rstd = t.mean + rows * t.channels;
  if (map == 0) return t;
  const int64_t plane = rows * t.channels * (t.dtype == DType::kFloat64 ? 8 : 4);
  t.by_g = pointer(map), t.by_z = pointer(map + plane), t.constant = pointer(map + 2 * plane);
  return t;
}

// A row, an index into the weights and whether it is normalised, for each term.
using TermsAt = std::tuple<std::vector<int>, std::vector<int>, std::vector<bool>, Address>;

Terms terms_of(const Table& table, const TermsAt& at) {
  const auto& [rows, weights, normalised, address] = at;
  if (rows.empty() || rows.size() > kMostInputs || rows.size() != weights.size() ||
      rows.size() != normalised.size()) {
    throw std::invalid_argument("terms: expected 1 to 64, got " + std::to_string(rows.size()));
  }
  Terms t = {};
  t.table = table, t.inputs = static_cast<int>(rows.size()), t.weights = pointer(address);
  std::copy(rows.begin(), rows.end(), t.row);
  std::copy(weights.begin(), weights.end(), t.weight);
  for (size_t k = 0; k < normalised.size(); ++k) {
    if (normalised[k]) t.normalised |= uint64_t{1} << k;
  }
  return t;
}

// Fills rows [first, first + G) from sums, each an address and what lies between its three rows of
// [C], or in eval mode from the running buffers, and their scales and shifts, [2, G, C].
void batch_norms_at(int dtype, const Shape& shape, const TableAt& table, int64_t first,
                    const Numbers& sums, const std::vector<Address>& running,
                    const std::pair<double, double>& rule, Address coefficients,
                    const Place& place) {
  const Table t = table_of(dtype, shape, table);
  const int inputs = static_cast<int>(running.size() / 2);
  if (inputs < 1 || inputs > kMostInputs || sums.size() != running.size()) {
    throw std::invalid_argument("running: expected those of 1 to 64 tensors, and as many sums");
  }
  Normalization n = {};
  n.dtype = t.dtype, n.inputs = inputs, n.channels = t.channels, n.count = t.count;
  n.training = t.training;
  std::tie(n.eps, n.momentum) = rule;
  for (int k = 0; k < inputs; ++k) {
    n.normalised |= uint64_t{1} << k;
    n.sums[k] = pointer<const double>(sums[2 * k]), n.apart[k] = sums[2 * k + 1];
    n.running_mean[k] = pointer(running[2 * k]), n.running_var[k] = pointer(running[2 * k + 1]);
  }
  n.mean = t.mean + first * t.channels, n.rstd = t.rstd + first * t.channels;
  n.scale = pointer(coefficients);
  n.shift = pointer(coefficients + inputs * t.channels * (t.dtype == DType::kFloat64 ? 8 : 4));
  run(n, place);
}

// kept: [3, K, C] float64: the means, which the backward needs, then room for scales and shifts.
void node_at(int dtype, const Shape& shape, const Numbers& tensors, const TableAt& table,
             const TermsAt& terms, Address factors, const Seeds& noise, Address kept,
             const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  check_cpu_dtype(a[0].dtype, place);
  TermCoefficients n = {};
  n.terms = terms_of(table_of(dtype, shape, table), terms);
  const int64_t plane = n.terms.inputs * shape[1];
  n.pivot = pointer<double>(kept);
  n.scale = n.pivot + plane, n.shift = n.pivot + 2 * plane;
  run(n, place);
  run(NodeSum{a[0], &a[1], n.terms.inputs, n.scale, n.shift, pointer(factors), drawn_of(noise)},
      place);
}

// buffer: [J] sums of the noise, [2, K, C] sums, workspace.
void node_backward_at(int dtype, const Shape& shape, const Numbers& tensors, const TableAt& table,
                      const TermsAt& terms, const std::vector<int>& drawn_weights,
                      Address factors, const Seeds& noise, Address kept, Address dweights,
                      Address buffer, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);  // g, K inputs
  check_cpu_dtype(a[0].dtype, place);
  TermGradients n = {};
  n.terms = terms_of(table_of(dtype, shape, table), terms);
  const Drawn drawn = drawn_of(noise);
  if (drawn_weights.size() != static_cast<size_t>(drawn.count)) {
    throw std::invalid_argument("drawn_weights: expected one a site");
  }
  double* const drawn_sums = pointer<double>(buffer);
  double* const sums = drawn_sums + drawn.count;
  run(NodeSumDq{a[0], &a[1], n.terms.inputs, pointer<double>(kept), pointer(factors), drawn, sums,
                drawn_sums, sums + 2 * n.terms.inputs * shape[1]},
      place);
  n.sums = sums, n.drawn_sums = drawn_sums, n.drawn = drawn.count;
  std::copy(drawn_weights.begin(), drawn_weights.end(), n.drawn_weight);
  n.dweights = pointer(dweights);
  run(n, place);
}

void norm_backward_at(int dtype, const Shape& shape, const TableAt& table, int first, int inputs,
                      Address sums, const Place& place) {
  run(RowGradients{table_of(dtype, shape, table), first, inputs, pointer<const double>(sums)},
      place);
}

}  // namespace

void define_cells(py::module_& module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def("batch_norms", &batch_norms_at, "Rows of a cell's table.", released);
  module.def("node", &node_at, "out, z...", released);
  module.def("node_backward", &node_backward_at, "g, z...; rows of the table.", released);
  module.def("norm_backward", &norm_backward_at, "Rows of the table.", released);
}

}  // namespace rdarts
