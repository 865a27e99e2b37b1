// How the CPU kernels walk over tensors [N, C, H, W]: a sample at a time, in runs of elements that
// lie one behind the other, in tiles that stay in the first-level cache.
//
// Channels innermost: a sample is one run, and element i of it has channel i % C; coefficients are
// spread over a pattern that repeats along the run, so that the inner loops know no channels.
// Otherwise a channel's plane is a run, a coefficient is one number, and sums are kept in a short
// pattern of kLanes. A tensor whose elements do not lie in the run's order is
// copied tile by tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "node_sum.h"
#include "vectors.h"
#include "walk.h"

namespace rdarts {
namespace {

constexpr int64_t kTile = 512;    // elements worked on at once
constexpr int64_t kPattern = 64;   // a pattern of channels is at least this long
constexpr int64_t kLanes = 16;     // the pattern of a channel's plane
constexpr int64_t kFlushed = 64;   // repetitions of the pattern that are summed in the array's type

struct Runs {
  int64_t samples, channels, height, width;
  bool inner;       // channels innermost
  int64_t count;    // runs a sample
  int64_t length;   // elements a run
  int64_t period;   // elements a pattern: whole multiples of C where channels are innermost
  int64_t tile;     // elements a tile: whole patterns

  int64_t pixels() const { return height * width; }
};

// Whether channels lie innermost, in whole vectors.
template <typename T>
bool in_blocks(const Runs& r) {
  return r.inner && r.channels % kVector<T> == 0;
}

inline bool is_empty(const Array& a) {
  return a.shape[0] == 0 || a.shape[1] == 0 || a.shape[2] == 0 || a.shape[3] == 0;
}

inline Runs runs_of(const Array& like) {
  Runs r;
  r.samples = like.shape[0], r.channels = like.shape[1];
  r.height = like.shape[2], r.width = like.shape[3];
  r.inner = channels_inner(like);
  r.count = r.inner ? 1 : r.channels;
  r.length = r.inner ? r.channels * r.pixels() : r.pixels();
  r.period = r.inner ? r.channels * ((kPattern + r.channels - 1) / r.channels) : kLanes;
  r.tile = r.period * std::max<int64_t>(1, kTile / r.period);
  return r;
}

// Whether the tensor's elements lie one behind the other in every run.
inline bool lies_in_runs(const Array& a, const Runs& r) {
  const int64_t w = r.inner ? r.channels : 1;
  const bool columns = r.width == 1 || a.strides[3] == w;
  const bool rows = r.height == 1 || a.strides[2] == r.width * w;
  return columns && rows && (!r.inner || r.channels == 1 || a.strides[1] == 1);
}

// Copies elements [begin, begin + size) of a run between the tensor and packed memory.
template <typename T, bool to_tensor>
void copy_tile(const Array& a, const Runs& r, int64_t sample, int64_t run, int64_t begin,
               int64_t size, T* packed) {
  T* const base = static_cast<T*>(a.data) + sample * a.strides[0];
  const int64_t depth = r.inner ? r.channels : 1;
  T* const plane = r.inner ? base : base + run * a.strides[1];
  int64_t pixel = begin / depth, channel = begin % depth;
  int64_t row = pixel / r.width, column = pixel % r.width;
  for (int64_t i = 0; i < size; ++i) {
    T& element = plane[row * a.strides[2] + column * a.strides[3] + channel * a.strides[1]];
    if (to_tensor) element = packed[i];
    else packed[i] = element;
    if (++channel < depth) continue;
    channel = 0;
    if (++column < r.width) continue;
    column = 0, ++row;
  }
}

// to[c, r] = from[r, c] of a matrix of rows x columns, in blocks that stay in registers.
template <typename T>
void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t kBlock = 16;
  for (int64_t r = 0; r < rows; r += kBlock) {
    for (int64_t c = 0; c < columns; c += kBlock) {
      const T* const first = from + r * columns + c;
      T* const target = to + c * rows + r;
      if (r + kBlock <= rows && c + kBlock <= columns) {
        for (int64_t j = 0; j < kBlock; ++j) {
          for (int64_t i = 0; i < kBlock; ++i) target[j * rows + i] = first[i * columns + j];
        }
        continue;
      }
      for (int64_t j = 0; j < std::min(kBlock, columns - c); ++j) {
        for (int64_t i = 0; i < std::min(kBlock, rows - r); ++i) {
          target[j * rows + i] = first[i * columns + j];
        }
      }
    }
  }
}

// A tensor that is read in tiles.
template <typename T>
class Reader {
 public:
  Reader(const Array& a, const Runs& r) : a_(&a), r_(&r), direct_(lies_in_runs(a, r)) {
    if (!direct_) packed_.resize(r.tile);
  }
  bool direct() const { return direct_; }  // its tiles may be of any size
  // Elements [begin, begin + size) of a run.
  const T* tile(int64_t sample, int64_t run, int64_t begin, int64_t size) {
    if (direct_) {
      const int64_t plane = r_->inner ? 0 : run * a_->strides[1];
      return static_cast<const T*>(a_->data) + sample * a_->strides[0] + plane + begin;
    }
    copy_tile<T, false>(*a_, *r_, sample, run, begin, size, packed_.data());
    return packed_.data();
  }

