// feature_adam_ on the GPU (feature/adam.h).
#pragma once

#include "feature/adam.h"
#include "feature/cuda/launch.h"

namespace alrao::cuda {

// The table's states are m, v and, with options.amsgrad, the largest v; made as mixed with amsgrad.
// The loss scale divides options.grad_factor.
cudaError_t launch_feature_adam(const MultiTensorCall& call, const AdamOptions& options);

}  // namespace alrao::cuda
