// The weighted sum of candidates into a node, and the affine map that its backward is made of:
//   out   = sum_k factors[k, n] * (scale[k, c] * z_k + shift[k, c]) + sum_j f_j w_j N(0, 1)
//   out_k = factors[k, n] * by_g[k, c] * g + by_z[k, c] * z_k + constant[k, c]
#include "node_sum.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "launchers.h"
#include "parallel.h"
#include "tiles.h"

namespace rdarts {
namespace {

template <typename T>
T at(const void* values, int64_t i, T absent) {
  return values ? static_cast<const T*>(values)[i] : absent;
}

// total (+)= (scale z + shift) + ... for up to four tensors at once: the sum is loaded and stored a
// quarter as often. Each shift is added to its own tensor, since the two nearly cancel where a mean
// is large. A repetition is a pattern of channels, or a whole tile of a channel's plane. fresh:
// nothing is in total yet.
template <typename T, int count, bool inner, bool fresh>
void accumulate(T* __restrict total, const T* const* z, const T* const* scale,
                const T* const* shift, int64_t size, int64_t repetition) {
  for (int64_t begin = 0; begin < size; begin += repetition) {
    const int64_t length = std::min(repetition, size - begin);
    T* __restrict out = total + begin;
    const T* __restrict z0 = z[0] + begin;
    const T* __restrict z1 = count > 1 ? z[1] + begin : nullptr;
    const T* __restrict z2 = count > 2 ? z[2] + begin : nullptr;
    const T* __restrict z3 = count > 3 ? z[3] + begin : nullptr;
    const T* __restrict a0 = scale[0];
    const T* __restrict a1 = count > 1 ? scale[1] : nullptr;
    const T* __restrict a2 = count > 2 ? scale[2] : nullptr;
    const T* __restrict a3 = count > 3 ? scale[3] : nullptr;
    const T* __restrict b0 = shift[0];
    const T* __restrict b1 = count > 1 ? shift[1] : nullptr;
    const T* __restrict b2 = count > 2 ? shift[2] : nullptr;
    const T* __restrict b3 = count > 3 ? shift[3] : nullptr;
    for (int k = 0; k < count; ++k) fetch_next_tile(z[k] + begin, length);
    for (int64_t i = 0; i < length; ++i) {
      T sum = pick<inner>(a0, i) * z0[i] + pick<inner>(b0, i);
      if constexpr (!fresh) sum += out[i];
      if constexpr (count > 1) sum += pick<inner>(a1, i) * z1[i] + pick<inner>(b1, i);
      if constexpr (count > 2) sum += pick<inner>(a2, i) * z2[i] + pick<inner>(b2, i);
      if constexpr (count > 3) sum += pick<inner>(a3, i) * z3[i] + pick<inner>(b3, i);
      out[i] = sum;
    }
  }
}

// The same where channels lie innermost in whole vectors: a block of them at a time, so that its
// coefficients stay in registers.
template <typename T, int count, bool fresh>
void accumulate_blocks(T* total, const T* const* z, const T* const* scale, const T* const* shift,
                       int64_t size, int64_t channels) {
  constexpr int L = kVector<T>;
  for (int64_t block = 0; block < channels; block += L) {
    Vec<T> a[count], b[count];
    for (int k = 0; k < count; ++k) a[k] = load(scale[k] + block), b[k] = load(shift[k] + block);
    for (int64_t i = block; i < size; i += channels) {
      Vec<T> sum = a[0] * load(z[0] + i) + b[0];
      if constexpr (!fresh) sum += load(total + i);
      for (int k = 1; k < count; ++k) sum += a[k] * load(z[k] + i) + b[k];
      for (int k = 0; k < count; ++k) __builtin_prefetch(z[k] + i + kTile, 0, 2);
      store<T>(total + i, sum);
    }
  }
}

// total = all terms, of which there is one at least.
template <typename T, bool inner>
void accumulate_all(T* total, const std::vector<const T*>& z, const std::vector<const T*>& scale,
                    const std::vector<const T*>& shift, int64_t size, const Runs& r) {
  const int64_t repetition = inner ? r.period : size;
  const bool blocks = in_blocks<T>(r);
  const auto some = [&](auto count, auto fresh, size_t k) {
    const T *const *x = &z[k], *const *a = &scale[k], *const *b = &shift[k];
    if (blocks) accumulate_blocks<T, count(), fresh()>(total, x, a, b, size, r.channels);
    else accumulate<T, count(), inner, fresh()>(total, x, a, b, size, repetition);
  };
  const auto up_to_four = [&](auto fresh, size_t k, size_t left) {
    if (left >= 4) some(std::integral_constant<int, 4>(), fresh, k);
    else if (left == 3) some(std::integral_constant<int, 3>(), fresh, k);
    else if (left == 2) some(std::integral_constant<int, 2>(), fresh, k);
    else some(std::integral_constant<int, 1>(), fresh, k);
  };
  up_to_four(std::true_type(), 0, z.size());
  for (size_t k = 4; k < z.size(); k += 4) up_to_four(std::false_type(), k, z.size() - k);
}

// total += factor (scale z + shift): the factor comes last, so that a large mean, which scale z and
// shift have in common, does not show the rounding of a scaled factor.
template <typename T, bool inner>
void accumulate_dropped(T* __restrict total, const T* __restrict z, const T* __restrict scale,
                        const T* __restrict shift, T factor, int64_t size, int64_t period) {
  const int64_t repetition = inner ? period : size;
  for (int64_t begin = 0; begin < size; begin += repetition) {
    const int64_t length = std::min(repetition, size - begin);
    for (int64_t i = 0; i < length; ++i) {
      const T term = pick<inner>(scale, i) * z[begin + i] + pick<inner>(shift, i);
      total[begin + i] += factor * term;
    }
  }
}

// The noise of one sample, sum_j f_j w_j N(0, 1), in the order of the runs: packed [C, H, W], in which
// numbers are drawn, or [H, W, C].
template <typename T>
void draw_sample(const Drawn& drawn, const Runs& r, int64_t n, std::vector<float>& numbers,
                 std::vector<T>& noise, std::vector<T>& turned) {
  const int64_t size = r.channels * r.pixels();
  numbers.resize(size);
  noise.assign(size, T(0));
  for (int j = 0; j < drawn.count; ++j) {
    const T factor = at<T>(drawn.factors, j * r.samples + n, T(1));
    const T weight = static_cast<const T*>(drawn.weights)[j] * factor;
    if (factor == T(0)) continue;
    PhiloxStart start = drawn.start;
    start.c1 = drawn.sites[j];
    float* const own =
        drawn.kept ? drawn.kept + (j * r.samples + n) * size : numbers.data();
    draw_normals<RDARTS_UNIT>(own, n * size, size, start);
    for (int64_t i = 0; i < size; ++i) noise[i] += weight * static_cast<T>(own[i]);
  }
  if (!r.inner) return;
  turned.resize(size);
  transpose(noise.data(), r.channels, r.pixels(), turned.data());
  noise.swap(turned);
}

// The terms of the tensors, without the noise.
template <typename T, bool inner>
class SampleSum {
 public:
  SampleSum(const NodeSum& a, const Runs& r)
      : a_(a), r_(r), scales_(inner ? a.inputs * r.period : 0), shifts_(scales_.size()),
        z_(a.inputs), scale_(a.inputs), shift_(a.inputs, &none_), factors_(a.inputs, T(1)) {
    for (int k = 0; k < a.inputs; ++k) readers_.emplace_back(a.z[k], r);
  }

