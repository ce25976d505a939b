// The float32 master of a bf16 or fp16 parameter.
#pragma once

#include "common/element.h"

namespace alrao {

// What an entry is worth to an update: its master, as long as the parameter holds that rounded.
// Where it does not, the parameter was written by someone else, and counts; a NaN there does, too,
// and an infinity to which the master has overflowed does not.
template <class Param>
ALRAO_HOST_DEVICE static inline float master_value(float master, Param param) {
  Param rounded;
  round_to(master, rounded);
  const float value = widen(param);
  return widen(rounded) == value ? master : value;
}

}  // namespace alrao
