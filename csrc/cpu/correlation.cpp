// The correlation of two images along their rows and its adjoints (correlation.h).
//
// A row of both images is packed, so that the pixels lie beside one another and zeros around them.
// Both are then one product, with vectors of pixels x and blocks of results j:
//   out[j][x] = 1/C sum over k of a[k][x] b[k * step + j * apart + x]
// where a result is a displacement, k a channel in the correlation, and the other way about in its
// adjoints.
#include <algorithm>
#include <vector>

#include "correlation.h"
#include "launchers.h"
#include "parallel.h"
#include "vectors.h"

namespace rdarts {
namespace {

constexpr int64_t kLeastWork = int64_t{1} << 18;  // multiplications of a piece, about
constexpr int kBlock = kWideBytes == 64 ? 16 : 8;  // results at once: half of the registers

bool is_empty(const Array& a) {
  return a.shape[0] == 0 || a.shape[1] == 0 || a.shape[2] == 0 || a.shape[3] == 0;
}

template <typename T>
int64_t whole_vectors(int64_t size) {
  return (size + kVector<T> - 1) / kVector<T> * kVector<T>;
}

// Rows of packed pixels, each with zeros on both sides.
template <typename T>
class PackedRows {
 public:
  PackedRows(int64_t rows, int64_t width, int64_t before, int64_t after)
      : before_(before), width_(width), vectors_(whole_vectors<T>(before + width + after) / kVector<T>) {
    vectors_ += vectors_ % 2 == 0;  // rows an even number of vectors apart would share cache sets
    memory_.assign(rows * pitch(), T(0));
  }

  int64_t pitch() const { return vectors_ * kVector<T>; }
  const T* at(int64_t pixel) const { return memory_.data() + before_ + pixel; }

  // Row y of sample n of every channel; channel c is moved by `moved(c)` pixels.
  template <typename Moved>
  void fill(const Array& a, int64_t n, int64_t y, const Moved& moved) {
    for (int64_t c = 0; c < a.shape[1]; ++c) {
      const T* const from = static_cast<const T*>(a.data) + n * a.strides[0] + c * a.strides[1] +
                            y * a.strides[2];
      T* const to = memory_.data() + c * pitch() + before_;
      const int64_t by = moved(c), step = a.strides[3];
      const int64_t begin = std::clamp<int64_t>(by, 0, width_);
      const int64_t end = std::clamp<int64_t>(width_ + by, 0, width_);
      std::fill(to, to + begin, T(0));
      if (step == 1 && end > begin) std::copy(from + begin - by, from + end - by, to + begin);
      else for (int64_t x = begin; x < end; ++x) to[x] = from[(x - by) * step];
      std::fill(to + std::max(begin, end), to + width_, T(0));
    }
  }

 private:
  int64_t before_, width_, vectors_;
  std::vector<T> memory_;
};

template <typename T>
struct Product {
  const T* a;
  int64_t pitch;  // of a
  const T* b;
  int64_t step, apart;
  int64_t terms;  // k
  T scale;
};

// A row of results.
template <typename T>
struct OutRow {
  T* data;
  int64_t strides[2];  // of a result, of a pixel
  int64_t width;

