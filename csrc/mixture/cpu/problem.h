// What the CPU drivers of switch_mixture share: the problem in one floating type, its chunks of
// samples, and a clone's log-likelihoods.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/cpu/gemm.h"
#include "common/cpu/tensors.h"
#include "mixture/checks.h"
#include "mixture/cpu/rows.h"

namespace alrao::cpu {

// The smallest chunk buffer worth splitting for, a few second-level caches: 6 to 10 % faster on a
// head of 10,000 classes than half of it, and no slower on others.
constexpr int64_t kCacheBytes = 16 << 20;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <class T>
MixtureGradients empty_gradients(const MixtureSizes& size, bool need_dx, bool need_dw) {
  const auto& [samples, features, clones, classes] = size;
  return {need_dx ? empty_tensor<T>({samples, features}) : empty_tensor<T>({0}),
          need_dw ? empty_tensor<T>({clones, classes, features}) : empty_tensor<T>({0}),
          need_dw ? empty_tensor<T>({clones, classes}) : empty_tensor<T>({0})};
}

template <class T>
struct MixtureProblem {
  MixtureSizes size;
  const T* x;
  const T* weight;
  const T* bias;  // or null
  std::vector<double> log_posterior;
  Likelihood likelihood;
  LossOptions options;
  // Classification has `target`, regression `expected`.
  const int64_t* target;
  const T* expected;
  // Probabilities [B, C] in the place of classes, or null; their likeliest classes, or null.
  const T* soft;
  const int64_t* likeliest;
  double norm;          // what each counted sample weighs in the loss, where there is no row_weight
  const T* row_weight;  // [B] or null
  const T* class_weight;  // [C], of mean 1, or null
  double label_smoothing, z_loss, softcap;
  // Whether the row kernels with options are taken.
  bool has_options;
  // Whether the gradients of the clones' own losses to the logits are results; those to the weights
  // are none then.
  bool keeps_dlogits = false;

  bool needs_dlogits() const { return options.need_dx || options.need_dw || keeps_dlogits; }

  // Of sample b.
  double weight_of(int64_t b) const { return row_weight ? double(row_weight[b]) : norm; }

  const T* clone_weight(int64_t n) const { return weight + n * size.classes * size.features; }
  bool counts(int64_t b) const {
    if (row_weight && row_weight[b] == 0) return false;
    return expected || soft || likelihood.classes.counts(target[b]);
  }
  const T* clone_bias(int64_t n) const { return bias ? bias + n * size.classes : nullptr; }
};

// What losses one by one keep for their backward of a clone and a sample; else 0.
constexpr int kDeadMark = 1;         // the clone is dead for it
constexpr int kNotCountedMark = -1;  // it does not count, for any clone

template <class T>
struct MixtureResult {
  double loss = 0;
  T* losses = nullptr;  // [B], zeros, where the samples' losses are asked for
  double* stats;        // [3, N]
  T* dx;                // [B, D] if needed
  T* dweight;           // [N, C, D] if needed
  T* dbias;             // [N, C] if needed
  // Where they are kept: gradients to the logits [chunks, N C, ld], made by the driver, which cuts
  // the samples into chunks of ld lanes.
  std::optional<Buffer<T>> dlogits;
  T* marks = nullptr;  // [N, B] or null: the driver writes kDeadMark where a clone is dead for one
};

// Of the first of the largest values; any place where some are NaN.
template <class T>
int64_t place_of_largest(const T* values, int64_t count) {
  constexpr int64_t kLanes = 16;
  T largest[kLanes];
  std::fill_n(largest, kLanes, values[0]);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      largest[lane] = values[i + lane] > largest[lane] ? values[i + lane] : largest[lane];
    }
  }
  for (; i < count; ++i) largest[0] = std::max(largest[0], values[i]);
  const T peak = *std::max_element(largest, largest + kLanes);
  return std::min<int64_t>(std::find(values, values + count, peak) - values, count - 1);
}

// Samples in chunks of `ld` lanes, with the targets padded and the expected outputs transposed.
template <class T>
class Chunks {
 public:
  struct Chunk {
    int64_t begin, size;
    const int64_t* target;  // [ld], -1: not counted
    const T* values;        // [C][ld]: expected values, or probabilities
    const T* weights;  // [ld]: factors of the losses of classes, or null where all are the same
  };

