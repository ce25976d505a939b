// The mixture's ops on a GPU: which products and kernels, in which order, in what memory. Nothing
// waits for the device. Bindings pass the stream, with the tensors' device current.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "switch/cuda/update.h"

namespace alrao::cuda {

// Loss, statistics and gradients to x, weight and bias: empty where they are not needed.
using MixtureOutputs =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor>;

struct MixtureInputs {
  const torch::stable::Tensor& x;
  const torch::stable::Tensor& weight;
  const std::optional<torch::stable::Tensor>& bias;
  const torch::stable::Tensor& log_posterior;
};

// Of the op's options those that both likelihoods have.
struct MixtureOptions {
  bool mean, need_dx, need_dw;
  int64_t memory_budget;
};

MixtureOutputs mixture_nll(const MixtureInputs& inputs, const torch::stable::Tensor& target,
                           int64_t ignore_index, const MixtureOptions& options,
                           const SwitchObservation& observation, cudaStream_t stream);

MixtureOutputs mixture_gaussian_nll(const MixtureInputs& inputs,
                                    const torch::stable::Tensor& target, double sigma2,
                                    const MixtureOptions& options,
                                    const SwitchObservation& observation, cudaStream_t stream);

torch::stable::Tensor mixture_log_prob(const MixtureInputs& inputs, int64_t memory_budget,
                                       cudaStream_t stream);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
mixture_log_prob_backward(const torch::stable::Tensor& grad, const MixtureInputs& inputs,
                          const torch::stable::Tensor& log_prob, bool need_dx, bool need_dw,
                          int64_t memory_budget, cudaStream_t stream);

}  // namespace alrao::cuda
