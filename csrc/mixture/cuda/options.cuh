// The loss's options in the kernels of switch_mixture (alrao_fast/reference/switch_mixture.py).
#pragma once

#include "mixture/cuda/rows.cuh"

namespace alrao::cuda {

// a / b within 2^-22 of it, for b from 2^-126 to 2^126.
__device__ inline float fast_divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
__device__ inline double fast_divide(double a, double b) { return a / b; }

// tanh(x) within 2^-20 of it.
__device__ inline float fast_tanh(float x) {
  // Near 0 by its series, as 1 - 2 / (1 + e^2x) is there a difference of ones.
  const float square = x * x;
  const float near =
      x + x * square *
              (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315 + square * (62.f / 2835))));
  const float far = 1 - fast_divide(2, 1 + fast_exp(2 * fmin(x, 40.f)));
  return square < 0.0625f ? near : far;
}
__device__ inline double fast_tanh(double x) { return std::tanh(x); }

// softcap tanh(logit / softcap), NaN for what is not finite.
template <class T>
__device__ T capped(T logit, T softcap) {
  return is_finite(logit) ? softcap * fast_tanh(fast_divide(logit, softcap)) : logit * T(0);
}

// Its derivative, by the capped logit.
template <class T>
__device__ T cap_derivative(T logit, T softcap) {
  const T share = fast_divide(logit, softcap);
  return T(1) - share * share;
}

// Sums over classes, l being a logit less the largest: of w l, q l, w q l, q and w q.
template <class T>
struct OptionSums {
  T weighted, dot, weighted_dot, mass, weighted_mass;

  static __device__ OptionSums none() { return {T(0), T(0), T(0), T(0), T(0)}; }

  __device__ void add(T w, T q, T below) {
    weighted += w * below;
    dot += q * below;
    weighted_dot += w * q * below;
    mass += q;
    weighted_mass += w * q;
  }
};

struct AddOptionSums {
  template <class T>
  __device__ OptionSums<T> operator()(const OptionSums<T>& a, const OptionSums<T>& b) const {
    return {a.weighted + b.weighted, a.dot + b.dot, a.weighted_dot + b.weighted_dot,
            a.mass + b.mass, a.weighted_mass + b.weighted_mass};
  }
};

// What the options say of neighbouring classes.
template <class T, int kCount>
struct OptionEntries {
  bool is_soft, are_summed;  // whether the loss looks at other classes than the target's
  T weight[kCount], soft[kCount];

  __device__ OptionEntries(const MixtureOptions<T>& options, int64_t sample, int64_t classes,
                           int64_t i)
      : is_soft(options.soft != nullptr), are_summed(is_soft || options.smoothing != 0) {
    const auto load = [&](const T* from, T* to) {
      load_some<kCount>(from, i, classes, is_aligned<T, kCount>(from), to);
    };
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      weight[j] = T(1);
      soft[j] = T(0);
    }
    if (are_summed && options.class_weight != nullptr) load(options.class_weight, weight);
    if (is_soft) load(options.soft + sample * classes, soft);
  }

  // What class j has of the target's share of the gradient.
  __device__ T share(int j, bool is_target) const {
    return is_soft ? weight[j] * soft[j] : static_cast<T>(is_target);
  }
};

// A softmax with the options' sums, of a row or a part of it, as its entries are read.
template <class T>
struct OptionSoftmax {
  Softmax<T> softmax;
  OptionSums<T> sums;
  T weight;  // sum of w

  static __device__ OptionSoftmax none() {
    return {Softmax<T>::none(), OptionSums<T>::none(), T(0)};
  }

  // For a larger maximum, in place of `before`. All terms have one sign.
  __device__ void lower(T before) {
    if (before == softmax.peak.value || before == lowest<T>()) return;
    const T shift = before - softmax.peak.value;
    sums.weighted += weight * shift;
    sums.dot += sums.mass * shift;
    sums.weighted_dot += sums.weighted_mass * shift;
  }

