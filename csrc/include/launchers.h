// Every launcher, one line a side. CPU launchers are templates that each unit specialises: their
// files are compiled once per unit, with RDARTS_UNIT naming it.
#pragma once

#include <cstdint>

#include "philox.h"
#include "place.h"

namespace rdarts {

template <Unit unit>
void philox_bits(int64_t* out, int64_t count, PhiloxStart start, int threads);
template <Unit unit>
void philox_uniform(float* out, int64_t count, PhiloxStart start, int threads);
template <Unit unit>
void philox_normal(float* out, int64_t count, PhiloxStart start, int threads);

namespace cuda {

void philox_bits(int64_t* out, int64_t count, PhiloxStart start, const Place& place);
void philox_uniform(float* out, int64_t count, PhiloxStart start, const Place& place);
void philox_normal(float* out, int64_t count, PhiloxStart start, const Place& place);

}  // namespace cuda
}  // namespace rdarts
