// feature_adam_: one launch for up to 480 tensors of a dtype, steps counted in it.
//
// Bound by memory: an entry moves 28 bytes in float32 (36 with amsgrad), 14 (18) in bf16 or fp16,
// 22 with float32 moments and 30 with masters as well. Tables and rates add under 0.1 %. Bias
// corrections are worked out once a block, behind its first loads.
#include "feature/cuda/multi_tensor.cuh"

namespace alrao::cuda {
namespace {

template <typename Acc, bool AMSGRAD>
class AdamOp {
 public:
  struct Options {
    AdamScalars<Acc> scalars;  // but for the bias corrections
    double beta1, beta2;
    bool decoupled;
    bool authors_eps;
  };

  static constexpr int kStates = AMSGRAD ? 3 : 2;
  template <class L>
  static constexpr int kUnroll = L::kMixed || L::kLowPrecision || L::kAverage ? 1 : 2;
  template <class L>
  static constexpr int kBlocks = AMSGRAD || L::kLowPrecision ? 2
                                 : L::kEntries == 4          ? 4
                                                             : 3;

  __device__ AdamOp(const Options& options, Acc lr, Acc grad_factor, int64_t step)
      : s_(options.scalars) {
    s_.lr = lr;
    s_.grad_factor = grad_factor;
    decay_ = s_.weight_decay == 0 ? Decay::kNone
             : options.decoupled  ? Decay::kWeights
                                  : Decay::kGradient;
    __shared__ double powers[2];
    if (threadIdx.x < 2)
      powers[threadIdx.x] =
          integer_power(threadIdx.x == 0 ? options.beta1 : options.beta2, step + 1);
    __syncthreads();
    const double correction1 = 1 - powers[0];
    const double root2 = square_root(1 - powers[1]);
    s_.step_factor = static_cast<Acc>((options.authors_eps ? root2 : 1) / correction1);
    s_.root_factor = static_cast<Acc>(options.authors_eps ? 1 : 1 / root2);
  }

  template <bool WIDE, int N>
  __device__ void update(Acc (&p)[N], const Acc (&g)[N], Acc (&states)[kStates][N],
                         const Acc (&rates)[N]) const {
    const auto each = [&](Decay decay) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        adam_element<AMSGRAD>(p[j], g[j], states[0][j], states[1][j], states[kStates - 1][j],
                              s_.lr * rates[j], s_, decay);
    };
    // The same for the whole block, so the branches cost next to nothing.
    if (!WIDE) {
      each(decay_);
    } else if (decay_ == Decay::kNone) {
      each(Decay::kNone);
    } else if (decay_ == Decay::kWeights) {
      each(Decay::kWeights);
    } else {
      each(Decay::kGradient);
    }
  }

 private:
  AdamScalars<Acc> s_;
  Decay decay_;
};

template <typename Param, Storage STORAGE, bool AMSGRAD, bool AVERAGE = false>
cudaError_t with_layout(const LaunchGroup& group, const MultiTensorCall& call,
                        const AdamOptions& o) {
  if constexpr (!AVERAGE && STORAGE != Storage::kMixed)
    if (group.averages) return with_layout<Param, STORAGE, AMSGRAD, true>(group, call, o);
  using L = Layout<Param, STORAGE, AVERAGE>;
  using Acc = typename L::Acc;
  const AdamScalars<Acc> s{static_cast<Acc>(o.lr),
                           static_cast<Acc>(o.grad_factor),
                           static_cast<Acc>(o.beta1),
                           static_cast<Acc>(1 - o.beta1),
                           static_cast<Acc>(o.beta2),
                           static_cast<Acc>(1 - o.beta2),
                           0,
                           0,
                           static_cast<Acc>(o.eps),
                           static_cast<Acc>(o.weight_decay)};
  return launch_group<L, AdamOp<Acc, AMSGRAD>>(group, call,
                                               {s, o.beta1, o.beta2, o.decoupled, o.authors_eps});
}

template <typename Param>
cudaError_t with_storage(const LaunchGroup& group, const MultiTensorCall& call,
                         const AdamOptions& o) {
  // With amsgrad the table is made as mixed; states of several dtypes are rare.
  if (o.amsgrad) return with_layout<Param, Storage::kMixed, true>(group, call, o);
  if constexpr (sizeof(Param) == 2) {
    if (group.storage == Storage::kFloat32)
      return with_layout<Param, Storage::kFloat32, false>(group, call, o);
    if (group.storage == Storage::kMaster)
      return with_layout<Param, Storage::kMaster, false>(group, call, o);
  }
  if constexpr (!std::is_same_v<Param, float>)
    if (group.storage == Storage::kMixed)
      return with_layout<Param, Storage::kMixed, false>(group, call, o);
  return with_layout<Param, Storage::kOwn, false>(group, call, o);
}

}  // namespace

cudaError_t launch_feature_adam(const MultiTensorCall& call, const AdamOptions& options) {
  return launch_groups(call, [&](auto param, const LaunchGroup& group) {
    return with_storage<decltype(param)>(group, call, options);
  });
}

}  // namespace alrao::cuda
