// feature_sgd_: SGD with one learning rate per feature. Equations: feature/sgd_math.h.
#pragma once

namespace alrao {

class MultiTensor;

struct SgdOptions {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  double grad_factor;  // 1 / grad_scale, negative to maximize
  bool nesterov;
  bool authors_momentum;
};

// Updates all tensors; the gradients are bound.
void feature_sgd_cpu(const MultiTensor& tensors, const SgdOptions& options);

}  // namespace alrao
