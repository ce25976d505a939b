// What an optimizer is to the code that all of them share: plain data, no torch headers.
#pragma once

#include <array>
#include <cstdint>
#include <variant>

#include "common/host_device.h"

namespace alrao {

// The options that every optimizer has; its own options are a struct on top of these.
struct FeatureOptions {
  double lr = 1;           // the multiplier of every rate
  double grad_factor = 1;  // 1 / grad_scale, negative to maximize
  double warmup_steps = 0;
  double averaging = 0;  // the power by which later values count more in the averages
};

// What the multiplier is multiplied by in the update after `step` others.
template <typename acc>
ALRAO_HOST_DEVICE static inline acc warmup_factor(acc warmup_steps, int64_t step) {
  const acc updates = static_cast<acc>(step + 1);
  return updates < warmup_steps ? updates * (1 / warmup_steps) : 1;
}

// What the value after that update weighs in the running average.
template <typename acc>
ALRAO_HOST_DEVICE static inline acc average_weight(acc averaging, int64_t step) {
  return (averaging + 1) / (static_cast<acc>(step) + averaging + 1);
}

// The first value takes the place of whatever was there, NaN included.
template <typename acc>
ALRAO_HOST_DEVICE static inline acc averaged(acc average, acc value, acc weight) {
  return weight == 1 ? value : average + weight * (value - average);
}

// One of an optimizer's own options, a number or a switch, by its name in Python. A struct's
// table() lists them in the order of the table in alrao_fast/ops/<op>.py; that both agree is
// checked when the extension is loaded.
template <class Options>
struct Option {
  const char* name;
  std::variant<double Options::*, bool Options::*> member;

  bool is_number() const { return member.index() == 0; }

  void set(Options& options, double value) const {
    if (is_number()) {
      options.*std::get<0>(member) = value;
    } else {
      options.*std::get<1>(member) = value != 0;
    }
  }
};

template <class Options, class Type>
Option(const char*, Type Options::*) -> Option<Options>;

}  // namespace alrao
