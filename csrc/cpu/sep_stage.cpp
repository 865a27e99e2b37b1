// Half a separable convolution and its backward; what they compute stands in stage.h:
//   z = pointwise (depthwise relu(scale x + shift)), with its sums per channel
// A sample and an edge at a time: relu's result lies as a padded image of blocks of channels in the
// thread's memory, tiles of a few rows go through the depthwise and the pointwise part in the
// first-level cache. Sums and gradients of weights belong to a sample or to a fixed chunk of samples
// and are added in their order, so that no bit depends on the number of threads.
#include "stage.h"

#include <utility>

#include "depthwise.h"
#include "images.h"
#include "launchers.h"
#include "parallel.h"
#include "results.h"

namespace rdarts {
namespace {

// The sizes of a call, in pixels and in blocks of L channels.
struct Sizes {
  int64_t samples, channels, height, width;            // of x
  int64_t out_channels, out_height, out_width;         // of z
  int64_t pad, padded_width, padded_pixels;            // of the image of y
  int64_t out_pad, out_padded_width, out_padded_pixels;  // of the image of the gradient of d
  int64_t tile_rows;
  int in, out, taps, stride;  // blocks of C, blocks of O, K * K

  int64_t tile() const { return tile_rows * out_width; }
};

template <typename T>
Sizes sizes_of(const Stage& s, const Array& z) {
  Sizes g;
  const Array& x = s.x[0];
  g.samples = x.shape[0], g.channels = x.shape[1], g.height = x.shape[2], g.width = x.shape[3];
  g.out_channels = z.shape[1], g.out_height = z.shape[2], g.out_width = z.shape[3];
  g.pad = s.dilation * (s.kernel / 2);
  g.padded_width = g.width + 2 * g.pad;
  g.padded_pixels = g.padded_width * (g.height + 2 * g.pad);
  g.out_pad = s.stride == 1 ? g.pad : (g.pad + 1) / 2;
  g.out_padded_width = g.out_width + 2 * g.out_pad;
  g.out_padded_pixels = g.out_padded_width * (g.out_height + 2 * g.out_pad);
  g.tile_rows = tile_rows_of(g.out_height, g.out_width);
  g.in = blocks_of<T>(g.channels), g.out = blocks_of<T>(g.out_channels);
  g.taps = s.kernel * s.kernel, g.stride = s.stride;
  return g;
}

// image = relu(scale x + shift) inside of the padding.
template <typename T>
void fill_image(const Pixels<T>& x, const Sizes& g, const T* scale, const T* shift, T* image) {
  constexpr int L = kVector<T>;
  for (int v = 0; v < g.in; ++v) {
    const Vec<T> a = scale ? load(scale + v * L) : Vec<T>{};
    const Vec<T> b = scale ? load(shift + v * L) : Vec<T>{};
    for (int64_t row = 0; row < g.height; ++row) {
      T* const to = image + (v * g.padded_pixels + (row + g.pad) * g.padded_width + g.pad) * L;
      if (scale) {
        x.along(row, g.width, v, [&](int64_t column, const Vec<T>& value) {
          store<T>(to + column * L, relu<T>(a * value + b));
        });
      } else {
        x.along(row, g.width, v, [&](int64_t column, const Vec<T>& value) {
          store<T>(to + column * L, relu<T>(value));
        });
      }
    }
  }
}

// image = scale x + by_gate gate + shift inside of the padding where gate > 0, else 0; just x there
// where scale is null.
template <typename T>
void fill_gated(const Pixels<T>& x, const Pixels<T>& gate, const Sizes& g, const T* scale,
                const T* by_gate, const T* shift, T* image) {
  constexpr int L = kVector<T>;
  for (int v = 0; v < g.in; ++v) {
    const Vec<T> a = scale ? load(scale + v * L) : Vec<T>{} + T(1);
    const Vec<T> b = scale ? load(shift + v * L) : Vec<T>{};
    const Vec<T> c = scale ? load(by_gate + v * L) : Vec<T>{};
    for (int64_t row = 0; row < g.height; ++row) {
      T* const to = image + (v * g.padded_pixels + (row + g.pad) * g.padded_width + g.pad) * L;
      x.along(row, g.width, v, [&](int64_t column, const Vec<T>& value) {
        store<T>(to + column * L, a * value + b);
      });
      gate.along(row, g.width, v, [&](int64_t column, const Vec<T>& value) {
        store<T>(to + column * L, where_passed<T>(load(to + column * L) + c * value, value));
      });
    }
  }
}

// d[blocks, tile, L] = the depthwise part of `rows` rows.
template <typename T>
void convolve_rows(const Depthwise<T>& kernel, const T* image, const Sizes& g, const T* taps,
                   int64_t first, int64_t rows, T* d) {
  constexpr int L = kVector<T>;
  for (int v = 0; v < g.in; ++v) {
    const T* const from = image + (v * g.padded_pixels + first * g.stride * g.padded_width) * L;
    kernel.convolve(from, g.padded_width, taps + v * g.taps * L, rows, g.out_width,
                    d + v * g.tile() * L);
  }
}

// Rows of x that belong to `rows` rows of z from `first` on.
inline int64_t rows_of(const Sizes& g, int64_t first, int64_t rows) {
  return std::min(rows * g.stride, g.height - first * g.stride);
}

// An edge's operands as the kernels take them; what a direction does not need is empty.
template <typename T>
struct Edge {
  T *taps = nullptr, *turned = nullptr, *matrix = nullptr, *scale = nullptr, *shift = nullptr;
  T* by_gate = nullptr;
  GradientMap<T> map;  // backward

