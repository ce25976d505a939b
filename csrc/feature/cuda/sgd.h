// feature_sgd_ on the GPU (feature/sgd.h).
#pragma once

#include "feature/cuda/launch.h"
#include "feature/sgd.h"

namespace alrao::cuda {

// The table's states are the momentum buffers, none where options.momentum is 0. The loss scale
// divides options.grad_factor.
cudaError_t launch_feature_sgd(const MultiTensorCall& call, const SgdOptions& options);

}  // namespace alrao::cuda
