// One clone after the other, for many classes: the logits of one clone for one chunk of samples are
// all that is held. The responsibilities are not known before all clones have been seen, so dx is
// accumulated with a running maximum and sum per sample, as flash attention does over keys.
//
// The classes are cut into blocks and the blocks dealt to a fixed number of groups, the tasks of
// the parallel loops. First pass: logits, block maxima, exponentials and their sums. Then the sums
// of the blocks give the log-likelihoods, and per block the factor that turns exponentials into
// gradients. Second pass: gradients, dweight, and each group's part of (gradient x weight).
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <numeric>

#include "common/cpu/gemm.h"
#include "mixture/cpu/problem.h"

namespace alrao::cpu {
namespace {

constexpr int64_t kBlockRows = 512;
constexpr int64_t kMaxGroups = 32;

template <class T>
class Streamed {
 public:
  Streamed(const MixtureProblem<T>& p, MixtureResult<T>& out)
      : p_(p),
        out_(out),
        classes_(p.size.classes),
        features_(p.size.features),
        blocks_(ceil_div(classes_, kBlockRows)),
        blocks_per_group_(ceil_div(blocks_, kMaxGroups)),
        groups_(ceil_div(blocks_, blocks_per_group_)),
        chunks_(p, samples_per_chunk()),
        ld_(chunks_.ld()),
        z_(p.keeps_dlogits ? 0 : classes_ * ld_),
        part_(p.options.need_dx ? groups_ * ld_ * features_ : 0),
        block_(blocks_ * ld_ * 4),
        option_block_(p.has_options ? blocks_ * ld_ * kOptionSums : 0),
        lane_(ld_ * 5),
        option_lane_(p.has_options ? ld_ * kOptionLanes : 0),
        is_argmax_((blocks_ + 1) * ld_),
        log_likelihood_(ld_),
        mixture_(p.size.samples, empty_mixture<double>()) {}

  void run() {
    if (p_.keeps_dlogits) {
      out_.dlogits.emplace({chunks_.count(), p_.size.clones * classes_, ld_});
    }
    for (int64_t n = 0; n < p_.size.clones; ++n) {
      CloneHealth health;
      bool first = true;
      for (const auto& chunk : chunks_) {
        const bool alive = logits(chunk, n, &health);
        if (alive && p_.needs_dlogits()) {
          gradients(chunk, n, first);
          first = false;
        } else if (p_.keeps_dlogits) {
          std::fill_n(z(chunk, n), classes_ * ld_, T(0));
        }
        mix(chunk, n);
      }
      if (p_.options.need_dw && (first || health.dead)) {
        std::fill_n(out_.dweight + n * classes_ * features_, classes_ * features_, T(0));
        std::fill_n(out_.dbias + n * classes_, classes_, T(0));
      }
    }
    for (const auto& chunk : chunks_) {
      for (int64_t lane = 0; lane < chunk.size; ++lane) {
        const int64_t b = chunk.begin + lane;
        if (chunk.target[lane] >= 0) add_loss(p_, out_, b, mixture_nll(mixture_[b]));
      }
    }
  }

 private:
  using Chunk = typename Chunks<T>::Chunk;

  int64_t samples_per_chunk() const {
    const int64_t bytes = sizeof(T);
    // The weights are read twice per chunk: no use for a buffer that is much smaller than they are.
    const int64_t budget =
        std::min(p_.options.memory_budget, std::max(kCacheBytes, classes_ * features_ * bytes));
    const int64_t per_sample = (classes_ + (p_.options.need_dx ? groups_ * features_ : 0)) * bytes;
    return budget / per_sample / kLaneTile * kLaneTile;
  }

  // The logits of a clone for the chunk, then their gradients, [C][ld].
  T* z(const Chunk& chunk, int64_t n) const {
    if (!p_.keeps_dlogits) return z_.data();
    return out_.dlogits->data() + classes_ * (chunk.begin * p_.size.clones + n * ld_);
  }

