// One element of feature_adam_: the equations of alrao_fast/reference/feature_adam.py.
#pragma once

#include "host_device.h"

namespace alrao {

enum class Decay {
  kNone,
  kGradient,  // weight_decay * p is added to the gradient (Adam)
  kWeights,   // p is multiplied by 1 - rate * weight_decay first (AdamW)
};

// The bias corrections depend on how many updates the tensor has had; both forms of eps are
//   p -= rate * step_factor * m / (sqrt(v) * root_factor + eps).
template <typename acc>
struct AdamScalars {
  acc lr;           // the multiplier of every rate
  acc grad_factor;  // 1 / grad_scale, negative to maximize
  acc beta1, one_minus_beta1;
  acc beta2, one_minus_beta2;
  acc step_factor;
  acc root_factor;
  acc eps;
  acc weight_decay;
};

// `rate` is the entry's rate times s.lr. `v_max` is left alone without AMSGRAD.
template <bool AMSGRAD, Decay DECAY, typename acc>
ALRAO_HOST_DEVICE static inline void adam_element(acc& p, acc g, acc& m, acc& v, acc& v_max,
                                                  acc rate, const AdamScalars<acc>& s) {
  g *= s.grad_factor;
  if constexpr (DECAY == Decay::kGradient) g += s.weight_decay * p;
  if constexpr (DECAY == Decay::kWeights) p *= 1 - rate * s.weight_decay;
  m = s.beta1 * m + s.one_minus_beta1 * g;
  v = s.beta2 * v + s.one_minus_beta2 * g * g;
  acc second = v;
  if constexpr (AMSGRAD) {
    v_max = v_max > v || v_max != v_max ? v_max : v;  // NaN stays, as in torch.maximum
    second = v_max;
  }
  p -= rate * s.step_factor * m / (square_root(second) * s.root_factor + s.eps);
}

}  // namespace alrao
