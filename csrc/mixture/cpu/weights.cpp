// The factors of the samples' losses and targets that are distributions, in one pass
// (alrao_fast/ops/mixture/weighting.py, which says the same in operations of PyTorch).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/checks.h"
#include "common/cpu/gemm.h"
#include "mixture/boxed.h"
#include "mixture/cpu/problem.h"

namespace alrao::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct WeightArguments {
  Tensor target;
  std::optional<Tensor> sample_weight, class_weight;
  int64_t ignore_index;
  double label_smoothing;
  bool mean;
  double divisor;
};

// Targets [B, C] that sum to 1 (none of classes), factors [B], and weights [C] of mean 1 where the
// losses themselves have them.
using Weights = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
const T* values(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Of the target's weight w, what the loss weighs its target with.
struct Smoothed {
  double keep, spread;
  double operator()(double w) const { return keep * w + spread; }
};

template <class T>
T sample_weight_at(const T* weights, int64_t b) {
  if (!weights) return T(1);
  ALRAO_CHECK(std::isfinite(weights[b]), "sample_weight: got ", weights[b], " at position ", b,
              ", expected finite numbers");
  return weights[b];
}

// The factors of classes, without the norm; returns what a mean divides by.
template <class T>
double weigh_classes(const WeightArguments& a, const T* sample_weights, const T* class_weights,
                     int64_t classes, Smoothed smoothed, T* factors) {
  const int64_t* target = static_cast<const int64_t*>(a.target.const_data_ptr());
  double divided = 0;
  for (int64_t b = 0; b < a.target.size(0); ++b) {
    if (target[b] == a.ignore_index) {
      factors[b] = T(0);
      continue;
    }
    const double given = sample_weight_at(sample_weights, b);
    // A class that does not exist is the loss's to refuse.
    const double w =
        class_weights ? class_weights[std::clamp<int64_t>(target[b], 0, classes - 1)] : 1.0;
    divided += given * w;
    factors[b] = static_cast<T>(given * (class_weights ? smoothed(w) : 1.0));
  }
  return divided;
}

// Of one target: the sum, that of the classes' weights times it, and what it has below 0.
template <class T>
struct TargetSums {
  double sum = 0, weighted = 0;
  T least = 0;

  bool valid() const { return std::isfinite(sum) && least >= 0; }
};

template <class T>
TargetSums<T> sum_target(const T* target, const T* class_weights, int64_t classes) {
  // Several sums at once: one after the other they would wait for each other.
  constexpr int64_t kLanes = 16;
  T sums[kLanes] = {}, weighted[kLanes] = {}, least[kLanes] = {};
  const auto add = [&](int64_t lane, int64_t c) {
    sums[lane] += target[c];
    least[lane] = target[c] < least[lane] ? target[c] : least[lane];
    if (class_weights) weighted[lane] += class_weights[c] * target[c];
  };
  int64_t begin = 0;
  for (; begin + kLanes <= classes; begin += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(lane, begin + lane);
  }
  for (int64_t c = begin; c < classes; ++c) add(c - begin, c);
  TargetSums<T> result;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    result.sum += sums[lane];
    result.weighted += weighted[lane];
    result.least = std::min(result.least, least[lane]);
  }
  return result;
}

// The factors of distributions, without the norm, and the distributions; returns what a mean
// divides by.
template <class T>
double weigh_distributions(const WeightArguments& a, const T* sample_weights,
                           const T* class_weights, Smoothed smoothed, T* target, T* factors) {
  const int64_t samples = a.target.size(0), classes = a.target.size(1);
  const T* given = static_cast<const T*>(a.target.const_data_ptr());
  double divided = 0;
  for (int64_t b = 0; b < samples; ++b) {
    factors[b] = sample_weight_at(sample_weights, b);
    divided += factors[b];
  }
  run_tasks(samples, [&](int64_t b) {
    const T* from = given + b * classes;
    T* to = target + b * classes;
    TargetSums<T> sums;
    if (factors[b] != T(0)) sums = sum_target(from, class_weights, classes);
    if (!sums.valid()) {
      factors[b] = T(NAN);
    } else if (sums.sum == 0) {
      factors[b] = T(0);
      std::fill_n(to, classes, T(0));
    } else {
      const T total = static_cast<T>(sums.sum);
      for (int64_t c = 0; c < classes; ++c) to[c] = from[c] / total;
      const double weight = class_weights ? smoothed(sums.weighted / sums.sum) : 1.0;
      factors[b] *= static_cast<T>(sums.sum * weight);
    }
  });
  for (int64_t b = 0; b < samples; ++b) {
    if (!std::isnan(factors[b])) continue;
    const TargetSums<T> sums = sum_target<T>(given + b * classes, nullptr, classes);
    refuse("target: got ", sums.least < 0 ? "negative entries" : "entries that are not finite",
           " for sample ", b, ", expected probabilities, or weights that are finite and >= 0");
  }
  return divided;
}

