// The 3x3 pools of padding 1, both kinds in one pass, with the sums of their results:
//   pool          out[0] = max over the window, out[1] = mean over the window inside the image
//   pool_tangent  out[0] = x at the maximum's place, out[1] = mean of x
//   pool_adjoint  dx = the adjoint of both
// The work goes by strips, row by row (strips.h); at stride 2 even and odd pixels lie in rows of
// their own. Maxima and means go by columns, then by rows.
#include <algorithm>
#include <limits>

#include "launchers.h"
#include "parallel.h"
#include "strips.h"
#include "tiles.h"

namespace rdarts {
namespace {

constexpr int64_t kRowsFlushed = 64;  // rows that are summed in the array's type
// What is the same in every row of a strip.
template <typename T>
struct Columns {
  Rows<T> rows;         // what is added to a left and to a right column: minus infinity where there
                        // is none, else -0, which changes nothing; then 1 / the window's columns
  Rows<Lane<T>> first;  // the first column that there is

  explicit Columns(const Images& m) : rows(m, 3), first(m, 1) {}
  void start(const Images& m, const Strip& s) {
    constexpr T none = -std::numeric_limits<T>::infinity();
    rows.clear(), first.clear();
    s.each(m.columns, [&](int64_t, int64_t pixel, int64_t i) {
      rows[0][i] = pixel == 0 ? none : T(-0.0);
      rows[1][i] = m.stride * pixel + 1 >= m.width ? none : T(-0.0);
      rows[2][i] = inverse_of<T>(counted(pixel, m.stride, m.width));
      first[0][i] = pixel == 0;
    });
  }
  const T* inverse() const { return rows[2]; }
};

// The elements of three columns, as three packed rows.
template <typename T>
struct Window {
  const T *left, *middle, *right;
};

// Three rows of x, and what their columns come to.
template <typename T>
class Ring {
 public:
  Ring(const Images& m) : m_(m), x_(m, 6), most_(m, 3), sum_(m, 4), place_(m, 3) {}

  void start() { x_.clear(), sum_.clear(); }

  void read(const Array& x, int64_t sample, int64_t row, const Strip& s) {
    copy_row<false, const T>(x, sample, row, s, m_.inner, 0, m_.stride, x_[row % 3]);
    if (m_.stride == 2) {
      copy_row<false, const T>(x, sample, row, s, m_.inner, 1, 2, x_[3 + row % 3]);
    }
  }
  Window<T> window(int64_t row, const Strip& s) const {
    const T* const even = x_[row % 3];
    const T* const odd = x_[3 + row % 3];
    if (m_.stride == 2) return {odd - s.depth, even, odd};
    return {even - s.depth, even, even + s.depth};
  }
  T* most(int64_t row) const { return most_[row % 3]; }
  Lane<T>* place(int64_t row) const { return place_[row % 3]; }
  T* sum(int64_t row) const { return sum_[row % 3]; }
  const T* zeros() const { return sum_[3]; }

 private:
  const Images& m_;
  Rows<T> x_, most_, sum_;
  Rows<Lane<T>> place_;
};

template <typename T>
void columns_max(const Window<T>& x, const Columns<T>& columns, int64_t size, T* __restrict most,
                 Lane<T>* __restrict place) {
  const T *__restrict left = x.left, *__restrict middle = x.middle, *__restrict right = x.right;
  const T *__restrict before = columns.rows[0], *__restrict behind = columns.rows[1];
  const Lane<T>* __restrict first = columns.first[0];
  for (int64_t i = 0; i < size; ++i) {
    const T second = middle[i], third = right[i] + behind[i];
    T best = left[i] + before[i];
    const bool by_second = takes(second, best);
    best = by_second ? second : best;
    const Lane<T> at = by_second ? 1 : first[i];
    const bool by_third = takes(third, best);
    most[i] = by_third ? third : best, place[i] = by_third ? 2 : at;
  }
}

template <typename T>
void columns_sum(const Window<T>& x, int64_t size, T* __restrict sum) {
  const T *__restrict left = x.left, *__restrict middle = x.middle, *__restrict right = x.right;
  for (int64_t i = 0; i < size; ++i) sum[i] = left[i] + middle[i] + right[i];
}

// The sums of a strip's results, elementwise until they are folded into the channels'.
template <typename T>
struct Sums {
  Rows<T> rows;  // pivots, sums, squares

