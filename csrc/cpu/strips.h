// How the CPU pools walk over tensors [N, C, H, W]: by strips, which are some channels of a sample,
// row by row. A row is copied into packed memory where a pixel's neighbours lie `depth` elements
// apart and a zero pixel stands before, between and behind the channels' pixels: the inner loops
// run over whole rows, however short the images', and know no borders.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "pool.h"
#include "walk.h"

namespace rdarts {
namespace {

constexpr int64_t kRow = 512;        // elements of a packed row: a strip's rows stay in the L1
constexpr int64_t kLeastDeep = 16;   // channels of a strip, where they lie innermost
constexpr int64_t kPiece = 1 << 15;  // elements, about, that a thread takes at once: a strip is set
                                     // up once a piece

// Numbers beside a T in the same vector.
template <typename T>
using Lane = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

struct Images {
  int64_t samples, channels, height, width;
  int64_t rows, columns;  // of a pool's result
  int stride;
  bool inner;    // channels innermost
  int64_t deep;  // channels a strip
};

// Samples of a piece of work.
inline int64_t grain_of(const Images& m) {
  return std::max<int64_t>(1, kPiece / (m.channels * m.height * m.width));
}

inline Images images_of(const Array& x, const Array* others, int stride) {
  Images m;
  m.samples = x.shape[0], m.channels = x.shape[1], m.height = x.shape[2], m.width = x.shape[3];
  m.stride = stride, m.rows = pooled(m.height, stride), m.columns = pooled(m.width, stride);
  int present = 1, inner = channels_inner(x);
  for (int i = 0; i < kPools; ++i) {
    if (others[i].data) ++present, inner += channels_inner(others[i]);
  }
  m.inner = 2 * inner > present;
  const int64_t most = std::max(m.inner ? kLeastDeep : 1, kRow / m.columns);
  const int64_t strips = (m.channels + most - 1) / most;
  m.deep = (m.channels + strips - 1) / strips;
  return m;
}

// Channels [first, first + count) of a sample as packed rows: `groups` of a row's pixels and a zero
// pixel; a pixel is `depth` channels.
struct Strip {
  int64_t first, count, depth, groups, pitch;

  Strip(const Images& m, int64_t from)
      : first(from), count(std::min(m.deep, m.channels - from)), depth(m.inner ? count : 1),
        groups(m.inner ? 1 : count), pitch((m.columns + 1) * depth) {}
  int64_t size() const { return groups * pitch - depth; }  // up to the last zero pixel

  // body(channel of the strip, pixel, index in a row) for each element.
  template <typename Body>
  void each(int64_t pixels, const Body& body) const {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c = 0; c < depth; ++c) body(g + c, p, g * pitch + p * depth + c);
      }
    }
  }
};

// Packed rows, each with a zero pixel before it.
template <typename T>
class Rows {
 public:
  Rows(const Images& m, int count)
      : lead_(m.inner ? m.deep : 1), length_(m.deep * (m.columns + 1) + lead_), count_(count),
        memory_(new T[count * length_]) {}
  void clear() { std::fill_n(memory_.get(), count_ * length_, T(0)); }
  T* operator[](int64_t row) const { return &memory_[row * length_ + lead_]; }

 private:
  int64_t lead_, length_, count_;
  std::unique_ptr<T[]> memory_;
};

template <bool to_tensor, typename T, typename P>
inline void copy_line(T* line, int64_t step, int64_t size, P* packed) {
  const auto copy = [&](int64_t by) {
    for (int64_t i = 0; i < size; ++i) {
      if constexpr (to_tensor) line[by * i] = static_cast<T>(packed[i]);
      else packed[i] = static_cast<P>(line[by * i]);
    }
  };
  if (step == 1) copy(1);
  else if (step == 2) copy(2);
  else copy(step);
}

// Copies pixels from, from + every, ... of a row between a tensor of T and a packed row.
template <bool to_tensor, typename T, typename P>
void copy_row(const Array& a, int64_t sample, int64_t row, const Strip& s, bool inner, int64_t from,
              int64_t every, P* packed) {
  const int64_t channel = a.strides[1], pixel = a.strides[3] * every;
  const int64_t pixels = (a.shape[3] - from + every - 1) / every;
  T* const line = static_cast<T*>(a.data) + sample * a.strides[0] + s.first * channel +
                  row * a.strides[2] + from * a.strides[3];
  if (!inner) {
    for (int64_t c = 0; c < s.count; ++c) {
      copy_line<to_tensor>(line + c * channel, pixel, pixels, packed + c * s.pitch);
    }
  } else if (channel == 1 && pixel == s.count) {
    copy_line<to_tensor>(line, 1, pixels * s.count, packed);
  } else {
    for (int64_t p = 0; p < pixels; ++p) {
      copy_line<to_tensor>(line + p * pixel, channel, s.count, packed + p * s.depth);
    }
  }
}

}  // namespace
}  // namespace rdarts
