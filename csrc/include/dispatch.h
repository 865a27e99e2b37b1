// Picks the compiled variant: which units exist and run here, whether there is a CUDA side.
#pragma once

#include <type_traits>

#include "place.h"

namespace rdarts {

constexpr bool kX86Units = RDARTS_X86_UNITS;
constexpr bool kCuda = RDARTS_HAS_CUDA;

template <Unit unit>
using UnitTag = std::integral_constant<Unit, unit>;

// call(UnitTag<unit>{}) for the compiled unit named by `unit`.
template <typename Call>
void on_unit(Unit unit, Call call) {
  if constexpr (kX86Units) {
    if (unit == Unit::kAvx512) return call(UnitTag<Unit::kAvx512>{});
    if (unit == Unit::kAvx2) return call(UnitTag<Unit::kAvx2>{});
  }
  call(UnitTag<Unit::kBase>{});
}

inline bool runs_here(Unit unit) {
#if RDARTS_X86_UNITS
  if (unit == Unit::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (unit == Unit::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return unit == Unit::kBase;
}

}  // namespace rdarts
