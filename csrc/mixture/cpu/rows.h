// Row kernels of switch_mixture on the CPU, and what they take.
//
// Logits are kept class-major: z[row][lane], a row being one class of one clone and a lane one
// sample. A sample stays in its vector lane, so that nothing is summed across lanes but the bias
// gradient, and any number of classes fills the vectors. Rows are `ld` apart; ld and `lanes` are
// multiples of kLaneTile, the lanes beyond the last sample hold anything.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"

namespace alrao::cpu {

constexpr int64_t kLaneTile = 16;

// z becomes exp(z + bias - max), in place. `sum` is NaN in a lane with a logit that is not finite.
template <class T>
struct SoftmaxRows {
  T* z;
  int64_t rows, ld, lanes;
  const T* bias;          // [rows] or null
  const int64_t* target;  // [lanes], -1 for none
  int64_t first_class;    // class of row 0
  T* max;                 // [lanes], out
  T* sum;                 // [lanes], out
  T* target_logit;        // [lanes], written where the target is among the rows
  uint8_t* is_argmax;     // [lanes], likewise: the target is the first row that attains the maximum
};

// The same with the loss's options. With a softcap k the logits are k tanh((z + bias) / k), those
// that are not finite become NaN, and z becomes logit - max: its exponential comes with the
// gradient. `q` are probabilities, `class_weight` weights w: the sums of what they say of logit -
// max, and of themselves, have lanes `ld` apart.
template <class T>
struct OptionSoftmaxRows {
  SoftmaxRows<T> plain;
  T softcap;              // 0: none
  const T* class_weight;  // [rows], or null for 1
  const T* q;             // [rows][ld] or null
  T* sums;                // [kOptionSums][ld]
};

// Sums over the rows of w (logit - max), q (logit - max), w q (logit - max), q, and w q.
constexpr int64_t kOptionSums = 5;

// z becomes z + bias - expected, in place; `sum` is the sum of its squares.
template <class T>
struct ResidualRows {
  T* z;
  int64_t rows, ld, lanes;
  const T* bias;
  const T* expected;  // [rows][ld]
  T* sum;
};

// z becomes z * factor, 0 in lanes of factor 0 whatever z is; then `hit`, or the lane's own of
// `hits`, is subtracted in the target's row. bias_grad is set (or added to) with the sums over
// lanes.
template <class T>
struct GradientRows {
  T* z;
  int64_t rows, ld, lanes;
  const T* factor;        // [lanes]
  const int64_t* target;  // [lanes] or null; no hit where factor is 0
  int64_t first_class;
  T hit;
  const T* hits;  // [lanes], or null where all are `hit`
  T* bias_grad;   // [rows] or null
  bool accumulate;
};

// What OptionSoftmaxRows leaves becomes the gradient: factor exp(logit - max) - spread w - hit q w,
// times the softcap's derivative; 0 in lanes that are not `live`. Without q, `hit` is subtracted in
// the target's row alone.
template <class T>
struct OptionGradientRows {
  T* z;
  int64_t rows, ld, lanes;
  const T *factor, *spread, *hit, *live;  // [lanes]
  const int64_t* target;                  // [lanes]
  int64_t first_class;
  const T* class_weight;  // [rows], or null for 1
  const T* q;             // [rows][ld] or null
  T softcap;
  const T* max;           // [lanes]
  const T* target_logit;  // [lanes]
  T* bias_grad;           // [rows] or null
  bool accumulate;
};

// out[n][row][lane] = weight[n][lane] * z[n][row][lane], 0 where the weight is 0.
template <class T>
struct WeightRows {
  T* out;
  const T* z;
  int64_t clones, rows, ld, lanes;
  const T* weight;  // [clones][ld]
};

// Responsibilities: r = softmax_n(log_posterior + log_likelihood), 0 where no clone is possible;
// the log of the mixture is max + log(sum). log_likelihood is overwritten.
template <class T>
struct MixtureRows {
  double* log_likelihood;  // [clones][ld]
  const double* log_posterior;
  int64_t clones, ld, lanes;
  T* responsibility;  // [clones][ld]
  double* max;        // [lanes]
  double* sum;        // [lanes]
};

// acc[i] = alpha[i] * acc[i] + beta[i] * sum_part part[part][i], rows i; a factor 0 reads nothing.
template <class T>
struct BlendRows {
  T* acc;  // [rows][width]
  const T* part;
  int64_t num_parts, part_stride, rows, width;
  const T* alpha;
  const T* beta;
};

// z becomes z + bias - max, in place; max and sum as in SoftmaxRows. softcap: as in
// OptionSoftmaxRows.
template <class T>
struct LogSumRows {
  T* z;
  int64_t rows, ld, lanes;
  const T* bias;
  T* max;
  T* sum;
  T softcap;
};

// out[row][lane] = log sum_n exp(z[n][row][lane] + offset[n][lane]); an offset of -inf leaves the
// clone out.
template <class T>
struct LogMixtureRows {
  T* out;  // [rows][ld]
  const T* z;
  int64_t clones, clone_stride, rows, ld, lanes;
  const T* offset;  // [clones][ld], clones offset_stride apart
  int64_t offset_stride;
};

// With w = exp(z + offset - log_mixture), the clone's share in the mixture's probability:
// sum[lane] = sum_row grad * w.
template <class T>
struct ShareRows {
  const T* z;
  int64_t rows, ld, lanes;
  const T* offset;       // [lanes]
  const T* log_mixture;  // [rows][ld]
  const T* grad;         // [rows][ld]
  T* sum;
};

// z becomes the gradient to the logits, grad * w - exp(z + log_scale) * sum; 0 where offset is
// -inf.
template <class T>
struct ShareGradientRows {
  T* z;
  int64_t rows, ld, lanes;
  const T* offset;
  const T* log_scale;  // [lanes]: makes log-probabilities of the clone's z
  const T* log_mixture;
  const T* grad;
  const T* sum;
  T* bias_grad;
  bool accumulate;
  T softcap;
  const T* max;  // [lanes]: makes logits of z, where there is a softcap
};

#ifdef ALRAO_ISA
#define ALRAO_ROW_KERNEL(name, Args)                                \
  ALRAO_DECLARE_KERNEL(void, name##_float, (const Args<float>& a)); \
  ALRAO_DECLARE_KERNEL(void, name##_double, (const Args<double>& a))
#else
// Callers choose by the argument's type.
#define ALRAO_ROW_KERNEL(name, Args)                                          \
  ALRAO_DECLARE_KERNEL(void, name##_float, (const Args<float>& a));           \
  ALRAO_DECLARE_KERNEL(void, name##_double, (const Args<double>& a));         \
  inline void name(const Args<float>& a) { ALRAO_KERNEL(name##_float)(a); }   \
  inline void name(const Args<double>& a) { ALRAO_KERNEL(name##_double)(a); } \
  static_assert(true, "a semicolon follows")
#endif

ALRAO_ROW_KERNEL(softmax_rows, SoftmaxRows);
ALRAO_ROW_KERNEL(option_softmax_rows, OptionSoftmaxRows);
ALRAO_ROW_KERNEL(residual_rows, ResidualRows);
ALRAO_ROW_KERNEL(gradient_rows, GradientRows);
ALRAO_ROW_KERNEL(option_gradient_rows, OptionGradientRows);
ALRAO_ROW_KERNEL(weight_rows, WeightRows);
ALRAO_ROW_KERNEL(mixture_rows, MixtureRows);
ALRAO_ROW_KERNEL(blend_rows, BlendRows);
ALRAO_ROW_KERNEL(log_sum_rows, LogSumRows);
ALRAO_ROW_KERNEL(log_mixture_rows, LogMixtureRows);
ALRAO_ROW_KERNEL(share_rows, ShareRows);
ALRAO_ROW_KERNEL(share_gradient_rows, ShareGradientRows);

}  // namespace alrao::cpu
