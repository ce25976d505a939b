// The kernels of switch_mixture on the GPU: what they take, without torch headers.
//
// scalar_t is float, double, BFloat16 or Float16, the type of the inputs; logits, sums and results
// are compute_t<scalar_t>. Matrices are row-major; `ld` is the distance of rows in elements of the
// logits' type, a multiple of kRowAlignment, so that rows begin at 16 bytes in every type. What
// lies between the last column and ld is read by nobody. All pointers are to device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "common/element.h"
#include "mixture/likelihood.h"
#include "mixture/math.h"
#include "switch/cuda/update.h"

namespace alrao::cuda {

constexpr int64_t kRowAlignment = 8;

// Gradients to the weights: what scales a loss comes later, so those of float16 need more range.
template <class scalar_t>
using weight_gradient_t =
    std::conditional_t<std::is_same_v<scalar_t, BFloat16>, BFloat16, compute_t<scalar_t>>;

// The switch's log-posterior [N], float or double.
struct MixturePosterior {
  const void* values;
  bool is_double;
};

// Classes [B]; where the targets are values it is null, and every sample counts.
struct ClassTargets {
  const int64_t* classes;
  ClassesOptions options;
};

template <class scalar_t>
struct MixtureTarget : ClassTargets {
  const scalar_t* values;  // [B, K], or null
  GaussianDensity density;
};

// What a sum over samples is divided by: `value`, times what is at `items` unless that is null:
// int64, float or double.
struct MixtureDivisor {
  enum Type { kInteger, kFloat, kDouble };

  double value;
  const void* items;
  Type type;

  ALRAO_HOST_DEVICE double get() const {
    if (items == nullptr) return value;
    switch (type) {
      case kFloat:
        return value * static_cast<double>(*static_cast<const float*>(items));
      case kDouble:
        return value * *static_cast<const double*>(items);
      default:
        return value * static_cast<double>(*static_cast<const int64_t*>(items));
    }
  }
};

// What a counted sample weighs in the gradients: `value`, or what `on_device` holds, or one over
// the number of counted samples, for each block to count, or one over `divisor`, whose items are
// not null.
template <class scalar_t>
struct MixtureNorm {
  const compute_t<scalar_t>* on_device;
  double value;
  bool count;
  MixtureDivisor divisor;
};

// The loss's options (alrao_fast/reference/switch_mixture.py); `any`: there is one. The kernels
// that know those of the classes are instantiations of their own.
template <class compute_type>
struct MixtureOptions {
  bool any;
  const compute_type* row_weight;    // [B], or null: the norm
  const compute_type* scale;         // what row_weight is divided by, or null: 1
  const compute_type* class_weight;  // [C] of mean 1, or null: 1
  const compute_type* soft;          // probabilities [B, C], or null: the target's class
  compute_type smoothing, z_loss, softcap;
  compute_type* losses;  // [B], or null

