// switch_mixture: the N clones of the last layer, evaluated together
// (alrao_fast/reference/switch_mixture.py).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "mixture/math.h"

namespace alrao {

// Checks of the arguments that all ops of the family share; raise before anything is written.
MixtureSizes check_mixture(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                           const std::optional<torch::stable::Tensor>& bias,
                           const torch::stable::Tensor& log_posterior, int64_t memory_budget);

// `target [B]` int64: classes.
void check_class_target(const torch::stable::Tensor& target, const torch::stable::Tensor& x);

// `target [B, K]`, of x's dtype: what the regressors should predict.
void check_gaussian_target(const torch::stable::Tensor& target, const torch::stable::Tensor& x,
                           int64_t outputs, double sigma2);

// `grad` and `log_prob`, [B, C] of the type that x is computed in.
void check_log_prob_gradient(const torch::stable::Tensor& grad,
                             const torch::stable::Tensor& log_prob, const torch::stable::Tensor& x,
                             int64_t classes);

}  // namespace alrao
