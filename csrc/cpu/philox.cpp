// Fills memory with Philox numbers; the formulas are in philox.h.
#include "philox.h"

#include <algorithm>

#include "launchers.h"
#include "parallel.h"
#include "wide.h"

namespace rdarts {
namespace {

using Wide = WideLane::Word;

constexpr int kLanes = 64;      // blocks of four numbers that are worked on at once
constexpr int64_t kGrain = 16;  // groups of kLanes blocks that a thread takes at once
constexpr int kPerWide = kWideBytes / 4;

struct LaneWords {
  alignas(64) uint32_t x0[kLanes], x1[kLanes], x2[kLanes], x3[kLanes];
};

// The low halves of `even` and `odd`, interleaved.
RDARTS_BODY void store(uint32_t* out, Wide even, Wide odd) {
  *reinterpret_cast<Wide*>(out) = (even & 0xFFFFFFFFu) | odd << 32;
}

// The words of kLanes blocks, the first of them `first` after the start. A 64-bit lane holds a
// block's word; even and odd blocks go separately, so that the products need no shuffles.
RDARTS_BODY void lane_words(uint32_t first, PhiloxStart start, LaneWords& x) {
  Wide even{};
  for (int i = 0; i < kPerWide / 2; ++i) even[i] = 2 * i;
  for (int lane = 0; lane < kLanes; lane += kPerWide) {
    Wide a0 = even + static_cast<uint64_t>(start.c0 + first + lane), b0 = a0 + 1;
    Wide a1 = Wide{} + start.c1, a2 = Wide{} + start.c2, a3 = Wide{} + start.c3;
    Wide b1 = a1, b2 = a2, b3 = a3;
    philox_rounds<WideLane>(a0, a1, a2, a3, start);
    philox_rounds<WideLane>(b0, b1, b2, b3, start);
    store(x.x0 + lane, a0, b0);
    store(x.x1 + lane, a1, b1);
    store(x.x2 + lane, a2, b2);
    store(x.x3 + lane, a3, b3);
  }
}

// The numbers of those blocks.
template <typename Kind>
RDARTS_BODY void write(typename Kind::Value* out, uint32_t first, PhiloxStart start) {
  using Value = typename Kind::Value;
  LaneWords x;
  lane_words(first, start, x);
  Value a[kLanes], b[kLanes], c[kLanes], d[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const Four<Value> four = Kind::numbers({x.x0[i], x.x1[i], x.x2[i], x.x3[i]});
    a[i] = four.a, b[i] = four.b, c[i] = four.c, d[i] = four.d;
  }
  for (int i = 0; i < kLanes; ++i) {
    out[4 * i] = a[i], out[4 * i + 1] = b[i], out[4 * i + 2] = c[i], out[4 * i + 3] = d[i];
  }
}

template <typename Kind>
void fill(typename Kind::Value* out, int64_t count, PhiloxStart start, int threads) {
  constexpr int64_t kNumbers = 4 * kLanes;
  start = read_clock(start, start.clock);
  const int64_t whole = count / kNumbers;
  parallel_for(whole, kGrain, threads, [=](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      write<Kind>(out + kNumbers * group, static_cast<uint32_t>(kLanes * group), start);
    }
  });
  typename Kind::Value rest[kNumbers];
  if (count % kNumbers != 0) write<Kind>(rest, static_cast<uint32_t>(kLanes * whole), start);
  for (int64_t i = kNumbers * whole; i < count; ++i) out[i] = rest[i - kNumbers * whole];
}

// Numbers [first, first + count) of the stream, by one thread.
template <typename Kind>
void fill_range(typename Kind::Value* out, int64_t first, int64_t count, PhiloxStart start) {
  constexpr int64_t kNumbers = 4 * kLanes;
  start = read_clock(start, start.clock);
  typename Kind::Value group[kNumbers];
  for (int64_t done = 0; done < count;) {
    const int64_t block = (first + done) / 4, skipped = first + done - 4 * block;
    const int64_t size = std::min(kNumbers - skipped, count - done);
    const bool whole = skipped == 0 && size == kNumbers;
    write<Kind>(whole ? out + done : group, static_cast<uint32_t>(block), start);
    if (!whole) std::copy_n(group + skipped, size, out + done);
    done += size;
  }
}

}  // namespace

template <>
void philox_bits<RDARTS_UNIT>(int64_t* out, int64_t count, PhiloxStart start, int threads) {
  fill<Bits>(out, count, start, threads);
}

template <>
void philox_uniform<RDARTS_UNIT>(float* out, int64_t count, PhiloxStart start, int threads) {
  fill<Uniform>(out, count, start, threads);
}

template <>
void philox_normal<RDARTS_UNIT>(float* out, int64_t count, PhiloxStart start, int threads) {
  fill<Normal>(out, count, start, threads);
}

template <>
void draw_normals<RDARTS_UNIT>(float* out, int64_t first, int64_t count, PhiloxStart start) {
  fill_range<Normal>(out, first, count, start);
}

}  // namespace rdarts
