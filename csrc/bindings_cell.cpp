// The module's functions of a cell's batch norms and nodes (rdarts_fast/kernels/norm_table.py, stages.py).
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

Table table_of(int dtype, const Shape& shape, const TableAt& at) {
  const auto [statistics, map, rows, training] = at;
  Table t = {};
  t.dtype = static_cast<DType>(dtype), t.channels = shape[1], t.training = training;
  t.count = static_cast<double>(shape[0] * shape[2] * shape[3]);
  t.mean = pointer<double>(statistics), t.rstd = t.mean + rows * t.channels;
  if (map == 0) return t;
  const int64_t plane = rows * t.channels;
  t.by_g = pointer(map);
  t.by_z = moved(t.by_g, t.dtype, plane), t.constant = moved(t.by_g, t.dtype, 2 * plane);
  return t;
}

// A row, an index into the weights and whether it is normalised, for each term.
using TermsAt = std::tuple<std::vector<int>, std::vector<int>, std::vector<bool>, Address>;

// Whether the kernels' tables hold such an index.
bool fits(int i) { return i >= 0 && i <= UINT16_MAX; }

Terms terms_of(const Table& table, const TermsAt& at) {
  const auto& [rows, weights, normalised, address] = at;
  if (rows.empty() || rows.size() > kMostInputs || rows.size() != weights.size() ||
      rows.size() != normalised.size()) {
    throw std::invalid_argument(
        "terms: expected 1 to 64 rows and as many weights and flags, got " +
        std::to_string(rows.size()) + ", " + std::to_string(weights.size()) + " and " +
        std::to_string(normalised.size()));
  }
  if (!std::all_of(rows.begin(), rows.end(), fits) ||
      !std::all_of(weights.begin(), weights.end(), fits)) {
    throw std::invalid_argument("terms: expected rows and weights from 0 to 65535");
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

constexpr size_t kBuffers = 3;  // of a batch norm: running mean, running variance, batches counted

// What fills rows of the table from `first` on from sums, each an address and what lies between its
// three rows of [C], or in eval mode from the buffers.
Normalization rows_of(const Table& t, int64_t first, int count, const Numbers& sums,
                      const Address* buffers, const Rule& rule) {
  Normalization n = {};
  n.dtype = t.dtype, n.inputs = count, n.channels = t.channels;
  n.rule = {t.count, rule.first, rule.second, t.training};
  for (int k = 0; k < count; ++k) {
    n.normalised |= uint64_t{1} << k;
    n.sums[k] = pointer<const double>(sums[2 * k]), n.apart[k] = sums[2 * k + 1];
    const Address* const own = buffers + kBuffers * k;
    n.running_mean[k] = pointer(own[0]), n.running_var[k] = pointer(own[1]);
    n.tracked[k] = pointer<int64_t>(own[2]);
  }
  n.mean = t.mean + first * t.channels, n.rstd = t.rstd + first * t.channels;
  return n;
}

// Those of sums that a launch leaves for all of its tensors, [3, G, C].
Numbers sums_of(const double* sums, int count, int64_t channels) {
  Numbers rows;
  for (int k = 0; k < count; ++k) {
    rows.push_back(static_cast<int64_t>(reinterpret_cast<Address>(sums + k * channels)));
    rows.push_back(count * channels);
  }
  return rows;
}

}  // namespace

Normalization norms_of(int dtype, const Shape& shape, const RowsAt& at, const double* sums) {
  const auto& [table, first, buffers, rule, scale, shift] = at;
  const int count = static_cast<int>(buffers.size() / kBuffers);
  if (count < 1 || count > kMostInputs) {
    throw std::invalid_argument("buffers: expected those of 1 to 64 tensors");
  }
  Normalization n = rows_of(table_of(dtype, shape, table), first, count,
                            sums_of(sums, count, shape[1]), buffers.data(), rule);
  n.scale = pointer(scale), n.shift = pointer(shift);
  return n;
}

namespace {

void batch_norms_at(int dtype, const Shape& shape, const TableAt& table, int64_t first,
                    const Numbers& sums, const Addresses& buffers, const Rule& rule,
                    const Place& place) {
  const Table t = table_of(dtype, shape, table);
  const int inputs = static_cast<int>(sums.size() / 2);
  if (inputs < 1 || inputs > kMostInputs || buffers.size() != kBuffers * inputs) {
    throw std::invalid_argument("buffers: expected those of 1 to 64 tensors, and as many sums");
  }
  run(rows_of(t, first, inputs, sums, buffers.data(), rule), place);
}

// z: K, then K results, scale z + shift each; scale, shift: [K, C].
void scaled_at(int dtype, const Shape& shape, const Numbers& tensors, Address scale, Address shift,
               const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  check_cpu_dtype(a[0].dtype, place);
  const int inputs = static_cast<int>(a.size() / 2);
  if constexpr (kCuda) {
    if (place.device >= 0) {
      Array none = a[0];
      none.data = nullptr;
      return cuda::affine({none, &a[0], &a[inputs], inputs, nullptr, pointer(scale),
                           pointer(shift), nullptr},
                          place);
    }
  }
  for (int k = 0; k < inputs; ++k) {
    const int64_t row = k * shape[1];
    run(NodeSum{a[inputs + k], &a[k], 1, moved(pointer(scale), a[0].dtype, row),
                moved(pointer(shift), a[0].dtype, row), nullptr, Drawn{}},
        place);
  }
}

// out: one or two, then K tensors, whose sum each is; scale: [2 K, C], factors: [2 K, N] or null.
void node_sums_at(int dtype, const Shape& shape, const Numbers& tensors, int sums, Address scale,
                  Address factors, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  const int inputs = static_cast<int>(a.size()) - sums;
  if (sums < 1 || sums > kMostSums || inputs < 1) {
    throw std::invalid_argument("out: expected one or two tensors, then others");
  }
  check_cpu_dtype(a[0].dtype, place);
  NodeSum sum = {a[0], &a[sums], inputs, pointer(scale), nullptr, pointer(factors), Drawn{}};
  if (place.device >= 0) {
    sum.sums = sums, sum.outs = a.data();
    return run(sum, place);
  }
  for (int j = 0; j < sums; ++j) {
    sum.out = a[j];
    sum.scale = moved(pointer(scale), a[0].dtype, j * inputs * shape[1]);
    sum.factors = moved(pointer(factors), a[0].dtype, j * inputs * shape[0]);
    run(sum, place);
  }
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
  run(NodeSum{a[0], &a[1], n.terms.inputs, n.scale, n.shift, pointer(factors), drawn_of(noise), &n},
      place);
}

// buffer: [J] sums of the noise, [2, K, C] sums, workspace. one: of the table's rows, or below 0.
void node_backward_at(int dtype, const Shape& shape, const Numbers& tensors, const TableAt& table,
                      const TermsAt& terms, const std::vector<int>& drawn_weights,
                      Address factors, const Seeds& noise, Address kept, Address dweights,
                      int one, Address buffer, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);  // g, K inputs
  check_cpu_dtype(a[0].dtype, place);
  TermGradients n = {};
  n.terms = terms_of(table_of(dtype, shape, table), terms), n.one = one;
  const Drawn drawn = drawn_of(noise);
  if (drawn_weights.size() != static_cast<size_t>(drawn.count) ||
      !std::all_of(drawn_weights.begin(), drawn_weights.end(), fits)) {
    throw std::invalid_argument("drawn_weights: expected one a site, from 0 to 65535");
  }
  double* const drawn_sums = pointer<double>(buffer);
  double* const sums = drawn_sums + drawn.count;
  n.sums = sums, n.drawn_sums = drawn_sums, n.drawn = drawn.count;
  std::copy(drawn_weights.begin(), drawn_weights.end(), n.drawn_weight);
  n.dweights = pointer(dweights);
  run(NodeSumDq{a[0], &a[1], n.terms.inputs, pointer<double>(kept), pointer(factors), drawn, sums,
                drawn_sums, sums + 2 * n.terms.inputs * shape[1], &n},
      place);
}

// The rows of K normalised tensors, each with a gradient of its own: K of these, then the tensors.
// buffer: [2, K, C] sums, workspace.
void norms_backward_at(int dtype, const Shape& shape, const Numbers& tensors, const TableAt& table,
                       int first, Address pivot, Address buffer, const Place& place) {
  const std::vector<Array> a = arrays_of(dtype, shape, tensors);
  check_cpu_dtype(a[0].dtype, place);
  const int count = static_cast<int>(a.size() / 2), most = place.device >= 0 ? kMostOwn : 1;
  for (int k = 0; k < count; k += most) {
    const int inputs = std::min(most, count - k);
    const int64_t plane = inputs * shape[1];
    TermGradients n = {};
    n.terms.table = table_of(dtype, shape, table), n.terms.inputs = inputs;
    for (int i = 0; i < inputs; ++i) {
      n.terms.row[i] = static_cast<uint16_t>(first + k + i);
      n.terms.normalised |= uint64_t{1} << i;
    }
    double* const sums = pointer<double>(buffer);
    n.sums = sums;
    NodeSumDq sum = {a[k],   &a[count + k], inputs, pointer<double>(pivot) + k * shape[1],
                     nullptr, Drawn{},      sums,   nullptr,
                     sums + 2 * plane, &n};
    if (inputs > 1) sum.own = &a[k];
    run(sum, place);
  }
}

// A stage of G separable convolutions as Python gives it: the shape of z and z, geometry, weights as
// of a stage, first row of the table, buffers of the batch norms or, backward, the gradients of the
// weights.
using StageAt = std::tuple<Shape, Numbers, Geometry, Addresses, int64_t, Addresses>;

constexpr int64_t kTensorsAnEdge = 3;  // that a stage's backward goes over

// The stages of G separable convolutions, each of x or of what the stage before it gives.
struct Chain {
  struct Link {
    Shape shape;            // of z
    std::vector<Array> z;   // [G]
    std::vector<Array> x;   // [G]
    std::vector<const void*> weights;  // G of the depthwise part, G of the pointwise
    Geometry geometry;
    int64_t first;  // row
    Addresses more;
    Table table;
    void *scale, *shift;  // [G, C] of z, where a stage follows
  };
  std::vector<Link> links;
  int edges, together;  // on the CPU so few that one stage's z are still in the cache in the next

  // maps: [S, 2, G, C].
  Chain(int dtype, const Shape& shape, const Numbers& x, const std::vector<StageAt>& stages,
        const TableAt& table, Address maps, const Place& place) {
    std::vector<Array> sources = arrays_of(dtype, shape, x);
    edges = static_cast<int>(sources.size());
    if (edges < 1 || edges > kMostEdges || stages.empty()) {
      throw std::invalid_argument("x: expected 1 to 64 tensors, and a stage or more");
    }
    check_cpu_dtype(sources[0].dtype, place);
    void* map = pointer(maps);
    for (const auto& [out, z, geometry, weights, first, more] : stages) {
      links.push_back({out, arrays_of(dtype, out, z), sources, pointers_of<const void>(weights),
                       geometry, first, more, table_of(dtype, out, table), map, nullptr});
      Link& link = links.back();
      if (link.z.size() != sources.size() || weights.size() != 2 * sources.size()) {
        throw std::invalid_argument("stages: expected a z and two weights an edge");
      }
      link.shift = moved(map, link.z[0].dtype, edges * out[1]);
      map = moved(map, link.z[0].dtype, 2 * edges * out[1]);
      sources = link.z;
    }
    together = group_of(links[0].x[0], edges, kTensorsAnEdge, place);
  }

  // Edges [e, e + count) of stage s.
  Stage part(size_t s, int e, int count) const {
    const Link& link = links[s];
    Stage stage = {};
    stage.edges = count, stage.x = &link.x[e];
    std::tie(stage.kernel, stage.dilation, stage.stride) = link.geometry;
    stage.depthwise = &link.weights[e], stage.pointwise = &link.weights[edges + e];
    if (s == 0) return stage;
    const Link& before = links[s - 1];
    const int64_t at = e * before.shape[1];
    stage.scale = moved(before.scale, link.x[0].dtype, at);
    stage.shift = moved(before.shift, link.x[0].dtype, at);
    return stage;
  }
};

void stages_at(int dtype, const Shape& shape, const Numbers& x, const std::vector<StageAt>& stages,
               const TableAt& table, const Rule& rule, Address maps, Address buffer,
               const Place& place) {
  const Chain chain(dtype, shape, x, stages, table, maps, place);
  double* const sums = pointer<double>(buffer);
  for (int e = 0; e < chain.edges; e += chain.together) {
    const int count = std::min(chain.together, chain.edges - e);
    for (size_t s = 0; s < chain.links.size(); ++s) {
      const Chain::Link& link = chain.links[s];
      const int64_t channels = link.shape[1];
      const DType type = link.z[0].dtype;
      Normalization n = rows_of(link.table, link.first + e, count, sums_of(sums, count, channels),
                                &link.more[kBuffers * e], rule);
      n.scale = moved(link.scale, type, e * channels);
      n.shift = moved(link.shift, type, e * channels);
      run(StageForward{chain.part(s, e, count), &link.z[e], sums, sums + 3 * count * channels,
                       s + 1 < chain.links.size(), &n},
          place);
    }
  }
}

// g: G gradients of what the edges' last z enter. between: for each stage but the last, room for the
// gradients of `together` normalised z. dv: G. factors: [G, N] or null.
void stages_backward_at(int dtype, const Shape& shape, const Numbers& x,
                        const std::vector<StageAt>& stages, const TableAt& table, Address maps,
                        const Numbers& g, const std::vector<Numbers>& between, const Numbers& dv,
                        const Flags& adds, Address factors, Address buffer, const Place& place) {
  const Chain chain(dtype, shape, x, stages, table, maps, place);
  const size_t last = chain.links.size() - 1;
  const std::vector<Array> entering = arrays_of(dtype, chain.links[last].shape, g);
  const std::vector<Array> leaving = arrays_of(dtype, shape, dv);
  const size_t edges = chain.edges;
  if (entering.size() != edges || leaving.size() != edges || adds.size() != edges ||
      between.size() != last) {
    throw std::invalid_argument(
        "g, dv, adds: expected " + std::to_string(edges) + " each, got " +
        std::to_string(entering.size()) + ", " + std::to_string(leaving.size()) + ", " +
        std::to_string(adds.size()) + "; between: expected " + std::to_string(last) + ", got " +
        std::to_string(between.size()));
  }
  const Flags none(edges, 0);
  double* const sums = pointer<double>(buffer);
  for (int e = 0; e < chain.edges; e += chain.together) {
    const int count = std::min(chain.together, chain.edges - e);
    std::vector<Array> given(&entering[e], &entering[e] + count);
    for (size_t s = last + 1; s-- > 0;) {
      const Chain::Link& link = chain.links[s];
      const DType type = link.z[0].dtype;
      const int64_t row = (link.first + e) * link.shape[1];
      const Shape& before = s > 0 ? chain.links[s - 1].shape : shape;
      const std::vector<Array> passed =
          s > 0 ? arrays_of(dtype, before, between[s - 1])
                : std::vector<Array>(&leaving[e], &leaving[e] + count);
      const std::vector<void*> dweights = pointers_of<void>(link.more);
      StageBackward a = {};
      a.stage = chain.part(s, e, count);
      a.g = given.data(), a.z = &link.z[e];
      a.by_g = moved(link.table.by_g, type, row);
      if (link.table.training) {
        a.by_z = moved(link.table.by_z, type, row);
        a.constant = moved(link.table.constant, type, row);
      }
      if (s == last) a.factors = moved(pointer(factors), type, e * link.shape[0]);
      a.dv = passed.data(), a.adds = s > 0 ? none.data() : &adds[e];
      a.sums = s > 0 ? sums : nullptr;
      a.ddepthwise = dweights.empty() ? nullptr : &dweights[e];
      a.dpointwise = dweights.empty() ? nullptr : &dweights[chain.edges + e];
      a.workspace = sums + 2 * count * before[1];
      RowGradients rows = {};
      if (s > 0) {
        const Chain::Link& under = chain.links[s - 1];
        rows = {under.table, static_cast<int>(under.first) + e, count, sums};
        a.rows = &rows;
      }
      run(a, place);
      given = passed;
    }
  }
}

// Edges that are worked on together.
int edges_together(int dtype, const Shape& shape, int edges, const Place& place) {
  Array like = {};
  like.dtype = static_cast<DType>(dtype);
  std::copy(shape.begin(), shape.end(), like.shape);
  return group_of(like, edges, kTensorsAnEdge, place);
}

// Doubles of buffer that `stages` or `stages_backward` needs for so many edges together.
int64_t stages_buffer(int together, Shape shape,
                      const std::vector<std::pair<Shape, Geometry>>& stages, bool backward,
                      const Place& place) {
  int64_t most = 0;
  for (const auto& [out, geometry] : stages) {
    most = std::max(most, stage_buffer(together, shape, out, geometry, backward, place));
    shape = out;
  }
  return most;
}

}  // namespace

void define_cells(py::module_& module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def("batch_norms", &batch_norms_at, "Rows of a cell's table.", released);
  module.def("node_sums", &node_sums_at, "out..., z...", released);
  module.def("scaled", &scaled_at, "z..., out...", released);
  module.def("node", &node_at, "out, z...", released);
  module.def("node_backward", &node_backward_at, "g, z...; rows of the table.", released);
  module.def("norms_backward", &norms_backward_at, "g..., z...; rows of the table.", released);
  module.def("stages", &stages_at, "x..., z... of each stage; rows of the table.", released);
  module.def("stages_backward", &stages_backward_at, "As stages; g..., dv...", released);
  module.def("stages_buffer", &stages_buffer, "Doubles of buffer that one of the two needs.");
  module.def("edges_together", &edges_together, "Edges that the two work on together.");
}

}  // namespace rdarts