  Edge() = default;
  Edge(const Sizes& g, bool backward, Parts<T>& parts) {
    constexpr int64_t L = kVector<T>;
    taps = parts.take(g.in * g.taps * L), turned = parts.take(g.in * g.taps * L);
    matrix = parts.take(backward ? g.in * g.out_channels * L : g.out * g.channels * L);
    scale = parts.take(g.in * L), shift = parts.take(g.in * L), by_gate = parts.take(g.in * L);
    if (backward) map = GradientMap<T>(g.out, parts);
  }

  void pack(const Stage& s, const Sizes& g, int e) const {
    pack_taps<T>(s.depthwise[e], g.channels, g.taps, false, taps);
    if (!s.scale) return;
    pack_row<T>(row_of<T>(s.scale, e, g.channels), g.channels, scale);
    pack_row<T>(row_of<T>(s.shift, e, g.channels), g.channels, shift);
    if (s.by_gate) pack_row<T>(row_of<T>(s.by_gate, e, g.channels), g.channels, by_gate);
  }
};

template <typename T>
struct Edges {
  std::vector<Edge<T>> edges;

  Edges() = default;
  Edges(const Sizes& g, int count, bool backward, Parts<T>& parts) {
    for (int e = 0; e < count; ++e) edges.emplace_back(g, backward, parts);
  }
};

// A thread's own memory.
template <typename T>
struct ForwardMemory {
  T *image, *d, *pivot, *sum, *square;

  ForwardMemory(const Sizes& g, Parts<T>& parts) {
    constexpr int64_t L = kVector<T>;
    image = parts.take(g.in * g.padded_pixels * L);
    d = parts.take(g.in * g.tile() * L);
    pivot = parts.take(g.out * L), sum = parts.take(g.out * L), square = parts.take(g.out * L);
  }