template <class T>
Weights run(const WeightArguments& a) {
  const bool soft = a.target.scalar_type() != ScalarType::Long;
  const int64_t samples = a.target.size(0);
  const T* sample_weights = values<T>(a.sample_weight);
  const T* class_weights = values<T>(a.class_weight);
  const int64_t classes = a.class_weight ? a.class_weight->size(0) : soft ? a.target.size(1) : 0;
  double sum = 0;
  for (int64_t c = 0; class_weights && c < classes; ++c) sum += class_weights[c];
  const double mean_weight = class_weights ? sum / static_cast<double>(classes) : 1.0;
  const Smoothed smoothed{1 - a.label_smoothing, a.label_smoothing * mean_weight};

  Tensor factors = empty_tensor<T>({samples});
  Tensor target = soft ? empty_tensor<T>({samples, classes}) : empty_tensor<T>({0});
  const bool within = class_weights && (soft || a.label_smoothing != 0);
  Tensor scaled = empty_tensor<T>({within ? classes : 0});
  T* factor = static_cast<T*>(factors.mutable_data_ptr());
  const double divided =
      soft ? weigh_distributions(a, sample_weights, class_weights, smoothed,
                                 static_cast<T*>(target.mutable_data_ptr()), factor)
           : weigh_classes(a, sample_weights, class_weights, classes, smoothed, factor);
  const double norm = !a.mean ? a.divisor : divided == 0 ? 1.0 : divided;
  for (int64_t b = 0; b < samples; ++b) factor[b] = static_cast<T>(factor[b] / norm);
  T* out = static_cast<T*>(scaled.mutable_data_ptr());
  for (int64_t c = 0; within && c < classes; ++c) {
    out[c] = static_cast<T>(class_weights[c] / mean_weight);
  }
  return {target, factors, scaled};
}

std::optional<Tensor> dense(std::optional<Tensor> tensor) {
  return tensor ? std::optional(alrao::dense(*tensor)) : std::nullopt;
}

void boxed_weights(StableIValue* stack_values, uint64_t num_arguments, uint64_t) {
  Stack stack(stack_values, num_arguments, 7);
  WeightArguments a{alrao::dense(stack.take<Tensor>()),
                    dense(stack.take<std::optional<Tensor>>()),
                    dense(stack.take<std::optional<Tensor>>()),
                    stack.take<int64_t>(),
                    stack.take<double>(),
                    stack.take<bool>(),
                    stack.take<double>()};
  const bool soft = a.target.scalar_type() != ScalarType::Long;
  ALRAO_CHECK(soft || a.sample_weight || a.class_weight,
              "sample_weight: got None, expected weights of samples or of classes");
  const Tensor& like = soft ? a.target : a.sample_weight ? *a.sample_weight : *a.class_weight;
  ALRAO_CHECK(a.target.dim() == (soft ? 2 : 1), "target: got shape ", shape_of(a.target),
              ", expected classes [B], or distributions [B, C]");
  check_dtype("weights", like, {ScalarType::Float, ScalarType::Double});
  if (a.sample_weight) {
    check_same_dtype("sample_weight", *a.sample_weight, "the others", like);
    check_shape("sample_weight", *a.sample_weight, {a.target.size(0)});
  }
  if (a.class_weight) {
    check_same_dtype("class_weight", *a.class_weight, "the others", like);
    ALRAO_CHECK(a.class_weight->dim() == 1 && a.class_weight->numel() > 0 &&
                    (!soft || a.class_weight->size(0) == a.target.size(1)),
                "class_weight: got shape ", shape_of(*a.class_weight), ", expected one per class");
  }
  const bool is_double = like.scalar_type() == ScalarType::Double;
  stack.put(is_double ? run<double>(a) : run<float>(a));
}

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) { m.impl("switch_mixture_weights", &boxed_weights); }

}  // namespace
}  // namespace alrao::cpu