  Chunks(const MixtureProblem<T>& p, int64_t samples_per_chunk) {
    const int64_t samples = p.size.samples, classes = p.size.classes;
    const int64_t count = ceil_div(samples, std::max(samples_per_chunk, kLaneTile));
    ld_ = round_up(ceil_div(samples, count), kLaneTile);
    // Rows that are pages apart would share a few sets of the caches.
    if (ld_ * static_cast<int64_t>(sizeof(T)) % 2048 == 0)
      ld_ += count == 1 ? kLaneTile : -kLaneTile;
    targets_.assign(ceil_div(samples, ld_) * ld_, -1);
    const bool weighted = p.row_weight && p.target;
    if (weighted) weights_.assign(targets_.size(), T(0));
    const T* values = p.expected ? p.expected : p.soft;
    for (int64_t b = 0; b < samples; ++b) {
      if (!p.counts(b)) continue;
      if (weighted) weights_[b] = p.row_weight[b];
      targets_[b] = p.target ? p.target[b] : 0;
      if (p.soft) {
        targets_[b] =
            p.likeliest ? p.likeliest[b] : place_of_largest(p.soft + b * classes, classes);
      }
    }
    if (values) {
      values_.emplace(ceil_div(samples, ld_) * ld_ * classes);
      run_tasks(ceil_div(samples, kLaneTile), [&](int64_t i) {
        const int64_t begin = i * kLaneTile, end = std::min(begin + kLaneTile, samples);
        T* out = values_->data() + begin / ld_ * ld_ * classes + begin % ld_;
        // Through a tile, so that whole cache lines are read and written: with strides of powers of
        // two they would push each other out.
        T tile[kLaneTile][kLaneTile] = {};
        for (int64_t first = 0; first < classes; first += kLaneTile) {
          const int64_t last = std::min(first + kLaneTile, classes);
          for (int64_t b = begin; b < end; ++b) {
            const T* in = values + b * classes;
            for (int64_t c = first; c < last; ++c) tile[c - first][b - begin] = in[c];
          }
          for (int64_t c = first; c < last; ++c)
            std::copy_n(tile[c - first], kLaneTile, out + c * ld_);
        }
      });
    }
    for (int64_t begin = 0; begin < samples; begin += ld_) {
      chunks_.push_back({begin, std::min(ld_, samples - begin), targets_.data() + begin,
                         values ? values_->data() + begin * classes : nullptr,
                         weighted ? weights_.data() + begin : nullptr});
    }
  }
  Chunks(const Chunks&) = delete;
  Chunks& operator=(const Chunks&) = delete;

  int64_t ld() const { return ld_; }
  int64_t count() const { return static_cast<int64_t>(chunks_.size()); }
  auto begin() const { return chunks_.begin(); }
  auto end() const { return chunks_.end(); }

 private:
  int64_t ld_;
  std::vector<int64_t> targets_;
  std::vector<T> weights_;
  std::optional<Buffer<T>> values_;
  std::vector<Chunk> chunks_;
};

// What the row kernels leave per lane about one clone, or one block of its classes.
template <class T>
struct LaneSums {
  T* max;           // classification only
  T* sum;           // of the exponentials, or of the squared residuals
  T* target_logit;  // classification only
  uint8_t* is_argmax;
  T* options = nullptr;  // [kOptionSums][ld], with options
};

// What turns a clone's logits into its gradient, per lane: OptionGradientRows.
template <class T>
struct OptionFactors {
  T *spread, *hit, *live;
};

constexpr int64_t kOptionLanes = kOptionSums + 3;

// Takes in the mixture's -log likelihood of sample b.
template <class T>
void add_loss(const MixtureProblem<T>& p, MixtureResult<T>& out, int64_t b, double nll) {
  const double value = p.weight_of(b) * nll;
  out.loss += value;
  if (out.losses) out.losses[b] = static_cast<T>(value);
}

// Is anything wrong with a clone, from all lanes seen so far?
struct CloneHealth {
  bool dead = false;     // for a counted sample
  bool suspect = false;  // for any sample: its weights may not be finite
};

