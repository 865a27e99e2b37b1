// A node of a recurrent cell (DARTS, appendix A.1.2): all that it reads and all its activations.
//   value = sum_j [ q_j s_j (1 - o_j) + o_j m_j ],  o_j = sigmoid(c_j)
//   m_j   = sum_f mix[j, f] f(u_j),                 q_j = sum_f mix[j, f]
// with f in tanh, relu, sigmoid, identity; then, where it is asked for, a batch norm without affine
// over the B rows of each column.
#pragma once

#include <cstdint>

#include "array.h"
#include "body.h"

namespace rdarts {

constexpr int kMostSources = 16;
constexpr int kCurves = 4;  // tanh, relu, sigmoid, identity: the order of mix

// A [B, columns] tensor whose columns lie side by side.
struct Rows {
  void* data;
  int64_t stride;  // elements from row to row
};

struct RecurrentNode {
  DType dtype;
  int64_t batch, hidden;  // B, H
  int sources;            // J
  bool curved;            // whether tanh or sigmoid has a coefficient that may not be 0
  const void* mix;        // [J, 4]
  Rows states[kMostSources];  // s_j [B, H]
  Rows gates[kMostSources];   // [B, 2 H]: c_j, then u_j
};

enum class NodeNorm { kNone, kBatch, kRunning };

// value = (y - mean) rstd of the node's sum y, and masked = value * mask; rows without gaps.
struct RecurrentForward {
  RecurrentNode node;
  NodeNorm norm;
  double eps, momentum;
  void* running_mean;  // [H]; kBatch moves them
  void* running_var;
  const void* mask;    // [B, H]
  void* value;         // [B, H]
  void* masked;        // [B, H]; null: not wanted
  double* statistics;  // [2, H]: mean, rstd
  double* workspace;
};

// With g = dvalue + mask dmasked + share dall the gradient of `value`; absent parts are null.
struct RecurrentBackward {
  RecurrentNode node;
  NodeNorm norm;
  const double* statistics;  // [2, H]
  const void* value;         // [B, H]
  const void* dvalue;        // [B, H] each
  const void* dmasked;
  const void* mask;
  const void* dall;
  double share;
  void* total;                 // [B, H]: room for g
  bool adds;                   // to what lies in dstates
  Rows dstates[kMostSources];  // [B, H]
  Rows dgates[kMostSources];   // [B, 2 H]
  double* dmix;                // [J, 4]
  double* workspace;
};

// The derivative of <dstates, along.states> + <dgates, along.gates> + <dmix, along.mix>, where
// these are what the backward of a node without norm makes of g: by g, which is the node's tangent
// along those, and by all that the node reads.
struct RecurrentSecond {
  RecurrentNode node;
  RecurrentNode along;
  const void* g;               // [B, H]
  void* tangent;               // [B, H]
  Rows dstates[kMostSources];  // [B, H]; no two of the outputs overlap
  Rows dgates[kMostSources];   // [B, 2 H]
  double* dmix;                // [J, 4]
  double* workspace;
};

}  // namespace rdarts
