// What an optimizer is to the code that all of them share: plain data, no torch headers.
#pragma once

#include <array>
#include <variant>

namespace alrao {

// The options that every optimizer has; its own options are a struct on top of these.
struct FeatureOptions {
  double lr = 1;           // the multiplier of every rate
  double grad_factor = 1;  // 1 / grad_scale, negative to maximize
};

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
