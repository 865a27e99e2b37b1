// The module's functions of the convolution stages (rdarts_fast/kernels/sep_stage.py, which checks
// their arguments).
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <tuple>

#include "bindings.h"

namespace py = pybind11;

namespace rdarts {
namespace {

// A stage, and the arrays that it points to.
struct Operands {
  std::vector<Array> x;
  std::vector<const void*> weights;  // G of the depthwise part, G of the pointwise
  Stage stage;

  Operands(int dtype, const Shape& shape, const Numbers& tensors, const Geometry& geometry,
           const Addresses& addresses, Address scale, Address shift)
      : x(arrays_of(dtype, shape, tensors)), weights(pointers_of<const void>(addresses)), stage{} {
    if (x.empty() || x.size() > kMostEdges || weights.size() != 2 * x.size()) {
      throw std::invalid_argument("x: expected 1 to 64 tensors and two weights each");
    }
    stage.edges = static_cast<int>(x.size()), stage.x = x.data();
    std::tie(stage.kernel, stage.dilation, stage.stride) = geometry;
    stage.scale = pointer(scale), stage.shift = pointer(shift);
    stage.depthwise = weights.data(), stage.pointwise = weights.data() + x.size();
  }
};

void run(const MixingForward& arguments, const Place& place) {
  RDARTS_LAUNCH(mixing, arguments, place.threads);
  if (arguments.norms && place.device < 0) run(*arguments.norms, place);
}
void run(const MixingBackward& arguments, const Place& place) {
  RDARTS_LAUNCH(mixing_backward, arguments, place.threads);
}

void sep_stage_at(int dtype, const Shape& shape, const Numbers& x, const Shape& out_shape,
                  const Numbers& z, const Geometry& geometry, const Addresses& weights,
                  Address scale, Address shift, Address buffer, const Place& place) {
  const Operands operands(dtype, shape, x, geometry, weights, scale, shift);
  const std::vector<Array> out = arrays_of(dtype, out_shape, z);
  check_cpu_dtype(out[0].dtype, place);
  double* const sums = pointer<double>(buffer);
  const int64_t size = 3 * static_cast<int64_t>(out.size()) * out_shape[1];
  run(StageForward{operands.stage, out.data(), sums, sums + size}, place);
}

// The same of tangents: gate is one tensor, by_gate [G, C].
void sep_stage_gated_at(int dtype, const Shape& shape, const Numbers& x, const Numbers& gate,
                        const Shape& out_shape, const Numbers& z, const Geometry& geometry,
                        const Addresses& weights, Address scale, Address by_gate, Address shift,
                        Address buffer, const Place& place) {
  Operands operands(dtype, shape, x, geometry, weights, scale, shift);
  const std::vector<Array> gates = arrays_of(dtype, shape, gate);
  const std::vector<Array> out = arrays_of(dtype, out_shape, z);
  if (gates.size() != 1) throw std::invalid_argument("gate: expected one tensor");
  check_cpu_dtype(out[0].dtype, place);
  operands.stage.gate = gates.data(), operands.stage.by_gate = pointer(by_gate);
  double* const sums = pointer<double>(buffer);
  const int64_t size = 3 * static_cast<int64_t>(out.size()) * out_shape[1];
  run(StageForward{operands.stage, out.data(), sums, sums + size}, place);
}

TangentMoments moments_of(int dtype, int64_t directions, const Shape& shape) {
  TangentMoments a = {};
  a.dtype = static_cast<DType>(dtype), a.directions = directions;
  a.samples = shape[0], a.pixels = shape[2] * shape[3], a.channels = shape[1];
  return a;
}

int64_t moments_buffer(int dtype, int64_t directions, const Shape& shape, const Place& place) {
  const TangentMoments a = moments_of(dtype, directions, shape);
  if (place.device >= 0) {
    if constexpr (kCuda) return a.size() + cuda::moments_workspace(a);
  }
  return a.size() + moments_workspace(a);
}

// x, the result and the gradient are dense; the sums follow one another (moments.h).
void tangent_moments_at(int dtype, int64_t directions, const Shape& shape,
                        const std::array<Address, 4>& operands, Address buffer,
                        const Place& place) {
  TangentMoments arguments = moments_of(dtype, directions, shape);
  check_cpu_dtype(arguments.dtype, place);
  arguments.x = pointer(operands[0]), arguments.result = pointer(operands[1]);
  arguments.gradient = pointer(operands[2]), arguments.weights = pointer(operands[3]);
  arguments.sums = pointer<double>(buffer);
  arguments.workspace = arguments.sums + arguments.size();
  RDARTS_LAUNCH(tangent_moments, arguments, place.threads);
}

using Map = std::array<Address, 4>;  // by_g, by_z, constant, factors

// `out`: G of g, then G of z.
GradientOfZ gradient_of(const std::vector<Array>& out, const Map& map) {
  return {out.data(),      out.data() + out.size() / 2, pointer(map[0]), pointer(map[1]),
          pointer(map[2]), pointer(map[3])};
}

void sep_stage_backward_at(int dtype, const Shape& shape, const Numbers& x, const Shape& out_shape,
                           const Numbers& gradients, const Geometry& geometry,
                           const Addresses& weights, Address scale, Address shift, const Map& map,
                           const Numbers& dv, const Flags& adds, bool wants_sums,
                           const Addresses& dweights, Address buffer, const Place& place) {
  const Operands operands(dtype, shape, x, geometry, weights, scale, shift);
  const std::vector<Array> out = arrays_of(dtype, out_shape, gradients);
  check_cpu_dtype(out[0].dtype, place);
  const size_t edges = operands.x.size();
  const std::vector<Array> results = arrays_of(dtype, shape, dv);
  const std::vector<void*> dweight = pointers_of<void>(dweights);
  double* const sums = pointer<double>(buffer);
  StageBackward a = {};
  static_cast<GradientOfZ&>(a) = gradient_of(out, map);
  a.stage = operands.stage, a.dv = results.data(), a.adds = adds.data();
  a.sums = wants_sums ? sums : nullptr;
  a.ddepthwise = dweight.empty() ? nullptr : dweight.data();
  a.dpointwise = dweight.empty() ? nullptr : dweight.data() + edges;
  a.workspace = sums + (wants_sums ? 2 * static_cast<int64_t>(edges) * shape[1] : 0);
  run(a, place);
}

// The sources of a mixing; `halves` addresses of weights an edge.
Mixing mixing_of(const std::vector<Array>& x, const std::vector<const void*>& weights, int edges,
                 int stride, Address scale, Address shift) {
  const int count = static_cast<int>(weights.size()), halves = edges > 0 ? count / edges : 0;
  if (x.empty() || (halves != 1 && halves != 2) || count != halves * edges) {
    throw std::invalid_argument("weights: expected one or two an edge");
  }
  return {edges,          static_cast<int>(x.size()), halves, stride, x.data(), pointer(scale),
          pointer(shift), weights.data()};
}

// What forward and backward of a mixing take alike: the shape of x and x, the shape of z, stride,
// weights, scale, shift and the buffer.
using MixingAt = std::tuple<Shape, Numbers, Shape, int, Addresses, Address, Address, Address>;
using ForwardAt = std::tuple<MixingAt, Numbers, std::optional<RowsAt>>;  // z, rows to fill
// g and z, the map of their gradient, dv, which of them are added to, the gradients of the weights.
using BackwardAt = std::tuple<MixingAt, Numbers, Map, Numbers, Flags, Addresses>;

// A call's arguments, and the arrays that they point to.
struct MixingCall {
  std::vector<Array> x, out, dv;
  std::vector<const void*> weights;
  std::vector<void*> dweights;
  Normalization norms = {};
  MixingForward forward = {};
  MixingBackward backward = {};

