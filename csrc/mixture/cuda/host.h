// The mixture's ops on a GPU: which products and kernels, in which order, in what memory. Nothing
// waits for the device. Bindings pass the stream, with the tensors' device current.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "mixture/arguments.h"
#include "switch/cuda/update.h"

namespace alrao::cuda {

MixtureOutputs mixture_loss(const LossArguments& arguments, const SwitchObservation& observation,
                            cudaStream_t stream);

torch::stable::Tensor mixture_log_prob(const MixtureInputs& inputs, int64_t memory_budget,
                                       cudaStream_t stream);

MixtureGradients mixture_log_prob_backward(const LogProbGradient& arguments, cudaStream_t stream);

}  // namespace alrao::cuda
