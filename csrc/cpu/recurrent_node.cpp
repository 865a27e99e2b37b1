// The nodes of a recurrent cell (recurrent.h). Rows go in pieces of kRows over the threads; what is
// summed over the rows has a sum a piece, and those are added in order.
#include <algorithm>
#include <vector>

#include "exponential.h"
#include "launchers.h"
#include "parallel.h"
#include "recurrent_body.h"

namespace rdarts {
namespace {

constexpr int64_t kRows = 16;  // of a piece

int64_t pieces_of(const RecurrentNode& n) { return (n.batch + kRows - 1) / kRows; }

template <typename T>
T* row_of(const Rows& rows, int64_t b) {
  return static_cast<T*>(rows.data) + b * rows.stride;
}

// body(first, count) over the vectors of a row; all but a last part have a constant count.
template <typename T, typename Body>
RDARTS_METHOD void over(int64_t size, const Body& body) {
  constexpr std::integral_constant<int, kVector<T>> whole;
  int64_t i = 0;
  for (; i + whole <= size; i += whole) body(i, whole);
  if (i < size) body(i, size - i);
}

template <typename T, typename Count>
RDARTS_METHOD Vec<T> get(const T* from, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) return load_part(from, count);
  else return load(from);
}

template <typename T, typename Count>
RDARTS_METHOD void put(T* to, const Vec<T>& vector, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) store_part(to, vector, count);
  else store(to, vector);
}

template <typename T>
double sum_of(const Vec<T>& vector) {
  double sum = 0;
  for (int i = 0; i < kVector<T>; ++i) sum += vector[i];
  return sum;
}

// What a launch reads after source j of row b: asked for while that one is worked on.
template <typename T>
struct Next {
  const T* s;
  const T* c;
  int64_t hidden;

  Next(const RecurrentNode& n, int j, int64_t b) : hidden(n.hidden) {
    const bool last = j + 1 == n.sources;
    const int64_t row = std::min(last ? b + 1 : b, n.batch - 1);
    s = row_of<const T>(n.states[last ? 0 : j + 1], row);
    c = row_of<const T>(n.gates[last ? 0 : j + 1], row);
  }
  RDARTS_METHOD void fetch(int64_t i) const {
    __builtin_prefetch(s + i);
    __builtin_prefetch(c + i);
    __builtin_prefetch(c + hidden + i);
  }
};

// work(flag) with the flag as a constant.
template <typename Work>
void on_curved(bool curved, const Work& work) {
  if (curved) work(std::true_type{});
  else work(std::false_type{});
}

// out[b, .] = the node's sum.
template <typename T, bool curved>
void sum_row(const RecurrentNode& n, int64_t b, T* out) {
  for (int j = 0; j < n.sources; ++j) {
    const CurveMix<T> mix = mix_of<T>(n, j);
    const T* const s = row_of<const T>(n.states[j], b);
    const T* const c = row_of<const T>(n.gates[j], b);
    const Next<T> next(n, j, b);
    over<T>(n.hidden, [&](int64_t i, auto count) {
      next.fetch(i);
      const Vec<T> term = node_term<VectorMath<T>, curved>(
          mix, get(s + i, count), get(c + i, count), get(c + n.hidden + i, count));
      put(out + i, j == 0 ? term : get(out + i, count) + term, count);
    });
  }
}

// mean and sum of squares about it of a piece's rows: moments [2, H].
template <typename T>
void piece_moments(const T* rows, int64_t count, int64_t columns, double* moments) {
  std::vector<T> sum(columns, T(0)), square(columns, T(0));
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t i = 0; i < columns; ++i) sum[i] += rows[b * columns + i];
  }
  for (int64_t i = 0; i < columns; ++i) sum[i] /= static_cast<T>(count);
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t i = 0; i < columns; ++i) {
      const T x = rows[b * columns + i] - sum[i];
      square[i] += x * x;
    }
  }
  std::copy(sum.begin(), sum.end(), moments);
  std::copy(square.begin(), square.end(), moments + columns);
}

