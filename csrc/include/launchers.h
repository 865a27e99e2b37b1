// Every launcher, one line a side. CPU launchers are templates that each unit specialises: their
// files are compiled once per unit, with RDARTS_UNIT naming it.
#pragma once

#include <cstdint>

#include "cell.h"
#include "correlation.h"
#include "mixing.h"
#include "moments.h"
#include "node_sum.h"
#include "philox.h"
#include "place.h"
#include "pool.h"
#include "recurrent.h"
#include "rounding.h"
#include "stage.h"

namespace rdarts {

template <Unit unit>
void philox_bits(int64_t* out, int64_t count, PhiloxStart start, int threads);
template <Unit unit>
void philox_uniform(float* out, int64_t count, PhiloxStart start, int threads);
template <Unit unit>
void philox_normal(float* out, int64_t count, PhiloxStart start, int threads);

// out[i] = normal number `first + i` of the stream, on the calling thread.
template <Unit unit>
void draw_normals(float* out, int64_t first, int64_t count, PhiloxStart start);

// What they compute stands beside their arguments in node_sum.h. float32 and float64.
template <Unit unit>
void node_sum(const NodeSum& arguments, int threads);
template <Unit unit>
void affine(const Affine& arguments, int threads);
template <Unit unit>
void channel_sums(const ChannelSums& arguments, int threads);
template <Unit unit>
void node_sum_dq(const NodeSumDq& arguments, int threads);
template <Unit unit>
void normalize(const Normalization& arguments);
template <Unit unit>
void normalize_backward(const NormalizationBackward& arguments);

// cell.h
template <Unit unit>
void term_coefficients(const TermCoefficients& arguments);
template <Unit unit>
void term_gradients(const TermGradients& arguments);
template <Unit unit>
void row_gradients(const RowGradients& arguments);

// stage.h and mixing.h
template <Unit unit>
void mixing(const MixingForward& arguments, int threads);
template <Unit unit>
void mixing_backward(const MixingBackward& arguments, int threads);
template <Unit unit>
void sep_stage(const StageForward& arguments, int threads);
template <Unit unit>
void sep_stage_backward(const StageBackward& arguments, int threads);

// moments.h
template <Unit unit>
void tangent_moments(const TangentMoments& arguments, int threads);

// rounding.h
template <Unit unit>
void rounding(const Rounding& arguments, int threads);

// pool.h says what they compute; float32 and float64.
template <Unit unit>
void pool(const Pool& arguments, int threads);
template <Unit unit>
void pool_tangent(const Pool& arguments, int threads);
template <Unit unit>
void pool_adjoint(const PoolAdjoint& arguments, int threads);

// correlation.h; float32 and float64.
template <Unit unit>
void correlation(const Correlation& arguments, int threads);
template <Unit unit>
void correlation_adjoint(const CorrelationAdjoint& arguments, int threads);
// recurrent.h; float32 and float64. The first gives the doubles of workspace that the others need.
template <Unit unit>
int64_t recurrent_workspace(const RecurrentNode& node);
template <Unit unit>
void recurrent_node(const RecurrentForward& arguments, int threads);
template <Unit unit>
void recurrent_node_backward(const RecurrentBackward& arguments, int threads);
template <Unit unit>
void recurrent_node_second(const RecurrentSecond& arguments, int threads);

namespace cuda {

void philox_bits(int64_t* out, int64_t count, PhiloxStart start, const Place& place);
void philox_uniform(float* out, int64_t count, PhiloxStart start, const Place& place);
void philox_normal(float* out, int64_t count, PhiloxStart start, const Place& place);

// Doubles of workspace that any of the following needs.
int64_t workspace(const int64_t* shape, int inputs, int sites);
void node_sum(const NodeSum& arguments, const Place& place);
void affine(const Affine& arguments, const Place& place);
void channel_sums(const ChannelSums& arguments, const Place& place);
void node_sum_dq(const NodeSumDq& arguments, const Place& place);
void normalize(const Normalization& arguments, const Place& place);
void normalize_backward(const NormalizationBackward& arguments, const Place& place);
void term_coefficients(const TermCoefficients& arguments, const Place& place);
void term_gradients(const TermGradients& arguments, const Place& place);
void row_gradients(const RowGradients& arguments, const Place& place);
void rounding(const Rounding& arguments, const Place& place);

// Doubles of workspace that the moments need.
int64_t moments_workspace(const TangentMoments& arguments);
void tangent_moments(const TangentMoments& arguments, const Place& place);

void pool(const Pool& arguments, const Place& place);
void pool_tangent(const Pool& arguments, const Place& place);
void pool_adjoint(const PoolAdjoint& arguments, const Place& place);
void correlation(const Correlation& arguments, const Place& place);
void correlation_adjoint(const CorrelationAdjoint& arguments, const Place& place);

int64_t recurrent_workspace(const RecurrentNode& node);
void recurrent_node(const RecurrentForward& arguments, const Place& place);
void recurrent_node_backward(const RecurrentBackward& arguments, const Place& place);
void recurrent_node_second(const RecurrentSecond& arguments, const Place& place);

// Doubles of workspace that a stage's forward or backward needs; z has `out_shape`.
int64_t stage_workspace(const Stage& stage, const int64_t* out_shape);
int64_t stage_backward_workspace(const Stage& stage, const int64_t* out_shape);
void sep_stage(const StageForward& arguments, const Place& place);
void sep_stage_backward(const StageBackward& arguments, const Place& place);

// The same for a mixing.
int64_t mixing_workspace(const Mixing& mixing, const int64_t* out_shape);
int64_t mixing_backward_workspace(const Mixing& mixing, const int64_t* out_shape);
void mixing(const MixingForward& arguments, const Place& place);
void mixing_backward(const MixingBackward& arguments, const Place& place);
// Two that do not wait for each other, in one launch where its parameters hold both.
void mixing(const MixingForward& a, const MixingForward& b, const Place& place);
void mixing_backward(const MixingBackward& a, const MixingBackward& b, const Place& place);

}  // namespace cuda
}  // namespace rdarts
