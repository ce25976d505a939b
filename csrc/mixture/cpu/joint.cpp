// All clones of a chunk of samples at once. The responsibilities are known before the gradient to
// x, which is one product over clones and classes together.
#include <torch/csrc/stable/ops.h>

#include "common/cpu/gemm.h"
#include "mixture/cpu/problem.h"

namespace alrao::cpu {
namespace {

// The product that gives dx reads all weights for each task.
constexpr int64_t kTaskLanes = 64;

template <class T>
class Joint {
 public:
  Joint(const MixtureProblem<T>& p, MixtureResult<T>& out)
      : p_(p),
        out_(out),
        rows_(p.size.clones * p.size.classes),
        chunks_(p, samples_per_chunk(p)),
        ld_(chunks_.ld()),
        z_(rows_ * ld_ * ((p.keeps_dlogits ? 0 : 1) + (p.options.need_dx ? 1 : 0))),
        log_likelihood_(p.size.clones * ld_ + 2 * ld_),
        lane_(p.size.clones * ld_ * 5),
        option_lane_(p.has_options ? p.size.clones * ld_ * kOptionLanes : 0),
        is_argmax_(p.size.clones * ld_),
        health_(p.size.clones),
        finite_weight_(p.weight, p.size.clones, p.size.classes * p.size.features) {
    const double flops = 2.0 * ld_ * p.size.features * rows_;
    clones_per_task_ = ceil_div(p.size.clones, task_count(flops, p.size.clones));
    lanes_per_task_ = round_up(ceil_div(ld_, task_count(flops, ld_ / kTaskLanes)), kLaneTile);
  }

  void run() {
    if (p_.keeps_dlogits) out_.dlogits.emplace({chunks_.count(), rows_, ld_});
    bool first = true;
    for (const auto& chunk : chunks_) {
      logits(chunk, first);
      gradients(chunk, first);
      first = false;
    }
    if (!p_.options.need_dw) return;
    for (int64_t n = 0; n < p_.size.clones; ++n) {
      if (!health_[n].dead) continue;
      std::fill_n(out_.dweight + n * p_.size.classes * p_.size.features,
                  p_.size.classes * p_.size.features, T(0));
      std::fill_n(out_.dbias + n * p_.size.classes, p_.size.classes, T(0));
    }
  }

 private:
  using Chunk = typename Chunks<T>::Chunk;

  static int64_t samples_per_chunk(const MixtureProblem<T>& p) {
    const int64_t rows = p.size.clones * p.size.classes;
    const int64_t weights = rows * p.size.features * static_cast<int64_t>(sizeof(T));
    // The weights are read once per chunk: no use for a buffer that is much smaller than they are.
    const int64_t bytes = std::min(p.options.memory_budget, std::max(kCacheBytes, weights));
    return bytes / (rows * static_cast<int64_t>(sizeof(T)) * (p.options.need_dx ? 2 : 1)) /
           kLaneTile * kLaneTile;
  }

  // The logits of the chunk, then their gradients, [N C][ld].
  T* z(const Chunk& chunk) const {
    return p_.keeps_dlogits ? out_.dlogits->data() + chunk.begin * rows_ : z_.data();
  }
  T* weighted() const { return z_.data() + (p_.keeps_dlogits ? 0 : rows_ * ld_); }

  Matrix<const T> samples(const Chunk& chunk) const {
    return row_major(p_.x + chunk.begin * p_.size.features, chunk.size, p_.size.features,
                     p_.size.features);
  }

  // Logits, log-likelihoods and the gradients of the clones' own losses to the logits.
  void logits(const Chunk& chunk, bool first) {
    const int64_t features = p_.size.features, clones = p_.size.clones;
    const int64_t tasks = ceil_div(clones, clones_per_task_);
    run_tasks(tasks, [&](int64_t i) {
      const int64_t n0 = i * clones_per_task_, n1 = std::min(n0 + clones_per_task_, clones);
      const int64_t rows = (n1 - n0) * p_.size.classes;
      gemm<T>(row_major(z(chunk) + n0 * p_.size.classes * ld_, rows, chunk.size, ld_),
              row_major(p_.clone_weight(n0), rows, features, features), samples(chunk).transposed(),
              false);
      for (int64_t n = n0; n < n1; ++n) clone(chunk, n, first);
    });
  }

  void clone(const Chunk& chunk, int64_t n, bool first) {
    const int64_t classes = p_.size.classes;
    T* z = this->z(chunk) + n * classes * ld_;
    T* lane = lane_.data() + n * ld_ * 4;
    LaneSums<T> sums{lane, lane + ld_, lane + 2 * ld_, is_argmax_.data() + n * ld_};
    T* factor = lane + 3 * ld_;
    if (p_.has_options) {
      sums.options = option_lane_.data() + n * ld_ * kOptionLanes;
      clone_with_options(chunk, n, first, z, sums, factor);
      return;
    }
    if (p_.expected) {
      residual_rows(
          ResidualRows<T>{z, classes, ld_, ld_, p_.clone_bias(n), chunk.values, sums.sum});
    } else {
      softmax_rows(SoftmaxRows<T>{z, classes, ld_, ld_, p_.clone_bias(n), chunk.target, 0, sums.max,
                                  sums.sum, sums.target_logit, sums.is_argmax});
    }
    finish_clone<T>(p_, chunk, n, ld_, sums, log_likelihood_.data() + n * ld_, factor, out_,
                    &health_[n]);
    if (!p_.needs_dlogits()) return;
    gradient_rows(GradientRows<T>{z, classes, ld_, ld_, factor,
                                  p_.expected ? nullptr : chunk.target, 0, static_cast<T>(p_.norm),
                                  chunk.weights,
                                  p_.options.need_dw ? out_.dbias + n * classes : nullptr, !first});
  }

