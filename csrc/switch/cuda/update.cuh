// The switch update as what a block does, alone or as the tail of another kernel.
#pragma once

#include "common/cuda/block.cuh"
#include "switch/cuda/update.h"
#include "switch/math.h"

namespace alrao::cuda {

// A thread takes clones threadIdx.x, threadIdx.x + blockDim.x, ... Masses are computed twice, so
// that no number of clones needs storage. `log_likelihood(i)` gives that of clone i; `scratch`, in
// shared memory, has a place for every warp.
template <typename LogLikelihood>
__device__ void update_switch(const SwitchState& state, LogLikelihood log_likelihood,
                              double* scratch) {
  const int64_t num_clones = state.num_clones;
  double* unstable_logw = state.logw;
  double* stable_logw = state.logw + num_clones;
  const int64_t step = *state.t;

  double largest = -INFINITY, reference = -INFINITY;
  for (int64_t i = threadIdx.x; i < num_clones; i += blockDim.x) {
    largest = fmax(largest, switch_evidence(log_likelihood(i)));
  }
  largest = block_reduce(largest, Max(), -INFINITY, scratch);
  const auto lag_of = [&](int64_t i) {
    return switch_lag(switch_evidence(log_likelihood(i)), largest);
  };
  for (int64_t i = threadIdx.x; i < num_clones; i += blockDim.x) {
    reference = fmax(reference, lag_of(i) + fmax(unstable_logw[i], stable_logw[i]));
  }
  reference = block_reduce(reference, Max(), -INFINITY, scratch);
  // Every clone with mass is at -inf: the observation says nothing.
  if (reference == -INFINITY) return;

  double unstable = 0, stable = 0;
  for (int64_t i = threadIdx.x; i < num_clones; i += blockDim.x) {
    const double lag = lag_of(i);
    unstable += switch_mass(unstable_logw[i], lag, reference);
    stable += switch_mass(stable_logw[i], lag, reference);
  }
  unstable = block_reduce(unstable, Sum(), 0.0, scratch);
  stable = block_reduce(stable, Sum(), 0.0, scratch);
  const double share = switch_share(unstable, step, num_clones);
  // Redistribution is linear and its shares add up to one: the total follows from the sums.
  const SwitchMass sums =
      switch_redistribute({unstable, stable}, share * num_clones, step, state.theta);
  const double total = sums.unstable + sums.stable;

  for (int64_t i = threadIdx.x; i < num_clones; i += blockDim.x) {
    const double lag = lag_of(i);
    const SwitchMass mass = switch_redistribute({switch_mass(unstable_logw[i], lag, reference),
                                                 switch_mass(stable_logw[i], lag, reference)},
                                                share, step, state.theta);
    unstable_logw[i] = log(mass.unstable / total);
    stable_logw[i] = log(mass.stable / total);
    state.log_posterior[i] = log((mass.unstable + mass.stable) / total);
  }
  // After the barriers above every thread has read the old value.
  if (threadIdx.x == 0) *state.t = step + 1;
}

// Adds the statistics [3, N] of a batch to the running ones, and updates the switch by them.
__device__ inline void observe(const SwitchObservation& observation, const double* stats,
                               double* scratch) {
  const int64_t n = observation.state.num_clones;
  for (int64_t i = threadIdx.x; i < 3 * n; i += blockDim.x) observation.running[i] += stats[i];
  update_switch(
      observation.state,
      [&](int64_t i) { return switch_observed(stats[i], stats[2 * n + i], observation.mean); },
      scratch);
}

}  // namespace alrao::cuda