  void clear(const Sizes& g) const {
    clear_border(image, g.in, g.height, g.width, g.pad);
    std::fill_n(sum, g.out * kVector<T>, T(0));
    std::fill_n(square, g.out * kVector<T>, T(0));
  }
};

// A sample of an edge.
struct Spot {
  int e;
  int64_t n;
};

// The one after it, which its thread mostly takes next: of samples [from, to) edge by edge, then of
// those that follow. After the last one, itself.
inline Spot after(const Spot& at, int edges, int64_t from, int64_t to, int64_t samples) {
  if (at.n + 1 < to) return {at.e, at.n + 1};
  if (at.e + 1 < edges) return {at.e + 1, from};
  return to < samples ? Spot{0, to} : at;
}

// One sample of one edge whose image is filled; sums: [3, O] of this sample. next: x of the one after
// it.
template <typename T>
void forward_sample(const Depthwise<T>& kernel, const Sizes& g, const Edge<T>& edge,
                    const ForwardMemory<T>& m, const Array& z, int64_t n, const int* offset,
                    double* sums, const Pixels<T>& next, bool read_soon) {
  constexpr int L = kVector<T>;
  const Result<T> result(z, n);
  std::fill_n(sums, 2 * g.out_channels, 0.0);
  for (int64_t first = 0; first < g.out_height; first += g.tile_rows) {
    const int64_t rows = std::min(g.tile_rows, g.out_height - first);
    const int pixels = static_cast<int>(rows * g.out_width);
    Ahead ahead;
    next.fetch(ahead, first * g.stride, rows_of(g, first, rows));
    ahead.spread(steps_of<false>(pixels, g.channels, g.out));
    convolve_rows(kernel, m.image, g, edge.taps, first, rows, m.d);
    Product<T> p = {m.d, g.tile() * L, edge.matrix, g.channels * L, result.pixel(first, 0), L, offset,
                    pixels, static_cast<int>(g.channels), g.out};
    if (first == 0) take_pivot(p, m.pivot, g.out_channels, sums + 2 * g.out_channels);
    p.ahead = &ahead;
    multiply<false>(p, Summed<T>{m.pivot, m.sum, m.square, g.out_channels, pixels * g.out_channels,
                                 !read_soon && result.aligned()});
    drain(m.sum, g.out_channels, sums);
    drain(m.square, g.out_channels, sums + g.out_channels);
  }
}

template <typename T>
void forward_of(const StageForward& a, int threads) {
  const Stage& s = a.stage;
  const Sizes g = sizes_of<T>(s, a.z[0]);
  const Depthwise<T> kernel = depthwise_of<T>(s.kernel, s.dilation, s.stride);
  const int64_t own = 3 * g.out_channels, pixels = g.out_height * g.out_width;
  std::vector<int> offset(g.tile());
  for (int64_t i = 0; i < g.tile(); ++i) offset[i] = static_cast<int>(i * g.out_channels);
  const Packed<T, Edges<T>> packed(g, s.edges, false);
  for (int e = 0; e < s.edges; ++e) {
    packed->edges[e].pack(s, g, e);
    const T* const w = static_cast<const T*>(s.pointwise[e]);
    pack_matrix<T>(w, g.channels, g.out_channels, 1, g.channels, packed->edges[e].matrix);
  }
  parallel_for(g.samples, piece_of(g.samples), threads, [&](int64_t from, int64_t to) {
    Parts<T> needed;
    ForwardMemory<T>(g, needed);
    Parts<T> parts(scratch<T>(needed.used()));
    const ForwardMemory<T> m(g, parts);
    m.clear(g);
    for (int e = 0; e < s.edges; ++e) {
      const Edge<T>& edge = packed->edges[e];
      for (int64_t n = from; n < to; ++n) {
        const Pixels<T> x(s.x[e], n);
        const T* const scale = s.scale ? edge.scale : nullptr;
        if (s.gate) fill_gated(x, Pixels<T>(*s.gate, n), g, scale, edge.by_gate, edge.shift, m.image);
        else fill_image(x, g, scale, edge.shift, m.image);
        double* const sums = a.workspace + (n * s.edges + e) * own;
        const Spot next = after({e, n}, s.edges, from, to, g.samples);
        forward_sample(kernel, g, edge, m, a.z[e], n, offset.data(), sums,
                       Pixels<T>(s.x[next.e], next.n), a.read_soon);
      }
    }
    finish_stores();
  });
  combine(a.workspace, g.samples, s.edges, pixels, g.out_channels, a.sums);
}

template <typename T>
struct BackwardMemory {
  T *image, *out, *d, *dz;

  BackwardMemory(const Sizes& g, Parts<T>& parts) {
    constexpr int64_t L = kVector<T>;
    image = parts.take(g.in * g.padded_pixels * L);
    out = parts.take(g.in * g.out_padded_pixels * L);
    d = parts.take(std::max(g.in * g.tile(), g.tile_rows * g.width) * L);  // or a block's dimage
    dz = parts.take(g.out * g.tile() * L);
  }

