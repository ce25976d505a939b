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

struct SgdRule {
  Momentum momentum;
  bool nesterov;
  bool decay;  // weight_decay is not 0
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
// kNone. A loop whose `rule` is a constant has no branch.
template <typename acc>
ALRAO_HOST_DEVICE static inline void sgd_element(acc& p, acc g, acc& buf, acc rate,
                                                 const SgdScalars<acc>& s, SgdRule rule) {
  g *= s.grad_factor;
  if (rule.decay) g += s.weight_decay * p;
  acc direction = g;
  if (rule.momentum != Momentum::kNone) {
    if (rule.momentum == Momentum::kFirst) {
      buf = g;
    } else {
      acc keep = s.momentum;
      if (rule.momentum == Momentum::kAuthors) {
        const acc root = square_root(rate);
        keep = 1 - s.momentum * (root < s.max_root ? root : s.max_root);
      }
      buf = keep * buf + s.grad_weight * g;
    }
    direction = rule.nesterov ? g + s.momentum * buf : buf;
  }
  p -= rate * direction;
}

}  // namespace alrao
