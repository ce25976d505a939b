// feature_sgd_ on the GPU (csrc/feature_sgd.h).
#pragma once

#include "cuda/multi_tensor_launch.h"
#include "feature_sgd.h"

namespace alrao::cuda {

// The table's states are the momentum buffers, none where options.momentum is 0. The loss scale
// divides options.grad_factor.
cudaError_t launch_feature_sgd(const MultiTensorCall& call, const SgdOptions& options);

}  // namespace alrao::cuda
