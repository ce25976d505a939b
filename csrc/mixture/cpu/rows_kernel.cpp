// Row kernels of switch_mixture, compiled once per instruction set. See rows.h.
#include "mixture/cpu/rows.h"

#include "common/cpu/simd.h"

namespace alrao::cpu::ALRAO_ISA {
namespace {

constexpr int64_t kGroup = 4;  // vectors kept in registers while walking down the rows

// Maximum over the rows, and NaN in `bad` where a logit is not finite, else 0.
template <class T, int64_t K>
ALRAO_INLINE void max_of_rows(const T* z, int64_t rows, int64_t ld, const T* bias, T* max, T* bad) {
  constexpr int64_t width = Simd<T>::kWidth;
  Vector<T> m[K], b[K];
  for (int64_t k = 0; k < K; ++k) {
    m[k] = splat(T(-kInfinity));
    b[k] = splat(T(0));
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Vector<T> offset = splat(bias ? bias[i] : T(0));
    for (int64_t k = 0; k < K; ++k) {
      const Vector<T> v = load(z + i * ld + k * width) + offset;
      m[k] = greater(v, m[k]);
      b[k] += v * T(0);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    store(max + k * width, m[k]);
    store(bad + k * width, b[k]);
  }
}

// z becomes z + bias - max, or its exponential. `sum` holds 0, or NaN to be kept, and receives the
// sum of the exponentials.
template <class T, int64_t K, bool kExponential>
ALRAO_INLINE void exp_of_rows(T* z, int64_t rows, int64_t ld, const T* bias, const T* max, T* sum) {
  constexpr int64_t width = Simd<T>::kWidth;
  Vector<T> m[K], s[K];
  for (int64_t k = 0; k < K; ++k) {
    m[k] = load(max + k * width);
    s[k] = load(sum + k * width);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Vector<T> offset = splat(bias ? bias[i] : T(0));
    for (int64_t k = 0; k < K; ++k) {
      T* p = z + i * ld + k * width;
      const Vector<T> below = load(p) + offset - m[k];
      const Vector<T> e = exp_below(below);
      s[k] += e;
      store(p, kExponential ? e : below);
    }
  }
  for (int64_t k = 0; k < K; ++k) store(sum + k * width, s[k]);
}

template <class T, bool kExponential>
ALRAO_INLINE void exp_of_tile(T* z, int64_t rows, int64_t ld, int64_t lanes, const T* bias,
                              const T* max, T* sum) {
  constexpr int64_t width = Simd<T>::kWidth;
  int64_t lane = 0;
  for (; lane + kGroup * width <= lanes; lane += kGroup * width) {
    exp_of_rows<T, kGroup, kExponential>(z + lane, rows, ld, bias, max + lane, sum + lane);
  }
  for (; lane < lanes; lane += width) {
    exp_of_rows<T, 1, kExponential>(z + lane, rows, ld, bias, max + lane, sum + lane);
  }
}

template <class T>
ALRAO_INLINE void max_of_tile(const T* z, int64_t rows, int64_t ld, int64_t lanes, const T* bias,
                              T* max, T* bad) {
  constexpr int64_t width = Simd<T>::kWidth;
  int64_t lane = 0;
  for (; lane + kGroup * width <= lanes; lane += kGroup * width) {
    max_of_rows<T, kGroup>(z + lane, rows, ld, bias, max + lane, bad + lane);
  }
  for (; lane < lanes; lane += width) {
    max_of_rows<T, 1>(z + lane, rows, ld, bias, max + lane, bad + lane);
  }
}

template <class T>
ALRAO_INLINE void find_targets(const SoftmaxRows<T>& a, const T* bias) {
  for (int64_t lane = 0; lane < a.lanes; ++lane) {
    const int64_t row = a.target[lane] - a.first_class;
    if (a.target[lane] < 0 || row < 0 || row >= a.rows) continue;
    const T value = a.z[row * a.ld + lane] + (bias ? bias[row] : T(0));
    a.target_logit[lane] = value;
    bool first = value == a.max[lane];
    for (int64_t i = 0; first && i < row; ++i) {
      first = a.z[i * a.ld + lane] + (bias ? bias[i] : T(0)) < value;
    }
    a.is_argmax[lane] = first;
  }
}

template <class T>
ALRAO_INLINE void softmax(const SoftmaxRows<T>& a) {
  max_of_tile(a.z, a.rows, a.ld, a.lanes, a.bias, a.max, a.sum);
  find_targets(a, a.bias);
  exp_of_tile<T, true>(a.z, a.rows, a.ld, a.lanes, a.bias, a.max, a.sum);
}

// z becomes softcap tanh((z + bias) / softcap), NaN where it is not finite.
template <class T>
ALRAO_INLINE void cap(T* z, int64_t rows, int64_t ld, int64_t lanes, const T* bias, T softcap) {
  constexpr int64_t width = Simd<T>::kWidth;
  const Vector<T> zero = splat(T(0));
  for (int64_t i = 0; i < rows; ++i) {
    const Vector<T> offset = splat(bias ? bias[i] : T(0));
    for (int64_t lane = 0; lane < lanes; lane += width) {
      T* p = z + i * ld + lane;
      const Vector<T> v = load(p) + offset;
      const Vector<T> bounded = softcap * tanh_of(v / softcap);
      store(p, v * T(0) == zero ? bounded : v * T(0));
    }
  }
}

// K vectors of lanes from `lane` on: so many neighbours of a row are in the cache when it is read.
// kSoft: there are probabilities; kKeep: z becomes logit - max, not its exponential.
template <class T, bool kSoft, bool kKeep, int64_t K>
ALRAO_INLINE void option_sums_of(const OptionSoftmaxRows<T>& a, const T* bias, int64_t lane) {
  constexpr int64_t width = Simd<T>::kWidth;
  const SoftmaxRows<T>& r = a.plain;
  // The processor does not fetch ahead by itself where rows are pages apart.
  constexpr int64_t kAhead = 16;
  Vector<T> m[K], s[K], total[kOptionSums][K] = {};
  for (int64_t k = 0; k < K; ++k) {
    m[k] = load(r.max + lane + k * width);
    s[k] = load(r.sum + lane + k * width);
  }
  for (int64_t i = 0; i < r.rows; ++i) {
    const Vector<T> offset = splat(bias ? bias[i] : T(0));
    const Vector<T> w = splat(a.class_weight ? a.class_weight[i] : T(1));
    for (int64_t k = 0; k < K; ++k) {
      T* p = r.z + i * r.ld + lane + k * width;
      const Vector<T> below = load(p) + offset - m[k];
      const Vector<T> e = exp_below(below);
      s[k] += e;
      total[0][k] += w * below;
      if constexpr (kSoft) {
        const T* const from = a.q + i * r.ld + lane + k * width;
        if (i + kAhead < r.rows) __builtin_prefetch(from + kAhead * r.ld);
        const Vector<T> q = load(from);
        total[1][k] += q * below;
        total[2][k] += w * q * below;
        total[3][k] += q;
        total[4][k] += w * q;
      }
      store(p, kKeep ? below : e);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    store(r.sum + lane + k * width, s[k]);
    for (int64_t j = 0; j < kOptionSums; ++j) {
      store(a.sums + j * r.ld + lane + k * width, total[j][k]);
    }
  }
}

template <class T, bool kSoft, bool kKeep>
ALRAO_INLINE void option_sums(const OptionSoftmaxRows<T>& a, const T* bias) {
  constexpr int64_t width = Simd<T>::kWidth, kPair = 2;
  int64_t lane = 0;
  for (; lane + kPair * width <= a.plain.lanes; lane += kPair * width) {
    option_sums_of<T, kSoft, kKeep, kPair>(a, bias, lane);
  }
  for (; lane < a.plain.lanes; lane += width) {
    option_sums_of<T, kSoft, kKeep, 1>(a, bias, lane);
  }
}

template <class T>
ALRAO_INLINE void option_softmax(const OptionSoftmaxRows<T>& a) {
  const SoftmaxRows<T>& r = a.plain;
  const T* bias = r.bias;
  if (a.softcap != 0) {
    cap(r.z, r.rows, r.ld, r.lanes, bias, a.softcap);
    bias = nullptr;
  }
  max_of_tile(r.z, r.rows, r.ld, r.lanes, bias, r.max, r.sum);
  find_targets(r, bias);
  if (a.q) {
    a.softcap != 0 ? option_sums<T, true, true>(a, bias) : option_sums<T, true, false>(a, bias);
  } else {
    a.softcap != 0 ? option_sums<T, false, true>(a, bias) : option_sums<T, false, false>(a, bias);
  }
}

template <class T>
ALRAO_INLINE void log_sum(const LogSumRows<T>& a) {
  const T* bias = a.bias;
  if (a.softcap != 0) {
    cap(a.z, a.rows, a.ld, a.lanes, bias, a.softcap);
    bias = nullptr;
  }
  max_of_tile(a.z, a.rows, a.ld, a.lanes, bias, a.max, a.sum);
  exp_of_tile<T, false>(a.z, a.rows, a.ld, a.lanes, bias, a.max, a.sum);
}

template <class T>
ALRAO_INLINE void residual(const ResidualRows<T>& a) {
  constexpr int64_t width = Simd<T>::kWidth;
  for (int64_t lane = 0; lane < a.lanes; lane += width) {
    Vector<T> s = splat(T(0));
    for (int64_t i = 0; i < a.rows; ++i) {
      T* p = a.z + i * a.ld + lane;
      const Vector<T> d =
          load(p) + splat(a.bias ? a.bias[i] : T(0)) - load(a.expected + i * a.ld + lane);
      s += d * d;
      store(p, d);
    }
    store(a.sum + lane, s);
  }
}

template <class T>
ALRAO_INLINE void put(T* bias_grad, int64_t row, bool accumulate, T value) {
  bias_grad[row] = accumulate ? bias_grad[row] + value : value;
}

// After hits that differ from sample to sample: what cancels in each cancels in the sum.
template <class T, template <class> class Rows>
ALRAO_INLINE void sum_rows(const Rows<T>& a) {
  for (int64_t i = 0; a.bias_grad && i < a.rows; ++i) {
    const T* z = a.z + i * a.ld;
    Vector<T> total = splat(T(0));
    for (int64_t lane = 0; lane < a.lanes; lane += Simd<T>::kWidth) total += load(z + lane);
    put(a.bias_grad, i, a.accumulate, sum_lanes<T>(total));
  }
}

template <class T>
ALRAO_INLINE void gradient(const GradientRows<T>& a) {
  constexpr int64_t width = Simd<T>::kWidth;
  const Vector<T> zero = splat(T(0));
  for (int64_t i = 0; i < a.rows; ++i) {
    Vector<T> total = zero;
    for (int64_t lane = 0; lane < a.lanes; lane += width) {
      T* p = a.z + i * a.ld + lane;
      const Vector<T> factor = load(a.factor + lane);
      const Vector<T> v = factor != zero ? load(p) * factor : zero;
      total += v;
      store(p, v);
    }
    if (a.bias_grad && !a.hits) put(a.bias_grad, i, a.accumulate, sum_lanes<T>(total));
  }
  for (int64_t lane = 0; a.target && lane < a.lanes; ++lane) {
    const int64_t row = a.target[lane] - a.first_class;
    if (a.target[lane] < 0 || row < 0 || row >= a.rows || a.factor[lane] == 0) continue;
    a.z[row * a.ld + lane] -= a.hits ? a.hits[lane] : a.hit;
    if (a.bias_grad && !a.hits) a.bias_grad[row] -= a.hit;
  }
  if (a.hits) sum_rows(a);
}

// d logit / d z, of the capped logit.
template <class V, class T>
ALRAO_INLINE V cap_derivative(V logit, T softcap) {
  const V share = logit / softcap;
  return T(1) - share * share;
}

template <class T, bool kSoft, bool kCapped>
ALRAO_INLINE void option_gradients(const OptionGradientRows<T>& a) {
  constexpr int64_t width = Simd<T>::kWidth;
  const Vector<T> zero = splat(T(0));
  for (int64_t i = 0; i < a.rows; ++i) {
    const Vector<T> w = splat(a.class_weight ? a.class_weight[i] : T(1));
    for (int64_t lane = 0; lane < a.lanes; lane += width) {
      T* p = a.z + i * a.ld + lane;
      const Vector<T> z = load(p);
      Vector<T> v = (kCapped ? exp_below(z) : z) * load(a.factor + lane);
      v -= w * load(a.spread + lane);
      if constexpr (kSoft) v -= w * load(a.q + i * a.ld + lane) * load(a.hit + lane);
      if constexpr (kCapped) v *= cap_derivative(z + load(a.max + lane), a.softcap);
      store(p, load(a.live + lane) != zero ? v : zero);
    }
  }
  for (int64_t lane = 0; !kSoft && lane < a.lanes; ++lane) {
    const int64_t row = a.target[lane] - a.first_class;
    if (a.target[lane] < 0 || row < 0 || row >= a.rows || a.live[lane] == 0) continue;
    T hit = a.hit[lane];
    if (kCapped) {
      // To the bit as above, where the product is rounded before anything is subtracted.
      const Vector<T> max = splat(a.max[lane]);
      volatile T rounded =
          hit * cap_derivative(splat(a.target_logit[lane]) - max + max, a.softcap)[0];
      hit = rounded;
    }
    a.z[row * a.ld + lane] -= hit;
  }
  sum_rows(a);
}

template <class T>
ALRAO_INLINE void option_gradient(const OptionGradientRows<T>& a) {
  if (a.q) {
    a.softcap != 0 ? option_gradients<T, true, true>(a) : option_gradients<T, true, false>(a);
  } else {
    a.softcap != 0 ? option_gradients<T, false, true>(a) : option_gradients<T, false, false>(a);
  }
}

template <class T>
ALRAO_INLINE void weigh(const WeightRows<T>& a) {
  constexpr int64_t width = Simd<T>::kWidth;
  const Vector<T> zero = splat(T(0));
  for (int64_t n = 0; n < a.clones; ++n) {
    for (int64_t i = n * a.rows; i < (n + 1) * a.rows; ++i) {
      for (int64_t lane = 0; lane < a.lanes; lane += width) {
        const Vector<T> w = load(a.weight + n * a.ld + lane);
        store(a.out + i * a.ld + lane, w != zero ? load(a.z + i * a.ld + lane) * w : zero);
      }
    }
  }
}

template <class T>
ALRAO_INLINE void mixture(const MixtureRows<T>& a) {
  constexpr int64_t width = Simd<double>::kWidth;
  typedef T Narrow __attribute__((vector_size(width * sizeof(T))));
  const Vector<double> none = splat(-kInfinity), zero = splat(0.0);
  for (int64_t lane = 0; lane < a.lanes; lane += width) {
    Vector<double> m = none, s = zero;
    for (int64_t n = 0; n < a.clones; ++n) {
      m = greater(load(a.log_likelihood + n * a.ld + lane) + a.log_posterior[n], m);
    }
    for (int64_t n = 0; n < a.clones; ++n) {
      double* p = a.log_likelihood + n * a.ld + lane;
      const Vector<double> e = exp_below(load(p) + a.log_posterior[n] - m);
      s += e;
      store(p, e);
    }
    const Vector<double> inverse = m > none ? 1.0 / s : zero;
    for (int64_t n = 0; n < a.clones; ++n) {
      const Vector<double> r = load(a.log_likelihood + n * a.ld + lane) * inverse;
      const Narrow narrow = __builtin_convertvector(r, Narrow);
      __builtin_memcpy(a.responsibility + n * a.ld + lane, &narrow, sizeof narrow);
    }
    store(a.max + lane, m);
    store(a.sum + lane, s);
  }
}

template <class T>
ALRAO_INLINE void blend(const BlendRows<T>& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    T* __restrict acc = a.acc + i * a.width;
    const T alpha = a.alpha[i], beta = a.beta[i];
    if (alpha == 0) {
      for (int64_t j = 0; j < a.width; ++j) acc[j] = 0;
    } else if (alpha != 1) {
      for (int64_t j = 0; j < a.width; ++j) acc[j] *= alpha;
    }
    if (beta == 0) continue;
    for (int64_t k = 0; k < a.num_parts; ++k) {
      const T* __restrict part = a.part + k * a.part_stride + i * a.width;
      for (int64_t j = 0; j < a.width; ++j) acc[j] += beta * part[j];
    }
  }
}

template <class T>
ALRAO_INLINE void log_mixture(const LogMixtureRows<T>& a) {
  constexpr int64_t width = Simd<T>::kWidth;
  const Vector<T> none = splat(T(-kInfinity));
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t lane = 0; lane < a.lanes; lane += width) {
      const T* z = a.z + i * a.ld + lane;
      Vector<T> m = none, s = splat(T(0));
      for (int64_t n = 0; n < a.clones; ++n) {
        m = greater(load(z + n * a.clone_stride) + load(a.offset + n * a.offset_stride + lane), m);
      }
      for (int64_t n = 0; n < a.clones; ++n) {
        s += exp_below(load(z + n * a.clone_stride) + load(a.offset + n * a.offset_stride + lane) -
                       m);
      }
      store(a.out + i * a.ld + lane, m > none ? m + log_positive(s) : none);
    }
  }
}

// A clone's share in the probability of a class, of logarithm `log_mixture`: at most 1, however
// large the numbers are whose rounding may say otherwise.
template <class V>
ALRAO_INLINE V share_of(V joint, V log_mixture) {
  const V below = joint - log_mixture;
  return exp_below(below > V{} ? V{} : below);
}

template <class T>
ALRAO_INLINE void share(const ShareRows<T>& a) {
  constexpr int64_t width = Simd<T>::kWidth;
  for (int64_t lane = 0; lane < a.lanes; lane += width) {
    const Vector<T> offset = load(a.offset + lane);
    Vector<T> s = splat(T(0));
    for (int64_t i = 0; i < a.rows; ++i) {
      const int64_t at = i * a.ld + lane;
      s += load(a.grad + at) * share_of(load(a.z + at) + offset, load(a.log_mixture + at));
    }
    store(a.sum + lane, s);
  }
}

template <class T>
ALRAO_INLINE void share_gradient(const ShareGradientRows<T>& a) {
  constexpr int64_t width = Simd<T>::kWidth;
  const Vector<T> zero = splat(T(0)), none = splat(T(-kInfinity));
  for (int64_t i = 0; i < a.rows; ++i) {
    Vector<T> total = zero;
    for (int64_t lane = 0; lane < a.lanes; lane += width) {
      const int64_t at = i * a.ld + lane;
      const Vector<T> z = load(a.z + at), offset = load(a.offset + lane);
      const Vector<T> w = share_of(z + offset, load(a.log_mixture + at));
      const Vector<T> p = exp_below(z + load(a.log_scale + lane));
      Vector<T> g = load(a.grad + at) * w - p * load(a.sum + lane);
      if (a.softcap != 0) g *= cap_derivative(z + load(a.max + lane), a.softcap);
      g = offset > none ? g : zero;
      total += g;
      store(a.z + at, g);
    }
    if (a.bias_grad) put(a.bias_grad, i, a.accumulate, sum_lanes<T>(total));
  }
}

}  // namespace

#define ALRAO_DEFINE(name, body, Args)                   \
  void name##_float(const Args<float>& a) { body(a); }   \
  void name##_double(const Args<double>& a) { body(a); } \
  static_assert(true, "a semicolon follows")

ALRAO_DEFINE(softmax_rows, softmax, SoftmaxRows);
ALRAO_DEFINE(option_softmax_rows, option_softmax, OptionSoftmaxRows);
ALRAO_DEFINE(residual_rows, residual, ResidualRows);
ALRAO_DEFINE(gradient_rows, gradient, GradientRows);
ALRAO_DEFINE(option_gradient_rows, option_gradient, OptionGradientRows);
ALRAO_DEFINE(weight_rows, weigh, WeightRows);
ALRAO_DEFINE(mixture_rows, mixture, MixtureRows);
ALRAO_DEFINE(blend_rows, blend, BlendRows);
ALRAO_DEFINE(log_sum_rows, log_sum, LogSumRows);
ALRAO_DEFINE(log_mixture_rows, log_mixture, LogMixtureRows);
ALRAO_DEFINE(share_rows, share, ShareRows);
ALRAO_DEFINE(share_gradient_rows, share_gradient, ShareGradientRows);

}  // namespace alrao::cpu::ALRAO_ISA
