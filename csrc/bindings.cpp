// The module _rdarts_fast: checks arguments, picks CPU or CUDA, calls a launcher. Memory comes as
// addresses (integers), so the library needs no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace rdarts {
namespace {

const char* const kUnitNames[] = {"base", "avx2", "avx512"};
constexpr int kUnits = kX86Units ? 3 : 1;

std::vector<std::string> compiled_units() { return {kUnitNames, kUnitNames + kUnits}; }

std::vector<std::string> runnable_units() {
  std::vector<std::string> names;
  for (int i = 0; i < kUnits; ++i) {
    if (runs_here(static_cast<Unit>(i))) names.push_back(kUnitNames[i]);
  }
  return names;
}

Unit unit_named(const std::string& name) {
  for (int i = 0; i < kUnits; ++i) {
    if (name == kUnitNames[i] && runs_here(static_cast<Unit>(i))) return static_cast<Unit>(i);
  }
  throw std::invalid_argument("unit: expected one of runnable_units(), found \"" + name + "\"");
}

Place make_place(const std::string& unit, int threads, int device, std::uintptr_t stream,
                 std::uintptr_t counters, bool tf32) {
  if (threads < 1) {
    throw std::invalid_argument("threads: expected 1 or more, found " + std::to_string(threads));
  }
  if (device >= 0 && !kCuda) {
    throw std::invalid_argument("device: this is a CPU build, found CUDA device " +
                                std::to_string(device));
  }
  return {unit_named(unit), threads, device, stream, pointer<uint32_t>(counters), tf32};
}

using Counter = std::array<uint32_t, 4>;

// The address of `count` numbers that the 32-bit block counter reaches from c0 on.
template <typename T>
T* checked(std::uintptr_t out, int64_t count, const Counter& counter) {
  const int64_t largest = ((int64_t{1} << 32) - counter[0]) * 4;
  if (count < 0 || count > largest) {
    throw std::invalid_argument("count: expected 0 .. " + std::to_string(largest) + ", found " +
                                std::to_string(count));
  }
  if (count > 0 && (out == 0 || out % alignof(T) != 0)) {
    throw std::invalid_argument("out: expected an aligned address, found " + std::to_string(out));
  }
  return reinterpret_cast<T*>(out);
}

// Calls the launchers of a Philox function on the side and the unit that `place` names.
#define RDARTS_PHILOX(NAME, TYPE)                                                               \
  void NAME##_at(std::uintptr_t out, int64_t count, uint64_t seed, const Counter& counter,      \
                 const Place& place, std::uintptr_t clock) {                                    \
    TYPE* const numbers = checked<TYPE>(out, count, counter);                                   \
    const PhiloxStart start = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),  \
                               counter[0], counter[1], counter[2], counter[3],                  \
                               pointer<const uint32_t>(clock)};                                 \
    if (place.device >= 0) {                                                                    \
      if constexpr (kCuda) cuda::NAME(numbers, count, start, place);                            \
      return;                                                                                   \
    }                                                                                           \
    on_unit(place.unit, [&](auto unit) {                                                        \
      NAME<decltype(unit)::value>(numbers, count, start, place.threads);                        \
    });                                                                                         \
  }

RDARTS_PHILOX(philox_bits, int64_t)
RDARTS_PHILOX(philox_uniform, float)
RDARTS_PHILOX(philox_normal, float)
#undef RDARTS_PHILOX

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    words.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return words;
}

py::dict build_info() {
  const std::string runtime = RDARTS_CUDA_RUNTIME;
  py::dict info;
  info["version"] = RDARTS_VERSION;
  info["csrc_hash"] = RDARTS_CSRC_HASH;
  info["compiler"] = RDARTS_COMPILER;
  info["build_type"] = RDARTS_BUILD_TYPE;
  info["cpu_units"] = compiled_units();
  info["cuda_archs"] = split(RDARTS_CUDA_ARCHS);
  info["cuda_runtime"] = kCuda ? py::object(py::str(runtime)) : py::none();
  return info;
}

}  // namespace

PYBIND11_MODULE(_rdarts_fast, module) {
  module.doc() = "The native library of rdarts_fast.";
  module.def("build_info", &build_info, "What was compiled, by what and for what.");
  module.def("runnable_units", &runnable_units, "The CPU units this machine runs, best last.");

  // Local, so that another build of this module can be loaded beside it.
  py::class_<Place>(module, "Place", py::module_local(),
                    "Where a launcher runs; device -1 is the CPU.")
      .def(py::init(&make_place), py::arg("unit"), py::arg("threads") = 1, py::arg("device") = -1,
           py::arg("stream") = 0, py::arg("counters") = 0, py::arg("tf32") = false)
      .def_readonly("device", &Place::device);
  module.attr("COUNTERS") = kCounters;

  const auto define = [&](const char* name, auto function, const char* text) {
    module.def(name, function, text, py::arg("out"), py::arg("count"), py::arg("seed"),
               py::arg("counter"), py::arg("place"), py::arg("clock") = 0,
               py::call_guard<py::gil_scoped_release>());
  };
  define("philox_bits", &philox_bits_at, "Fill int64 [count] with words of 32 bits.");
  define("philox_uniform", &philox_uniform_at, "Fill float32 [count], uniform in [0, 1).");
  define("philox_normal", &philox_normal_at, "Fill float32 [count], standard normal.");
  define_cells(module);
  define_kernels(module);
  define_memory(module);
  define_pools(module);
  define_correlations(module);
  define_recurrent(module);
  define_stages(module);
}

}  // namespace rdarts
