// The switch update on the GPU (csrc/switch_update.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace alrao::cuda {

// log_likelihood holds num_clones entries of scalar_t (float or double), `stride` apart.
template <typename scalar_t>
cudaError_t launch_switch_update(double* logw, double* log_posterior, int64_t* t,
                                 const scalar_t* log_likelihood, int64_t num_clones, int64_t stride,
                                 double theta, cudaStream_t stream);

}  // namespace alrao::cuda
