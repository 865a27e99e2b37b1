// 1x1 convolutions below a ReLU and their backward; what they compute stands in mixing.h:
//   z_g = weights_g relu(scale x + shift), x the channels of all sources, with z's sums per channel
// A tile of a few rows of all sources lies in the thread's memory, in blocks of L channels, and
// serves every edge. Sums and gradients of weights are added in a fixed order, as in sep_stage.cpp.
#include "mixing.h"

#include "launchers.h"
#include "parallel.h"
#include "results.h"

namespace rdarts {
namespace {

struct Sizes {
  int64_t samples, channels, height, width;     // of a source
  int64_t out_channels, out_height, out_width;  // of z
  int64_t tile_rows;
  int blocks;  // of a source's channels
  int depth;   // numbers along all sources, whole blocks

  int64_t tile() const { return tile_rows * out_width; }
};

template <typename T>
Sizes sizes_of(const Mixing& m, const Array& z) {
  Sizes g;
  const Array& x = m.x[0];
  g.samples = x.shape[0], g.channels = x.shape[1], g.height = x.shape[2], g.width = x.shape[3];
  g.out_channels = z.shape[1], g.out_height = z.shape[2], g.out_width = z.shape[3];
  g.tile_rows = tile_rows_of(g.out_height, g.out_width);
  g.blocks = blocks_of<T>(g.channels);
  g.depth = m.sources * g.blocks * kVector<T>;
  return g;
}

// The channels of a half as a tensor of their own.
template <typename T>
Array half_of(const Array& a, const Mixing& m, int half) {
  Array part = a;
  part.shape[1] = channels_of_half(m, a.shape[1], half);
  if (half == 1) {
    part.data = static_cast<T*>(a.data) + channels_of_half(m, a.shape[1], 0) * a.strides[1];
  }
  return part;
}

// One half of one edge, packed.
template <typename T>
struct Half {
  int64_t channels, first;  // of z
  int blocks;
  T* forward;   // B of the forward: [blocks of O, depth, L]
  T* backward;  // B of the backward: [blocks of all sources, O, L]
  GradientMap<T> map;

  Half(const Mixing& m, const Sizes& g, int half, Parts<T>& parts) {
    constexpr int64_t L = kVector<T>;
    channels = channels_of_half(m, g.out_channels, half);
    first = half == 1 ? channels_of_half(m, g.out_channels, 0) : 0;
    blocks = blocks_of<T>(channels);
    forward = parts.take(blocks * L * g.depth);
    backward = parts.take(channels * g.depth);
    map = GradientMap<T>(blocks, parts);
  }

  // Each source's columns of the weights [O, M C] begin a new block.
  void pack(const Mixing& m, const Sizes& g, const void* weights) const {
    constexpr int L = kVector<T>;
    const T* const w = static_cast<const T*>(weights);
    const int64_t row = m.sources * g.channels;
    for (int64_t k = 0; k < g.depth; ++k) {
      const int64_t source = k / (g.blocks * L), c = k % (g.blocks * L);
      const T* const column = w + source * g.channels + c;
      for (int64_t o = 0; o < blocks * L; ++o) {
        const T value = o < channels && c < g.channels ? column[o * row] : T(0);
        forward[(o / L * g.depth + k) * L + o % L] = value;
        if (o < channels) backward[(k / L * channels + o) * L + k % L] = value;
      }
    }
  }
};

// What a call's threads share.
template <typename T>
struct Operands {
  T *scale = nullptr, *shift = nullptr;
  std::vector<Half<T>> halves;  // [G, halves]

  Operands() = default;
  Operands(const Mixing& m, const Sizes& g, Parts<T>& parts) {
    scale = parts.take(g.depth), shift = parts.take(g.depth);
    for (int i = 0; i < m.edges * m.halves; ++i) halves.emplace_back(m, g, i % m.halves, parts);
  }

