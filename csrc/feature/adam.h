// feature_adam_: Adam and AdamW with one learning rate per feature. Equations: feature/adam_math.h.
#pragma once

namespace alrao {

class MultiTensor;

struct AdamOptions {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double grad_factor;  // 1 / grad_scale, negative to maximize
  bool amsgrad;
  bool decoupled;
  bool authors_eps;
};

// Updates all tensors; the gradients are bound.
void feature_adam_cpu(const MultiTensor& tensors, const AdamOptions& options);

}  // namespace alrao
