// One clone's part in the mixture for one sample (alrao_fast/reference/switch_mixture.py).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace alrao {

struct MixtureSizes {
  int64_t samples, features, clones, classes;
};

// Half of K log(2 pi sigma^2).
static inline double gaussian_log_normaliser(int64_t outputs, double sigma2) {
  return 0.5 * static_cast<double>(outputs) * std::log(2 * 3.14159265358979323846 * sigma2);
}

template <class T>
ALRAO_HOST_DEVICE static inline T gaussian_log_likelihood(T squared_error, T inverse_variance,
                                                          T log_normaliser) {
  return T(-0.5) * squared_error * inverse_variance - log_normaliser;
}

// `sum` is the sum of exp(logit - max). NaN in `sum`, or anything not finite, says that the clone
// is dead for the sample.
template <class T>
ALRAO_HOST_DEVICE static inline T class_log_likelihood(T target_logit, T max, T sum) {
  return (target_logit - max) - std::log(sum);
}

// Finite: the clone is alive for the sample.
template <class T>
ALRAO_HOST_DEVICE static inline bool is_alive(T log_likelihood) {
  return log_likelihood > T(-INFINITY) && log_likelihood < T(INFINITY);
}

// The mixture over the clones seen so far: sum_n exp(a_n + logp_n) = exp(max) * sum.
template <class T>
struct RunningMixture {
  T max, sum;
};

template <class T>
ALRAO_HOST_DEVICE static inline RunningMixture<T> empty_mixture() {
  return {T(-INFINITY), T(0)};
}

// By what to multiply sums over the clones seen before, and the term of the new one.
template <class T>
struct MixtureFactors {
  T keep, take;
};

// Takes in a clone with a_n + logp_n = `joint`, -inf for one that is dead.
template <class T>
ALRAO_HOST_DEVICE static inline MixtureFactors<T> take_in(RunningMixture<T>& mixture, T joint) {
  const T max = joint > mixture.max ? joint : mixture.max;
  // No clone is possible yet.
  if (!(max > T(-INFINITY))) return {T(0), T(0)};
  const MixtureFactors<T> factors{std::exp(mixture.max - max), std::exp(joint - max)};
  mixture = {max, mixture.sum * factors.keep + factors.take};
  return factors;
}

// -log of the mixture's likelihood, +inf where no clone is possible.
template <class T>
ALRAO_HOST_DEVICE static inline T mixture_nll(RunningMixture<T> mixture) {
  return mixture.max > T(-INFINITY) ? -mixture.max - std::log(mixture.sum) : T(INFINITY);
}

}  // namespace alrao