// Joins the pieces' moments (Chan et al., 1979) into mean and rstd; moves the running ones.
template <typename T>
void batch_statistics(const RecurrentForward& a) {
  const int64_t columns = a.node.hidden;
  std::vector<double> mean(columns, 0.0), square(columns, 0.0);
  for (int64_t piece = 0, before = 0; piece < pieces_of(a.node); ++piece) {
    const double* const m = a.workspace + piece * 2 * columns;
    const int64_t count = std::min(kRows, a.node.batch - before), all = before + count;
    const double share = static_cast<double>(count) / all, both = share * before;
    for (int64_t i = 0; i < columns; ++i) {
      const double apart = m[i] - mean[i];
      mean[i] += share * apart;
      square[i] += m[columns + i] + both * apart * apart;
    }
    before = all;
  }
  T* const running_mean = static_cast<T*>(a.running_mean);
  T* const running_var = static_cast<T*>(a.running_var);
  const double rows = static_cast<double>(a.node.batch);
  for (int64_t i = 0; i < columns; ++i) {
    a.statistics[i] = mean[i];
    a.statistics[columns + i] = 1.0 / std::sqrt(square[i] / rows + a.eps);
    const double m = a.momentum, var = square[i] / (rows - 1.0);
    running_mean[i] = static_cast<T>((1.0 - m) * running_mean[i] + m * mean[i]);
    running_var[i] = static_cast<T>((1.0 - m) * running_var[i] + m * var);
  }
}

template <typename T>
void running_statistics(const RecurrentForward& a) {
  const int64_t columns = a.node.hidden;
  for (int64_t i = 0; i < columns; ++i) {
    a.statistics[i] = static_cast<const T*>(a.running_mean)[i];
    const double var = static_cast<const T*>(a.running_var)[i];
    a.statistics[columns + i] = 1.0 / std::sqrt(var + a.eps);
  }
}

template <typename T>
void finish_rows(const RecurrentForward& a, int64_t from, int64_t to) {
  const int64_t columns = a.node.hidden;
  std::vector<T> mean(columns, T(0)), rstd(columns, T(1));
  if (a.norm != NodeNorm::kNone) {
    std::copy_n(a.statistics, columns, mean.begin());
    std::copy_n(a.statistics + columns, columns, rstd.begin());
  }
  T* const values = static_cast<T*>(a.value);
  T* const masked = static_cast<T*>(a.masked);
  const T* const mask = static_cast<const T*>(a.mask);
  for (int64_t b = from; b < to; ++b) {
    for (int64_t i = 0, at = b * columns; i < columns; ++i, ++at) {
      const T value = (values[at] - mean[i]) * rstd[i];
      values[at] = value;
      if (masked) masked[at] = value * mask[at];
    }
  }
}

template <typename T>
void forward_of(const RecurrentForward& a, int threads) {
  const RecurrentNode& n = a.node;
  const int64_t columns = n.hidden;
  T* const values = static_cast<T*>(a.value);
  if (a.norm == NodeNorm::kRunning) running_statistics<T>(a);
  parallel_for(n.batch, kRows, threads, [&](int64_t from, int64_t to) {
    on_curved(n.curved, [&](auto curved) {
      for (int64_t b = from; b < to; ++b) {
        sum_row<T, decltype(curved)::value>(n, b, values + b * columns);
      }
    });
    if (a.norm == NodeNorm::kBatch) {
      double* const own = a.workspace + from / kRows * 2 * columns;
      piece_moments(values + from * columns, to - from, columns, own);
    } else if (a.norm == NodeNorm::kRunning || a.masked) {
      finish_rows<T>(a, from, to);
    }
  });
  if (a.norm != NodeNorm::kBatch) return;
  batch_statistics<T>(a);
  parallel_for(n.batch, kRows, threads,
               [&](int64_t from, int64_t to) { finish_rows<T>(a, from, to); });
}

