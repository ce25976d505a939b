// The kernels of the feature optimizers, <stem>_piece: update entries [begin, end) of one
// parameter. `begin` is a multiple of 8 (the random bits of stochastic rounding come eight at a
// time).
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "feature/optimizers.h"
#include "feature/record.h"

namespace alrao::cpu {

#define ALRAO_DECLARE_PIECE(stem, Options) \
  ALRAO_DECLARE_KERNEL(                    \
      void, stem##_piece,                  \
      (const FeatureRecord& record, const Options& options, int64_t begin, int64_t end));
ALRAO_OPTIMIZERS(ALRAO_DECLARE_PIECE)
#undef ALRAO_DECLARE_PIECE

}  // namespace alrao::cpu
