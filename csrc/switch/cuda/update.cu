#include "switch/cuda/update.h"

#include "common/cuda/block.cuh"
#include "common/cuda/runtime.cuh"
#include "switch/cuda/update.cuh"

namespace alrao::cuda {
namespace {

constexpr int kMaxThreads = 256;

int threads_for(int64_t num_clones) { return num_clones <= kWarp ? kWarp : kMaxThreads; }

// One block.
template <typename scalar_t>
__global__ void switch_update_kernel(SwitchState state, const scalar_t* log_likelihood,
                                     int64_t stride) {
  __shared__ double scratch[kMaxThreads / kWarp];
  update_switch(
      state, [&](int64_t i) { return static_cast<double>(log_likelihood[i * stride]); }, scratch);
}

__global__ void switch_observe_kernel(SwitchObservation observation, const double* stats) {
  __shared__ double scratch[kMaxThreads / kWarp];
  observe(observation, stats, scratch);
}

}  // namespace

template <typename scalar_t>
cudaError_t launch_switch_update(const SwitchState& state, const scalar_t* log_likelihood,
                                 int64_t stride, cudaStream_t stream) {
  return launch(switch_update_kernel<scalar_t>, 1, threads_for(state.num_clones), 0, stream, state,
                log_likelihood, stride);
}

template cudaError_t launch_switch_update<float>(const SwitchState&, const float*, int64_t,
                                                 cudaStream_t);
template cudaError_t launch_switch_update<double>(const SwitchState&, const double*, int64_t,
                                                  cudaStream_t);

cudaError_t launch_switch_observe(const SwitchObservation& observation, const double* stats,
                                  cudaStream_t stream) {
  return launch(switch_observe_kernel, 1, threads_for(observation.state.num_clones), 0, stream,
                observation, stats);
}

}  // namespace alrao::cuda
