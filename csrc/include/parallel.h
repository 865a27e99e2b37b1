// Splits CPU work over threads.
#pragma once

#include <cstdint>

namespace rdarts {

// body(begin, end) over [0, size) in pieces of `grain`. The pieces depend on the shape alone, so
// no result depends on the number of threads.
template <typename Body>
static inline void parallel_for(int64_t size, int64_t grain, int threads, const Body& body) {
  const int64_t pieces = (size + grain - 1) / grain;
  const int team = static_cast<int>(pieces < threads ? pieces : threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = piece * grain;
    body(begin, begin + grain < size ? begin + grain : size);
  }
}

}  // namespace rdarts
