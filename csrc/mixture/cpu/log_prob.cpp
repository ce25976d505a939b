// Log-probabilities of the mixture and their gradient, on the CPU: all clones of a chunk of samples
// at a time. The backward computes the logits again rather than keep [B, N, C].
#include <torch/csrc/stable/ops.h>

#include "common/cpu/gemm.h"
#include "mixture/boxed.h"
#include "mixture/cpu/problem.h"

namespace alrao::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlockRows = 512;
constexpr int64_t kTaskLanes = 64;

// The inputs in one type, and what both directions compute first.
template <class T>
class LogProb {
 public:
  LogProb(const MixtureInputs& inputs, const MixtureSizes& size, int64_t memory_budget,
          double softcap, bool backward)
      : size_(size),
        softcap_(static_cast<T>(softcap)),
        x_(in_type<T>(inputs.x)),
        weight_(in_type<T>(inputs.weight)),
        blocks_(ceil_div(size.classes, kBlockRows)),
        ld_(lanes(memory_budget, backward)),
        z_(size.clones * size.classes * ld_),
        block_(size.clones * (3 * blocks_ + 1) * ld_),
        max_(softcap != 0 && backward ? size.clones * blocks_ * ld_ : 0),
        mass_(ld_),
        health_(size.clones),
        finite_weight_(static_cast<const T*>(weight_.const_data_ptr()), size.clones,
                       size.classes * size.features) {
    if (inputs.bias) bias_ = in_type<T>(*inputs.bias);
    log_posterior_ = as_doubles(inputs.log_posterior);
    whole_ = log_mass([](int64_t) { return true; });
    if (whole_ == -INFINITY) return;
    for (double& a : log_posterior_) a -= whole_;
  }

  // `log_mass` receives the logarithm of what the posterior of the living clones adds up to.
  void forward(T* out, T* log_mass) {
    Buffer<T> transposed(size_.classes * ld_);
    for (int64_t begin = 0; begin < size_.samples; begin += ld_) {
      const int64_t count = std::min(ld_, size_.samples - begin);
      logits(begin, count);
      for (int64_t lane = 0; lane < count; ++lane) {
        log_mass[begin + lane] = static_cast<T>(whole_ + mass_[lane]);
      }
      run_tasks(blocks_, [&](int64_t block) {
        const int64_t row = block * kBlockRows;
        T* tile = transposed.data() + row * ld_;
        log_mixture_rows(LogMixtureRows<T>{tile, z_.data() + row * ld_, size_.clones,
                                           size_.classes * ld_, rows(block), ld_, ld_,
                                           offset(0, block), blocks_ * 3 * ld_});
        for (int64_t lane = 0; lane < count; ++lane) {
          T* to = out + (begin + lane) * size_.classes + row;
          for (int64_t i = 0; i < rows(block); ++i) to[i] = tile[i * ld_ + lane];
        }
      });
    }
  }

  void backward(const T* grad, const T* log_prob, T* dx, T* dweight, T* dbias) {
    Buffer<T> grad_rows(size_.classes * ld_), log_prob_rows(size_.classes * ld_);
    const Tensor finite_x = with_finite_rows<T>(x_, [](int64_t) { return true; });
    for (int64_t begin = 0; begin < size_.samples; begin += ld_) {
      const int64_t count = std::min(ld_, size_.samples - begin);
      transpose(grad + begin * size_.classes, count, grad_rows.data());
      transpose(log_prob + begin * size_.classes, count, log_prob_rows.data());
      logits(begin, count);
      shares(grad_rows.data(), log_prob_rows.data());
      logit_gradients(begin, count, grad_rows.data(), log_prob_rows.data(),
                      static_cast<const T*>(finite_x.const_data_ptr()), dweight, dbias);
      if (!dx) continue;
      const T* weight = finite_weight_.get(health_);
      const int64_t all = size_.clones * size_.classes;
      run_tasks(ceil_div(count, kTaskLanes), [&](int64_t i) {
        const int64_t lane = i * kTaskLanes, lanes = std::min(kTaskLanes, count - lane);
        gemm<T>(
            row_major(dx + (begin + lane) * size_.features, lanes, size_.features, size_.features),
            row_major<const T>(z_.data() + lane, all, lanes, ld_).transposed(),
            row_major(weight, all, size_.features, size_.features), false);
      });
    }
  }

 private:
  int64_t lanes(int64_t memory_budget, bool backward) const {
    const int64_t per_sample =
        (size_.clones + (backward ? 2 : 1)) * size_.classes * static_cast<int64_t>(sizeof(T));
    // The backward adds to dweight once per chunk, so it takes the budget; the forward stays in
    // cache.
    const int64_t bytes = backward ? memory_budget : std::min(memory_budget, kCacheBytes);
    return std::clamp(bytes / per_sample / kLaneTile * kLaneTile, kLaneTile,
                      round_up(size_.samples, kLaneTile));
  }

