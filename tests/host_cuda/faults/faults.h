// A fault is a small kernel that is wrong where `planted` is true and right where it is not.
#pragma once

#include <map>
#include <string>

#include "launch.h"
#include "span.h"

namespace faults {

using Output = rdarts::Span<float>;
using Input = rdarts::Span<const float>;
using Fault = void (*)(bool planted, Output out, Input in);

std::map<std::string, Fault>& table();

// One of these stands in each fault's file.
struct Entry {
  Entry(const char* name, Fault fault) { table()[name] = fault; }
};

constexpr rdarts::Place kPlace = {rdarts::Unit::kBase, 1, 0, 0};

// Launches the wrong or the right one of two kernels.
inline void run(const char* name, bool planted, void (*wrong)(Output, Input),
                void (*right)(Output, Input), const rdarts::Grid& grid, Output out, Input in) {
  rdarts::launch(name, planted ? wrong : right, grid, kPlace, out, in);
}

}  // namespace faults