// total = the gradient of `value`; with a batch norm also its sums, alone and with value: [2, H].
template <typename T>
void gather_rows(const RecurrentBackward& a, int64_t from, int64_t to) {
  const int64_t columns = a.node.hidden;
  T* const total = static_cast<T*>(a.total);
  const T* const dvalue = static_cast<const T*>(a.dvalue);
  const T* const dmasked = static_cast<const T*>(a.dmasked);
  const T* const mask = static_cast<const T*>(a.mask);
  const T* const dall = static_cast<const T*>(a.dall);
  const T share = static_cast<T>(a.share);
  for (int64_t at = from * columns; at < to * columns; ++at) total[at] = dvalue ? dvalue[at] : T(0);
  if (dmasked && mask) {
    for (int64_t at = from * columns; at < to * columns; ++at) total[at] += mask[at] * dmasked[at];
  } else if (dmasked) {
    for (int64_t at = from * columns; at < to * columns; ++at) total[at] += dmasked[at];
  }
  if (dall) {
    for (int64_t at = from * columns; at < to * columns; ++at) total[at] += share * dall[at];
  }
  if (a.norm != NodeNorm::kBatch) return;
  const T* const value = static_cast<const T*>(a.value);
  std::vector<T> plain(columns, T(0)), along(columns, T(0));
  for (int64_t b = from; b < to; ++b) {
    for (int64_t i = 0, at = b * columns; i < columns; ++i, ++at) {
      plain[i] += total[at];
      along[i] += total[at] * value[at];
    }
  }
  double* const own = a.workspace + from / kRows * 2 * columns;
  std::copy(plain.begin(), plain.end(), own);
  std::copy(along.begin(), along.end(), own + columns);
}

// A row of the gradient by way of the norm, rstd (g - mean g - value mean(g value)).
template <typename T>
struct ThroughNorm {
  std::vector<T> rstd, plain, along;

  ThroughNorm(const RecurrentBackward& a) {
    const int64_t columns = a.node.hidden;
    rstd.assign(columns, T(1)), plain.assign(columns, T(0)), along.assign(columns, T(0));
    if (a.norm == NodeNorm::kNone) return;
    std::copy_n(a.statistics + columns, columns, rstd.begin());
    if (a.norm != NodeNorm::kBatch) return;
    std::vector<double> sums(2 * columns, 0.0);
    for (int64_t piece = 0; piece < pieces_of(a.node); ++piece) {
      const double* const own = a.workspace + piece * 2 * columns;
      for (int64_t i = 0; i < 2 * columns; ++i) sums[i] += own[i];
    }
    const double rows = static_cast<double>(a.node.batch);
    for (int64_t i = 0; i < columns; ++i) plain[i] = static_cast<T>(sums[i] / rows);
    for (int64_t i = 0; i < columns; ++i) along[i] = static_cast<T>(sums[columns + i] / rows);
  }

  void apply(const RecurrentBackward& a, int64_t b, T* row) const {
    if (a.norm == NodeNorm::kNone) return;
    const int64_t columns = a.node.hidden;
    const T* const value = static_cast<const T*>(a.value) + b * columns;
    for (int64_t i = 0; i < columns; ++i) {
      row[i] = rstd[i] * (row[i] - plain[i] - value[i] * along[i]);
    }
  }
};

// g: the gradient of the row's sum; dmix: [J, 4] sums to add to.
template <typename T, bool curved>
void spread_row(const RecurrentBackward& a, int64_t b, const T* g, double* dmix) {
  const RecurrentNode& n = a.node;
  for (int j = 0; j < n.sources; ++j) {
    const CurveMix<T> mix = mix_of<T>(n, j);
    const T* const s = row_of<const T>(n.states[j], b);
    const T* const c = row_of<const T>(n.gates[j], b);
    T* const ds = row_of<T>(a.dstates[j], b);
    T* const dc = row_of<T>(a.dgates[j], b);
    Vec<T> sums[kCurves] = {};
    const Next<T> next(n, j, b);
    over<T>(n.hidden, [&](int64_t i, auto count) {
      next.fetch(i);
      const auto d = node_gradients<VectorMath<T>, curved>(
          mix, get(s + i, count), get(c + i, count), get(c + n.hidden + i, count),
          get(g + i, count));
      put(ds + i, a.adds ? get(ds + i, count) + d.state : d.state, count);
      put(dc + i, d.c, count);
      put(dc + n.hidden + i, d.u, count);
      for (int f = 0; f < kCurves; ++f) sums[f] += d.mix[f];
    });
    for (int f = 0; f < kCurves; ++f) dmix[j * kCurves + f] += sum_of<T>(sums[f]);
  }
}

// Adds the pieces' own [J, 4] in order.
void combine_mix(const double* own, int64_t pieces, int sources, double* dmix) {
  const int64_t size = sources * kCurves;
  std::fill_n(dmix, size, 0.0);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int64_t i = 0; i < size; ++i) dmix[i] += own[piece * size + i];
  }
}

