// The factors of the samples' losses and targets that are distributions, in one pass
// (alrao_fast/ops/mixture/weighting.py, which says the same in operations of PyTorch).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/cpu/gemm.h"
#include "mixture/boxed.h"
#include "mixture/cpu/problem.h"

namespace alrao::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// Factors are doubles until all that makes them is known: in float32 a product of small weights, or
// a small weight where denormal numbers are flushed, would be 0, and its sample not count.

// The factors of classes, without the norm; returns what a mean divides by.
template <class T>
double weigh_classes(const WeightArguments& a, const T* sample_weights, const T* class_weights,
                     int64_t classes, Smoothed smoothed, double* factors) {
  const int64_t* target = static_cast<const int64_t*>(a.target.const_data_ptr());
  double divided = 0;
  for (int64_t b = 0; b < a.target.size(0); ++b) {
    if (target[b] == a.ignore_index) {
      factors[b] = 0;
      continue;
    }
    const double given = sample_weight_at(sample_weights, b);
    // A class that does not exist is the loss's to refuse.
    const double w =
        class_weights ? class_weights[std::clamp<int64_t>(target[b], 0, classes - 1)] : 1.0;
    divided += given * w;
    factors[b] = given * (class_weights ? smoothed(w) : 1.0);
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

// Sums that are 1 but for their rounding.
template <class T>
bool is_one(double sum) {
  return std::abs(sum - 1) <= 16 * std::numeric_limits<T>::epsilon();
}

// The factors of distributions, without the norm, and their likeliest classes; whether each of them
// counts and sums to 1, and what a mean divides by.
template <class T>
std::pair<bool, double> weigh_distributions(const WeightArguments& a, const T* sample_weights,
                                            const T* class_weights, Smoothed smoothed,
                                            int64_t* likeliest, double* factors, double* totals) {
  const int64_t samples = a.target.size(0), classes = a.target.size(1);
  const T* given = static_cast<const T*>(a.target.const_data_ptr());
  double divided = 0;
  for (int64_t b = 0; b < samples; ++b) {
    factors[b] = sample_weight_at(sample_weights, b);
    divided += factors[b];
  }
  run_tasks(samples, [&](int64_t b) {
    const T* from = given + b * classes;
    TargetSums<T> sums;
    if (factors[b] != 0) sums = sum_target(from, class_weights, classes);
    totals[b] = sums.sum;
    likeliest[b] = sums.sum == 0 ? 0 : place_of_largest(from, classes);
    if (!sums.valid()) {
      factors[b] = NAN;
    } else {
      const double weight =
          class_weights && sums.sum != 0 ? smoothed(sums.weighted / sums.sum) : 1.0;
      factors[b] *= sums.sum * weight;
    }
  });
  bool whole = true;
  for (int64_t b = 0; b < samples; ++b) {
    whole = whole && is_one<T>(totals[b]);
    if (!std::isnan(factors[b])) continue;
    const TargetSums<T> sums = sum_target<T>(given + b * classes, nullptr, classes);
    refuse("target: got ", sums.least < 0 ? "negative entries" : "entries that are not finite",
           " for sample ", b, ", expected probabilities, or weights that are finite and >= 0");
  }
  return {whole, divided};
}

// The distributions divided by their sums; of a sum of 0 they are 0.
template <class T>
void normalise(const Tensor& given, const double* totals, T* target) {
  const int64_t classes = given.size(1);
  run_tasks(given.size(0), [&](int64_t b) {
    const T* from = static_cast<const T*>(given.const_data_ptr()) + b * classes;
    T* to = target + b * classes;
    const T total = static_cast<T>(totals[b]);
    if (total == 0) {
      std::fill_n(to, classes, T(0));
    } else {
      for (int64_t c = 0; c < classes; ++c) to[c] = from[c] / total;
    }
  });
}

template <class T>
Weights run(const WeightArguments& a) {
  const bool soft = a.soft(), within = a.within();
  const int64_t samples = a.target.size(0);
  const T* sample_weights = values<T>(a.sample_weight);
  const T* class_weights = values<T>(a.class_weight);
  const int64_t classes = a.class_weight ? a.class_weight->size(0) : soft ? a.target.size(1) : 0;
  double sum = 0;
  for (int64_t c = 0; class_weights && c < classes; ++c) sum += class_weights[c];
  const double mean_weight = class_weights ? sum / static_cast<double>(classes) : 1.0;
  const Smoothed smoothed{1 - a.label_smoothing, a.label_smoothing * mean_weight};

  Tensor factors = empty_tensor<T>({samples});
  Tensor likeliest = empty_tensor<int64_t>({soft ? samples : 0});
  Tensor scaled = empty_tensor<T>({within ? classes : 0});
  std::vector<double> weighed(samples), totals(soft ? samples : 0);
  bool whole = true;
  double divided = 0;
  if (soft) {
    std::tie(whole, divided) = weigh_distributions(
        a, sample_weights, class_weights, smoothed,
        static_cast<int64_t*>(likeliest.mutable_data_ptr()), weighed.data(), totals.data());
  } else {
    divided = weigh_classes(a, sample_weights, class_weights, classes, smoothed, weighed.data());
  }
  const bool copies = soft && (a.copy || !whole);
  Tensor target = copies ? empty_tensor<T>({samples, classes}) : empty_tensor<T>({0});
  if (copies) normalise(a.target, totals.data(), static_cast<T*>(target.mutable_data_ptr()));
  const double items = a.num_items ? number_in(*a.num_items) : 1.0;
  const double norm = (!a.mean ? a.divisor : divided == 0 ? 1.0 : divided) * items;
  T* factor = static_cast<T*>(factors.mutable_data_ptr());
  for (int64_t b = 0; b < samples; ++b) factor[b] = static_cast<T>(weighed[b] / norm);
  T* out = static_cast<T*>(scaled.mutable_data_ptr());
  for (int64_t c = 0; within && c < classes; ++c) {
    out[c] = static_cast<T>(class_weights[c] / mean_weight);
  }
  return {target, factors, scaled, likeliest};
}

}  // namespace

Weights mixture_weights(const WeightArguments& arguments) {
  return arguments.like().scalar_type() == ScalarType::Double ? run<double>(arguments)
                                                              : run<float>(arguments);
}

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("switch_mixture_weights", &boxed_weights<&mixture_weights>);
}

}  // namespace alrao::cpu