  int64_t rows(int64_t block) const {
    return std::min(kBlockRows, size_.classes - block * kBlockRows);
  }
  T* block_value(int64_t n, int64_t block, int64_t which) {
    return block_.data() + ((n * blocks_ + block) * 3 + which) * ld_;
  }
  // What to add to the block's logits for log-probabilities of the clone, and for its part in the
  // mixture: -inf where it is dead.
  T* log_scale(int64_t n, int64_t block) { return block_value(n, block, 0); }
  T* offset(int64_t n, int64_t block) { return block_value(n, block, 1); }
  // Of the block's logits, where the backward needs them.
  T* max(int64_t n, int64_t block) { return max_.data() + (n * blocks_ + block) * ld_; }
  T* share_sum(int64_t n) { return block_.data() + (3 * size_.clones * blocks_ + n) * ld_; }
  const T* x() const { return static_cast<const T*>(x_.const_data_ptr()); }
  const T* weight() const { return static_cast<const T*>(weight_.const_data_ptr()); }
  int64_t row_of(int64_t n, int64_t block) const { return n * size_.classes + block * kBlockRows; }

  template <class Body>
  void for_each_block(const Body& body) {
    run_tasks(size_.clones * blocks_, [&](int64_t i) { body(i / blocks_, i % blocks_); });
  }

  // log sum e^a over the clones that are alive, -inf without any.
  template <class Alive>
  double log_mass(const Alive& alive) const {
    auto mass = empty_mixture<double>();
    for (int64_t n = 0; n < size_.clones; ++n) {
      if (alive(n)) take_in(mass, log_posterior_[n]);
    }
    return -mixture_nll(mass);
  }

  // Logits of all clones, less the largest of the block; `log_scale` and `offset` for them.
  void logits(int64_t begin, int64_t count) {
    const int64_t features = size_.features;
    for_each_block([&](int64_t n, int64_t block) {
      T* z = z_.data() + row_of(n, block) * ld_;
      gemm<T>(row_major(z, rows(block), count, ld_),
              row_major(weight() + row_of(n, block) * features, rows(block), features, features),
              row_major(x() + begin * features, count, features, features).transposed(), false);
      const T* bias =
          bias_ ? static_cast<const T*>(bias_->const_data_ptr()) + row_of(n, block) : nullptr;
      log_sum_rows(LogSumRows<T>{z, rows(block), ld_, ld_, bias, block_value(n, block, 0),
                                 block_value(n, block, 1), softcap_});
      // Its place is taken by the scale.
      if (max_.size() > 0) std::copy_n(block_value(n, block, 0), ld_, max(n, block));
    });
    std::fill(mass_.begin(), mass_.end(), 0.0);
    for (int64_t n = 0; n < size_.clones; ++n) {
      for (int64_t lane = 0; lane < ld_; ++lane) {
        if (set_scales(n, lane, lane < count)) continue;
        health_[n].suspect = true;
        mass_[lane] = NAN;
      }
    }
    for (int64_t lane = 0; lane < count; ++lane) {
      if (std::isnan(mass_[lane])) leave_out_the_dead(lane);
    }
  }

  // From the maxima and sums of the clone's blocks. False for a sample that it is dead for, where
  // the scales are NaN and the offsets -inf.
  bool set_scales(int64_t n, int64_t lane, bool is_sample) {
    T max = -INFINITY;
    double sum = 0;
    for (int64_t k = 0; k < blocks_; ++k) max = std::max(max, block_value(n, k, 0)[lane]);
    for (int64_t k = 0; k < blocks_; ++k) {
      const double lag = static_cast<double>(block_value(n, k, 0)[lane]) - max;
      sum += block_value(n, k, 1)[lane] * (lag == 0 ? 1 : std::exp(lag));
    }
    const double log_sum = std::log(sum);
    const bool alive = is_sample && is_alive(log_sum);
    for (int64_t k = 0; k < blocks_; ++k) {
      // The difference of the maxima first: they may be huge, and the logarithm is small.
      const double scale = static_cast<double>(block_value(n, k, 0)[lane]) - max - log_sum;
      log_scale(n, k)[lane] = static_cast<T>(alive ? scale : NAN);
      offset(n, k)[lane] = static_cast<T>(alive ? log_posterior_[n] + scale : -INFINITY);
    }
    return alive || !is_sample;
  }

  // What a dead clone has of the posterior's mass goes to the living.
  void leave_out_the_dead(int64_t lane) {
    mass_[lane] = log_mass([&](int64_t n) { return !std::isnan(log_scale(n, 0)[lane]); });
    if (mass_[lane] == -INFINITY) return;
    for (int64_t n = 0; n < size_.clones; ++n) {
      for (int64_t k = 0; k < blocks_; ++k) {
        const double scale = log_scale(n, k)[lane];
        if (std::isnan(scale)) continue;
        offset(n, k)[lane] = static_cast<T>(log_posterior_[n] - mass_[lane] + scale);
      }
    }
  }

  void transpose(const T* from, int64_t count, T* to) const {
    for (int64_t lane = 0; lane < ld_; ++lane) {
      for (int64_t c = 0; c < size_.classes; ++c) {
        to[c * ld_ + lane] = lane < count ? from[lane * size_.classes + c] : T(0);
      }
    }
  }