  void clear(const Sizes& g) const {
    clear_border(image, g.in, g.height, g.width, g.pad);
    clear_border(out, g.in, g.out_height, g.out_width, g.out_pad);
  }
};

// Gradients of one edge's weights in a chunk of samples.
template <typename T>
struct WeightSums {
  T* taps;    // [blocks of C, K * K, L]
  T* matrix;  // [blocks of O, C, L]
};

// Where the rows of its products lie.
struct Offsets {
  std::vector<int> pixel;    // of a tile, in the image of the gradient of d
  std::vector<int> channel;  // of the pointwise weights
};

// What the tile after this one reads, of x that of the next sample, and where this one's dv goes.
template <typename T>
void fetch_next(const StageBackward& a, const Sizes& g, const Spot& at, const Spot& next,
                int64_t first, int64_t rows, Ahead& ahead) {
  const int64_t own = rows_of(g, first, rows), row = first * g.stride;
  const bool within = first + rows < g.out_height;
  const Spot& then = within ? at : next;
  const int64_t from = within ? first + rows : 0, count = std::min(g.tile_rows, g.out_height - from);
  Pixels<T>(a.g[then.e], then.n).fetch(ahead, from, count);
  if (a.by_z) Pixels<T>(a.z[then.e], then.n).fetch(ahead, from, count);
  Pixels<T>(a.stage.x[next.e], next.n).fetch(ahead, row, own);
  if (a.dv[at.e].data) Pixels<T>(a.dv[at.e], at.n).fetch(ahead, row, own);
}

// The gradient of d of a sample, and what the weights get of it.
template <typename T>
void through_pointwise(const StageBackward& a, const Depthwise<T>& kernel, const Sizes& g,
                       const Edge<T>& edge, const BackwardMemory<T>& m, const Spot& at,
                       const Spot& next, const Offsets& offset, const WeightSums<T>* weights) {
  constexpr int L = kVector<T>;
  const auto [e, n] = at;
  const int channels = static_cast<int>(g.channels), out = static_cast<int>(g.out_channels);
  const Pixels<T> gradient(a.g[e], n), z(a.by_z ? a.z[e] : a.g[e], n);
  const T factor = factor_at<T>(a.factors, e * g.samples + n);
  for (int64_t first = 0; first < g.out_height; first += g.tile_rows) {
    const int64_t rows = std::min(g.tile_rows, g.out_height - first);
    const int pixels = static_cast<int>(rows * g.out_width);
    Ahead ahead;
    fetch_next<T>(a, g, at, next, first, rows, ahead);
    ahead.spread(steps_of<false>(pixels, out, g.in) +
                 (weights ? steps_of<true>(channels, pixels, g.out) : 0));
    gradient_rows(gradient, a.by_z ? &z : nullptr, edge.map, factor, first, rows, g.out_width,
                  g.tile(), m.dz);
    T* const to = m.out + ((first + g.out_pad) * g.out_padded_width + g.out_pad) * L;
    multiply<false>(Product<T>{m.dz, g.tile() * L, edge.matrix, g.out_channels * L, to,
                               g.out_padded_pixels * L, offset.pixel.data(), pixels, out, g.in,
                               &ahead},
                    Replace{});
    if (!weights) continue;
    convolve_rows(kernel, m.image, g, edge.taps, first, rows, m.d);
    multiply<true>(Product<T>{m.d, g.tile() * L, m.dz, g.tile() * L, weights->matrix, channels * L,
                              offset.channel.data(), channels, pixels, g.out, &ahead},
                   Add{});
    for (int v = 0; v < g.in; ++v) {
      const int64_t in_at = v * g.padded_pixels + first * g.stride * g.padded_width;
      const int64_t out_at = (first + g.out_pad) * g.out_padded_width + g.out_pad;
      kernel.gradient(m.image + in_at * L, g.padded_width,
                      m.out + (v * g.out_padded_pixels + out_at) * L, g.out_padded_width, rows,
                      g.out_width, weights->taps + v * g.taps * L);
    }
  }
}

// Some rows of a block of dv: where relu's result y was not 0, the gradient of the image `dimage`.
template <typename T>
struct Passed {
  const T* dimage;  // [rows, columns, L]
  const T* y;
  int64_t y_width;  // pixels from row to row
  int64_t rows, columns, channels;
  T* dv;  // [rows, columns, channels]; null: not wanted
  int64_t count;  // channels of the block