  template <int kCount>
  __device__ void take(const OptionEntries<T, kCount>& entries, const T* value, int i, int end) {
    const T before = softmax.peak.value;
    take_row<kCount>(softmax, value, i, end);
    lower(before);
    if (!entries.are_summed) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (i + j >= end) break;
      const T below = value[j] - softmax.peak.value, w = entries.weight[j];
      weight += w;
      if (entries.is_soft) {
        sums.add(w, entries.soft[j], below);
      } else {
        sums.weighted += w * below;
      }
    }
  }

  // Of weights that are all 1.
  template <int kCount>
  __device__ void take_uniform(bool summed, const T* value, int i, int end) {
    const T before = softmax.peak.value;
    take_row<kCount>(softmax, value, i, end);
    if (!summed) return;
    lower(before);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (i + j >= end) break;
      weight += 1;
      sums.weighted += value[j] - softmax.peak.value;
    }
  }

  static __device__ OptionSoftmax merged(OptionSoftmax a, OptionSoftmax b) {
    const T before_a = a.softmax.peak.value, before_b = b.softmax.peak.value;
    a.softmax = b.softmax = Merge()(a.softmax, b.softmax);
    a.lower(before_a);
    b.lower(before_b);
    return {a.softmax, AddOptionSums()(a.sums, b.sums), a.weight + b.weight};
  }
};

// What a clone's logits say of a sample, and what makes the gradient of them; scale is NaN where
// there is none.
template <class T>
struct OptionTerms {
  T objective, likelihood, scale, spread, hit;

  __device__ bool alive() const { return is_alive(objective) && is_alive(likelihood); }
  __device__ bool flows() const { return scale == scale; }

  // To a logit of weight w, e being the exponential of what it is below the largest: the target's
  // share is w q, or 1 at the target.
  __device__ T gradient(T e, T w, T share) const { return e * scale - w * spread - share * hit; }
};

template <class T>
__device__ OptionTerms<T> option_terms(const MixtureOptions<T>& options, int64_t classes,
                                       LogitSums<T> logits, T target_logit, int64_t target,
                                       const OptionSums<T>& sums, T weight) {
  const bool soft = options.soft != nullptr;
  const T log_sum = std::log(logits.sum);
  const T class_weight =
      soft || options.class_weight == nullptr || target < 0 ? T(1) : options.class_weight[target];
  const SmoothedTarget<T> smoothed{options.smoothing,
                                   static_cast<T>(classes),
                                   log_sum,
                                   sums.weighted,
                                   soft ? sums.weighted_dot : target_logit - logits.max,
                                   soft ? sums.weighted_mass : T(1)};
  const T lse = logits.max + log_sum, total = smoothed.total(class_weight);
  OptionTerms<T> terms;
  terms.likelihood = soft ? sums.dot - sums.mass * log_sum : smoothed.dot - log_sum;
  terms.objective = smoothed.log_likelihood(class_weight) - options.z_loss * lse * lse;
  const T whole = total == T(0) ? T(0) : T(1), divisor = total == T(0) ? T(1) : total;
  terms.scale = weight * (whole + 2 * options.z_loss * lse) / logits.sum;
  terms.spread = whole * weight * options.smoothing / (static_cast<T>(classes) * divisor);
  // weight (1 - e) w / T in other words: of one class alone nothing is left, to the bit.
  const T rest = whole * (weight - static_cast<T>(classes) * terms.spread);
  terms.hit = smoothed.mass == T(0) ? T(0) : rest / smoothed.mass;
  if (!terms.alive()) terms.scale = NAN;
  return terms;
}

// Whether a sample with options counts, and with which weight.
template <class T>
__device__ bool counts_with_options(const MixtureOptions<T>& options, const ClassTargets& target,
                                    int64_t sample) {
  if (options.row_weight != nullptr && options.row_weight[sample] == 0) return false;
  return target.classes == nullptr || options.soft != nullptr ||
         target.options.counts(target.classes[sample]);
}

template <class T>
__device__ T weight_with_options(const MixtureOptions<T>& options, int64_t sample, T norm) {
  if (options.row_weight == nullptr) return norm;
  const T weight = options.row_weight[sample];
  return options.scale == nullptr ? weight : weight / *options.scale;
}

}  // namespace alrao::cuda
