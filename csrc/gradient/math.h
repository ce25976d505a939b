// The arithmetic of clipping by norms (alrao_fast/reference/gradient_clip.py), for host and device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace alrao {

enum class NormKind : int32_t { kTwo, kOne, kLargest, kPower };

struct Norm {
  NormKind kind;
  double order;
};

static inline Norm norm_of_order(double order) {
  if (order == 2) return {NormKind::kTwo, order};
  if (order == 1) return {NormKind::kOne, order};
  return {order == INFINITY ? NormKind::kLargest : NormKind::kPower, order};
}

// What an entry adds to the sum, or is to the maximum, of which the norm is made.
template <NormKind KIND>
ALRAO_HOST_DEVICE static inline double norm_term(double x, double order) {
  if constexpr (KIND == NormKind::kTwo) return x * x;
  if constexpr (KIND == NormKind::kPower) return pow(fabs(x), order);
  return fabs(x);
}

// A NaN stays.
template <NormKind KIND>
ALRAO_HOST_DEVICE static inline double norm_join(double a, double b) {
  if constexpr (KIND == NormKind::kLargest) return b > a || b != b ? b : a;
  return a + b;
}

ALRAO_HOST_DEVICE static inline double norm_of_sum(double sum, Norm norm) {
  if (norm.kind == NormKind::kTwo) return sqrt(sum);
  return norm.kind == NormKind::kPower ? pow(sum, 1 / norm.order) : sum;
}

// 1 where nothing is to be scaled.
ALRAO_HOST_DEVICE static inline double clip_factor(double norm, double max_norm) {
  if (max_norm == INFINITY) return 1;
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1 ? 1 : factor;
}

}  // namespace alrao