  void pack(const Mixing& m, const Sizes& g) const {
    for (size_t i = 0; i < halves.size(); ++i) {
      if (halves[i].channels > 0) halves[i].pack(m, g, m.weights[i]);
    }
    for (int s = 0; s < m.sources && m.scale; ++s) {
      const int64_t at = static_cast<int64_t>(s) * g.blocks * kVector<T>;
      pack_row<T>(row_of<T>(m.scale, s, g.channels), g.channels, scale + at);
      pack_row<T>(row_of<T>(m.shift, s, g.channels), g.channels, shift + at);
    }
  }
};

// A thread's own.
template <typename T>
struct Memory {
  const Operands<T>* operands;
  T *y, *dy, *dz;
  T *pivot, *sum, *square;  // [G, halves, blocks of O, L]

  Memory(const Mixing& m, const Sizes& g, const Operands<T>& shared, Parts<T>& parts)
      : operands(&shared) {
    const int64_t tile = g.depth * g.tile();
    y = parts.take(m.halves * tile), dy = parts.take(m.halves * tile);
    dz = parts.take(blocks_of<T>(g.out_channels) * kVector<T> * g.tile());
    const int64_t all = m.edges * m.halves * width(g);
    pivot = parts.take(all), sum = parts.take(all), square = parts.take(all);
  }

  static int64_t width(const Sizes& g) { return blocks_of<T>(g.out_channels) * kVector<T>; }

