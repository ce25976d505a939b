// One Bayesian update of the switch posterior (alrao_fast/reference/switch_update.py).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace alrao {

// Raises unless the arguments are those of the schema; to be called before anything is written.
void check_switch_update(const torch::stable::Tensor& logw,
                         const torch::stable::Tensor& log_posterior, const torch::stable::Tensor& t,
                         const torch::stable::Tensor& log_likelihood, double theta);

// The same for an update by the statistics [3, N] of a batch, which are added to `running`.
void check_switch_observe(const torch::stable::Tensor& logw,
                          const torch::stable::Tensor& log_posterior,
                          const torch::stable::Tensor& t, const torch::stable::Tensor& running,
                          const torch::stable::Tensor& stats, double theta);

}  // namespace alrao
