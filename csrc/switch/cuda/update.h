// The switch update on the GPU (switch/checks.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace alrao::cuda {

// The posterior over num_clones clones, in device memory.
struct SwitchState {
  double* logw;           // [2, N]
  double* log_posterior;  // [N]
  int64_t* t;
  int64_t num_clones;
  double theta;
};

// What to do with the statistics of a batch; nothing where `running` is null.
struct SwitchObservation {
  SwitchState state;
  double* running;  // [3, N]
  bool mean;        // of the log-likelihoods, or their sum
};

// log_likelihood holds num_clones entries of scalar_t (float or double), `stride` apart.
template <typename scalar_t>
cudaError_t launch_switch_update(const SwitchState& state, const scalar_t* log_likelihood,
                                 int64_t stride, cudaStream_t stream);

// stats [3, N]: sums of -log p, of the scores, and the number of samples.
cudaError_t launch_switch_observe(const SwitchObservation& observation, const double* stats,
                                  cudaStream_t stream);

}  // namespace alrao::cuda