  int64_t rows(int64_t block) const { return std::min(kBlockRows, classes_ - block * kBlockRows); }

  LaneSums<T> sums(int64_t block) {
    T* p = block_.data() + block * ld_ * 4;
    return {p, p + ld_, p + 2 * ld_, is_argmax_.data() + block * ld_,
            p_.has_options ? option_block_.data() + block * ld_ * kOptionSums : nullptr};
  }

  T* factor(int64_t block) { return block_.data() + block * ld_ * 4 + 3 * ld_; }

  Matrix<const T> samples(const Chunk& chunk) const {
    return row_major(p_.x + chunk.begin * features_, chunk.size, features_, features_);
  }

  const T* class_weight(int64_t row) const {
    return p_.class_weight ? p_.class_weight + row : nullptr;
  }

  const T* probabilities(const Chunk& chunk, int64_t row) const {
    return p_.soft ? chunk.values + row * ld_ : nullptr;
  }

  template <class Body>
  void for_each_group(const Body& body) {
    run_tasks(groups_, [&](int64_t group) {
      const int64_t last = std::min((group + 1) * blocks_per_group_, blocks_);
      for (int64_t block = group * blocks_per_group_; block < last; ++block) body(group, block);
    });
  }

  // First pass over a clone's classes; false if the clone has no counted sample it is alive for.
  bool logits(const Chunk& chunk, int64_t n, CloneHealth* health) {
    for_each_group([&](int64_t, int64_t block) {
      const int64_t row = block * kBlockRows;
      T* z = this->z(chunk, n) + row * ld_;
      gemm<T>(row_major(z, rows(block), chunk.size, ld_),
              row_major(p_.clone_weight(n) + row * features_, rows(block), features_, features_),
              samples(chunk).transposed(), false);
      const T* bias = p_.bias ? p_.clone_bias(n) + row : nullptr;
      const LaneSums<T> s = sums(block);
      if (p_.expected) {
        residual_rows(
            ResidualRows<T>{z, rows(block), ld_, ld_, bias, chunk.values + row * ld_, s.sum});
        return;
      }
      const SoftmaxRows<T> softmax{z,     rows(block),    ld_,        ld_,
                                   bias,  chunk.target,   row,        s.max,
                                   s.sum, s.target_logit, s.is_argmax};
      if (p_.has_options) {
        option_softmax_rows(OptionSoftmaxRows<T>{softmax, static_cast<T>(p_.softcap),
                                                 class_weight(row), probabilities(chunk, row),
                                                 s.options});
      } else {
        softmax_rows(softmax);
      }
    });
    return p_.expected ? finish_gaussian(chunk, n, health) : finish_classes(chunk, n, health);
  }

  bool finish_gaussian(const Chunk& chunk, int64_t n, CloneHealth* health) {
    const LaneSums<T> total{nullptr, lane_.data(), nullptr, nullptr};
    std::fill_n(total.sum, ld_, T(0));
    for (int64_t block = 0; block < blocks_; ++block) {
      for (int64_t lane = 0; lane < ld_; ++lane) total.sum[lane] += sums(block).sum[lane];
    }
    T* common = lane_.data() + 3 * ld_;
    finish_clone<T>(p_, chunk, n, ld_, total, log_likelihood_.data(), common, out_, health);
    for (int64_t block = 0; block < blocks_; ++block) std::copy_n(common, ld_, factor(block));
    return is_alive_for_any();
  }