  explicit Sums(const Images& m) : rows(m, 3) {}
  void add(const T* __restrict out, int64_t size) {
    const T* __restrict pivot = rows[0];
    T *__restrict sum = rows[1], *__restrict square = rows[2];
    for (int64_t i = 0; i < size; ++i) {
      const T centred = out[i] - pivot[i];
      sum[i] += centred, square[i] += centred * centred;
    }
  }
  void fold(const Strip& s, int64_t columns, double* sums, double* squares) {
    s.each(columns, [&](int64_t c, int64_t, int64_t i) {
      sums[c] += rows[1][i], squares[c] += rows[2][i];
      rows[1][i] = rows[2][i] = T(0);
    });
  }
};

// The rows of a window: those of the image, one twice where another is missing, which then yields
// no place but its own.
struct Three {
  int64_t row[3], offset[3];

  Three(const Images& m, int64_t out) {
    const int64_t middle = m.stride * out;
    const bool top = middle == 0, bottom = middle + 1 >= m.height;
    row[0] = top ? middle : middle - 1, offset[0] = top ? 3 : 0;
    row[1] = middle, offset[1] = 3;
    row[2] = bottom ? middle : middle + 1, offset[2] = bottom ? 3 : 6;
  }
};

template <typename T>
void rows_max(const Ring<T>& ring, const Three& three, int64_t size, T* __restrict out,
              Lane<T>* __restrict place) {
  const T *a = ring.most(three.row[0]), *b = ring.most(three.row[1]), *c = ring.most(three.row[2]);
  const Lane<T> *at_a = ring.place(three.row[0]), *at_b = ring.place(three.row[1]);
  const Lane<T>* at_c = ring.place(three.row[2]);
  const Lane<T> from_a = three.offset[0], from_b = three.offset[1], from_c = three.offset[2];
  for (int64_t i = 0; i < size; ++i) {
    T best = a[i];
    Lane<T> at = at_a[i] + from_a;
    const bool by_b = takes(b[i], best);
    best = by_b ? b[i] : best, at = by_b ? at_b[i] + from_b : at;
    const bool by_c = takes(c[i], best);
    best = by_c ? c[i] : best, at = by_c ? at_c[i] + from_c : at;
    out[i] = best, place[i] = at;
  }
}

template <typename T>
void rows_mean(const Ring<T>& ring, const Images& m, int64_t row, const T* __restrict inverse,
               int64_t size, T* __restrict out) {
  const Three three(m, row);
  const T* a = row == 0 ? ring.zeros() : ring.sum(three.row[0]);
  const T* b = ring.sum(three.row[1]);
  const T* c = three.row[2] == three.row[1] ? ring.zeros() : ring.sum(three.row[2]);
  const T part = inverse_of<T>(counted(row, m.stride, m.height));
  for (int64_t i = 0; i < size; ++i) out[i] = (a[i] + b[i] + c[i]) * (part * inverse[i]);
}

template <typename T>
class SamplePools {
 public:
  SamplePools(const Pool& a, const Images& m)
      : a_(a), m_(m), ring_(m), columns_(m), out_(m, 1), place_(m, 1),
        sums_{Sums<T>(m), Sums<T>(m)} {}

  void run(int64_t from, int64_t to) {
    const int64_t size = 2 * kinds_of(a_.out) * m_.channels;
    std::fill_n(a_.workspace + from * size, (to - from) * size, 0.0);
    for (int64_t first = 0; first < m_.channels; first += m_.deep) {
      const Strip s(m_, first);
      start(s);
      for (int64_t n = from; n < to; ++n) run_strip(n, s, a_.workspace + n * size + first);
    }
  }

