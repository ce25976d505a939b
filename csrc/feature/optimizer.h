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

// What the value after that update weighs in the running average. In the long run only every k-th
// value counts, k the power of two by which it weighs 2^-11 to 2^-10: beside smaller shares of what
// is new a float32 average would stand still.
ALRAO_HOST_DEVICE static inline double average_weight(double averaging, int64_t step) {
  int64_t stride = static_cast<int64_t>(static_cast<double>(step) / (1024 * (averaging + 1)));
  for (int shift = 1; shift < 64; shift *= 2) stride |= stride >> shift;
  stride -= stride >> 1;
  if (stride == 0) stride = 1;
  if ((step & (stride - 1)) != 0) return 0;
  return (averaging + 1) / (static_cast<double>(step / stride) + averaging + 1);
}

// The first value takes the place of whatever was there, NaN included.
template <typename acc>
ALRAO_HOST_DEVICE static inline acc averaged(acc average, acc value, acc weight) {
  if (weight == 0) return average;
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
