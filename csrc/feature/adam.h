// feature_adam_: Adam and AdamW with one learning rate per feature. Its options, and the update of
// one element by the equations of alrao_fast/reference/feature_adam.py.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "feature/optimizer.h"

namespace alrao {

struct AdamOptions : FeatureOptions {
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool amsgrad;
  bool decoupled;
  bool authors_eps;

  static constexpr auto table() {
    return std::array{Option{"beta1", &AdamOptions::beta1},
                      Option{"beta2", &AdamOptions::beta2},
                      Option{"eps", &AdamOptions::eps},
                      Option{"weight_decay", &AdamOptions::weight_decay},
                      Option{"amsgrad", &AdamOptions::amsgrad},
                      Option{"decoupled", &AdamOptions::decoupled},
                      Option{"authors_eps", &AdamOptions::authors_eps}};
  }

  static constexpr std::array kStates{"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
  static constexpr int kFixedStates = 2;
  int num_states() const { return amsgrad ? 3 : 2; }
  const char* why_states() const { return amsgrad ? "amsgrad is on" : "amsgrad is off"; }
};

enum class Decay {
  kNone,
  kGradient,  // weight_decay * p is added to the gradient (Adam)
  kWeights,   // p is multiplied by max(0, 1 - rate * weight_decay) first (AdamW)
};

// base^exponent for 0 <= base <= 1 and exponent >= 1, to nearest almost always, by squaring in
// pairs of doubles: near base = 1 an error in the last place of the power is many in 1 - power.
ALRAO_HOST_DEVICE static inline double integer_power(double base, int64_t exponent) {
  double power = 1, power_rest = 0, rest = 0;
  for (;;) {
    if (exponent & 1) {
      const double product = power * base;
      power_rest = fma(power, base, -product) + (power * rest + power_rest * base);
      power = product + power_rest;
      power_rest -= power - product;
    }
    exponent >>= 1;
    if (exponent == 0) return power;
    const double square = base * base;
    rest = fma(base, base, -square) + 2 * base * rest;
    base = square + rest;
    rest -= base - square;
  }
}

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

// `rate` is the entry's rate times s.lr. `v_max` is left alone without AMSGRAD. A loop whose
// `decay` is a constant has no branch.
template <bool AMSGRAD, typename acc>
ALRAO_HOST_DEVICE static inline void adam_element(acc& p, acc g, acc& m, acc& v, acc& v_max,
                                                  acc rate, const AdamScalars<acc>& s,
                                                  Decay decay) {
  g *= s.grad_factor;
  if (decay == Decay::kGradient) g += s.weight_decay * p;
  if (decay == Decay::kWeights) {
    const acc kept = 1 - rate * s.weight_decay;
    p *= kept > 0 ? kept : 0;
  }
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