 private:
  const Array* a_;
  const Runs* r_;
  bool direct_;
  std::vector<T> packed_;
};

// A tensor that is written in tiles: fill tile(), then call done().
template <typename T>
class Writer {
 public:
  Writer(const Array& a, const Runs& r) : a_(&a), r_(&r), direct_(lies_in_runs(a, r)) {
    if (!direct_) packed_.resize(r.tile);
  }
  bool direct() const { return direct_; }
  T* tile(int64_t sample, int64_t run, int64_t begin) {
    if (!direct_) return packed_.data();
    const int64_t plane = r_->inner ? 0 : run * a_->strides[1];
    return static_cast<T*>(a_->data) + sample * a_->strides[0] + plane + begin;
  }
  void done(int64_t sample, int64_t run, int64_t begin, int64_t size) {
    if (!direct_) copy_tile<T, true>(*a_, *r_, sample, run, begin, size, packed_.data());
  }

 private:
  const Array* a_;
  const Runs* r_;
  bool direct_;
  std::vector<T> packed_;
};

// Lets `count` elements about a tile further on be fetched: as the tiles of several tensors come in
// turn, the processor does not see what comes next.
template <typename T>
inline void fetch_next_tile(const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + kTile + i, 0, 2);
}

// body(begin, size) for each tile of a run.
template <typename Body>
inline void for_tiles(const Runs& r, const Body& body) {
  for (int64_t begin = 0; begin < r.length; begin += r.tile) {
    body(begin, std::min(r.tile, r.length - begin));
  }
}

// Spreads value(channel) over a pattern; a channel's plane takes its first number.
template <typename T, typename Value>
inline void spread(const Runs& r, int64_t run, T* pattern, const Value& value) {
  if (r.inner) {
    for (int64_t i = 0; i < r.period; ++i) pattern[i] = i < r.channels ? value(i) : pattern[i - r.channels];
  } else {
    pattern[0] = value(run);
  }
}

// Samples of a piece, which one thread takes at once, and the pieces.
inline int64_t samples_of(const Runs& r) { return std::max<int64_t>(1, r.samples / 16); }
inline int64_t pieces_of(const Runs& r) { return (r.samples + samples_of(r) - 1) / samples_of(r); }

// Adds a pattern of sums to double sums by channel, and clears it.
template <typename T>
inline void flush(const Runs& r, int64_t run, T* __restrict pattern, double* __restrict sums) {
  if (r.inner) {
    for (int64_t first = 0; first < r.period; first += r.channels) {
      for (int64_t i = 0; i < r.channels; ++i) sums[i] += pattern[first + i];
    }
    std::fill_n(pattern, r.period, T(0));
    return;
  }
  sums[run] += sum_of<kLanes>(pattern);
  std::fill_n(pattern, kLanes, T(0));
}

// sums = the pieces' partial sums [pieces, size], added in their order.
inline void combine(const double* partial, int64_t pieces, int64_t size, double* sums) {
  std::fill_n(sums, size, 0.0);
  for (int64_t n = 0; n < pieces; ++n) {
    for (int64_t i = 0; i < size; ++i) sums[i] += partial[n * size + i];
  }
}

// The coefficient of element i of a repetition: a pattern of channels has one each, a channel's
// plane has one for all.
template <bool inner, typename T>
inline T pick(const T* pattern, int64_t i) {
  return pattern[inner ? i : 0];
}

}  // namespace
}  // namespace rdarts