  MixingCall(const MixingCall&) = delete;
  MixingCall& operator=(const MixingCall&) = delete;

  MixingCall(int dtype, const ForwardAt& call) {
    const auto& [at, z, rows] = call;
    const auto& [shape, tensors, out_shape, stride, w, scale, shift, buffer] = at;
    x = arrays_of(dtype, shape, tensors), out = arrays_of(dtype, out_shape, z);
    weights = pointers_of<const void>(w);
    const int edges = static_cast<int>(out.size());
    double* const sums = pointer<double>(buffer);
    if (rows) norms = norms_of(dtype, out_shape, *rows, sums);
    if (rows && norms.inputs != edges) {
      throw std::invalid_argument("rows: expected the running buffers of every edge");
    }
    forward = {mixing_of(x, weights, edges, stride, scale, shift), out.data(), sums,
               sums + 3 * edges * out_shape[1], rows ? &norms : nullptr};
  }

  MixingCall(int dtype, const BackwardAt& call) {
    const auto& [at, gradients, map, results, adds, gradients_of_weights] = call;
    const auto& [shape, tensors, out_shape, stride, w, scale, shift, buffer] = at;
    x = arrays_of(dtype, shape, tensors), out = arrays_of(dtype, out_shape, gradients);
    weights = pointers_of<const void>(w), dv = arrays_of(dtype, shape, results);
    dweights = pointers_of<void>(gradients_of_weights);
    static_cast<GradientOfZ&>(backward) = gradient_of(out, map);
    const int edges = static_cast<int>(out.size() / 2);
    backward.mixing = mixing_of(x, weights, edges, stride, scale, shift);
    backward.dv = dv.data(), backward.adds = adds.data();
    backward.dweights = dweights.empty() ? nullptr : dweights.data();
    backward.workspace = pointer<double>(buffer);
  }
};

// On a GPU two calls share a launch.
void mixing_at(int dtype, const std::vector<ForwardAt>& given, const Place& place) {
  check_cpu_dtype(static_cast<DType>(dtype), place);
  std::deque<MixingCall> calls;
  for (const ForwardAt& call : given) calls.emplace_back(dtype, call);
  if constexpr (kCuda) {
    if (calls.size() == 2 && place.device >= 0) {
      return cuda::mixing(calls[0].forward, calls[1].forward, place);
    }
  }
  for (const MixingCall& call : calls) run(call.forward, place);
}

void mixing_backward_at(int dtype, const std::vector<BackwardAt>& given, const Place& place) {
  check_cpu_dtype(static_cast<DType>(dtype), place);
  std::deque<MixingCall> calls;
  for (const BackwardAt& call : given) calls.emplace_back(dtype, call);
  if constexpr (kCuda) {
    if (calls.size() == 2 && place.device >= 0) {
      return cuda::mixing_backward(calls[0].backward, calls[1].backward, place);
    }
  }
  for (const MixingCall& call : calls) run(call.backward, place);
}

int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }

// Doubles of buffer that the forward or the backward needs: sums and workspace.
int64_t mixing_buffer(int64_t edges, int64_t sources, int halves, const Shape& shape,
                      const Shape& out_shape, bool backward, const Place& place) {
  const int64_t out_channels = out_shape[1];
  if (place.device >= 0) {
    const Array x = {nullptr, DType::kFloat64, {shape[0], shape[1], shape[2], shape[3]}, {}};
    Mixing m = {};
    m.edges = static_cast<int>(edges), m.sources = static_cast<int>(sources);
    m.halves = halves, m.x = &x;
    if constexpr (kCuda) {
      if (backward) return cuda::mixing_backward_workspace(m, out_shape.data());
      return 3 * edges * out_channels + cuda::mixing_workspace(m, out_shape.data());
    }
  }
  if (!backward) return 3 * edges * out_channels * (shape[0] + 1);
  return 16 * edges * (padded(out_channels) + 16) * sources * padded(shape[1]);
}

}  // namespace

