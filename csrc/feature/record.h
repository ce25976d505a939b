// What a kernel of the feature optimizers knows about one parameter: plain data, no torch headers.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace alrao {

constexpr int kMaxStates = 3;

// All tensors of one parameter are dense and have the parameter's strides, so element i means the
// same entry in each of them. In memory order entry i has the rate rates[(i / inner) % period].
struct FeatureRecord {
  void* param;
  const void* grad;  // of the parameter's dtype
  void* states[kMaxStates];
  float* master;  // null, or the float32 copy of a bf16 or fp16 parameter that takes the update
  void* average;  // null, or the running average, in the type of the arithmetic
  const void* rates;
  int64_t numel;
  int64_t inner;
  int64_t period;
  int64_t step;           // updates the parameter has had before this one
  double average_weight;  // of the value after this update, 0 where it does not count
  uint64_t seed;
  bool stochastic;  // round stochastically into the parameter (bf16 and fp16 without master)
  Dtype param_dtype;
  Dtype state_dtypes[kMaxStates];
  Dtype rate_dtype;
};

}  // namespace alrao
