// What the convolution stages share on the CPU: pixels of a tensor as vectors of channels, images in
// blocks of L channels [blocks, rows, columns, L] in a thread's own memory, and packed weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "array.h"
#include "matmul.h"
#include "vectors.h"

namespace rdarts {
namespace {

constexpr int64_t kTilePixels = 64;  // of output that are worked on at once, in a near cache
constexpr int64_t kMostChunks = 16;  // parts of a batch, each with gradients of the weights of its own

template <typename T>
int blocks_of(int64_t channels) {
  return static_cast<int>((channels + kVector<T> - 1) / kVector<T>);
}

inline int64_t chunk_of(int64_t samples) {
  return std::max<int64_t>(1, (samples + kMostChunks - 1) / kMostChunks);
}
// Samples that a thread takes at once where no gradients of weights are added up: fewer, as the others
// wait for the last one.
inline int64_t piece_of(int64_t samples) { return std::min<int64_t>(2, chunk_of(samples)); }

// Rows of a tile of an image, which may be empty.
inline int64_t tile_rows_of(int64_t height, int64_t width) {
  const int64_t most = std::max<int64_t>(1, height);
  return std::clamp<int64_t>(kTilePixels / std::max<int64_t>(1, width), 1, most);
}

// A thread's memory, which grows and is used again.
template <typename T>
T* scratch(int64_t count) {
  constexpr size_t aligned = 64 / sizeof(T);
  static thread_local std::vector<T> memory;
  const size_t wanted = static_cast<size_t>(count) + aligned;
  if (memory.size() < wanted) memory.resize(wanted);
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

// Hands out aligned parts of memory: first without any, to learn how much is needed.
template <typename T>
class Parts {
 public:
  explicit Parts(T* memory = nullptr) : memory_(memory) {}
  T* take(int64_t count) {
    constexpr int64_t aligned = 64 / sizeof(T);
    T* const part = memory_ ? memory_ + used_ : nullptr;
    used_ += (count + aligned - 1) / aligned * aligned;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  T* memory_;
  int64_t used_ = 0;
};

// Memory that a call's threads share, laid out as `Layout(arguments..., parts)` takes its parts.
template <typename T, typename Layout>
class Packed {
 public:
  template <typename... Arguments>
  explicit Packed(const Arguments&... arguments) {
    Parts<T> needed;
    Layout(arguments..., needed);
    memory_.resize(needed.used() + kAligned);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data());
    Parts<T> parts(reinterpret_cast<T*>((address + 63) / 64 * 64));
    layout_ = Layout(arguments..., parts);
  }
  const Layout& operator*() const { return layout_; }
  const Layout* operator->() const { return &layout_; }

 private:
  static constexpr int64_t kAligned = 64 / sizeof(T);
  std::vector<T> memory_;
  Layout layout_;
};

// Clears the border of `pad` pixels around an image [blocks, padded height, padded width, L].
template <typename T>
void clear_border(T* image, int blocks, int64_t height, int64_t width, int64_t pad) {
  constexpr int64_t L = kVector<T>;
  const int64_t row = (width + 2 * pad) * L, edge = pad * L;
  for (int v = 0; v < blocks; ++v, image += (height + 2 * pad) * row) {
    std::fill_n(image, pad * row, T(0));
    std::fill_n(image + (pad + height) * row, pad * row, T(0));
    for (int64_t y = pad; y < pad + height; ++y) {
      std::fill_n(image + y * row, edge, T(0));
      std::fill_n(image + (y + 1) * row - edge, edge, T(0));
    }
  }
}

// One sample of a tensor.
template <typename T>
class Pixels {
 public:
  Pixels(const Array& a, int64_t sample)
      : data_(static_cast<T*>(a.data) + sample * a.strides[0]),
        step_(a.strides[1]), row_(a.strides[2]), column_(a.strides[3]),
        channels_(a.shape[1]), inner_(a.strides[1] == 1 || a.shape[1] == 1),
        dense_(inner_ && column_ == channels_ && row_ == channels_ * a.shape[3]) {}

  // body(i, block v of the channels, zeros past the last) at `count` columns of a row, from `first`
  // on in steps of `step`.
  template <typename Body>
  RDARTS_METHOD void along(int64_t row, int64_t count, int v, const Body& body, int64_t first = 0,
                           int64_t step = 1) const {
    constexpr int L = kVector<T>;
    const T* from = data_ + row * row_ + first * column_ + v * L * step_;
    const int64_t rest = channels_ - v * L;
    if (inner_ && rest >= L) {
      for (int64_t i = 0; i < count; ++i, from += step * column_) body(i, load(from));
    } else if (inner_) {
      for (int64_t i = 0; i < count; ++i, from += step * column_) body(i, load_part(from, rest));
    } else {
      for (int64_t i = 0; i < count; ++i) body(i, get(row, first + i * step, v));
    }
  }

  // Block v of the first pixel of a row, where the elements of all rows lie side by side, else null:
  // the next pixel lies `channels()` further.
  const T* dense(int64_t row, int v) const {
    return dense_ ? data_ + row * row_ + v * kVector<T> : nullptr;
  }
  int64_t channels() const { return channels_; }

  // Lets `rows` rows be fetched, where their elements lie side by side.
  void fetch(Ahead& ahead, int64_t row, int64_t rows) const {
    if (dense_) ahead.add(data_ + row * row_, rows * row_ * static_cast<int64_t>(sizeof(T)));
  }

  // Block v of the channels, zeros past the last.
  RDARTS_METHOD Vec<T> get(int64_t row, int64_t column, int v) const {
    constexpr int L = kVector<T>;
    const T* const from = data_ + row * row_ + column * column_ + v * L * step_;
    const int64_t count = channels_ - v * L;
    if (inner_) return count >= L ? load(from) : load_part(from, count);
    Vec<T> vector = {};
    for (int64_t i = 0; i < L && i < count; ++i) vector[i] = from[i * step_];
    return vector;
  }

 private:
  const T* data_;
  int64_t step_, row_, column_, channels_;
  bool inner_, dense_;
};

// One sample of a result, dense and with its channels innermost.
template <typename T>
class Result {
 public:
  Result(const Array& a, int64_t sample)
      : data_(static_cast<T*>(a.data) + sample * a.shape[1] * a.shape[2] * a.shape[3]),
        channels_(a.shape[1]), width_(a.shape[3]),
        aligned_(reinterpret_cast<uintptr_t>(a.data) % kWideBytes == 0 &&
                 channels_ % kVector<T> == 0) {}

  bool aligned() const { return aligned_; }
  T* pixel(int64_t row, int64_t column) const { return data_ + (row * width_ + column) * channels_; }

  // Puts value(i), a block v of channels, at `count` columns of a row, from `first` on in steps of
  // `step`, or adds it to what is there. past_cache: it is not read soon; end with finish_stores().
  template <bool past_cache = false, typename Value>
  RDARTS_METHOD void along(int64_t row, int64_t count, int v, bool adds, const Value& value,
                           int64_t first = 0, int64_t step = 1) const {
    constexpr int L = kVector<T>;
    T* to = pixel(row, first) + v * L;
    const int64_t rest = channels_ - v * L, next = step * channels_;
    if (rest < L) {
      for (int64_t i = 0; i < count; ++i, to += next) {
        const Vec<T> found = value(i);
        store_part<T>(to, adds ? load_part(to, rest) + found : found, rest);
      }
    } else if (adds) {
      for (int64_t i = 0; i < count; ++i, to += next) store<T>(to, load(to) + value(i));
    } else if (past_cache && aligned_) {
      for (int64_t i = 0; i < count; ++i, to += next) store_past_cache<T>(to, value(i));
    } else {
      for (int64_t i = 0; i < count; ++i, to += next) store<T>(to, value(i));
    }
  }

 private:
  T* data_;
  int64_t channels_, width_;
  bool aligned_;  // every block of channels, to a vector
};

// Fills packed[blocks, L] with `channels` numbers and zeros.
template <typename T>
void pack_row(const void* row, int64_t channels, T* packed) {
  std::fill_n(packed, blocks_of<T>(channels) * kVector<T>, T(0));
  std::copy_n(static_cast<const T*>(row), channels, packed);
}

// A matrix [rows, columns] as the B of a product: [blocks of columns, rows, L].
template <typename T>
void pack_matrix(const T* matrix, int64_t rows, int64_t columns, int64_t row_step,
                 int64_t column_step, T* packed) {
  constexpr int L = kVector<T>;
  for (int j = 0; j < blocks_of<T>(columns); ++j) {
    for (int64_t r = 0; r < rows; ++r) {
      T* const to = packed + (j * rows + r) * L;
      for (int64_t i = 0; i < L; ++i) {
        const int64_t column = j * L + i;
        to[i] = column < columns ? matrix[r * row_step + column * column_step] : T(0);
      }
    }
  }
}

// Depthwise weights [C, K, K] as [blocks, K * K, L], turned by half a circle where `turned`.
template <typename T>
void pack_taps(const void* weights, int64_t channels, int taps, bool turned, T* packed) {
  constexpr int L = kVector<T>;
  const T* const from = static_cast<const T*>(weights);
  for (int v = 0; v < blocks_of<T>(channels); ++v) {
    for (int t = 0; t < taps; ++t) {
      for (int64_t i = 0; i < L; ++i) {
        const int64_t c = v * L + i;
        const int tap = turned ? taps - 1 - t : t;
        packed[(v * taps + t) * L + i] = c < channels ? from[c * taps + tap] : T(0);
      }
    }
  }
}

}  // namespace
}  // namespace rdarts