 private:
  void start(const Strip& s) {
    ring_.start();
    columns_.start(m_, s);
    const T* const x = static_cast<const T*>(a_.x.data) + s.first * a_.x.strides[1];
    for (Sums<T>& sums : sums_) {
      sums.rows.clear();
      s.each(m_.columns, [&](int64_t c, int64_t, int64_t i) {
        sums.rows[0][i] = x[c * a_.x.strides[1]];
      });
    }
  }

  // sums: [2, kinds, C], from the strip's channels on.
  void run_strip(int64_t n, const Strip& s, double* sums) {
    int64_t next = 0;
    for (int64_t row = 0; row < m_.rows; ++row) {
      for (; next < std::min(m_.stride * row + 2, m_.height); ++next) read(n, next, s);
      if (a_.out[0].data) write_max(n, row, s);
      if (a_.out[1].data) write_mean(n, row, s);
      if ((row + 1) % kRowsFlushed != 0 && row + 1 < m_.rows) continue;
      double* total = sums;
      for (int kind = 0; kind < kPools; ++kind) {
        if (!a_.out[kind].data) continue;
        sums_[kind].fold(s, m_.columns, total, total + kinds_of(a_.out) * m_.channels);
        total += m_.channels;
      }
    }
  }

  void read(int64_t n, int64_t row, const Strip& s) {
    ring_.read(a_.x, n, row, s);
    const Window<T> x = ring_.window(row, s);
    if (a_.out[0].data) columns_max(x, columns_, s.size(), ring_.most(row), ring_.place(row));
    if (a_.out[1].data) columns_sum(x, s.size(), ring_.sum(row));
  }

  void write_max(int64_t n, int64_t row, const Strip& s) {
    rows_max(ring_, Three(m_, row), s.size(), out_[0], place_[0]);
    sums_[0].add(out_[0], s.size());
    copy_row<true, T>(a_.out[0], n, row, s, m_.inner, 0, 1, out_[0]);
    copy_row<true, uint8_t>(a_.place, n, row, s, m_.inner, 0, 1, place_[0]);
  }

  void write_mean(int64_t n, int64_t row, const Strip& s) {
    rows_mean(ring_, m_, row, columns_.inverse(), s.size(), out_[0]);
    sums_[1].add(out_[0], s.size());
    copy_row<true, T>(a_.out[1], n, row, s, m_.inner, 0, 1, out_[0]);
  }

  const Pool& a_;
  const Images& m_;
  Ring<T> ring_;
  Columns<T> columns_;
  Rows<T> out_;
  Rows<Lane<T>> place_;
  Sums<T> sums_[kPools];
};

// out = the element of x at the maximum's place, where that lies in the window's row `row`.
template <typename T>
void select(const Window<T>& x, int row, const Lane<T>* __restrict place, int64_t size,
            T* __restrict out) {
  const T *__restrict left = x.left, *__restrict middle = x.middle, *__restrict right = x.right;
  const Lane<T> first = 3 * row;
  for (int64_t i = 0; i < size; ++i) {
    const T zeroth = left[i], second = middle[i], third = right[i];
    const Lane<T> at = place[i] - first;
    out[i] = at == 0 ? zeroth : at == 1 ? second : at == 2 ? third : out[i];
  }
}

template <typename T>
class SampleTangents {
 public:
  SampleTangents(const Pool& a, const Images& m)
      : a_(a), m_(m), ring_(m), columns_(m), out_(m, 1), place_(m, 1) {}

  void run(int64_t from, int64_t to) {
    for (int64_t first = 0; first < m_.channels; first += m_.deep) {
      const Strip s(m_, first);
      ring_.start(), place_.clear(), columns_.start(m_, s);
      for (int64_t n = from; n < to; ++n) run_strip(n, s);
    }
  }

