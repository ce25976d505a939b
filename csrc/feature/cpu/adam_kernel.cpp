#include "feature/cpu/pieces.h"
#include "feature/cpu/update_piece.h"

namespace alrao::cpu::ALRAO_ISA {
namespace {

template <typename acc, bool AMSGRAD, Decay DECAY>
struct AdamUpdate {
  static constexpr int kStates = AMSGRAD ? 3 : 2;
  static constexpr bool kUsual = !AMSGRAD;

  AdamScalars<acc> scalars;

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
    auto *const ms = entries.states[0], *const vs = entries.states[1];
    auto* const v_maxs = entries.states[kStates - 1];  // not used without AMSGRAD
    const AdamScalars<acc> s = scalars;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      acc x = entries.value(i), m = widen(ms[i]), v = widen(vs[i]), v_max = 0;
      if constexpr (AMSGRAD) v_max = widen(v_maxs[i]);
      adam_element<AMSGRAD>(x, widen(entries.g[i]), m, v, v_max, rate(i), s, DECAY);
      entries.store(i, x);
      round_to(m, ms[i]);
      round_to(v, vs[i]);
      if constexpr (AMSGRAD) round_to(v_max, v_maxs[i]);
    }
  }
};

template <typename acc, bool AMSGRAD>
void with_decay(const FeatureRecord& record, const AdamOptions& o, const AdamScalars<acc>& s,
                int64_t begin, int64_t end) {
  if (o.weight_decay == 0) {
    update_piece<acc>(record, begin, end, AdamUpdate<acc, AMSGRAD, Decay::kNone>{s});
  } else if (o.decoupled) {
    update_piece<acc>(record, begin, end, AdamUpdate<acc, AMSGRAD, Decay::kWeights>{s});
  } else {
    update_piece<acc>(record, begin, end, AdamUpdate<acc, AMSGRAD, Decay::kGradient>{s});
  }
}

template <typename acc>
void piece(const FeatureRecord& record, const AdamOptions& o, int64_t begin, int64_t end) {
  const double t = static_cast<double>(record.step) + 1;
  const double correction1 = 1 - __builtin_pow(o.beta1, t);
  const double root2 = __builtin_sqrt(1 - __builtin_pow(o.beta2, t));
  const AdamScalars<acc> s{static_cast<acc>(o.lr),
                           static_cast<acc>(o.grad_factor),
                           static_cast<acc>(o.beta1),
                           static_cast<acc>(1 - o.beta1),
                           static_cast<acc>(o.beta2),
                           static_cast<acc>(1 - o.beta2),
                           static_cast<acc>(o.authors_eps ? root2 / correction1 : 1 / correction1),
                           static_cast<acc>(o.authors_eps ? 1 : 1 / root2),
                           static_cast<acc>(o.eps),
                           static_cast<acc>(o.weight_decay)};
  if (o.amsgrad) {
    with_decay<acc, true>(record, o, s, begin, end);
  } else {
    with_decay<acc, false>(record, o, s, begin, end);
  }
}

}  // namespace

void feature_adam_piece(const FeatureRecord& record, const AdamOptions& options, int64_t begin,
                        int64_t end) {
  if (record.param_dtype == Dtype::kFloat64) {
    piece<double>(record, options, begin, end);
  } else {
    piece<float>(record, options, begin, end);
  }
}

}  // namespace alrao::cpu::ALRAO_ISA
