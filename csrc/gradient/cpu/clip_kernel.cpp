#include "common/element.h"
#include "gradient/cpu/pieces.h"

namespace alrao::cpu::ALRAO_ISA {
namespace {

// Partial sums, so many on every instruction set: the widest holds them in two registers.
constexpr int64_t kLanes = 16;

template <NormKind KIND, class T>
double sum(const T* x, int64_t n, double order) {
  double lanes[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l)
      lanes[l] =
          norm_join<KIND>(lanes[l], norm_term<KIND>(static_cast<double>(widen(x[i + l])), order));
  }
  for (int64_t i = whole; i < n; ++i)
    lanes[i - whole] =
        norm_join<KIND>(lanes[i - whole], norm_term<KIND>(static_cast<double>(widen(x[i])), order));
  double total = 0;
  for (const double lane : lanes) total = norm_join<KIND>(total, lane);
  return total;
}

}  // namespace

double gradient_clip_sum(const void* grad, Dtype dtype, int64_t begin, int64_t n, Norm norm) {
  return with_type(dtype, [&](auto zero) {
    const auto* const x = static_cast<const decltype(zero)*>(grad) + begin;
    switch (norm.kind) {
      case NormKind::kTwo:
        return sum<NormKind::kTwo>(x, n, norm.order);
      case NormKind::kOne:
        return sum<NormKind::kOne>(x, n, norm.order);
      case NormKind::kLargest:
        return sum<NormKind::kLargest>(x, n, norm.order);
      default:
        return sum<NormKind::kPower>(x, n, norm.order);
    }
  });
}

void gradient_clip_scale(void* grad, Dtype dtype, int64_t begin, int64_t n, double factor) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* const x = static_cast<T*>(grad) + begin;
    const auto own = static_cast<compute_t<T>>(factor);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) round_to(widen(x[i]) * own, x[i]);
  });
}

}  // namespace alrao::cpu::ALRAO_ISA
