// Splits CPU work over threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace rdarts {

// The pieces [next, end) that no thread has taken yet, in a cache line of their own.
struct alignas(64) Remaining {
  std::atomic<int64_t> next;
  int64_t end;
};

// body(begin, end) over [0, size) in pieces of `grain`. The pieces depend on the shape alone, so
// no result depends on the number of threads. Each thread takes its own run of pieces, the same from
// call to call for the sake of its cache; one that is done takes what others have left.
template <typename Body>
static inline void parallel_for(int64_t size, int64_t grain, int threads, const Body& body) {
  const int64_t pieces = (size + grain - 1) / grain;
  const int team = static_cast<int>(std::min<int64_t>(pieces, threads));
  const auto run = [&](int64_t piece) {
    const int64_t begin = piece * grain;
    body(begin, std::min(begin + grain, size));
  };
  if (team <= 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) run(piece);
    return;
  }
  const std::unique_ptr<Remaining[]> remaining(new Remaining[team]);
  for (int t = 0; t < team; ++t) {
    remaining[t].next = pieces * t / team, remaining[t].end = pieces * (t + 1) / team;
  }
#pragma omp parallel num_threads(team)
  for (int t = 0, me = omp_get_thread_num(); t < team; ++t) {
    Remaining& own = remaining[(me + t) % team];
    for (int64_t piece; (piece = own.next.fetch_add(1)) < own.end;) run(piece);
  }
}

}  // namespace rdarts
