// Loss, statistics and gradients of the mixture: checks, outputs, the choice between the two ways
// through the clones, and the finishing kernel.
#include <array>

#include "common/checks.h"
#include "mixture/checks.h"
#include "mixture/cuda/problem.h"

namespace alrao::cuda {
namespace {

using torch::stable::Tensor;

// Up to so many targets every block counts them by itself, which spares a launch.
constexpr int64_t kCountedByBlocks = 1024;
// Copies of the weights may be as large as this whatever the budget.
constexpr int64_t kSmallCopy = 1 << 20;

// The class of the largest probability, of every sample.
Tensor argmax(const Tensor& probabilities) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(probabilities), from(std::optional<int64_t>(1)),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::argmax", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
MixtureOutputs run(const LossArguments& arguments, const MixtureSizes& size,
                   const SwitchObservation& observation, cudaStream_t stream) {
  using Compute = compute_t<T>;
  const auto& [samples, features, clones, classes] = size;
  const LossOptions& options = arguments.options;
  const Likelihood& likelihood = arguments.likelihood;
  NllProblem<T> p(arguments.inputs, size, options.memory_budget, stream);
  const LossExtras& extras = arguments.extras;
  const auto loss = extras.per_sample ? p.gemm.template empty<Compute>({samples})
                                      : p.gemm.template empty<Compute>({});
  const auto stats = p.gemm.template empty<double>({3, clones});
  auto [dx, dweight, dbias] = p.template gradients<weight_gradient_t<T>>(
      options.need_dx, options.need_dw, options.need_dw && p.bias.has_value());
  const Tensor target = dense(arguments.target);
  std::optional<Tensor> likeliest, row_weight, class_weight, sum;

  p.options = options;
  p.dx = data_of<Compute>(dx);
  p.dweight = data_of<weight_gradient_t<T>>(dweight);
  p.dbias = dbias.numel() > 0 ? data_of<Compute>(dbias) : nullptr;
  p.target = {};
  if (likelihood.gaussian) {
    p.target.values = data_of<const T>(target);
    p.target.density = likelihood.values.density(classes);
  } else if (is_soft(target)) {
    likeliest = extras.likeliest ? dense(*extras.likeliest) : argmax(target);
    p.target.classes = data_of<const int64_t>(*likeliest);
    p.target.options = {-1};
    p.extras.soft = data_of<const Compute>(target);
  } else {
    p.target.classes = data_of<const int64_t>(target);
    p.target.options = likelihood.classes;
  }
  p.extras.any = extras.any() || p.extras.soft != nullptr;
  if (extras.row_weight) row_weight = dense(*extras.row_weight);
  if (extras.class_weight) class_weight = dense(*extras.class_weight);
  p.extras.row_weight = row_weight ? data_of<const Compute>(*row_weight) : nullptr;
  p.extras.class_weight = class_weight ? data_of<const Compute>(*class_weight) : nullptr;
  p.extras.smoothing = static_cast<Compute>(extras.label_smoothing);
  p.extras.z_loss = static_cast<Compute>(extras.z_loss);
  p.extras.softcap = static_cast<Compute>(extras.softcap);
  p.extras.losses = extras.per_sample ? data_of<Compute>(loss) : nullptr;

  const bool joint =
      p.is_joint(p.extras.any) &&
      (!options.need_dx || clones * classes * features * static_cast<int64_t>(sizeof(T)) <=
                               std::max(options.memory_budget, kSmallCopy));
  p.norm_counts = options.mean && !likelihood.gaussian;
  p.divisor = divisor_of(extras.divisor, extras.num_items);
  p.norm_value = !options.mean ? 1 / extras.divisor
                 : samples > 0 ? 1.0 / static_cast<double>(samples)
                               : 1.0;
  const bool norm_on_device = (p.norm_counts && (!joint || samples > kCountedByBlocks)) ||
                              (extras.num_items && !joint) ||
                              ((options.mean || extras.divides()) && !NllProblem<T>::kFoldsNorm);
  const auto norm = p.result(norm_on_device, {1});
  if (norm_on_device) {
    p.norm = data_of<const Compute>(norm);
    check_launch("mixture_norm", launch_mixture_norm(p.target, options.mean, p.divisor, samples,
                                                     data_of<Compute>(norm), stream));
  }

  const bool scaled = p.extras.row_weight != nullptr && !NllProblem<T>::kFoldsNorm;
  const auto largest = p.result(scaled, {1});
  if (scaled) {
    // The gradients carry the weights relative to the largest, and are scaled at the end.
    check_launch("mixture_largest", launch_mixture_largest(p.extras.row_weight, samples,
                                                           data_of<Compute>(largest), stream));
    p.norm = p.extras.scale = data_of<const Compute>(largest);
  }

  Unfinished<T> left{};
  FinishArguments<T> a{};
  if (samples > 0) {
    left = joint ? run_joint(p) : run_streamed(p);
    if (options.need_dw) {
      a.dweight = p.dweight;
      a.dbias = p.dbias;
    }
  } else if (options.need_dw) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  }
  a.size = size;
  a.parts = left.parts;
  a.target = p.target;
  a.mean = options.mean;
  a.loss = data_of<Compute>(loss);
  a.stats = data_of<double>(stats);
  a.observation = observation;
  a.columns = left.columns;
  a.dx = left.scale_dx ? p.dx : nullptr;
  a.norm = p.norm_left();
  a.row_weight = p.extras.row_weight;
  a.divisor = p.divisor;
  if (extras.per_sample) {
    // The losses lie in the result already.
    sum = p.result(true, {1});
    a.loss = data_of<Compute>(*sum);
  }
  check_launch("mixture_finish", launch_mixture_finish(a, stream));
  return {loss, stats, dx, dweight, dbias};
}

}  // namespace

MixtureOutputs mixture_loss(const LossArguments& given, const SwitchObservation& observation,
                            cudaStream_t stream) {
  const MixtureSizes size = check_loss(given);
  const auto& [mean, need_dx, need_dw, memory_budget] = given.options;
  ALRAO_CHECK(!given.extras.per_sample || !(need_dx || need_dw),
              "per_sample: got True, expected False where gradients are needed");
  const auto weigh = [&](const WeightArguments& a) { return mixture_weights(a, stream); };
  const LossArguments arguments = given.extras.make_factors ? with_factors(given, weigh) : given;
  return in_type_of(arguments.inputs, [&](auto zero) {
    return run<decltype(zero)>(arguments, size, observation, stream);
  });
}

}  // namespace alrao::cuda