  // Takes the coefficients of a run of a sample.
  void start(int64_t n, int64_t run) {
    const bool same = run == run_;
    n_ = n, run_ = run;
    for (int k = 0; k < a_.inputs; ++k) {
      factors_[k] = at<T>(a_.factors, k * r_.samples + n, T(1));
      if (same) continue;
      const T* const scale = static_cast<const T*>(a_.scale) + k * r_.channels;
      const T* const shift = static_cast<const T*>(a_.shift) + (a_.shift ? k * r_.channels : 0);
      if (!inner) {
        scale_[k] = scale + run;
        if (shift) shift_[k] = shift + run;
        continue;
      }
      T *const scales = &scales_[k * r_.period], *const shifts = &shifts_[k * r_.period];
      spread(r_, run, scales, [&](int64_t c) { return scale[c]; });
      spread(r_, run, shifts, [&](int64_t c) { return shift ? shift[c] : T(0); });
      scale_[k] = scales, shift_[k] = shifts;
    }
  }

  // Fills sum with elements [begin, begin + size) of the run.
  void tile(T* sum, int64_t begin, int64_t size) {
    if (a_.factors) {
      std::fill_n(sum, size, T(0));
      for (int k = 0; k < a_.inputs; ++k) {
        if (factors_[k] == T(0)) continue;
        accumulate_dropped<T, inner>(sum, readers_[k].tile(n_, run_, begin, size), scale_[k],
                                     shift_[k], factors_[k], size, r_.period);
      }
      return;
    }
    for (int k = 0; k < a_.inputs; ++k) z_[k] = readers_[k].tile(n_, run_, begin, size);
    accumulate_all<T, inner>(sum, z_, scale_, shift_, size, r_);
  }

