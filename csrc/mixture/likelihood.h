// The likelihoods of the mixture by the options of their ops
// (alrao_fast/ops/mixture/likelihood.py), and how likely a target is for one clone
// (alrao_fast/reference/switch_mixture.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <tuple>

#include "common/host_device.h"

namespace alrao {

// Of a clone's logits for one sample: the largest, and the sum of exp(logit - max). NaN in `sum`,
// or anything not finite, says that the clone is dead for the sample.
template <class T>
struct LogitSums {
  T max, sum;
};

// A class by softmax. `fields` are the options, as the schema has them.
struct ClassesOptions {
  int64_t ignore_index;

  auto fields() { return std::tie(ignore_index); }

  ALRAO_HOST_DEVICE bool counts(int64_t target) const { return target != ignore_index; }

  template <class T>
  ALRAO_HOST_DEVICE T log_likelihood(T target_logit, LogitSums<T> logits) const {
    return (target_logit - logits.max) - std::log(logits.sum);
  }

  // What turns exp(logit - max) into the gradient of `norm` times -log p to the logit; at the
  // target's `norm` is to be subtracted.
  template <class T>
  ALRAO_HOST_DEVICE T gradient_factor(T norm, LogitSums<T> logits) const {
    return norm / logits.sum;
  }
};

// A target with label smoothing, of one sample and clone: with t_c = w_c ((1 - e) q_c + e / C) and
// T = sum_c t_c the mean of log p_c by t_c / T. The logits are those less the largest, l_c, and
// log_sum the logarithm of the sum of their exponentials. The weights w have the mean 1.
template <class T>
struct SmoothedTarget {
  T smoothing, classes, log_sum;
  T weighted;  // sum_c w_c l_c
  T dot;       // sum_c w_c q_c l_c; of a class its own l, whose weight is given below
  T mass;      // sum_c w_c q_c; of a class 1

  // T, with the class's own weight.
  ALRAO_HOST_DEVICE T total(T class_weight) const {
    return (T(1) - smoothing) * mass * class_weight + smoothing;
  }

  // 0 where T is.
  ALRAO_HOST_DEVICE T log_likelihood(T class_weight) const {
    const T whole = total(class_weight);
    if (whole == T(0)) return T(0);
    const T own = (T(1) - smoothing) * class_weight * (dot - mass * log_sum);
    // Without smoothing the other classes, however unlikely, are not looked at.
    const T others = smoothing == T(0) ? T(0) : smoothing * (weighted / classes - log_sum);
    return (own + others) / whole;
  }
};

// Gaussian noise on every output: what does not depend on the sample.
struct GaussianDensity {
  double inverse_variance, log_normaliser;

  template <class T>
  ALRAO_HOST_DEVICE T log_likelihood(T squared_error) const {
    return T(-0.5) * squared_error * static_cast<T>(inverse_variance) -
           static_cast<T>(log_normaliser);
  }
};

// Values with Gaussian noise of variance sigma2.
struct ValuesOptions {
  double sigma2;

  auto fields() { return std::tie(sigma2); }

  GaussianDensity density(int64_t outputs) const {
    const double log_variance = std::log(2 * 3.14159265358979323846 * sigma2);
    return {1 / sigma2, 0.5 * static_cast<double>(outputs) * log_variance};
  }
};

// One of the two.
struct Likelihood {
  Likelihood() = default;
  Likelihood(ClassesOptions options) : classes(options) {}
  Likelihood(ValuesOptions options) : gaussian(true), values(options) {}

  bool gaussian = false;
  ClassesOptions classes{};
  ValuesOptions values{};
};

// The options that both have.
struct LossOptions {
  bool mean, need_dx, need_dw;
  int64_t memory_budget;
};

}  // namespace alrao