  RDARTS_METHOD void write(int64_t j, int64_t x, const Vec<T>& value) const {
    T* const to = data + j * strides[0] + x * strides[1];
    const int64_t count = std::min<int64_t>(kVector<T>, width - x);
    if (strides[1] != 1) {
      for (int64_t i = 0; i < count; ++i) to[i * strides[1]] = value[i];
    } else if (count == kVector<T>) {
      store<T>(to, value);
    } else {
      store_part<T>(to, value, count);
    }
  }
};

// The results from j on, `block` of them; adjacent: apart is 1.
template <int block, bool adjacent, typename T>
void multiply_block(const Product<T>& p, int64_t j, const OutRow<T>& out) {
  const int64_t apart = adjacent ? 1 : p.apart;
  for (int64_t x = 0; x < out.width; x += kVector<T>) {
    Vec<T> sum[block] = {};
    const T* a = p.a + x;
    const T* b = p.b + j * apart + x;
    for (int64_t k = 0; k < p.terms; ++k, a += p.pitch, b += p.step) {
      const Vec<T> factor = load(a);
#pragma GCC unroll 16
      for (int i = 0; i < block; ++i) sum[i] += factor * load(b + i * apart);
    }
#pragma GCC unroll 16
    for (int i = 0; i < block; ++i) out.write(j + i, x, sum[i] * p.scale);
  }
}

template <bool adjacent, typename T>
void multiply(const Product<T>& p, int64_t results, const OutRow<T>& out) {
  int64_t j = 0;
  for (; j + kBlock <= results; j += kBlock) multiply_block<kBlock, adjacent>(p, j, out);
  for (; j + 4 <= results; j += 4) multiply_block<4, adjacent>(p, j, out);
  for (; j < results; ++j) multiply_block<1, adjacent>(p, j, out);
}

// The zeros that displacements from `first` on need before and after a row.
struct Margins {
  int64_t before, after;
  Margins(int64_t first, int64_t last)
      : before(std::max<int64_t>(0, -first)), after(std::max<int64_t>(0, last)) {}
};

template <typename T>
OutRow<T> row_of(const Array& a, int64_t n, int64_t y) {
  T* const data = static_cast<T*>(a.data) + n * a.strides[0] + y * a.strides[2];
  return {data, {a.strides[1], a.strides[3]}, a.shape[3]};
}

// body(n, y) for the rows of each piece; make() makes what a piece needs.
template <typename Make, typename Body>
void for_rows(const Array& a, int64_t count, int threads, const Make& make, const Body& body) {
  const int64_t height = a.shape[2], work = std::max<int64_t>(1, a.shape[1] * a.shape[3] * count);
  const int64_t grain = std::max<int64_t>(1, kLeastWork / work);
  parallel_for(a.shape[0] * height, grain, threads, [&](int64_t from, int64_t to) {
    auto own = make();
    for (int64_t row = from; row < to; ++row) body(own, row / height, row % height);
  });
}

template <typename T>
struct Packed {
  PackedRows<T> a, b;
};

constexpr auto kUnmoved = [](int64_t) { return int64_t{0}; };

template <typename T>
void correlation_of(const Correlation& c, int threads) {
  const int64_t channels = c.left.shape[1], width = c.left.shape[3], count = c.out.shape[1];
  const Margins margins(c.first, c.first + count - 1);
  const int64_t rest = whole_vectors<T>(width) - width;  // which the last vector reads too
  const auto make = [&] {
    return Packed<T>{PackedRows<T>(channels, width, 0, 0),
                     PackedRows<T>(channels, width, margins.before, margins.after + rest)};
  };
  for_rows(c.left, count, threads, make, [&](Packed<T>& p, int64_t n, int64_t y) {
    p.a.fill(c.left, n, y, kUnmoved);
    p.b.fill(c.right, n, y, kUnmoved);
    const Product<T> product = {p.a.at(0), p.a.pitch(), p.b.at(c.first), p.b.pitch(), 1, channels,
                                T(1) / static_cast<T>(channels)};
    multiply<true>(product, count, row_of<T>(c.out, n, y));
  });
}

template <typename T>
void adjoint_of(const CorrelationAdjoint& c, int threads) {
  const int64_t channels = c.other.shape[1], width = c.other.shape[3], count = c.g.shape[1];
  const int64_t sign = c.to_right ? -1 : 1, start = sign * c.first, end = start + sign * (count - 1);
  const Margins margins(std::min(start, end), std::max(start, end));
  const int64_t rest = whole_vectors<T>(width) - width;  // which the last vector reads too
  const auto make = [&] {
    return Packed<T>{PackedRows<T>(count, width, 0, 0),
                     PackedRows<T>(channels, width, margins.before, margins.after + rest)};
  };
  for_rows(c.other, count, threads, make, [&](Packed<T>& p, int64_t n, int64_t y) {
    p.a.fill(c.g, n, y, [&](int64_t i) { return c.to_right ? c.first + i : 0; });
    p.b.fill(c.other, n, y, kUnmoved);
    const Product<T> product = {p.a.at(0), p.a.pitch(), p.b.at(start), sign, p.b.pitch(), count,
                                T(1) / static_cast<T>(channels)};
    multiply<false>(product, channels, row_of<T>(c.out, n, y));
  });
}

}  // namespace

template <>
void correlation<RDARTS_UNIT>(const Correlation& a, int threads) {
  if (is_empty(a.out)) return;
  if (a.left.dtype == DType::kFloat64) correlation_of<double>(a, threads);
  else correlation_of<float>(a, threads);
}

template <>
void correlation_adjoint<RDARTS_UNIT>(const CorrelationAdjoint& a, int threads) {
  if (is_empty(a.out)) return;
  if (a.other.dtype == DType::kFloat64) adjoint_of<double>(a, threads);
  else adjoint_of<float>(a, threads);
}

}  // namespace rdarts
