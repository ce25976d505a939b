// The optimizers of this family: the stem of each op and its options.
#pragma once

#include "feature/adam.h"
#include "feature/sgd.h"

#define ALRAO_OPTIMIZERS(X)           \
  X(feature_sgd, ::alrao::SgdOptions) \
  X(feature_adam, ::alrao::AdamOptions)
