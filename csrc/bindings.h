// What the files that define the module's functions share. Tensors come as one flat list of
// numbers, coefficients and sums as addresses (rdarts_fast/kernels/array.py, which checks them).
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "launchers.h"

// Calls the launcher of that name on the side and the unit that `place` names.
#define RDARTS_LAUNCH(NAME, ...)                                                     \
  do {                                                                               \
    if (place.device >= 0) {                                                         \
      if constexpr (kCuda) cuda::NAME(arguments, place);                             \
    } else {                                                                         \
      on_unit(place.unit, [&](auto unit) { NAME<decltype(unit)::value>(__VA_ARGS__); }); \
    }                                                                                \
  } while (false)

namespace rdarts {

void define_cells(pybind11::module_& module);
void define_correlations(pybind11::module_& module);
void define_kernels(pybind11::module_& module);
void define_memory(pybind11::module_& module);
void define_pools(pybind11::module_& module);
void define_recurrent(pybind11::module_& module);
void define_stages(pybind11::module_& module);

using Shape = std::array<int64_t, 4>;
using Address = std::uintptr_t;
using Numbers = std::vector<int64_t>;

using Addresses = std::vector<Address>;
using Flags = std::vector<uint8_t>;
using Geometry = std::tuple<int, int, int>;  // kernel, dilation, stride

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
std::vector<T*> pointers_of(const Addresses& addresses) {
  std::vector<T*> pointers;
  for (const Address address : addresses) pointers.push_back(pointer<T>(address));
  return pointers;
}

// Five numbers a tensor: address and strides.
inline std::vector<Array> arrays_of(int dtype, const Shape& shape, const Numbers& flat) {
  if (dtype < 0 || dtype > 2 || flat.size() % 5 != 0) {
    throw std::invalid_argument("dtype: expected 0, 1 or 2; tensors: expected five numbers each");
  }
  std::vector<Array> arrays(flat.size() / 5);
  for (size_t i = 0; i < arrays.size(); ++i) {
    arrays[i].data = pointer(static_cast<Address>(flat[5 * i]));
    arrays[i].dtype = static_cast<DType>(dtype);
    for (int d = 0; d < 4; ++d) {
      arrays[i].shape[d] = shape[d];
      arrays[i].strides[d] = flat[5 * i + 1 + d];
    }
  }
  return arrays;
}

using Seeds = std::optional<std::vector<uint64_t>>;

// seed, step, branch and pass, addresses of the clock, weights, factors and kept numbers, then the
// sites.
inline Drawn drawn_of(const Seeds& noise) {
  Drawn drawn = {};
  if (!noise) return drawn;
  const std::vector<uint64_t>& n = *noise;
  constexpr size_t first = 7;  // of the sites
  if (n.size() < first || n.size() > first + kMostInputs) {
    throw std::invalid_argument("noise: expected 7 numbers and at most 64 sites");
  }
  drawn.start = {static_cast<uint32_t>(n[0]), static_cast<uint32_t>(n[0] >> 32), 0, 0,
                 static_cast<uint32_t>(n[1]), static_cast<uint32_t>(n[2]),
                 pointer<const uint32_t>(n[3])};
  drawn.weights = pointer(n[4]);
  drawn.factors = pointer(n[5]);
  drawn.kept = pointer<float>(n[6]);
  drawn.count = static_cast<int>(n.size() - first);
  for (int j = 0; j < drawn.count; ++j) drawn.sites[j] = static_cast<uint32_t>(n[first + j]);
  return drawn;
}

inline void check_cpu_dtype(DType dtype, const Place& place) {
  if (place.device < 0 && dtype == DType::kBFloat16) {
    throw std::invalid_argument("dtype: expected float32 or float64 on the CPU, got bfloat16");
  }
}

constexpr int64_t kNear = int64_t{12} << 20;  // bytes that stay in the last-level cache

// Inputs that are worked on together. On the CPU they are so few that the second pass over them
// finds them in the cache; there more inputs cost nothing, on a GPU a launch.
inline int group_of(const Array& like, int inputs, int64_t tensors_an_input, const Place& place) {
  if (place.device >= 0) return inputs;
  const int64_t width = like.dtype == DType::kFloat64 ? 8 : 4;
  const int64_t bytes = width * like.shape[0] * like.shape[1] * like.shape[2] * like.shape[3];
  const int64_t fit = kNear / std::max<int64_t>(1, bytes * tensors_an_input);
  return static_cast<int>(std::clamp<int64_t>(fit, 1, inputs));
}

inline size_t width_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }  // of a coefficient

// `data` moved on by so many coefficients; null stays null.
template <typename Void>
Void* moved(Void* data, DType dtype, int64_t by) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return data ? static_cast<Byte*>(data) + by * static_cast<int64_t>(width_of(dtype)) : nullptr;
}

// The launchers that several files call.
inline void run(const TermCoefficients& arguments, const Place& place) {
  RDARTS_LAUNCH(term_coefficients, arguments);
}
inline void run(const TermGradients& arguments, const Place& place) {
  RDARTS_LAUNCH(term_gradients, arguments);
}
// What goes with the following is on a GPU part of the same launch.
inline void run(const NodeSum& arguments, const Place& place) {
  if (arguments.terms && place.device < 0) run(*arguments.terms, place);
  RDARTS_LAUNCH(node_sum, arguments, place.threads);
}
inline void run(const NodeSumDq& arguments, const Place& place) {
  RDARTS_LAUNCH(node_sum_dq, arguments, place.threads);
  if (arguments.terms && place.device < 0) run(*arguments.terms, place);
}
inline void run(const Normalization& arguments, const Place& place) {
  RDARTS_LAUNCH(normalize, arguments);
}
inline void run(const RowGradients& arguments, const Place& place) {
  RDARTS_LAUNCH(row_gradients, arguments);
}
inline void run(const StageForward& arguments, const Place& place) {
  RDARTS_LAUNCH(sep_stage, arguments, place.threads);
  if (arguments.norms && place.device < 0) run(*arguments.norms, place);
}
inline void run(const StageBackward& arguments, const Place& place) {
  RDARTS_LAUNCH(sep_stage_backward, arguments, place.threads);
  if (arguments.rows && place.device < 0) run(*arguments.rows, place);
}

// Of a cell's table: addresses of [2, R, C] float64 (mean, rstd) and of [3, R, C] coefficients (by_g,
// by_z, constant), R, whether in training.
using TableAt = std::tuple<Address, Address, int64_t, bool>;
using Rule = std::pair<double, double>;  // eps and momentum
// Rows of it: the first, running buffers (a mean and a variance each), the rule of their norms, the
// scales and shifts [G, C] that normalise, or null.
using RowsAt = std::tuple<TableAt, int64_t, Addresses, Rule, Address, Address>;

// What fills them from the sums of a launch's tensors of that shape, [3, G, C].
Normalization norms_of(int dtype, const Shape& shape, const RowsAt& at, const double* sums);

// Doubles of buffer that the forward or the backward of a stage needs: sums and workspace.
int64_t stage_buffer(int64_t edges, const Shape& shape, const Shape& out_shape,
                     const Geometry& geometry, bool backward, const Place& place);

}  // namespace rdarts