  bool finish_classes(const Chunk& chunk, int64_t n, CloneHealth* health) {
    T* p = lane_.data();
    const LaneSums<T> total{p, p + ld_, p + 2 * ld_, is_argmax_.data() + blocks_ * ld_,
                            option_lane_.data()};
    std::fill_n(total.max, ld_, T(-INFINITY));
    std::fill_n(total.sum, ld_, T(0));
    for (int64_t block = 0; block < blocks_; ++block) {
      const T* max = sums(block).max;
      for (int64_t lane = 0; lane < ld_; ++lane) {
        total.max[lane] = std::max(total.max[lane], max[lane]);
      }
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      const LaneSums<T> s = sums(block);
      T* scale = factor(block);
      for (int64_t lane = 0; lane < ld_; ++lane) {
        scale[lane] = std::exp(s.max[lane] - total.max[lane]);
        total.sum[lane] += s.sum[lane] * scale[lane];
      }
    }
    for (int64_t lane = 0; lane < chunk.size; ++lane) {
      if (chunk.target[lane] < 0) continue;
      const int64_t block = chunk.target[lane] / kBlockRows;
      const LaneSums<T> s = sums(block);
      total.target_logit[lane] = s.target_logit[lane];
      bool first = s.is_argmax[lane] && s.max[lane] == total.max[lane];
      for (int64_t i = 0; first && i < block; ++i) first = sums(i).max[lane] < total.max[lane];
      total.is_argmax[lane] = first;
    }
    T* common = p + 3 * ld_;
    if (p_.has_options) return finish_options(chunk, n, total, common, health);
    finish_clone<T>(p_, chunk, n, ld_, total, log_likelihood_.data(), common, out_, health);
    for (int64_t block = 0; block < blocks_; ++block) {
      T* scale = factor(block);
      for (int64_t lane = 0; lane < ld_; ++lane) {
        // A factor 0 means "no gradient", so one that underflows must not become it: the target may
        // be in this block.
        const T share = scale[lane] * std::abs(common[lane]);
        const T kept = std::max(share, std::numeric_limits<T>::min());
        scale[lane] = common[lane] == 0 ? T(0) : std::copysign(kept, common[lane]);
      }
    }
    return is_alive_for_any();
  }

  // Not by the factors: one may underflow, and the mixture takes the clone's part of dx all the
  // same.
  bool is_alive_for_any() const {
    return std::any_of(log_likelihood_.begin(), log_likelihood_.end(),
                       [](double value) { return value > -INFINITY; });
  }

  OptionFactors<T> option_factors() const {
    T* p = option_lane_.data() + kOptionSums * ld_;
    return {p, p + ld_, p + 2 * ld_};
  }

  // The sums of the blocks, each relative to the block's maximum, brought to that of all.
  bool finish_options(const Chunk& chunk, int64_t n, const LaneSums<T>& total, T* common,
                      CloneHealth* health) {
    std::fill_n(total.options, kOptionSums * ld_, T(0));
    for (int64_t block = 0; block < blocks_; ++block) {
      const LaneSums<T> s = sums(block);
      const int64_t row = block * kBlockRows;
      T weights = static_cast<T>(rows(block));
      if (const T* w = class_weight(row)) weights = std::accumulate(w, w + rows(block), T(0));
      for (int64_t lane = 0; lane < ld_; ++lane) {
        const auto of = [&](int64_t k) { return s.options[k * ld_ + lane]; };
        const T lag = s.max[lane] - total.max[lane];
        total.options[lane] += of(0) + weights * lag;
        total.options[ld_ + lane] += of(1) + of(3) * lag;
        total.options[2 * ld_ + lane] += of(2) + of(4) * lag;
        total.options[3 * ld_ + lane] += of(3);
        total.options[4 * ld_ + lane] += of(4);
      }
    }
    const OptionFactors<T> factors = option_factors();
    finish_clone_with_options<T>(p_, chunk, n, ld_, total, log_likelihood_.data(), common, factors,
                                 out_, health);
    for (int64_t block = 0; block < blocks_; ++block) {
      T* scale = factor(block);
      for (int64_t lane = 0; lane < ld_; ++lane) scale[lane] *= common[lane];
    }
    return is_alive_for_any();
  }