  // Whether an option looks at more than the target's class, or changes logits.
  bool are_of_classes() const {
    return class_weight != nullptr || soft != nullptr || smoothing != 0 || z_loss != 0 ||
           softcap != 0;
  }
  // Whether all classes but the target's are treated alike.
  ALRAO_HOST_DEVICE bool treat_others_alike() const {
    return soft == nullptr && softcap == 0 && (class_weight == nullptr || smoothing == 0);
  }
};

// A copy with 0 for what is not finite; nothing where `to` is null.
template <class from_t, class to_t>
struct FiniteCopy {
  const from_t* from;
  to_t* to;
  int64_t size;
};

// Sums over samples, or over what a block has seen of them, [2 N + 1, parts]: per clone -log p (inf
// where dead) and score (correct predictions or squared errors), then -log of the mixture.
struct MixtureParts {
  double* sums;
  int64_t parts;
};

// A chunk of `chunk` samples from number `first` on, with their logits.
template <class scalar_t>
struct Chunk {
  MixtureSizes size;
  int64_t first, chunk, ld;
  compute_t<scalar_t>* z;  // [chunk, N C], or [chunk, C] of one clone
  const scalar_t* bias;    // [N, C] or null
  MixturePosterior posterior;
};

// ---- all clones of a sample at once (joint.cu) ----

// Where the logits of a sample, all clones, stay in shared memory.
template <class scalar_t>
bool fits_joint(int64_t clones, int64_t classes, bool with_options);

// The number of parts that a chunk of so many samples leaves.
template <class scalar_t>
int64_t joint_parts(int64_t chunk, int64_t clones, int64_t classes, bool with_options);

// Reads the logits, writes G, the gradients of the clones' own losses to them, and r G, those of
// the mixture's loss; either may be null.
template <class scalar_t>
struct JointArguments : Chunk<scalar_t> {
  MixtureTarget<scalar_t> target;
  MixtureNorm<scalar_t> norm;
  scalar_t* g;   // [chunk, N C] or null
  scalar_t* rg;  // the same
  MixtureParts out;
  int64_t first_part;
  const scalar_t* x;   // [B, D]
  scalar_t* finite_x;  // [B, D] or null: receives the chunk's rows, with 0 for what is not finite
  FiniteCopy<scalar_t, scalar_t> weight;
  MixtureOptions<compute_t<scalar_t>> options;
};

template <class scalar_t>
cudaError_t launch_mixture_joint(const JointArguments<scalar_t>& arguments, cudaStream_t stream);

// ---- clone after clone (streamed.cu) ----

// Per sample [B]: the mixture over the clones seen so far, and the factors that the newest clone
// asks for (mixture/math.h).
template <class compute_type>
struct MixtureState {
  compute_type *max, *sum, *keep, *take;
};

// A chunk of one clone's logits, overwritten by the gradient of the clone's own loss to them: in
// scalar_t, each row at the place of the logits' row.
template <class scalar_t>
struct RowArguments : Chunk<scalar_t> {
  int64_t clone;
  MixtureTarget<scalar_t> target;
  MixtureNorm<scalar_t> norm;  // by value or on the device
  bool need_gradient;
  MixtureState<compute_t<scalar_t>> state;
  MixtureParts out;  // one part a sample
  MixtureOptions<compute_t<scalar_t>> options;
};

template <class scalar_t>
cudaError_t launch_mixture_rows(const RowArguments<scalar_t>& arguments, cudaStream_t stream);

// Sums over the rows of a matrix, out[c] = (add ? out[c] : 0) + sum_b g[b, c]; nothing where `out`
// is null.
template <class scalar_t>
struct ColumnSums {
  const scalar_t* g;
  int64_t rows, columns, ld;  // ld in elements of g
  compute_t<scalar_t>* out;
  bool add;
};

// total = keep * total + take * term for the rows of a chunk, then total / sum * norm at the last
// clone; beside it the column sums of the clone's gradient, which is the bias's.
template <class scalar_t>
struct CombineArguments {
  MixtureState<compute_t<scalar_t>> state;
  int64_t first, chunk, features;
  const compute_t<scalar_t>* term;  // [chunk, D] or null: column sums only
  compute_t<scalar_t>* total;       // [B, D]
  bool is_first, is_last;
  const compute_t<scalar_t>* norm;  // or null: 1
  ColumnSums<scalar_t> columns;
};

template <class scalar_t>
cudaError_t launch_mixture_combine(const CombineArguments<scalar_t>& arguments,
                                   cudaStream_t stream);

// ---- before and after (finish.cu) ----

// One over the number of counted samples, or over the divisor where `mean` is false.
template <class compute_type>
cudaError_t launch_mixture_norm(const ClassTargets& target, bool mean,
                                const MixtureDivisor& divisor, int64_t samples, compute_type* norm,
                                cudaStream_t stream);

// The largest size of a weight, 1 if all are 0.
template <class compute_type>
cudaError_t launch_mixture_largest(const compute_type* row_weight, int64_t samples,
                                   compute_type* largest, cudaStream_t stream);

template <class from_t, class to_t>
cudaError_t launch_finite_copy(const FiniteCopy<from_t, to_t>& copy, cudaStream_t stream);

// Loss and statistics from the parts, the switch's observation, and what is left to do for the
// gradients: the last chunk's column sums, nothing for clones that were dead, and the norm where
// the gradients do not carry it.
template <class scalar_t>
struct FinishArguments {
  MixtureSizes size;
  MixtureParts parts;
  ClassTargets target;
  bool mean;
  compute_t<scalar_t>* loss;
  double* stats;  // [3, N]
  SwitchObservation observation;
  weight_gradient_t<scalar_t>* dweight;   // [N, C, D] or null
  compute_t<scalar_t>* dbias;             // [N, C] or null
  ColumnSums<scalar_t> columns;           // into dbias, all clones
  compute_t<scalar_t>* dx;                // [B, D], to be scaled, or null
  const compute_t<scalar_t>* norm;        // or null: 1
  const compute_t<scalar_t>* row_weight;  // [B], or null: a sample of weight 0 does not count
  MixtureDivisor divisor;                 // of the loss, if it is no mean
};

template <class scalar_t>
cudaError_t launch_mixture_finish(const FinishArguments<scalar_t>& arguments, cudaStream_t stream);

// ---- the loss's backward (scale.cu) ----

template <class T>
struct ScaledArray {
  T* values;
  int64_t size;
};

// Gradients of the loss, the weights' of type weight_t, times what `factor` holds.
template <class weight_t>
struct ScaleArguments {
  ScaledArray<compute_t<weight_t>> dx;
  ScaledArray<weight_t> dweight;
  ScaledArray<compute_t<weight_t>> dbias;
  const compute_t<weight_t>* factor;
};

template <class weight_t>
cudaError_t launch_mixture_scale(const ScaleArguments<weight_t>& arguments, cudaStream_t stream);

// ---- log-probabilities (log_prob.cu) ----

// A chunk of logits, of all clones (`clone` -1) or of one. Forward: out and log_mass receive the
// mixture's log-probabilities and the posterior mass of the living clones, or take one clone into
// them; the last one normalises. Backward, where `grad` is given: they hold them, and z is
// overwritten by the gradients to the logits.
template <class scalar_t>
struct LogProbArguments : Chunk<scalar_t> {
  int64_t clone;
  compute_t<scalar_t>* out;                 // [B, C]
  compute_t<scalar_t>* log_mass;            // [B]
  const compute_t<scalar_t>* grad;          // [B, C] or null
  MixtureState<compute_t<scalar_t>> state;  // one clone's backward: keep all, take the living
  compute_t<scalar_t> softcap;              // 0: none
};

template <class scalar_t>
cudaError_t launch_log_prob(const LogProbArguments<scalar_t>& arguments, cudaStream_t stream);

// ---- the factors of the samples' losses (weights.cu) ----

// switch_mixture_weights, of classes or of distributions. compute_type is float or double.
template <class compute_type>
struct WeightsArguments {
  int64_t samples, classes;
  ClassTargets target;                // classes null: distributions
  const compute_type* given;          // distributions [B, C]
  const compute_type* sample_weight;  // [B], or null: 1
  const compute_type* class_weight;   // [C], or null: 1
  double smoothing;
  bool mean;               // what is divided by is the sum of the weights, beside the divisor
  MixtureDivisor divisor;  // of value 1 where `mean` is true
  compute_type* out;       // [B, C]: distributions that sum to 1
  compute_type* factors;   // [B]
  compute_type* scaled;    // [C]: class weights of mean 1; or null
  int64_t* likeliest;      // [B], of distributions
  double* totals;          // [2], for what all blocks ask for, where weights_totals() says so
};

// Whether distributions have a launch of their own for what all blocks ask for.
template <class compute_type>
bool weights_totals(const WeightsArguments<compute_type>& arguments);

template <class compute_type>
cudaError_t launch_weights(const WeightsArguments<compute_type>& arguments, cudaStream_t stream);

}  // namespace alrao::cuda