  // Per clone and sample: the part of the gradient that goes through the normaliser.
  void shares(const T* grad, const T* log_prob) {
    for_each_block([&](int64_t n, int64_t block) {
      const int64_t row = block * kBlockRows;
      share_rows(ShareRows<T>{z_.data() + row_of(n, block) * ld_, rows(block), ld_, ld_,
                              offset(n, block), log_prob + row * ld_, grad + row * ld_,
                              block_value(n, block, 2)});
    });
    for (int64_t n = 0; n < size_.clones; ++n) {
      std::fill_n(share_sum(n), ld_, T(0));
      for (int64_t k = 0; k < blocks_; ++k) {
        for (int64_t lane = 0; lane < ld_; ++lane) {
          share_sum(n)[lane] += block_value(n, k, 2)[lane];
        }
      }
    }
  }

  void logit_gradients(int64_t begin, int64_t count, const T* grad, const T* log_prob,
                       const T* finite_x, T* dweight, T* dbias) {
    const int64_t features = size_.features;
    for_each_block([&](int64_t n, int64_t block) {
      const int64_t row = block * kBlockRows, at = row_of(n, block);
      T* z = z_.data() + at * ld_;
      share_gradient_rows(ShareGradientRows<T>{
          z, rows(block), ld_, ld_, offset(n, block), log_scale(n, block), log_prob + row * ld_,
          grad + row * ld_, share_sum(n), dbias ? dbias + at : nullptr, begin > 0, softcap_,
          max_.size() > 0 ? max(n, block) : nullptr});
      if (!dweight) return;
      gemm<T>(row_major(dweight + at * features, rows(block), features, features),
              row_major<const T>(z, rows(block), count, ld_),
              row_major(finite_x + begin * features, count, features, features), begin > 0);
    });
  }

  MixtureSizes size_;
  T softcap_;
  Tensor x_, weight_;
  std::optional<Tensor> bias_;
  std::vector<double> log_posterior_;  // normalised; `whole_` is what was taken off
  double whole_;
  int64_t blocks_, ld_;
  Buffer<T> z_;  // [N C][ld]
  // [N][blocks][log_scale, offset, sum of shares][ld], then the clones' sums of shares [N][ld]
  Buffer<T> block_;
  Buffer<T> max_;             // [N][blocks][ld], with a softcap
  std::vector<double> mass_;  // [ld]: log of the normalised posterior's mass on the living clones
  std::vector<CloneHealth> health_;
  FiniteWeight<T> finite_weight_;
};

template <class T>
LogProbOutputs forward(const MixtureInputs& inputs, const MixtureSizes& size, int64_t memory_budget,
                       double softcap) {
  const Tensor out = empty_tensor<T>({size.samples, size.classes});
  const Tensor log_mass = empty_tensor<T>({size.samples});
  if (size.samples > 0) {
    LogProb<T>(inputs, size, memory_budget, softcap, false)
        .forward(static_cast<T*>(out.mutable_data_ptr()),
                 static_cast<T*>(log_mass.mutable_data_ptr()));
  }
  return {out, log_mass};
}

LogProbOutputs log_prob(const MixtureInputs& inputs, int64_t memory_budget, double softcap) {
  const MixtureSizes size = check_mixture(inputs, memory_budget);
  check_softcap(softcap);
  const bool is_double = inputs.x.scalar_type() == ScalarType::Double;
  return is_double ? forward<double>(inputs, size, memory_budget, softcap)
                   : forward<float>(inputs, size, memory_budget, softcap);
}

template <class T>
MixtureGradients backward(const LogProbGradient& a, const MixtureSizes& size) {
  auto [dx, dweight, dbias] = empty_gradients<T>(size, a.need_dx, a.need_dw);
  const auto data_or_null = [](const Tensor& tensor, bool needed) {
    return needed ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
  };
  if (size.samples > 0) {
    const Tensor upstream = dense(a.grad), value = dense(a.log_prob);
    LogProb<T>(a.inputs, size, a.memory_budget, a.softcap, true)
        .backward(static_cast<const T*>(upstream.const_data_ptr()),
                  static_cast<const T*>(value.const_data_ptr()), data_or_null(dx, a.need_dx),
                  data_or_null(dweight, a.need_dw), data_or_null(dbias, a.need_dw));
  } else {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  }
  return {dx, dweight, dbias};
}

MixtureGradients log_prob_backward(const LogProbGradient& arguments) {
  const MixtureSizes size = check_log_prob_gradient(arguments);
  const bool is_double = arguments.inputs.x.scalar_type() == ScalarType::Double;
  return is_double ? backward<double>(arguments, size) : backward<float>(arguments, size);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("switch_mixture_log_prob", &boxed_log_prob<&log_prob>);
  m.impl("switch_mixture_log_prob_backward", &boxed_log_prob_backward<&log_prob_backward>);
}

}  // namespace alrao::cpu