  void clear(const Mixing& m, const Sizes& g) const {
    std::fill_n(sum, m.edges * m.halves * width(g), T(0));
    std::fill_n(square, m.edges * m.halves * width(g), T(0));
  }
};

// body(memory) in every thread, over the samples [from, to) of a piece.
template <typename T, typename Body>
void in_pieces(const Mixing& m, const Sizes& g, const Operands<T>& operands, int64_t piece, int threads,
               const Body& body) {
  parallel_for(g.samples, piece, threads, [&](int64_t from, int64_t to) {
    Parts<T> needed;
    Memory<T>(m, g, operands, needed);
    Parts<T> parts(scratch<T>(needed.used()));
    const Memory<T> own(m, g, operands, parts);
    own.clear(m, g);
    body(own, from, to);
  });
}

// Columns of a row of z whose pixel in x, shifted by `half`, is inside.
inline int64_t columns_of(const Mixing& m, const Sizes& g, int half) {
  return std::min(g.out_width, (g.width - half + m.stride - 1) / m.stride);
}

// y[halves, blocks of all sources, tile, L] of `rows` rows of a sample.
template <typename T>
void fill_tile(const Mixing& m, const Sizes& g, const Memory<T>& memory, int64_t n, int64_t first,
               int64_t rows) {
  constexpr int L = kVector<T>;
  for (int i = 0; i < m.sources * g.blocks; ++i) {
    const Pixels<T> x(m.x[i / g.blocks], n);
    const Vec<T> scale = load(memory.operands->scale + i * L);
    const Vec<T> shift = load(memory.operands->shift + i * L);
    for (int half = 0; half < m.halves; ++half) {
      T* to = memory.y + half * g.depth * g.tile() + i * g.tile() * L;
      const int64_t inside = columns_of(m, g, half);
      for (int64_t row = 0; row < rows; ++row, to += g.out_width * L) {
        const int64_t from = m.stride * (first + row) + half;
        const int64_t count = from < g.height ? inside : 0;
        x.along(from, count, i % g.blocks, [&](int64_t column, const Vec<T>& value) {
          store<T>(to + column * L, relu<T>(m.scale ? scale * value + shift : value));
        }, half, m.stride);
        std::fill_n(to + count * L, (g.out_width - count) * L, T(0));
      }
    }
  }
}

// The first row of z of a tile, and its sample.
struct Spot {
  int64_t n, row;
};

// The tile after this one, which mostly is the thread's next.
inline Spot after(const Sizes& g, const Spot& at) {
  if (at.row + g.tile_rows < g.out_height) return {at.n, at.row + g.tile_rows};
  return {at.n + 1, 0};
}

// Lets a tile's rows of the tensors be fetched, of which `stride` make one of z.
template <typename T>
void fetch_rows(const Array* tensors, int count, const Sizes& g, const Spot& at, int64_t stride,
                Ahead& ahead) {
  if (at.n == g.samples) return;
  for (int i = 0; i < count; ++i) {
    const int64_t row = stride * at.row, rows = stride * g.tile_rows;
    Pixels<T>(tensors[i], at.n).fetch(ahead, row, std::min(rows, tensors[i].shape[2] - row));
  }
}

template <typename T>
void forward_sample(const MixingForward& a, const Sizes& g, const Memory<T>& memory, int64_t n,
                    const int* offset, double* sums /* [G, 3, O] */) {
  constexpr int L = kVector<T>;
  const Mixing& m = a.mixing;
  const int64_t own = 3 * g.out_channels;
  std::fill_n(sums, m.edges * own, 0.0);
  for (int64_t first = 0; first < g.out_height; first += g.tile_rows) {
    const int64_t rows = std::min(g.tile_rows, g.out_height - first);
    const int pixels = static_cast<int>(rows * g.out_width);
    Ahead ahead;
    fetch_rows<T>(m.x, m.sources, g, after(g, {n, first}), m.stride, ahead);
    int64_t steps = 0;
    for (const Half<T>& half : memory.operands->halves) {
      steps += steps_of<false>(pixels, g.depth, half.blocks);
    }
    ahead.spread(steps);
    fill_tile(m, g, memory, n, first, rows);
    for (int i = 0; i < m.edges * m.halves; ++i) {
      const Half<T>& half = memory.operands->halves[i];
      if (half.channels == 0) continue;
      T* const z = Result<T>(a.z[i / m.halves], n).pixel(first, 0) + half.first;
      const T* const y = memory.y + i % m.halves * g.depth * g.tile();
      Product<T> p = {y, g.tile() * L, half.forward, int64_t{g.depth} * L, z, L, offset,
                      pixels, g.depth, half.blocks};
      double* const at = sums + i / m.halves * own + half.first;
      const int64_t own_sums = i * Memory<T>::width(g);
      T *const pivot = memory.pivot + own_sums, *const sum = memory.sum + own_sums;
      T* const square = memory.square + own_sums;
      if (first == 0) take_pivot(p, pivot, half.channels, at + 2 * g.out_channels);
      p.ahead = &ahead;
      multiply<false>(p, Summed<T>{pivot, sum, square, half.channels, pixels * g.out_channels});
      drain(sum, half.channels, at);
      drain(square, half.channels, at + g.out_channels);
    }
  }
}

template <typename T>
void forward_of(const MixingForward& a, int threads) {
  const Mixing& m = a.mixing;
  const Sizes g = sizes_of<T>(m, a.z[0]);
  std::vector<int> offset(g.tile());
  for (int64_t i = 0; i < g.tile(); ++i) offset[i] = static_cast<int>(i * g.out_channels);
  const Packed<T, Operands<T>> packed(m, g);
  packed->pack(m, g);
  const int64_t piece = piece_of(g.samples);
  in_pieces<T>(m, g, *packed, piece, threads, [&](const Memory<T>& memory, int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      double* const sums = a.workspace + n * m.edges * 3 * g.out_channels;
      forward_sample(a, g, memory, n, offset.data(), sums);
    }
  });
  combine(a.workspace, g.samples, m.edges, g.out_height * g.out_width, g.out_channels, a.sums);
}

// Writes the gradients of a tile's rows of all sources, or adds them.
template <typename T>
void scatter_tile(const MixingBackward& a, const Sizes& g, const Memory<T>& memory, int64_t n,
                  int64_t first, int64_t rows) {
  constexpr int L = kVector<T>;
  const Mixing& m = a.mixing;
  for (int i = 0; i < m.sources * g.blocks; ++i) {
    if (!a.dv[i / g.blocks].data) continue;
    const Result<T> dv(a.dv[i / g.blocks], n);
    for (int half = 0; half < m.halves; ++half) {
      if (memory.operands->halves[half].channels == 0) continue;
      const int64_t tile = half * g.depth * g.tile() + i * g.tile() * L;
      const int64_t inside = columns_of(m, g, half);
      const bool adds = a.adds[i / g.blocks] || m.stride > 1;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t to = m.stride * (first + row) + half, from = tile + row * g.out_width * L;
        if (to >= g.height) continue;
        dv.template along<true>(to, inside, i % g.blocks, adds, [&](int64_t column) {
          const int64_t at = from + column * L;
          return where_passed<T>(load(memory.dy + at), load(memory.y + at));
        }, half, m.stride);
      }
    }
  }
}