 private:
  void run_strip(int64_t n, const Strip& s) {
    int64_t next = 0;
    for (int64_t row = 0; row < m_.rows; ++row) {
      for (; next < std::min(m_.stride * row + 2, m_.height); ++next) {
        ring_.read(a_.x, n, next, s);
        columns_sum(ring_.window(next, s), s.size(), ring_.sum(next));
      }
      if (a_.out[0].data) {
        const Three three(m_, row);
        copy_row<false, const uint8_t>(a_.place, n, row, s, m_.inner, 0, 1, place_[0]);
        for (int i = 0; i < 3; ++i) {
          select(ring_.window(three.row[i], s), i, place_[0], s.size(), out_[0]);
        }
        copy_row<true, T>(a_.out[0], n, row, s, m_.inner, 0, 1, out_[0]);
      }
      if (a_.out[1].data) {
        rows_mean(ring_, m_, row, columns_.inverse(), s.size(), out_[0]);
        copy_row<true, T>(a_.out[1], n, row, s, m_.inner, 0, 1, out_[0]);
      }
    }
  }

  const Pool& a_;
  const Images& m_;
  Ring<T> ring_;
  Columns<T> columns_;
  Rows<T> out_;
  Rows<Lane<T>> place_;
};

// What a row of results hands back to the rows of its windows: dx[row] += ...
template <typename T, int stride>
struct Spread {
  T* even[3];  // all pixels at stride 1
  T* odd[3];

  void max(const T* __restrict g, const Lane<T>* __restrict place, int64_t depth,
           int64_t size) const {
    const T *left = g - depth, *right = g + depth;
    const Lane<T> *at_left = place - depth, *at_right = place + depth;
    for (int row = 0; row < 3; ++row) {
      T* __restrict dx = even[row];
      T* __restrict between = stride == 2 ? odd[row] : nullptr;
      const Lane<T> first = 3 * row, second = first + 1, third = first + 2;
      for (int64_t i = 0; i < size; ++i) {
        const T here = place[i] == second ? g[i] : T(0);
        const T from_right = at_right[i] == first ? right[i] : T(0);
        if constexpr (stride == 2) {
          dx[i] += here;
          between[i] += (place[i] == third ? g[i] : T(0)) + from_right;
        } else {
          dx[i] += (at_left[i] == third ? left[i] : T(0)) + here + from_right;
        }
      }
    }
  }

  // g is already divided by the windows' counts.
  void mean(const T* __restrict g, int64_t depth, int64_t size) const {
    const T *left = g - depth, *right = g + depth;
    for (int64_t i = 0; i < size; ++i) {
      const T here = stride == 2 ? g[i] : left[i] + g[i] + right[i];
      for (int row = 0; row < 3; ++row) even[row][i] += here;
      if constexpr (stride == 2) {
        const T between = g[i] + right[i];
        for (int row = 0; row < 3; ++row) odd[row][i] += between;
      }
    }
  }
};

template <typename T, int stride>
class SampleAdjoints {
 public:
  SampleAdjoints(const PoolAdjoint& a, const Images& m)
      : a_(a), m_(m), columns_(m), g_(m, 1), dx_(m, 8), place_(m, 1) {}

  void run(int64_t from, int64_t to) {
    for (int64_t first = 0; first < m_.channels; first += m_.deep) {
      const Strip s(m_, first);
      columns_.start(m_, s), g_.clear(), place_.clear();
      for (int64_t n = from; n < to; ++n) run_strip(n, s);
    }
  }

 private:
  void run_strip(int64_t n, const Strip& s) {
    int64_t next = 0, done = 0;
    for (int64_t row = 0; row < m_.rows; ++row) {
      const int64_t end = std::min(stride * row + 2, m_.height);  // of the rows that it reaches
      for (; next < end; ++next) {
        std::fill_n(dx_[next % 3], s.size(), T(0));
        if (stride == 2) std::fill_n(dx_[4 + next % 3], s.size(), T(0));
      }
      add(n, row, s);
      const int64_t last = row + 1 < m_.rows ? stride * (row + 1) - 1 : m_.height;
      for (; done < last; ++done) write(n, done, s);
    }
  }

