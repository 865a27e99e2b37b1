// Philox4x32-10 and the numbers made of its words; the same bits on every device.
//
//   key      k0 = low word of the seed, k1 = its high word
//   counter  c0 = block (block b holds numbers 4b .. 4b+3), c1 = site, c2 = step,
//            c3 = branch << 16 | pass
//   uniform  (x >> 8) * 2^-24
//   normals  two from each pair (x0, x1), (x2, x3) of a block, by Box-Muller:
//            n = (x0 >> 8) + 1,   u = n * 2^-24 in (0, 1]
//            u = 2^-e * (1 - s), 1 - s in [sqrt(1/2), sqrt(2))
//            r = sqrt(e * 2 ln 2 + s * Q(s)),  Q(s) = -2 ln(1 - s) / s
//            v = x1 >> 8,   q = (v + 2^21) >> 22,   f = (v - (q << 22)) * 2^-24 in [-1/8, 1/8)
//            z0 = r * cos(q * pi/2 + 2 pi f),   z1 = r * sin(q * pi/2 + 2 pi f)
//
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "body.h"

namespace rdarts {

// The key and the first block's counter. Where there is a clock, two words in the memory of the
// device that draws, step and stream count from where it stands: a launch that is recorded once and
// replayed draws anew whenever the clock has been set.
struct PhiloxStart {
  uint32_t k0, k1;          // the seed
  uint32_t c0, c1, c2, c3;  // block, site, step, branch << 16 | pass
  const uint32_t* clock;    // added to c2 and c3, or null
};

// The start as the clock stands, read through a pointer or a Span.
template <typename Clock>
RDARTS_BODY PhiloxStart read_clock(PhiloxStart start, const Clock& clock) {
  if (start.clock == nullptr) return start;
  start.c2 += clock[0], start.c3 += clock[1];
  start.clock = nullptr;
  return start;
}

struct Words {
  uint32_t x0, x1, x2, x3;
};

struct Pair {
  float z0, z1;
};

// One block at a time; wide.h has the lanes of a vector register.
struct OneLane {
  using Word = uint64_t;
  // The product of the low halves.
  RDARTS_BODY Word product(Word a, Word b) {
    return static_cast<Word>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b);
  }
};

// The ten rounds in place; only the low halves of the words count.
template <typename Lane, typename Word = typename Lane::Word>
RDARTS_BODY void philox_rounds(Word& c0, Word& c1, Word& c2, Word& c3, PhiloxStart start) {
  const Word m0 = Word{} + 0xD2511F53u, m1 = Word{} + 0xCD9E8D57u;
  for (int round = 0; round < 10; ++round) {
    const Word low = Lane::product(c0, m0), high = Lane::product(c2, m1);
    c0 = (high >> 32) ^ c1 ^ start.k0;
    c1 = high;
    c2 = (low >> 32) ^ c3 ^ start.k1;
    c3 = low;
    start.k0 += 0x9E3779B9u;
    start.k1 += 0xBB67AE85u;
  }
}

// The words of the block that comes `block` after the first.
RDARTS_BODY Words philox4x32(uint32_t block, PhiloxStart start) {
  uint64_t c0 = start.c0 + block, c1 = start.c1, c2 = start.c2, c3 = start.c3;
  philox_rounds<OneLane>(c0, c1, c2, c3, start);
  return {static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2),
          static_cast<uint32_t>(c3)};
}

RDARTS_BODY float uniform(uint32_t word) {
  return mul(static_cast<float>(static_cast<int32_t>(word >> 8)), 0x1p-24f);
}

// value * x + coefficient, rounded twice.
RDARTS_BODY float horner(float value, float x, float coefficient) {
  return add(mul(value, x), coefficient);
}

// The coefficients are minimax in relative error, rounded to float32: Q 3e-8 on
// [1 - sqrt(2), 1 - sqrt(1/2)], sine 4e-9 and cosine 6e-11 on [0, 1/64] (in f * f).
RDARTS_BODY float log_quotient(float s) {
  float q = 0.1744471f;
  q = horner(q, s, 0.28734544f);
  q = horner(q, s, 0.299049f);
  q = horner(q, s, 0.3312469f);
  q = horner(q, s, 0.39913625f);
  q = horner(q, s, 0.5000415f);
  q = horner(q, s, 0.66668373f);
  q = horner(q, s, 0.99999976f);
  return horner(q, s, 2.0f);
}

RDARTS_BODY float sine_quotient(float f2) {
  float q = -75.39356f;
  q = horner(q, f2, 81.592354f);
  q = horner(q, f2, -41.341663f);
  return horner(q, f2, 6.2831855f);
}

RDARTS_BODY float cosine(float f2) {
  float q = 59.202797f;
  q = horner(q, f2, -85.4423f);
  q = horner(q, f2, 64.93931f);
  q = horner(q, f2, -19.739208f);
  return horner(q, f2, 1.0f);
}

RDARTS_BODY float radius(uint32_t word) {
  const int32_t n = bits_of(static_cast<float>(static_cast<int32_t>(word >> 8) + 1));
  const int32_t exponent = (n - 0x3F3504F3) >> 23;  // 0x3F3504F3 is sqrt(1/2)
  // Signs are folded into s and 24 - exponent, so u = 1 gives +0 and nothing is ever negative.
  const float s = add(1.0f, -float_of(n - exponent * (1 << 23)));
  const float e = static_cast<float>(24 - exponent);
  return root(add(mul(e, 1.3862944f), mul(s, log_quotient(s))));
}

RDARTS_BODY Pair normal_pair(uint32_t x0, uint32_t x1) {
  const float r = radius(x0);
  const int32_t v = static_cast<int32_t>(x1 >> 8);
  const int32_t q = (v + (1 << 21)) >> 22;
  const float f = mul(static_cast<float>(v - q * (1 << 22)), 0x1p-24f);
  const float f2 = mul(f, f);
  const int32_t s = bits_of(mul(f, sine_quotient(f2))), c = bits_of(cosine(f2));
  // A quarter turn swaps the two; the quadrant's bits are the signs.
  const int32_t swap = -(q & 1);
  const int32_t sign_x = static_cast<int32_t>((q + 1u) << 30 & 0x80000000u);
  const int32_t sign_y = static_cast<int32_t>((q + 0u) << 30 & 0x80000000u);
  const int32_t x = ((s & swap) | (c & ~swap)) ^ sign_x;
  const int32_t y = ((c & swap) | (s & ~swap)) ^ sign_y;
  return {mul(r, float_of(x)), mul(r, float_of(y))};
}

// How the four words of a block become four numbers.
template <typename T>
struct Four {
  T a, b, c, d;
};

struct Bits {
  using Value = int64_t;
  RDARTS_BODY Four<int64_t> numbers(Words x) { return {x.x0, x.x1, x.x2, x.x3}; }
};

struct Uniform {
  using Value = float;
  RDARTS_BODY Four<float> numbers(Words x) {
    return {uniform(x.x0), uniform(x.x1), uniform(x.x2), uniform(x.x3)};
  }
};

struct Normal {
  using Value = float;
  RDARTS_BODY Four<float> numbers(Words x) {
    const Pair first = normal_pair(x.x0, x.x1), second = normal_pair(x.x2, x.x3);
    return {first.z0, first.z1, second.z0, second.z1};
  }
};

}  // namespace rdarts
