// feature_sgd_: one launch for up to 480 tensors of a dtype, steps counted in it.
//
// Bound by memory: an entry moves 12 bytes in float32 and 6 in bf16 or fp16 without momentum, 20
// and 10 with it, 14 with float32 momentum of a 16-bit parameter, 14 and 22 with masters. Rates,
// rows and chunks add under 0.1 %, gradients' pointers 8 bytes a tensor. On an H200 a step
// took 1.05 of these bytes at the copy rate for 124M entries in float32, 1.2 in bf16, 1.25 for
// GoogLeNet's 258 tensors.
#include "feature/cuda/multi_tensor.cuh"

namespace alrao::cuda {
namespace {

template <typename Acc, bool MOMENTUM>
class SgdOp {
 public:
  struct Options {
    SgdScalars<Acc> scalars;
    bool nesterov;
    bool authors;
  };

  static constexpr int kStates = MOMENTUM ? 1 : 0;
  template <class L>
  static constexpr int kUnroll = L::kMixed          ? 1
                                 : L::kLowPrecision ? (L::kAverage ? 1 : 2 - kStates)
                                                    : 4 / (1 + kStates + L::kAverage);
  // Two vectors of a master and its parameter, and what is mixed, need more than the 80 registers
  // of three blocks.
  template <class L>
  static constexpr int kBlocks = L::kStorage == Storage::kMaster && kStates == 0  ? 2
                                 : L::kLowPrecision && (L::kAverage || L::kMixed) ? 2
                                 : L::kEntries == 4 && !L::kMixed                 ? 4
                                                                                  : 3;

  __device__ SgdOp(const Options& options, Acc lr, Acc grad_factor, int64_t step)
      : s_(options.scalars) {
    s_.lr = lr;
    s_.grad_factor = grad_factor;
    const Momentum momentum = !MOMENTUM         ? Momentum::kNone
                              : step == 0       ? Momentum::kFirst
                              : options.authors ? Momentum::kAuthors
                                                : Momentum::kTorch;
    rule_ = {momentum, MOMENTUM && options.nesterov, s_.weight_decay != 0};
  }

  template <bool WIDE, int N, int STATES>
  __device__ void update(Acc (&p)[N], const Acc (&g)[N], Acc (&states)[STATES][N],
                         const Acc (&rates)[N]) const {
    const auto each = [&](SgdRule rule) {
#pragma unroll
      for (int j = 0; j < N; ++j) sgd_element(p[j], g[j], states[0][j], s_.lr * rates[j], s_, rule);
    };
    // The same for the whole block, so the branches cost next to nothing.
    constexpr Momentum kUsual = MOMENTUM ? Momentum::kTorch : Momentum::kNone;
    if (!WIDE || rule_.momentum != kUsual) {
      each(rule_);
    } else if (rule_.nesterov) {
      rule_.decay ? each({kUsual, true, true}) : each({kUsual, true, false});
    } else {
      rule_.decay ? each({kUsual, false, true}) : each({kUsual, false, false});
    }
  }

 private:
  SgdScalars<Acc> s_;
  SgdRule rule_;
};

template <typename Param, Storage STORAGE, bool MOMENTUM, bool AVERAGE = false>
cudaError_t with_layout(const LaunchGroup& group, const MultiTensorCall& call,
                        const SgdOptions& o) {
  if constexpr (!AVERAGE && STORAGE != Storage::kMixed)
    if (group.averages) return with_layout<Param, STORAGE, MOMENTUM, true>(group, call, o);
  using L = Layout<Param, STORAGE, AVERAGE>;
  using Acc = typename L::Acc;
  const SgdScalars<Acc> s{static_cast<Acc>(o.lr),
                          static_cast<Acc>(o.grad_factor),
                          static_cast<Acc>(o.momentum),
                          static_cast<Acc>(MOMENTUM ? 1 / o.momentum : 0),
                          static_cast<Acc>(1 - o.dampening),
                          static_cast<Acc>(o.weight_decay)};
  return launch_group<L, SgdOp<Acc, MOMENTUM>>(group, call, {s, o.nesterov, o.authors_momentum});
}

template <typename Param>
cudaError_t with_storage(const LaunchGroup& group, const MultiTensorCall& call,
                         const SgdOptions& o) {
  if constexpr (sizeof(Param) == 2) {
    if (group.storage == Storage::kMaster)
      return o.momentum != 0 ? with_layout<Param, Storage::kMaster, true>(group, call, o)
                             : with_layout<Param, Storage::kMaster, false>(group, call, o);
  }
  if (o.momentum == 0) return with_layout<Param, Storage::kOwn, false>(group, call, o);
  // In float32 it is the same, and a float32 momentum without masters is rare.
  if constexpr (!std::is_same_v<Param, float>)
    if (group.storage != Storage::kOwn)
      return with_layout<Param, Storage::kMixed, true>(group, call, o);
  return with_layout<Param, Storage::kOwn, true>(group, call, o);
}

}  // namespace

cudaError_t launch_feature_sgd(const MultiTensorCall& call, const SgdOptions& options) {
  return launch_groups(call, [&](auto param, const LaunchGroup& group) {
    return with_storage<decltype(param)>(group, call, options);
  });
}

}  // namespace alrao::cuda