template <typename T>
void backward_of(const RecurrentBackward& a, int threads) {
  const RecurrentNode& n = a.node;
  const int64_t columns = n.hidden, size = n.sources * kCurves;
  T* const total = static_cast<T*>(a.total);
  double* const mixes = a.workspace + pieces_of(n) * 2 * columns;
  const auto gather = [&](int64_t from, int64_t to) { gather_rows<T>(a, from, to); };
  if (a.norm == NodeNorm::kBatch) parallel_for(n.batch, kRows, threads, gather);
  const ThroughNorm<T> through(a);
  parallel_for(n.batch, kRows, threads, [&](int64_t from, int64_t to) {
    if (a.norm != NodeNorm::kBatch) gather(from, to);
    double* const own = mixes + from / kRows * size;
    std::fill_n(own, size, 0.0);
    on_curved(n.curved, [&](auto curved) {
      for (int64_t b = from; b < to; ++b) {
        through.apply(a, b, total + b * columns);
        spread_row<T, decltype(curved)::value>(a, b, total + b * columns, own);
      }
    });
  });
  combine_mix(mixes, pieces_of(n), n.sources, a.dmix);
}

template <typename T, bool curved>
void second_row(const RecurrentSecond& a, int64_t b, double* dmix) {
  const RecurrentNode& n = a.node;
  const T* const g = static_cast<const T*>(a.g) + b * n.hidden;
  T* const tangent = static_cast<T*>(a.tangent) + b * n.hidden;
  for (int j = 0; j < n.sources; ++j) {
    const CurveMix<T> mix = mix_of<T>(n, j), change = mix_of<T>(a.along, j);
    const T* const s = row_of<const T>(n.states[j], b);
    const T* const c = row_of<const T>(n.gates[j], b);
    const T* const along_s = row_of<const T>(a.along.states[j], b);
    const T* const along_c = row_of<const T>(a.along.gates[j], b);
    T* const ds = row_of<T>(a.dstates[j], b);
    T* const dc = row_of<T>(a.dgates[j], b);
    Vec<T> sums[kCurves] = {};
    over<T>(n.hidden, [&](int64_t i, auto count) {
      const auto d = second_gradients<VectorMath<T>, curved>(
          mix, get(s + i, count), get(c + i, count), get(c + n.hidden + i, count), change,
          get(along_s + i, count), get(along_c + i, count), get(along_c + n.hidden + i, count),
          get(g + i, count));
      put(tangent + i, j == 0 ? d.tangent : get(tangent + i, count) + d.tangent, count);
      put(ds + i, d.by.state, count);
      put(dc + i, d.by.c, count);
      put(dc + n.hidden + i, d.by.u, count);
      for (int f = 0; f < kCurves; ++f) sums[f] += d.by.mix[f];
    });
    for (int f = 0; f < kCurves; ++f) dmix[j * kCurves + f] += sum_of<T>(sums[f]);
  }
}

template <typename T>
void second_of(const RecurrentSecond& a, int threads) {
  const RecurrentNode& n = a.node;
  const int64_t size = n.sources * kCurves;
  parallel_for(n.batch, kRows, threads, [&](int64_t from, int64_t to) {
    double* const own = a.workspace + from / kRows * size;
    std::fill_n(own, size, 0.0);
    on_curved(n.curved, [&](auto curved) {
      for (int64_t b = from; b < to; ++b) second_row<T, decltype(curved)::value>(a, b, own);
    });
  });
  combine_mix(a.workspace, pieces_of(n), n.sources, a.dmix);
}

}  // namespace

template <>
int64_t recurrent_workspace<RDARTS_UNIT>(const RecurrentNode& n) {
  return pieces_of(n) * (2 * n.hidden + n.sources * kCurves);
}

template <>
void recurrent_node<RDARTS_UNIT>(const RecurrentForward& a, int threads) {
  if (a.node.dtype == DType::kFloat64) forward_of<double>(a, threads);
  else forward_of<float>(a, threads);
}

template <>
void recurrent_node_backward<RDARTS_UNIT>(const RecurrentBackward& a, int threads) {
  if (a.node.dtype == DType::kFloat64) backward_of<double>(a, threads);
  else backward_of<float>(a, threads);
}

template <>
void recurrent_node_second<RDARTS_UNIT>(const RecurrentSecond& a, int threads) {
  if (a.node.dtype == DType::kFloat64) second_of<double>(a, threads);
  else second_of<float>(a, threads);
}

}  // namespace rdarts
