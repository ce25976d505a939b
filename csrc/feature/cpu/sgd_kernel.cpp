#include "feature/cpu/pieces.h"
#include "feature/cpu/update_piece.h"

namespace alrao::cpu::ALRAO_ISA {
namespace {

template <typename acc, Momentum MOMENTUM, bool NESTEROV, bool DECAY>
struct SgdUpdate {
  static constexpr int kStates = MOMENTUM == Momentum::kNone ? 0 : 1;
  static constexpr bool kUsual = MOMENTUM == Momentum::kNone || MOMENTUM == Momentum::kTorch;

  SgdScalars<acc> scalars;

  template <class Entries>
  void uniform(const Entries& arrays, acc rate, int64_t n) const {
    const acc scaled = scalars.lr * rate;
    each(arrays, n, [scaled](int64_t) { return scaled; });
  }

  template <class Entries>
  void varying(const Entries& arrays, const acc* rates, int64_t n) const {
    const acc lr = scalars.lr;
    each(arrays, n, [lr, rates](int64_t i) { return lr * rates[i]; });
  }

 private:
  template <class Entries, class Rate>
  void each(const Entries entries, int64_t n, Rate rate) const {
    auto* const bufs = entries.states[0];
    const SgdScalars<acc> s = scalars;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      acc x = entries.value(i), buf = 0;
      if constexpr (MOMENTUM == Momentum::kTorch || MOMENTUM == Momentum::kAuthors)
        buf = widen(bufs[i]);
      sgd_element(x, widen(entries.g[i]), buf, rate(i), s, SgdRule{MOMENTUM, NESTEROV, DECAY});
      entries.store(i, x);
      if constexpr (MOMENTUM != Momentum::kNone) round_to(buf, bufs[i]);
    }
  }
};

template <typename acc, Momentum MOMENTUM, bool NESTEROV>
void with_decay(const FeatureRecord& record, const SgdScalars<acc>& s, int64_t begin, int64_t end) {
  if (s.weight_decay != 0) {
    update_piece<acc>(record, begin, end, SgdUpdate<acc, MOMENTUM, NESTEROV, true>{s});
  } else {
    update_piece<acc>(record, begin, end, SgdUpdate<acc, MOMENTUM, NESTEROV, false>{s});
  }
}

template <typename acc>
void piece(const FeatureRecord& record, const SgdOptions& o, int64_t begin, int64_t end) {
  const SgdScalars<acc> s{static_cast<acc>(o.lr),
                          static_cast<acc>(o.grad_factor),
                          static_cast<acc>(o.momentum),
                          static_cast<acc>(o.momentum != 0 ? 1 / o.momentum : 0),
                          static_cast<acc>(1 - o.dampening),
                          static_cast<acc>(o.weight_decay)};
  if (o.momentum == 0) {
    with_decay<acc, Momentum::kNone, false>(record, s, begin, end);
  } else if (record.step == 0) {
    if (o.nesterov) {
      with_decay<acc, Momentum::kFirst, true>(record, s, begin, end);
    } else {
      with_decay<acc, Momentum::kFirst, false>(record, s, begin, end);
    }
  } else if (o.authors_momentum) {
    if (o.nesterov) {
      with_decay<acc, Momentum::kAuthors, true>(record, s, begin, end);
    } else {
      with_decay<acc, Momentum::kAuthors, false>(record, s, begin, end);
    }
  } else if (o.nesterov) {
    with_decay<acc, Momentum::kTorch, true>(record, s, begin, end);
  } else {
    with_decay<acc, Momentum::kTorch, false>(record, s, begin, end);
  }
}

}  // namespace

void feature_sgd_piece(const FeatureRecord& record, const SgdOptions& options, int64_t begin,
                       int64_t end) {
  if (record.param_dtype == Dtype::kFloat64) {
    piece<double>(record, options, begin, end);
  } else {
    piece<float>(record, options, begin, end);
  }
}

}  // namespace alrao::cpu::ALRAO_ISA
