// The arithmetic of a recurrent node (recurrent.h), the same on every device: of numbers or vectors
// V of Math::Number, with Math::exp and Math::expm1, which are asked for no x above 0.
#pragma once

#include "recurrent.h"

namespace rdarts {

template <typename T>
struct CurveMix {
  T tanh, relu, sigmoid, identity, total;
};

template <typename T>
RDARTS_BODY CurveMix<T> mix_of(const RecurrentNode& n, int j) {
  const T* const m = static_cast<const T*>(n.mix) + j * kCurves;
  return {m[0], m[1], m[2], m[3], m[0] + m[1] + m[2] + m[3]};
}

template <typename V>
struct Gate {
  V open, shut;  // sigmoid(c), 1 - sigmoid(c): each to its own precision
};

// What is known of u: the curves and their slopes.
template <typename V>
struct Curves {
  V u, relu, step, tanh, sigmoid, rest, dtanh, dsigmoid;  // rest = 1 - sigmoid
};

template <typename Math, typename V>
RDARTS_BODY Gate<V> gate_at(const V& c) {
  using T = typename Math::Number;
  const V e = Math::exp(c > T(0) ? -c : c), large = T(1) / (T(1) + e), small = e * large;
  return {c < T(0) ? small : large, c < T(0) ? large : small};
}

template <typename Math, bool curved, typename V>
RDARTS_BODY Curves<V> curves_at(const V& u) {
  using T = typename Math::Number;
  Curves<V> at;
  const V zero = {}, one = zero + T(1);
  at.u = u, at.relu = u <= zero ? zero : u, at.step = u <= zero ? zero : one;
  at.tanh = at.sigmoid = at.rest = at.dtanh = at.dsigmoid = zero;
  if constexpr (curved) {
    // tanh |u| = (1 - e^2) / (1 + e^2) with e = exp(-|u|); expm1 keeps the small ones.
    const V x = u > zero ? -u : u, e = Math::exp(x), large = T(1) / (T(1) + e), small = e * large;
    const V t = -Math::expm1(x) * (T(1) + e) / (T(1) + e * e);
    at.tanh = u < zero ? -t : t, at.dtanh = T(1) - t * t;
    at.sigmoid = u < zero ? small : large, at.rest = u < zero ? large : small;
    at.dsigmoid = small * large;
  }
  return at;
}

// sum_f mix_f f(u), f'(u), f''(u)
template <bool curved, typename T, typename V>
RDARTS_BODY V height(const CurveMix<T>& m, const Curves<V>& at) {
  V sum = m.identity * at.u + m.relu * at.relu;
  if constexpr (curved) sum += m.tanh * at.tanh + m.sigmoid * at.sigmoid;
  return sum;
}

template <bool curved, typename T, typename V>
RDARTS_BODY V slope(const CurveMix<T>& m, const Curves<V>& at) {
  V sum = m.identity + m.relu * at.step;
  if constexpr (curved) sum += m.tanh * at.dtanh + m.sigmoid * at.dsigmoid;
  return sum;
}

template <bool curved, typename T, typename V>
RDARTS_BODY V bend(const CurveMix<T>& m, const Curves<V>& at) {
  V sum = {};
  if constexpr (curved) {
    sum += m.sigmoid * (at.dsigmoid * (at.rest - at.sigmoid));
    sum -= m.tanh * (T(2) * at.tanh * at.dtanh);
  }
  return sum;
}

// What a source adds to the node.
template <typename Math, bool curved, typename V, typename T = typename Math::Number>
RDARTS_BODY V node_term(const CurveMix<T>& m, const V& s, const V& c, const V& u) {
  const Gate<V> gate = gate_at<Math>(c);
  return m.total * s * gate.shut + gate.open * height<curved>(m, curves_at<Math, curved>(u));
}

// What g means for a source, its gates, and the coefficient of each curve.
template <typename V>
struct NodeGradients {
  V state, c, u, mix[kCurves];
};

template <typename Math, bool curved, typename V, typename T = typename Math::Number>
RDARTS_BODY NodeGradients<V> node_gradients(const CurveMix<T>& m, const V& s, const V& c,
                                            const V& u, const V& g) {
  const Gate<V> gate = gate_at<Math>(c);
  const Curves<V> at = curves_at<Math, curved>(u);
  const V held = g * gate.shut, passed = g * gate.open, kept = held * s;
  NodeGradients<V> d;
  d.state = m.total * held;
  d.c = held * gate.open * (height<curved>(m, at) - m.total * s);
  d.u = passed * slope<curved>(m, at);
  d.mix[0] = kept + passed * at.tanh, d.mix[1] = kept + passed * at.relu;
  d.mix[2] = kept + passed * at.sigmoid, d.mix[3] = kept + passed * at.u;
  return d;
}

template <typename V>
struct SecondGradients {
  V tangent;
  NodeGradients<V> by;
};

template <typename Math, bool curved, typename V, typename T = typename Math::Number>
RDARTS_BODY SecondGradients<V> second_gradients(const CurveMix<T>& m, const V& s, const V& c,
                                                const V& u, const CurveMix<T>& dm, const V& ds,
                                                const V& dc, const V& du, const V& g) {
  const Gate<V> gate = gate_at<Math>(c);
  const Curves<V> at = curves_at<Math, curved>(u);
  const V both = gate.open * gate.shut;  // sigmoid'
  const V gap = height<curved>(m, at) - m.total * s, rise = slope<curved>(m, at);
  const V change = height<curved>(dm, at) - dm.total * s;
  SecondGradients<V> d;
  d.tangent = ds * m.total * gate.shut + dc * both * gap + du * gate.open * rise + dm.total * s +
              gate.open * change;
  d.by.state = g * (dm.total * gate.shut - dc * both * m.total);
  d.by.c = g * both * (dc * (gate.shut - gate.open) * gap + du * rise + change - ds * m.total);
  d.by.u = g * (dc * both * rise + gate.open * (du * bend<curved>(m, at) + slope<curved>(dm, at)));
  const V kept = g * (ds * gate.shut - dc * both * s), passed = g * dc * both;
  const V turned = g * du * gate.open;
  d.by.mix[0] = kept + passed * at.tanh + turned * at.dtanh;
  d.by.mix[1] = kept + passed * at.relu + turned * at.step;
  d.by.mix[2] = kept + passed * at.sigmoid + turned * at.dsigmoid;
  d.by.mix[3] = kept + passed * at.u + turned;
  return d;
}

}  // namespace rdarts