 private:
  const NodeSum& a_;
  const Runs& r_;
  std::vector<Reader<T>> readers_;
  std::vector<T> scales_, shifts_;  // a pattern an input, where channels are innermost
  const T none_ = T(0);
  std::vector<const T*> z_, scale_, shift_;
  std::vector<T> factors_;
  int64_t n_ = 0, run_ = -1;
};

template <typename T, bool inner>
void sum_samples(const NodeSum& a, const Runs& r, int64_t from, int64_t to) {
  SampleSum<T, inner> terms(a, r);
  Writer<T> writer(a.out, r);
  std::vector<T> noise, turned, own;
  std::vector<float> numbers;
  const auto is_out = [&](const Array& z) { return z.data == a.out.data; };
  if (std::any_of(a.z, a.z + a.inputs, is_out)) own.resize(r.tile);  // read until the sum is whole
  for (int64_t n = from; n < to; ++n) {
    if (a.drawn.count > 0) draw_sample(a.drawn, r, n, numbers, noise, turned);
    for (int64_t run = 0; run < r.count; ++run) {
      terms.start(n, run);
      for_tiles(r, [&](int64_t begin, int64_t size) {
        T *const target = writer.tile(n, run, begin), *const sum = own.empty() ? target : own.data();
        terms.tile(sum, begin, size);
        if (a.drawn.count > 0) {
          const T* const more = &noise[run * r.length + begin];
          for (int64_t i = 0; i < size; ++i) sum[i] += more[i];
        }
        if (sum != target) std::copy_n(sum, size, target);
        writer.done(n, run, begin, size);
      });
    }
  }
}

// out = by_g g + by_z z + constant on one tile; a null tensor is absent. Coefficients repeat after
// `period` elements.
template <typename T>
void affine_tile(T* __restrict out, const T* __restrict g, const T* __restrict z,
                 const T* __restrict by_g, const T* __restrict by_z, const T* __restrict constant,
                 int64_t size, int64_t period) {
  for (int64_t begin = 0; begin < size; begin += period) {
    const int64_t length = std::min(period, size - begin);
    for (int64_t i = 0; g && z && i < length; ++i) {
      out[begin + i] = by_g[i] * g[begin + i] + (by_z[i] * z[begin + i] + constant[i]);
    }
    for (int64_t i = 0; g && !z && i < length; ++i) out[begin + i] = by_g[i] * g[begin + i] + constant[i];
    for (int64_t i = 0; !g && i < length; ++i) out[begin + i] = by_z[i] * z[begin + i] + constant[i];
  }
}

template <bool past, typename T>
void put(T* to, const Vec<T>& vector) {
  if constexpr (past) store_past_cache<T>(to, vector);
  else store<T>(to, vector);
}

// store(i, value of the vector at i) of by_g g + by_z z + constant for i = first, first + step, ...
template <typename T, typename Store>
inline void affine_vectors(const T* g, const T* z, const Vec<T>& a, const Vec<T>& b,
                           const Vec<T>& c, int64_t first, int64_t size, int64_t step,
                           const Store& store) {
  if (g && z) {
    for (int64_t i = first; i < size; i += step) store(i, a * load(g + i) + (b * load(z + i) + c));
  } else if (g) {
    for (int64_t i = first; i < size; i += step) store(i, a * load(g + i) + c);
  } else {
    for (int64_t i = first; i < size; i += step) store(i, b * load(z + i) + c);
  }
}

// The same where channels lie innermost in whole vectors: a block of them at a time.
template <typename T, bool past>
void affine_blocks(T* out, const T* g, const T* z, const T* by_g, const T* by_z, const T* constant,
                   int64_t size, int64_t channels) {
  for (int64_t block = 0; block < channels; block += kVector<T>) {
    affine_vectors<T>(g, z, load(by_g + block), load(by_z + block), load(constant + block), block,
                      size, channels, [&](int64_t i, const Vec<T>& v) { put<past, T>(out + i, v); });
  }
}

// The same for a channel's plane, which has one of each coefficient.
template <typename T, bool past>
void affine_plane(T* out, const T* g, const T* z, const T* by_g, const T* by_z, const T* constant,
                  int64_t size, int64_t) {
  constexpr int L = kVector<T>;
  const Vec<T> a = Vec<T>{} + *by_g, b = Vec<T>{} + *by_z, c = Vec<T>{} + *constant;
  const int64_t whole = size / L * L;
  affine_vectors<T>(g, z, a, b, c, 0, whole, L,
                    [&](int64_t i, const Vec<T>& v) { put<past, T>(out + i, v); });
  for (int64_t i = whole; i < size; ++i) {
    const T rest = z ? *by_z * z[i] + *constant : *constant;
    out[i] = g ? *by_g * g[i] + rest : rest;
  }
}

constexpr int64_t kLong = 8;  // tiles at once of each tensor
constexpr int64_t kOwn = int64_t{2} << 20;  // bytes that the cores' own caches hold for who reads next

int64_t outputs_of(const Affine& a) {
  return std::count_if(a.out, a.out + a.inputs, [](const Array& out) { return out.data != nullptr; });
}

template <typename T>
void affine_samples(const Affine& a, const Array* like, const Runs& r, int64_t from, int64_t to) {
  const int64_t all = a.inputs * r.period;
  std::vector<T> by_g(all), by_z(all), constant(all);
  std::vector<Reader<T>> z;
  std::vector<Writer<T>> out;
  for (int k = 0; k < a.inputs; ++k) {
    z.emplace_back(a.z[k].data ? a.z[k] : a.out[k], r);
    out.emplace_back(a.out[k], r);
  }
  Reader<T> g(a.g.data ? a.g : *like, r);
  Runs tiles = r;  // longer where nothing is copied: fewer tensors come in turn
  bool direct = g.direct();
  for (int k = 0; k < a.inputs; ++k) {
    direct = direct && (!a.out[k].data || (z[k].direct() && out[k].direct()));
  }
  if (direct) tiles.tile *= kLong;
  const bool past = direct && outputs_of(a) * r.samples * r.channels * r.pixels() *
                                  static_cast<int64_t>(sizeof(T)) > kOwn;
  for (int64_t n = from; n < to; ++n) {
    for (int64_t run = 0; run < r.count; ++run) {
      const bool same = n > from && r.count == 1 && !a.factors;  // as of the sample before
      for (int k = 0; k < a.inputs && !same; ++k) {
        const T factor = at<T>(a.factors, k * r.samples + n, T(1));
        const int64_t row = k * r.channels;
        spread(r, run, &by_g[k * r.period],
               [&](int64_t c) { return factor * at<T>(a.by_g, row + c, T(0)); });
        spread(r, run, &by_z[k * r.period],
               [&](int64_t c) { return at<T>(a.by_z, row + c, T(0)); });
        spread(r, run, &constant[k * r.period],
               [&](int64_t c) { return at<T>(a.constant, row + c, T(0)); });
      }
      for_tiles(tiles, [&](int64_t begin, int64_t size) {
        const T* gradient = a.g.data ? g.tile(n, run, begin, size) : nullptr;
        for (int k = 0; k < a.inputs; ++k) {
          if (!a.out[k].data) continue;
          const bool reads = a.z[k].data && a.by_z;
          const T* input = reads ? z[k].tile(n, run, begin, size) : nullptr;
          const int64_t row = k * r.period;
          T* const result = out[k].tile(n, run, begin);
          const bool away = past && reinterpret_cast<uintptr_t>(result) % kWideBytes == 0;
          const auto map = in_blocks<T>(r)
                               ? (away ? affine_blocks<T, true> : affine_blocks<T, false>)
                           : r.inner ? affine_tile<T>
                                     : (away ? affine_plane<T, true> : affine_plane<T, false>);
          const int64_t step = in_blocks<T>(r) ? r.channels : r.period;
          map(result, gradient, input, &by_g[row], &by_z[row], &constant[row], size, step);
          out[k].done(n, run, begin, size);
        }
      });
    }
  }
  if (past) finish_stores();
}

}  // namespace

template <>
void node_sum<RDARTS_UNIT>(const NodeSum& a, int threads) {
  if (is_empty(a.out)) return;
  const Runs r = runs_of(a.out);
  parallel_for(r.samples, samples_of(r), threads, [&](int64_t from, int64_t to) {
    const bool wide = a.out.dtype == DType::kFloat64;
    if (wide && r.inner) sum_samples<double, true>(a, r, from, to);
    if (wide && !r.inner) sum_samples<double, false>(a, r, from, to);
    if (!wide && r.inner) sum_samples<float, true>(a, r, from, to);
    if (!wide && !r.inner) sum_samples<float, false>(a, r, from, to);
  });
}

template <>
void affine<RDARTS_UNIT>(const Affine& a, int threads) {
  if (is_empty(a.out[0])) return;
  const Array* like = a.out;
  while (!like->data) ++like;  // one output at least is wanted
  const Runs r = runs_of(*like);
  parallel_for(r.samples, samples_of(r), threads, [&](int64_t from, int64_t to) {
    if (like->dtype == DType::kFloat64) affine_samples<double>(a, like, r, from, to);
    else affine_samples<float>(a, like, r, from, to);
  });
}

}  // namespace rdarts
