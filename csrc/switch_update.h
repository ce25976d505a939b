// One Bayesian update of the switch posterior (alrao_fast/reference/switch_update.py).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace alrao {

// Raises unless the arguments are those of the schema; to be called before anything is written.
void check_switch_update(const torch::stable::Tensor& logw,
                         const torch::stable::Tensor& log_posterior, const torch::stable::Tensor& t,
                         const torch::stable::Tensor& log_likelihood, double theta);

}  // namespace alrao
