// feature_sgd_: SGD with one learning rate per feature. Its options, and the update of one element
// by the equations of alrao_fast/reference/feature_sgd.py.
#pragma once

#include "common/host_device.h"
#include "feature/optimizer.h"

namespace alrao {

struct SgdOptions : FeatureOptions {
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool authors_momentum;

  static constexpr auto table() {
    return std::array{Option{"momentum", &SgdOptions::momentum},
                      Option{"dampening", &SgdOptions::dampening},
                      Option{"weight_decay", &SgdOptions::weight_decay},
                      Option{"nesterov", &SgdOptions::nesterov},
                      Option{"authors_momentum", &SgdOptions::authors_momentum}};
  }

  // The lists of states; those from kFixedStates on may be left out where the options need none.
  static constexpr std::array kStates{"momentum_buffers"};
  static constexpr int kFixedStates = 0;
  int num_states() const { return momentum != 0 ? 1 : 0; }
  const char* why_states() const { return momentum != 0 ? "momentum is not 0" : "momentum is 0"; }
};

enum class Momentum {
  kNone,
  kFirst,    // the buffer starts as the gradient, whatever it held
  kTorch,    // buf = momentum * buf + (1 - dampening) * g
  kAuthors,  // the paper's code: fast features forget faster
};

template <typename acc>
struct SgdScalars {
  acc lr;           // the multiplier of every rate
  acc grad_factor;  // 1 / grad_scale, negative to maximize
  acc momentum;
  acc max_root;     // 1 / momentum
  acc grad_weight;  // 1 - dampening
  acc weight_decay;
};

// `rate` is the entry's rate times s.lr. `buf` is read by kTorch and kAuthors and left alone by
// kNone.
template <Momentum MOMENTUM, bool NESTEROV, bool DECAY, typename acc>
ALRAO_HOST_DEVICE static inline void sgd_element(acc& p, acc g, acc& buf, acc rate,
                                                 const SgdScalars<acc>& s) {
  g *= s.grad_factor;
  if constexpr (DECAY) g += s.weight_decay * p;
  acc direction = g;
  if constexpr (MOMENTUM != Momentum::kNone) {
    if constexpr (MOMENTUM == Momentum::kFirst) {
      buf = g;
    } else {
      acc keep = s.momentum;
      if constexpr (MOMENTUM == Momentum::kAuthors) {
        const acc root = square_root(rate);
        keep = 1 - s.momentum * (root < s.max_root ? root : s.max_root);
      }
      buf = keep * buf + s.grad_weight * g;
    }
    direction = NESTEROV ? g + s.momentum * buf : buf;
  }
  p -= rate * direction;
}

}  // namespace alrao
