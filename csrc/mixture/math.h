// One clone's part in the mixture for one sample (alrao_fast/reference/switch_mixture.py).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace alrao {

struct MixtureSizes {
  int64_t samples, features, clones, classes;
};

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