  void clone_with_options(const Chunk& chunk, int64_t n, bool first, T* z, const LaneSums<T>& sums,
                          T* factor) {
    const int64_t classes = p_.size.classes;
    const T softcap = static_cast<T>(p_.softcap);
    const T* q = p_.soft ? chunk.values : nullptr;
    option_softmax_rows(
        OptionSoftmaxRows<T>{{z, classes, ld_, ld_, p_.clone_bias(n), chunk.target, 0, sums.max,
                              sums.sum, sums.target_logit, sums.is_argmax},
                             softcap,
                             p_.class_weight,
                             q,
                             sums.options});
    T* lane = sums.options + kOptionSums * ld_;
    const OptionFactors<T> factors{lane, lane + ld_, lane + 2 * ld_};
    finish_clone_with_options<T>(p_, chunk, n, ld_, sums, log_likelihood_.data() + n * ld_, factor,
                                 factors, out_, &health_[n]);
    if (!p_.needs_dlogits()) return;
    option_gradient_rows(OptionGradientRows<T>{
        z, classes, ld_, ld_, factor, factors.spread, factors.hit, factors.live, chunk.target, 0,
        p_.class_weight, q, softcap, sums.max, sums.target_logit,
        p_.options.need_dw ? out_.dbias + n * classes : nullptr, !first});
  }

  // The mixture and dx by ranges of samples, dweight by ranges of clones, side by side.
  void gradients(const Chunk& chunk, bool first) {
    const int64_t by_lanes = ceil_div(ld_, lanes_per_task_);
    const int64_t by_clones = p_.options.need_dw ? ceil_div(p_.size.clones, clones_per_task_) : 0;
    const T* weight = p_.options.need_dx ? finite_weight_.get(health_) : nullptr;
    run_tasks(by_lanes + by_clones, [&](int64_t i) {
      if (i < by_lanes) {
        mix(chunk, i * lanes_per_task_, weight);
      } else {
        weight_gradient(chunk, (i - by_lanes) * clones_per_task_, first);
      }
    });
    const double* max = log_likelihood_.data() + p_.size.clones * ld_;
    const double* sum = max + ld_;
    for (int64_t lane = 0; lane < chunk.size; ++lane) {
      if (chunk.target[lane] < 0) continue;
      add_loss(p_, out_, chunk.begin + lane, -(max[lane] + std::log(sum[lane])));
    }
  }

  void mix(const Chunk& chunk, int64_t lane, const T* weight) {
    const int64_t features = p_.size.features, clones = p_.size.clones;
    const int64_t lanes = std::min(lanes_per_task_, ld_ - lane);
    double* max = log_likelihood_.data() + clones * ld_;
    T* responsibility = lane_.data() + 4 * clones * ld_;
    mixture_rows(MixtureRows<T>{log_likelihood_.data() + lane, p_.log_posterior.data(), clones, ld_,
                                lanes, responsibility + lane, max + lane, max + ld_ + lane});
    const int64_t count = std::min(lanes, chunk.size - lane);
    if (!p_.options.need_dx || count <= 0) return;
    const T* z = this->z(chunk) + lane;
    T* weighted = this->weighted() + lane;
    weight_rows(
        WeightRows<T>{weighted, z, clones, p_.size.classes, ld_, lanes, responsibility + lane});
    gemm<T>(row_major(out_.dx + (chunk.begin + lane) * features, count, features, features),
            row_major<const T>(weighted, rows_, count, ld_).transposed(),
            row_major(weight, rows_, features, features), false);
  }

  void weight_gradient(const Chunk& chunk, int64_t n, bool first) {
    const int64_t features = p_.size.features, classes = p_.size.classes;
    const int64_t rows = std::min(clones_per_task_, p_.size.clones - n) * classes;
    gemm<T>(row_major(out_.dweight + n * classes * features, rows, features, features),
            row_major<const T>(z(chunk) + n * classes * ld_, rows, chunk.size, ld_), samples(chunk),
            !first);
  }

  const MixtureProblem<T>& p_;
  MixtureResult<T>& out_;
  int64_t rows_;
  Chunks<T> chunks_;
  int64_t ld_;
  Buffer<T> z_;                    // [N C][ld] unless kept; again weighted by the responsibilities
  Buffer<double> log_likelihood_;  // [N][ld], then the mixture's max and sum
  Buffer<T> lane_;         // [N][max, sum, target logit, factor][ld], responsibility [N][ld]
  Buffer<T> option_lane_;  // [N][option sums, spread, hit, live][ld]
  std::vector<uint8_t> is_argmax_;
  std::vector<CloneHealth> health_;
  FiniteWeight<T> finite_weight_;
  int64_t clones_per_task_, lanes_per_task_;
};

}  // namespace

template <class T>
void mixture_joint(const MixtureProblem<T>& p, MixtureResult<T>& out) {
  Joint<T>(p, out).run();
}

template void mixture_joint(const MixtureProblem<float>&, MixtureResult<float>&);
template void mixture_joint(const MixtureProblem<double>&, MixtureResult<double>&);

}  // namespace alrao::cpu