// Numbers of the gradients of all weights in a chunk, and where those of a half begin: [blocks of O,
// depth, L].
template <typename T>
int64_t weight_sums(const Mixing& m, const Sizes& g, int halves) {
  int64_t size = 0;
  for (int i = 0; i < halves; ++i) {
    const int64_t channels = channels_of_half(m, g.out_channels, i % m.halves);
    size += int64_t{blocks_of<T>(channels)} * kVector<T> * g.depth;
  }
  return size;
}

template <typename T>
void backward_sample(const MixingBackward& a, const Sizes& g, const Memory<T>& memory, int64_t n,
                     const int* offset, T* weights /* or null */) {
  constexpr int L = kVector<T>;
  const Mixing& m = a.mixing;
  const int64_t tile = g.tile() * L;
  for (int s = 0; s < m.sources && m.stride > 1; ++s) {  // most pixels are in no half
    if (!a.dv[s].data || a.adds[s]) continue;
    std::fill_n(Result<T>(a.dv[s], n).pixel(0, 0), g.channels * g.height * g.width, T(0));
  }
  for (int64_t first = 0; first < g.out_height; first += g.tile_rows) {
    const int64_t rows = std::min(g.tile_rows, g.out_height - first);
    const int pixels = static_cast<int>(rows * g.out_width);
    Ahead ahead;
    const Spot next = after(g, {n, first});
    fetch_rows<T>(m.x, m.sources, g, next, m.stride, ahead);
    fetch_rows<T>(a.g, m.edges, g, next, 1, ahead);
    if (a.by_z) fetch_rows<T>(a.z, m.edges, g, next, 1, ahead);
    for (int s = 0; s < m.sources; ++s) {
      if (!a.dv[s].data || !(a.adds[s] || m.stride > 1)) continue;  // else it is not read
      fetch_rows<T>(&a.dv[s], 1, g, {n, first}, m.stride, ahead);
    }
    int64_t steps = 0;
    for (const Half<T>& half : memory.operands->halves) {
      steps += steps_of<false>(pixels, half.channels, g.depth / L);
      if (weights) steps += steps_of<true>(g.depth, pixels, half.blocks);
    }
    ahead.spread(steps);
    fill_tile(m, g, memory, n, first, rows);
    for (int i = 0; i < m.edges * m.halves; ++i) {
      const Half<T>& half = memory.operands->halves[i];
      if (half.channels == 0) continue;
      const int e = i / m.halves, side = i % m.halves;
      const Pixels<T> gradient(half_of<T>(a.g[e], m, side), n);
      const Pixels<T> z(half_of<T>(a.by_z ? a.z[e] : a.g[e], m, side), n);
      const T factor = factor_at<T>(a.factors, e * g.samples + n);
      gradient_rows(gradient, a.by_z ? &z : nullptr, half.map, factor, first, rows, g.out_width,
                    g.tile(), memory.dz);
      const int64_t own = side * g.depth * g.tile();
      const Product<T> back = {memory.dz, tile, half.backward, half.channels * L, memory.dy + own,
                               tile, offset, pixels, static_cast<int>(half.channels), g.depth / L,
                               &ahead};
      if (e == 0) multiply<false>(back, Replace{});
      else multiply<false>(back, Add{});
      if (!weights) continue;
      T* const sums = weights + weight_sums<T>(m, g, i);
      multiply<true>(Product<T>{memory.y + own, tile, memory.dz, tile, sums, int64_t{g.depth} * L,
                                offset, g.depth, pixels, half.blocks, &ahead},
                     Add{});
    }
    scatter_tile(a, g, memory, n, first, rows);
  }
}