// Log-likelihoods of one clone for a chunk, -inf where dead or not counted; the factor that turns
// what is in the logits' buffer into the gradient of the clone's own loss, 0 there; the statistics.
template <class T>
void finish_clone(const MixtureProblem<T>& p, const typename Chunks<T>::Chunk& chunk, int64_t n,
                  int64_t ld, const LaneSums<T>& sums, double* log_likelihood, T* factor,
                  MixtureResult<T>& out, CloneHealth* health) {
  const bool gaussian = p.likelihood.gaussian;
  const ClassesOptions& classes = p.likelihood.classes;
  const ValuesOptions& values = p.likelihood.values;
  const auto density = gaussian ? values.density(p.size.classes) : GaussianDensity{};
  double own = 0, score = 0;
  for (int64_t lane = 0; lane < ld; ++lane) {
    log_likelihood[lane] = -INFINITY;
    factor[lane] = 0;
    if (lane >= chunk.size) continue;
    const double sum = sums.sum[lane];
    if (!(sum < INFINITY)) health->suspect = true;
    if (chunk.target[lane] < 0) continue;
    const LogitSums<double> logits{gaussian ? 0.0 : sums.max[lane], sum};
    const double value = gaussian ? density.log_likelihood(sum)
                                  : classes.log_likelihood(double(sums.target_logit[lane]), logits);
    if (!is_alive(value)) {
      health->dead = health->suspect = true;
      if (out.marks) out.marks[n * p.size.samples + chunk.begin + lane] = kDeadMark;
      own = INFINITY;
      if (gaussian) score = INFINITY;
      continue;
    }
    log_likelihood[lane] = value;
    const double weight = p.weight_of(chunk.begin + lane);
    factor[lane] =
        static_cast<T>(gaussian ? weight / values.sigma2 : classes.gradient_factor(weight, logits));
    own -= value;
    score += gaussian ? sum : sums.is_argmax[lane];
  }
  out.stats[n] += own;
  out.stats[p.size.clones + n] += score;
}

// The same with the loss's options (alrao_fast/reference/switch_mixture.py has the formulas): what
// the mixture takes of a clone is -L, what the statistics take is the likelihood.
template <class T>
void finish_clone_with_options(const MixtureProblem<T>& p, const typename Chunks<T>::Chunk& chunk,
                               int64_t n, int64_t ld, const LaneSums<T>& sums, double* objective,
                               T* factor, const OptionFactors<T>& factors, MixtureResult<T>& out,
                               CloneHealth* health) {
  const double classes = static_cast<double>(p.size.classes);
  double own = 0, score = 0;
  for (int64_t lane = 0; lane < ld; ++lane) {
    objective[lane] = -INFINITY;
    factor[lane] = factors.spread[lane] = factors.hit[lane] = factors.live[lane] = 0;
    if (lane >= chunk.size) continue;
    const double sum = sums.sum[lane];
    if (!(sum < INFINITY)) health->suspect = true;
    const int64_t target = chunk.target[lane];
    if (target < 0) continue;
    const auto option_sum = [&](int64_t k) { return double(sums.options[k * ld + lane]); };
    const SmoothedTarget<double> smoothed{
        p.label_smoothing,
        classes,
        std::log(sum),
        option_sum(0),
        p.soft ? option_sum(2) : (double(sums.target_logit[lane]) - sums.max[lane]),
        p.soft ? option_sum(4) : 1.0};
    const double class_weight = p.soft || !p.class_weight ? 1.0 : double(p.class_weight[target]);
    const double likelihood =
        p.soft ? option_sum(1) - option_sum(3) * smoothed.log_sum : smoothed.dot - smoothed.log_sum;
    const double lse = sums.max[lane] + smoothed.log_sum;
    const double value = smoothed.log_likelihood(class_weight) - p.z_loss * lse * lse;
    if (!is_alive(value) || !is_alive(likelihood)) {
      health->dead = health->suspect = true;
      if (out.marks) out.marks[n * p.size.samples + chunk.begin + lane] = kDeadMark;
      own = INFINITY;
      continue;
    }
    const double weight = p.weight_of(chunk.begin + lane);
    const double total = smoothed.total(class_weight);
    objective[lane] = value;
    factor[lane] = static_cast<T>(weight * ((total == 0 ? 0.0 : 1.0) + 2 * p.z_loss * lse) / sum);
    if (total != 0) {
      factors.spread[lane] = static_cast<T>(weight * p.label_smoothing / (classes * total));
      factors.hit[lane] = static_cast<T>(weight * (1 - p.label_smoothing) * class_weight / total);
    }
    factors.live[lane] = 1;
    own -= likelihood;
    score += sums.is_argmax[lane];
  }
  out.stats[n] += own;
  out.stats[p.size.clones + n] += score;
}