  void add(int64_t n, int64_t row, const Strip& s) {
    Spread<T, stride> spread;
    for (int i = 0; i < 3; ++i) {
      const int64_t h = stride * row - 1 + i;
      const int64_t at = h < 0 || h >= m_.height ? 3 : h % 3;  // row 3 takes what falls outside
      spread.even[i] = dx_[at], spread.odd[i] = dx_[4 + at];
    }
    if (a_.g[0].data) {
      copy_row<false, const T>(a_.g[0], n, row, s, m_.inner, 0, 1, g_[0]);
      copy_row<false, const uint8_t>(a_.place, n, row, s, m_.inner, 0, 1, place_[0]);
      spread.max(g_[0], place_[0], s.depth, s.size());
    }
    if (a_.g[1].data) {
      copy_row<false, const T>(a_.g[1], n, row, s, m_.inner, 0, 1, g_[0]);
      const T part = inverse_of<T>(counted(row, stride, m_.height));
      T* const g = g_[0];
      const T* const inverse = columns_.inverse();
      for (int64_t i = 0; i < s.size(); ++i) g[i] *= part * inverse[i];
      spread.mean(g, s.depth, s.size());
    }
  }

  void write(int64_t n, int64_t row, const Strip& s) {
    copy_row<true, T>(a_.dx, n, row, s, m_.inner, 0, stride, dx_[row % 3]);
    if (stride == 2) copy_row<true, T>(a_.dx, n, row, s, m_.inner, 1, 2, dx_[4 + row % 3]);
  }

  const PoolAdjoint& a_;
  const Images& m_;
  Columns<T> columns_;
  Rows<T> g_, dx_;
  Rows<Lane<T>> place_;
};

template <typename T>
void pool_of(const Pool& a, const Images& m, int threads) {
  const int kinds = kinds_of(a.out);
  const int64_t plane = kinds * m.channels;
  parallel_for(m.samples, grain_of(m), threads,
               [&](int64_t from, int64_t to) { SamplePools<T>(a, m).run(from, to); });
  combine(a.workspace, m.samples, 2 * plane, a.sums);
  const T* const x = static_cast<const T*>(a.x.data);
  for (int64_t i = 0; i < plane; ++i) {
    a.sums[2 * plane + i] = x[i % m.channels * a.x.strides[1]];
  }
}

}  // namespace

template <>
void pool<RDARTS_UNIT>(const Pool& a, int threads) {
  const int64_t kinds = kinds_of(a.out);
  if (is_empty(a.x)) return void(std::fill_n(a.sums, 3 * kinds * a.x.shape[1], 0.0));
  const Images m = images_of(a.x, a.out, a.stride);
  if (a.x.dtype == DType::kFloat64) pool_of<double>(a, m, threads);
  else pool_of<float>(a, m, threads);
}

template <>
void pool_tangent<RDARTS_UNIT>(const Pool& a, int threads) {
  if (is_empty(a.x)) return;
  const Images m = images_of(a.x, a.out, a.stride);
  parallel_for(m.samples, grain_of(m), threads, [&](int64_t from, int64_t to) {
    if (a.x.dtype == DType::kFloat64) SampleTangents<double>(a, m).run(from, to);
    else SampleTangents<float>(a, m).run(from, to);
  });
}

template <>
void pool_adjoint<RDARTS_UNIT>(const PoolAdjoint& a, int threads) {
  if (is_empty(a.dx)) return;
  const Images m = images_of(a.dx, a.g, a.stride);
  const bool wide = a.dx.dtype == DType::kFloat64;
  parallel_for(m.samples, grain_of(m), threads, [&](int64_t from, int64_t to) {
    if (wide && a.stride == 1) SampleAdjoints<double, 1>(a, m).run(from, to);
    if (wide && a.stride == 2) SampleAdjoints<double, 2>(a, m).run(from, to);
    if (!wide && a.stride == 1) SampleAdjoints<float, 1>(a, m).run(from, to);
    if (!wide && a.stride == 2) SampleAdjoints<float, 2>(a, m).run(from, to);
  });
}

}  // namespace rdarts
