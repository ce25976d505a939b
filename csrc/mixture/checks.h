// switch_mixture: the N clones of the last layer, evaluated together
// (alrao_fast/reference/switch_mixture.py). Checks of the ops' arguments; they raise before
// anything is written. Those in Python are worded alike (alrao_fast/ops/checks.py).
#pragma once

#include "mixture/arguments.h"
#include "mixture/math.h"

namespace alrao {

MixtureSizes check_mixture(const MixtureInputs& inputs, int64_t memory_budget);

// 0 is none.
void check_softcap(double softcap);

// The targets are classes [B] int64, probabilities [B, C] of the type that x is computed in, or
// values [B, K] of x's dtype.
MixtureSizes check_loss(const LossArguments& arguments);

void check_weights(const WeightArguments& arguments);

// `grad` and `log_prob` are [B, C], `log_mass` is [B], of the type that x is computed in.
MixtureSizes check_log_prob_gradient(const LogProbGradient& arguments);

}  // namespace alrao
