// The switch's observation of a batch on the CPU, for ops that have its statistics.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace alrao::cpu {

// switch_observe_ for arguments that check_switch_observe has let pass.
void observe(const torch::stable::Tensor& logw, const torch::stable::Tensor& log_posterior,
             const torch::stable::Tensor& t, const torch::stable::Tensor& running,
             const torch::stable::Tensor& stats, bool mean, double theta);

}  // namespace alrao::cpu
