// The dtypes of parameters and gradients: plain data, no torch headers.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace alrao {

enum class Dtype : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// What function(T()) returns, T the type that stores `dtype`.
template <class Function>
ALRAO_HOST_DEVICE static inline auto with_type(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kFloat64:
      return function(double());
    case Dtype::kFloat32:
      return function(float());
    case Dtype::kBFloat16:
      return function(BFloat16());
    default:
      return function(Float16());
  }
}

}  // namespace alrao
