// What the files that define the module's functions share.
#pragma once

#include <pybind11/pybind11.h>

namespace rdarts {

void define_kernels(pybind11::module_& module);
void define_memory(pybind11::module_& module);

}  // namespace rdarts
