// One step of a feature optimizer on the GPU: the device tables of its tensors, made once for a
// plan.
#pragma once

#include <cuda_runtime_api.h>

#include "feature/cuda/launch.h"
#include "feature/multi_tensor.h"

namespace alrao::cuda {

// Checks scalars and gradients and starts launch(call, options) on the current stream of the
// tensors' device. Nothing waits for the device. With `mixed` a table's launches take states of
// several dtypes.
template <class Options>
void step_on_cuda(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads, Options options,
                  const ScalarTensors& scalars, bool mixed,
                  cudaError_t (*launch)(const MultiTensorCall&, const Options&));

}  // namespace alrao::cuda