template <typename T>
void unpack_weights(const MixingBackward& a, const Sizes& g, const T* partial, int64_t chunks,
                    int threads) {
  constexpr int L = kVector<T>;
  const Mixing& m = a.mixing;
  const int64_t all = weight_sums<T>(m, g, m.edges * m.halves), row = m.sources * g.channels;
  parallel_for(row, L, threads, [&](int64_t from, int64_t to) {
    double total[L];
    for (int i = 0; i < m.edges * m.halves; ++i) {
      const int64_t channels = channels_of_half(m, g.out_channels, i % m.halves);
      const T* const sums = partial + weight_sums<T>(m, g, i);
      for (int64_t k = from; k < to; ++k) {
        const int64_t at = k / g.channels * g.blocks * L + k % g.channels;
        T* const column = static_cast<T*>(a.dweights[i]) + k;
        for (int64_t o = 0; o < channels; o += L) {
          add_chunks(sums + (o / L * g.depth + at) * L, chunks, all, total);
          const int64_t count = std::min<int64_t>(L, channels - o);
          for (int64_t j = 0; j < count; ++j) column[(o + j) * row] = static_cast<T>(total[j]);
        }
      }
    }
  });
}

template <typename T>
void backward_of(const MixingBackward& a, int threads) {
  const Mixing& m = a.mixing;
  const Sizes g = sizes_of<T>(m, a.g[0]);
  const int64_t chunk = chunk_of(g.samples), chunks = (g.samples + chunk - 1) / chunk;
  const int64_t own = weight_sums<T>(m, g, m.edges * m.halves);
  T* const partial = reinterpret_cast<T*>(a.workspace);  // [chunks, own]
  std::vector<int> offset(std::max<int64_t>(g.tile(), g.depth));
  for (size_t i = 0; i < offset.size(); ++i) offset[i] = static_cast<int>(i * kVector<T>);
  const Packed<T, Operands<T>> packed(m, g);
  packed->pack(m, g);
  for (int i = 0; i < m.edges * m.halves; ++i) {
    const Half<T>& half = packed->halves[i];
    const int64_t first = i / m.halves * g.out_channels + half.first;
    half.map.pack(a.by_g, a.by_z, a.constant, first, half.channels);
  }
  const int64_t piece = a.dweights ? chunk : piece_of(g.samples);
  in_pieces<T>(m, g, *packed, piece, threads, [&](const Memory<T>& memory, int64_t from, int64_t to) {
    T* const weights = a.dweights ? partial + from / chunk * own : nullptr;
    if (weights) std::fill_n(weights, own, T(0));
    for (int64_t n = from; n < to; ++n) {
      backward_sample(a, g, memory, n, offset.data(), weights);
    }
    finish_stores();
  });
  if (a.dweights) unpack_weights(a, g, partial, chunks, threads);
}

}  // namespace

template <>
void mixing<RDARTS_UNIT>(const MixingForward& a, int threads) {
  if (a.z[0].dtype == DType::kFloat64) forward_of<double>(a, threads);
  else forward_of<float>(a, threads);
}

template <>
void mixing_backward<RDARTS_UNIT>(const MixingBackward& a, int threads) {
  if (a.g[0].dtype == DType::kFloat64) backward_of<double>(a, threads);
  else backward_of<float>(a, threads);
}

}  // namespace rdarts