  // Second pass.
  void gradients(const Chunk& chunk, int64_t n, bool first) {
    for_each_group([&](int64_t group, int64_t block) {
      const int64_t row = block * kBlockRows;
      T* z = this->z(chunk, n) + row * ld_;
      T* bias_grad = p_.options.need_dw ? out_.dbias + n * classes_ + row : nullptr;
      if (p_.has_options) {
        const OptionFactors<T> f = option_factors();
        option_gradient_rows(OptionGradientRows<T>{
            z, rows(block), ld_, ld_, factor(block), f.spread, f.hit, f.live, chunk.target, row,
            class_weight(row), probabilities(chunk, row), static_cast<T>(p_.softcap),
            sums(block).max, lane_.data() + 2 * ld_, bias_grad, !first});
      } else {
        gradient_rows(GradientRows<T>{z, rows(block), ld_, ld_, factor(block),
                                      p_.expected ? nullptr : chunk.target, row,
                                      static_cast<T>(p_.norm), chunk.weights, bias_grad, !first});
      }
      const auto g = row_major<const T>(z, rows(block), chunk.size, ld_);
      if (p_.options.need_dw) {
        gemm<T>(row_major(out_.dweight + (n * classes_ + row) * features_, rows(block), features_,
                          features_),
                g, samples(chunk), !first);
      }
      if (p_.options.need_dx) {
        gemm<T>(row_major(part_.data() + group * ld_ * features_, chunk.size, features_, features_),
                g.transposed(),
                row_major(p_.clone_weight(n) + row * features_, rows(block), features_, features_),
                block % blocks_per_group_ != 0);
      }
    });
  }

  // Takes the clone into the running mixture of every sample of the chunk, and into dx.
  void mix(const Chunk& chunk, int64_t n) {
    const bool last = n + 1 == p_.size.clones;
    T* alpha = lane_.data() + 3 * ld_;
    T* beta = alpha + ld_;
    for (int64_t lane = 0; lane < chunk.size; ++lane) {
      RunningMixture<double>& mixture = mixture_[chunk.begin + lane];
      auto [keep, take] = take_in(mixture, p_.log_posterior[n] + log_likelihood_[lane]);
      if (last && mixture.sum > 0) {
        keep /= mixture.sum;
        take /= mixture.sum;
      }
      alpha[lane] = static_cast<T>(keep);
      beta[lane] = static_cast<T>(take);
    }
    if (!p_.options.need_dx) return;
    run_tasks(ceil_div(chunk.size, kLaneTile), [&](int64_t i) {
      const int64_t lane = i * kLaneTile, count = std::min(kLaneTile, chunk.size - lane);
      blend_rows(BlendRows<T>{out_.dx + (chunk.begin + lane) * features_,
                              part_.data() + lane * features_, groups_, ld_ * features_, count,
                              features_, alpha + lane, beta + lane});
    });
  }

  const MixtureProblem<T>& p_;
  MixtureResult<T>& out_;
  int64_t classes_, features_, blocks_, blocks_per_group_, groups_;
  Chunks<T> chunks_;
  int64_t ld_;
  Buffer<T> z_;             // [C][ld] unless kept
  Buffer<T> part_;          // [groups][ld][D]
  Buffer<T> block_;         // [blocks][max, sum, target logit, factor][ld]
  Buffer<T> option_block_;  // [blocks][option sums][ld]
  Buffer<T> lane_;          // as block_ for the clone, then alpha and beta [ld]
  Buffer<T> option_lane_;   // [option sums, spread, hit, live][ld]
  std::vector<uint8_t> is_argmax_;
  std::vector<double> log_likelihood_;           // [ld], this clone and chunk
  std::vector<RunningMixture<double>> mixture_;  // [B]
};

}  // namespace

template <class T>
void mixture_streamed(const MixtureProblem<T>& p, MixtureResult<T>& out) {
  Streamed<T>(p, out).run();
}

template void mixture_streamed(const MixtureProblem<float>&, MixtureResult<float>&);
template void mixture_streamed(const MixtureProblem<double>&, MixtureResult<double>&);

}  // namespace alrao::cpu