  // Writes dv or adds to it, and returns its sum and that of dv y.
  template <bool wanted, bool adds>
  RDARTS_METHOD std::pair<Vec<T>, Vec<T>> take() const {
    constexpr int L = kVector<T>;
    Vec<T> sum = {}, product = {};
    for (int64_t row = 0; row < rows; ++row) {
      const T *const from = dimage + row * columns * L, *const gate = y + row * y_width * L;
      T* to = dv + row * columns * channels;
      for (int64_t column = 0; column < columns; ++column, to += channels) {
        const Vec<T> passed = load(gate + column * L);
        const Vec<T> found = where_passed<T>(load(from + column * L), passed);
        sum += found, product += found * passed;
        if (!wanted) continue;
        if (count < L) store_part<T>(to, adds ? load_part(to, count) + found : found, count);
        else store<T>(to, adds ? load(to) + found : found);
      }
    }
    return {sum, product};
  }
};

// The gradient of v of a sample from that of d.
template <typename T>
void through_depthwise(const StageBackward& a, const Depthwise<T>& kernel, const Sizes& g,
                       const Edge<T>& edge, const BackwardMemory<T>& m, int e, int64_t n,
                       double* sums /* [2, C] */) {
  constexpr int L = kVector<T>;
  const bool wanted = a.dv[e].data, adds = a.adds[e];
  for (int v = 0; v < g.in; ++v) {
    const T* const out = m.out + v * g.out_padded_pixels * L;
    const T* const inner = out + (g.out_pad * g.out_padded_width + g.out_pad) * L;
    const T* const y = m.image + (v * g.padded_pixels + g.pad * g.padded_width + g.pad) * L;
    for (int64_t first = 0; first < g.height; first += g.tile_rows) {
      const int64_t rows = std::min(g.tile_rows, g.height - first);
      if (g.stride == 1) {
        kernel.convolve(out + first * g.out_padded_width * L, g.out_padded_width,
                        edge.turned + v * g.taps * L, rows, g.width, m.d);
      } else {
        kernel.transposed(inner, g.out_padded_width, edge.taps + v * g.taps * L, first, rows, g.width,
                          m.d);
      }
      Passed<T> p = {m.d, y + first * g.padded_width * L, g.padded_width, rows, g.width, g.channels,
                     nullptr, std::min<int64_t>(L, g.channels - v * L)};
      if (wanted) p.dv = Result<T>(a.dv[e], n).pixel(first, 0) + v * L;
      const auto [sum, product] = !wanted ? p.template take<false, false>()
                                  : adds  ? p.template take<true, true>()
                                          : p.template take<true, false>();
      if (!sums) continue;
      add_to<T>(sums + v * L, sum, p.count);
      add_to<T>(sums + g.channels + v * L, product, p.count);
    }
  }
}

// Numbers of the gradients of one edge's weights in a chunk.
template <typename T>
int64_t weight_sums(const Sizes& g) {
  return static_cast<int64_t>(g.in * g.taps + g.out * g.channels) * kVector<T>;
}

template <typename T>
void unpack_weights(const StageBackward& a, const Sizes& g, const T* partial, int64_t chunks,
                    int threads) {
  constexpr int L = kVector<T>;
  const int64_t own = weight_sums<T>(g), all = a.stage.edges * own;
  const int64_t first = static_cast<int64_t>(g.in) * g.taps * L;
  parallel_for(a.stage.edges * g.in, 1, threads, [&](int64_t begin, int64_t) {
    const int64_t e = begin / g.in, v = begin % g.in;  // a block of channels of an edge
    const int64_t from = v * L, channels = std::min<int64_t>(L, g.channels - from);
    T* const taps = static_cast<T*>(a.ddepthwise[e]) + from * g.taps;
    T* const matrix = static_cast<T*>(a.dpointwise[e]) + from;
    const T* const sums = partial + e * own;
    double total[L];
    for (int t = 0; t < g.taps; ++t) {
      add_chunks(sums + (v * g.taps + t) * L, chunks, all, total);
      for (int64_t c = 0; c < channels; ++c) taps[c * g.taps + t] = static_cast<T>(total[c]);
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t o = 0; o < g.out_channels; o += L) {
        add_chunks(sums + first + (o / L * g.channels + from + c) * L, chunks, all, total);
        const int64_t count = std::min<int64_t>(L, g.out_channels - o);
        for (int64_t i = 0; i < count; ++i) {
          matrix[(o + i) * g.channels + c] = static_cast<T>(total[i]);
        }
      }
    }
  });
}

template <typename T>
void backward_of(const StageBackward& a, int threads) {
  const Stage& s = a.stage;
  const Sizes g = sizes_of<T>(s, a.g[0]);
  const Depthwise<T> kernel = depthwise_of<T>(s.kernel, s.dilation, s.stride);
  const int64_t chunk = chunk_of(g.samples), chunks = (g.samples + chunk - 1) / chunk;
  const int64_t own = weight_sums<T>(g), sums = 2 * g.channels;
  double* const partial_sums = a.workspace;  // [N, G, 2, C]
  T* const partial = reinterpret_cast<T*>(partial_sums + (a.sums ? g.samples * s.edges * sums : 0));
  Offsets offset;
  for (int64_t i = 0; i < g.tile(); ++i) {
    const int64_t pixel = i / g.out_width * g.out_padded_width + i % g.out_width;
    offset.pixel.push_back(static_cast<int>(pixel * kVector<T>));
  }
  for (int64_t c = 0; c < g.channels; ++c) {
    offset.channel.push_back(static_cast<int>(c * kVector<T>));
  }
  const Packed<T, Edges<T>> packed(g, s.edges, true);
  for (int e = 0; e < s.edges; ++e) {
    const Edge<T>& edge = packed->edges[e];
    edge.pack(s, g, e);
    if (g.stride == 1) pack_taps<T>(s.depthwise[e], g.channels, g.taps, true, edge.turned);
    pack_matrix<T>(static_cast<const T*>(s.pointwise[e]), g.out_channels, g.channels, g.channels, 1,
                   edge.matrix);
    edge.map.pack(a.by_g, a.by_z, a.constant, e * g.out_channels, g.out_channels);
  }
  const int64_t piece = a.ddepthwise ? chunk : piece_of(g.samples);
  parallel_for(g.samples, piece, threads, [&](int64_t from, int64_t to) {
    Parts<T> needed;
    BackwardMemory<T>(g, needed);
    Parts<T> parts(scratch<T>(needed.used()));
    const BackwardMemory<T> m(g, parts);
    m.clear(g);
    for (int e = 0; e < s.edges; ++e) {
      const Edge<T>& edge = packed->edges[e];
      T* const first = partial + (from / chunk * s.edges + e) * own;
      const WeightSums<T> weights = {first, first + static_cast<int64_t>(g.in) * g.taps * kVector<T>};
      if (a.ddepthwise) std::fill_n(first, own, T(0));
      for (int64_t n = from; n < to; ++n) {
        double* const own_sums = a.sums ? partial_sums + (n * s.edges + e) * sums : nullptr;
        if (own_sums) std::fill_n(own_sums, sums, 0.0);
        fill_image(Pixels<T>(s.x[e], n), g, s.scale ? edge.scale : nullptr, edge.shift, m.image);
        through_pointwise(a, kernel, g, edge, m, {e, n}, after({e, n}, s.edges, from, to, g.samples),
                          offset, a.ddepthwise ? &weights : nullptr);
        if (a.dv[e].data || own_sums) through_depthwise(a, kernel, g, edge, m, e, n, own_sums);
      }
    }
  });
  if (a.ddepthwise) unpack_weights(a, g, partial, chunks, threads);
  if (!a.sums) return;
  std::fill_n(a.sums, s.edges * sums, 0.0);
  for (int64_t i = 0; i < g.samples * s.edges; ++i) {
    double* const first = a.sums + i % s.edges * g.channels;
    const double* const own_sums = partial_sums + i * sums;
    for (int64_t c = 0; c < g.channels; ++c) {
      first[c] += own_sums[c], first[s.edges * g.channels + c] += own_sums[g.channels + c];
    }
  }
}

}  // namespace

template <>
void sep_stage<RDARTS_UNIT>(const StageForward& a, int threads) {
  if (a.z[0].dtype == DType::kFloat64) forward_of<double>(a, threads);
  else forward_of<float>(a, threads);
}

template <>
void sep_stage_backward<RDARTS_UNIT>(const StageBackward& a, int threads) {
  if (a.g[0].dtype == DType::kFloat64) backward_of<double>(a, threads);
  else backward_of<float>(a, threads);
}

}  // namespace rdarts