int64_t stage_buffer(int64_t edges, const Shape& shape, const Shape& out_shape,
                     const Geometry& geometry, bool backward, const Place& place) {
  const int64_t channels = shape[1], out_channels = out_shape[1], samples = shape[0] + 1;
  if (place.device >= 0) {
    const Array x = {nullptr, DType::kFloat64, {shape[0], shape[1], shape[2], shape[3]}, {}};
    Stage stage = {};
    stage.edges = static_cast<int>(edges), stage.x = &x;
    std::tie(stage.kernel, stage.dilation, stage.stride) = geometry;
    if constexpr (kCuda) {
      const int64_t* const out = out_shape.data();
      if (backward) return 2 * edges * channels + cuda::stage_backward_workspace(stage, out);
      return 3 * edges * out_channels + cuda::stage_workspace(stage, out);
    }
  }
  if (!backward) return 3 * edges * out_channels * samples;
  const int64_t taps = std::get<0>(geometry) * std::get<0>(geometry);
  const int64_t weights = padded(channels) * taps + padded(out_channels) * channels;
  return edges * (2 * channels * samples + 16 * weights);
}

void define_stages(py::module_& module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def("stage_buffer", &stage_buffer, "Doubles of buffer that one of the following needs.");
  module.def("sep_stage", &sep_stage_at, "x..., z...; sums, then workspace.", released);
  module.def("sep_stage_gated", &sep_stage_gated_at, "x..., gate, z...; sums, then workspace.",
             released);
  module.def("moments_buffer", &moments_buffer, "Doubles of buffer that the following needs.");
  module.def("tangent_moments", &tangent_moments_at, "The sums of moments.h, then workspace.",
             released);
  module.def("sep_stage_backward", &sep_stage_backward_at, "x..., g..., z..., dv...", released);
  module.def("mixing_buffer", &mixing_buffer, "Doubles of buffer that one of the following needs.");
  module.def("mixing", &mixing_at, "Calls of x..., z...; sums, then workspace; rows of a table.",
             released);
  module.def("mixing_backward", &mixing_backward_at, "Calls of x..., g..., z..., dv...", released);
}

}  // namespace rdarts
