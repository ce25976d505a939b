// The kernels of the feature optimizers: update entries [begin, end) of one parameter. `begin` is a
// multiple of 8 (the random bits of stochastic rounding come eight at a time).
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "feature/adam.h"
#include "feature/record.h"
#include "feature/sgd.h"

namespace alrao::cpu {

ALRAO_DECLARE_KERNEL(void, feature_sgd_piece,
                     (const FeatureRecord& record, const SgdOptions& options, int64_t begin,
                      int64_t end));
ALRAO_DECLARE_KERNEL(void, feature_adam_piece,
                     (const FeatureRecord& record, const AdamOptions& options, int64_t begin,
                      int64_t end));

}  // namespace alrao::cpu
