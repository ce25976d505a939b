// The arguments of the mixture's ops by name, on every backend.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "mixture/likelihood.h"

namespace alrao {

inline torch::stable::Tensor dense(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// x [B, D], weight [N, C, D], bias [N, C], log_posterior [N].
struct MixtureInputs {
  torch::stable::Tensor x, weight;
  std::optional<torch::stable::Tensor> bias;
  torch::stable::Tensor log_posterior;
};

// The rest of the switch's state beside the log-posterior, and how it is updated.
struct SwitchObserver {
  torch::stable::Tensor logw, t, running;
  bool mean;
  double theta;
};

struct LossArguments {
  MixtureInputs inputs;
  torch::stable::Tensor target;
  Likelihood likelihood;
  LossOptions options;
  std::optional<SwitchObserver> observer;
};

// Log-probabilities [B, C], and log_mass [B]: the logarithm of what the posterior of the clones
// alive for the sample adds up to, by which it was normalised.
using LogProbOutputs = std::tuple<torch::stable::Tensor, torch::stable::Tensor>;

// Of log_prob's backward.
struct LogProbGradient {
  torch::stable::Tensor grad;
  MixtureInputs inputs;
  torch::stable::Tensor log_prob, log_mass;
  bool need_dx, need_dw;
  int64_t memory_budget;
};

// dx, dweight and dbias: empty where they are not needed.
using MixtureGradients =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

// Loss, statistics and the gradients.
using MixtureOutputs =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor>;

}  // namespace alrao
