// One clone's part in an update of the switch posterior. All in double.
//
// A constant that all log-likelihoods have in common cancels, so the largest is taken off them
// before anything else: beside 1e12 of it logw would lose its digits. The masses of one step are
// taken relative to the largest, exp(logw + l - max), so that nothing overflows and a clone at -inf
// is an ordinary zero. What underflows is below the share that every clone gets back from the pool.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace alrao {

struct SwitchMass {
  double unstable;
  double stable;
};

// A log-likelihood that is NaN or +inf comes from a diverged clone and counts as -inf.
ALRAO_HOST_DEVICE static inline double switch_evidence(double log_likelihood) {
  return log_likelihood < INFINITY ? log_likelihood : -INFINITY;
}

// What a batch says of a clone: the mean of its log-likelihoods, or their sum. With nothing counted
// it is 0/0 = NaN, no observation.
ALRAO_HOST_DEVICE static inline double switch_observed(double nll_sum, double count, bool mean) {
  const double average = -nll_sum / count;
  return mean ? average : average * count;
}

// The evidence for a clone beside the largest of all, 0 at most; -inf if all are.
ALRAO_HOST_DEVICE static inline double switch_lag(double evidence, double largest) {
  return evidence > -INFINITY ? evidence - largest : -INFINITY;
}

// The mass of one hypothesis after the observation, `reference` being the largest logw + lag.
ALRAO_HOST_DEVICE static inline double switch_mass(double logw, double lag, double reference) {
  return exp(logw + lag - reference);
}

// What each clone receives from the pool: the instability 1 / (t + 1) of the unstable mass, divided
// uniformly.
ALRAO_HOST_DEVICE static inline double switch_share(double unstable_mass, int64_t t,
                                                    int64_t num_clones) {
  return unstable_mass / (static_cast<double>(t + 1) * static_cast<double>(num_clones));
}

ALRAO_HOST_DEVICE static inline SwitchMass switch_redistribute(SwitchMass mass, double share,
                                                               int64_t t, double theta) {
  const double keep = static_cast<double>(t) / static_cast<double>(t + 1);
  return {mass.unstable * keep + theta * share, mass.stable + (1 - theta) * share};
}

}  // namespace alrao