template <class T>
bool all_finite(const T* values, int64_t count) {
  constexpr int64_t kLanes = 16;
  T wrong[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) wrong[lane] += values[i + lane] * 0;
  }
  for (; i < count; ++i) wrong[0] += values[i] * 0;
  return std::all_of(wrong, wrong + kLanes, [](T w) { return w == 0; });
}

// The contents of a tensor in one type, dense.
template <class T>
torch::stable::Tensor in_type(const torch::stable::Tensor& tensor) {
  const auto own = dense(tensor);
  return own.scalar_type() == kScalarType<T> ? own : torch::stable::to(own, kScalarType<T>);
}

// Of a tensor of one: int64, or of a floating type that kernels compute in.
inline double number_in(const torch::stable::Tensor& tensor) {
  const void* p = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Double:
      return *static_cast<const double*>(p);
    case torch::headeronly::ScalarType::Float:
      return *static_cast<const float*>(p);
    default:
      return static_cast<double>(*static_cast<const int64_t*>(p));
  }
}

inline std::vector<double> as_doubles(const torch::stable::Tensor& tensor) {
  const auto dense = in_type<double>(tensor);
  const double* p = static_cast<const double*>(dense.const_data_ptr());
  return {p, p + dense.numel()};
}

// x with zeros for the rows that are not finite, among those that `chosen` picks: such rows have no
// gradient to the logits, and 0 * inf must not reach dweight.
template <class T, class Chosen>
torch::stable::Tensor with_finite_rows(const torch::stable::Tensor& x, const Chosen& chosen) {
  auto result = x;
  bool copied = false;
  const int64_t features = x.size(1);
  for (int64_t b = 0; b < x.size(0); ++b) {
    if (!chosen(b) ||
        all_finite(static_cast<const T*>(x.const_data_ptr()) + b * features, features))
      continue;
    if (!copied) result = torch::stable::clone(x);
    copied = true;
    std::fill_n(static_cast<T*>(result.mutable_data_ptr()) + b * features, features, T(0));
  }
  return result;
}

// The weights with zeros for the clones that have one that is not finite: such a clone is dead for
// every sample, and 0 * inf must not reach dx.
template <class T>
class FiniteWeight {
 public:
  FiniteWeight(const T* weight, int64_t clones, int64_t weights_per_clone)
      : weight_(weight), count_(weights_per_clone), checked_(clones, false) {}

  const T* get(const std::vector<CloneHealth>& health) {
    const int64_t clones = static_cast<int64_t>(health.size());
    for (int64_t n = 0; n < clones; ++n) {
      if (!health[n].suspect || checked_[n]) continue;
      checked_[n] = true;
      if (all_finite(weight_ + n * count_, count_)) continue;
      if (!copy_) {
        copy_.emplace(clones * count_);
        std::copy_n(weight_, clones * count_, copy_->data());
      }
      std::fill_n(copy_->data() + n * count_, count_, T(0));
    }
    return copy_ ? copy_->data() : weight_;
  }

 private:
  const T* weight_;
  int64_t count_;
  std::vector<bool> checked_;
  std::optional<Buffer<T>> copy_;
};

// switch_mixture_weights.
Weights mixture_weights(const WeightArguments& arguments);

// All clones of a chunk of samples at once: for few classes.
template <class T>
void mixture_joint(const MixtureProblem<T>& p, MixtureResult<T>& out);

// One clone after the other with an online mixture: for many classes. Same results up to rounding.
template <class T>
void mixture_streamed(const MixtureProblem<T>& p, MixtureResult<T>& out);

}  // namespace alrao::cpu
