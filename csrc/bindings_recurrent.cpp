// The module's functions of a recurrent cell's nodes (rdarts_fast/kernels/recurrent_node.py, which
// checks them). Tensors are rows: an address and the elements from row to row, two numbers each.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings.h"

namespace py = pybind11;

namespace rdarts {
namespace {

// dtype, B, H, whether curved, the address of mix; then the states' and the gates' rows.
using NodeAt = std::tuple<int, int64_t, int64_t, bool, Address>;

void fill(Rows (&rows)[kMostSources], const Numbers& numbers, const char* name, size_t sources) {
  if (numbers.size() != 2 * sources || sources < 1 || sources > kMostSources) {
    throw std::invalid_argument(std::string(name) +
                                ": expected two numbers each of 1 to 16 sources, got " +
                                std::to_string(numbers.size()));
  }
  for (size_t j = 0; j < sources; ++j) {
    rows[j] = {pointer(static_cast<Address>(numbers[2 * j])), numbers[2 * j + 1]};
  }
}

RecurrentNode node_of(const NodeAt& at, const Numbers& states, const Numbers& gates) {
  const auto& [dtype, batch, hidden, curved, mix] = at;
  if (dtype != 0 && dtype != 1) throw std::invalid_argument("dtype: expected float32 or float64");
  RecurrentNode n = {};
  n.dtype = static_cast<DType>(dtype), n.batch = batch, n.hidden = hidden, n.curved = curved;
  n.mix = pointer(mix), n.sources = static_cast<int>(states.size() / 2);
  fill(n.states, states, "states", states.size() / 2);
  fill(n.gates, gates, "gates", states.size() / 2);
  return n;
}

int64_t workspace_of(int64_t batch, int64_t hidden, int sources, const Place& place) {
  RecurrentNode n = {};
  n.batch = batch, n.hidden = hidden, n.sources = sources;
  int64_t doubles = 0;
  if (place.device >= 0) {
    if constexpr (kCuda) doubles = cuda::recurrent_workspace(n);
    return doubles;
  }
  on_unit(place.unit, [&](auto unit) { doubles = recurrent_workspace<decltype(unit)::value>(n); });
  return doubles;
}

// Kind (0 none, 1 the batch's, 2 the running ones), eps, momentum, the addresses of both running.
using NormAt = std::tuple<int, double, double, Address, Address>;

// more: addresses of mask, value, masked, statistics and workspace.
void forward_at(const NodeAt& at, const Numbers& states, const Numbers& gates, const NormAt& norm,
                const std::array<Address, 5>& more, const Place& place) {
  RecurrentForward arguments = {};
  arguments.node = node_of(at, states, gates);
  const auto& [kind, eps, momentum, mean, var] = norm;
  arguments.norm = static_cast<NodeNorm>(kind), arguments.eps = eps, arguments.momentum = momentum;
  arguments.running_mean = pointer(mean), arguments.running_var = pointer(var);
  arguments.mask = pointer(more[0]), arguments.value = pointer(more[1]);
  arguments.masked = pointer(more[2]), arguments.statistics = pointer<double>(more[3]);
  arguments.workspace = pointer<double>(more[4]);
  RDARTS_LAUNCH(recurrent_node, arguments, place.threads);
}

// more: addresses of statistics, value, dvalue, dmasked, mask, dall, total, dmix and workspace.
void backward_at(const NodeAt& at, const Numbers& states, const Numbers& gates, int norm,
                 double share, const std::array<Address, 9>& more, bool adds,
                 const Numbers& dstates, const Numbers& dgates, const Place& place) {
  RecurrentBackward arguments = {};
  arguments.node = node_of(at, states, gates);
  arguments.norm = static_cast<NodeNorm>(norm), arguments.share = share, arguments.adds = adds;
  arguments.statistics = pointer<double>(more[0]), arguments.value = pointer(more[1]);
  arguments.dvalue = pointer(more[2]), arguments.dmasked = pointer(more[3]);
  arguments.mask = pointer(more[4]), arguments.dall = pointer(more[5]);
  arguments.total = pointer(more[6]), arguments.dmix = pointer<double>(more[7]);
  arguments.workspace = pointer<double>(more[8]);
  fill(arguments.dstates, dstates, "dstates", states.size() / 2);
  fill(arguments.dgates, dgates, "dgates", states.size() / 2);
  RDARTS_LAUNCH(recurrent_node_backward, arguments, place.threads);
}

// more: addresses of g, tangent, dmix and workspace.
void second_at(const NodeAt& at, const Numbers& states, const Numbers& gates, Address along_mix,
               const Numbers& along_states, const Numbers& along_gates,
               const std::array<Address, 4>& more, const Numbers& dstates, const Numbers& dgates,
               const Place& place) {
  RecurrentSecond arguments = {};
  arguments.node = node_of(at, states, gates);
  arguments.along = node_of(at, along_states, along_gates);
  arguments.along.mix = pointer(along_mix);
  arguments.g = pointer(more[0]), arguments.tangent = pointer(more[1]);
  arguments.dmix = pointer<double>(more[2]), arguments.workspace = pointer<double>(more[3]);
  fill(arguments.dstates, dstates, "dstates", states.size() / 2);
  fill(arguments.dgates, dgates, "dgates", states.size() / 2);
  RDARTS_LAUNCH(recurrent_node_second, arguments, place.threads);
}

}  // namespace

void define_recurrent(py::module_& module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def("recurrent_workspace", &workspace_of, "Doubles of workspace of a node's functions.");
  module.def("recurrent_node", &forward_at, "states..., gates...", released);
  module.def("recurrent_node_backward", &backward_at, "As recurrent_node; dstates..., dgates...",
             released);
  module.def("recurrent_node_second", &second_at, "The derivative of recurrent_node_backward.",
             released);
}

}  // namespace rdarts
