// The float32 master of a bf16 or fp16 parameter.
#pragma once

#include "common/element.h"

namespace alrao {

// Whether a parameter's entry still is its master rounded. Zeros of either sign are one number.
template <class Param>
ALRAO_HOST_DEVICE static inline bool holds_master(float master, Param param) {
  Param rounded;
  round_to(master, rounded);
  return rounded.bits == param.bits || ((rounded.bits | param.bits) & 0x7fffu) == 0;
}

// What an entry is worth to an update: its master, as long as the parameter holds that. Where it
// does not, the parameter was written by someone else, and counts; a NaN there does, too, and an
// infinity to which the master has overflowed does not.
template <class Param>
ALRAO_HOST_DEVICE static inline float master_value(float master, Param param) {
  return holds_master(master, param) ? master : widen(param);
}

}  // namespace alrao
