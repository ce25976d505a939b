// Loss, statistics and gradients of the mixture: checks, outputs, the choice between the two ways
// through the clones, and the finishing kernel.
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

template <class T>
MixtureOutputs run(const LossArguments& arguments, const MixtureSizes& size,
                   const SwitchObservation& observation, cudaStream_t stream) {
  using Compute = compute_t<T>;
  const auto& [samples, features, clones, classes] = size;
  const LossOptions& options = arguments.options;
  const Likelihood& likelihood = arguments.likelihood;
  NllProblem<T> p(arguments.inputs, size, options.memory_budget, stream);
  const auto loss = p.gemm.template empty<Compute>({});
  const auto stats = p.gemm.template empty<double>({3, clones});
  auto [dx, dweight, dbias] = p.gradients(options.need_dx, options.need_dw);
  const Tensor target = dense(arguments.target);

  p.options = options;
  p.dx = data_of<Compute>(dx);
  p.dweight = data_of<Compute>(dweight);
  p.dbias = data_of<Compute>(dbias);
  p.target = {};
  if (likelihood.gaussian) {
    p.target.values = data_of<const T>(target);
    p.target.density = likelihood.values.density(classes);
  } else {
    p.target.classes = data_of<const int64_t>(target);
    p.target.options = likelihood.classes;
  }

  const bool joint =
      p.is_joint() &&
      (!options.need_dx || clones * classes * features * static_cast<int64_t>(sizeof(T)) <=
                               std::max(options.memory_budget, kSmallCopy));
  p.norm_counts = options.mean && !likelihood.gaussian;
  p.norm_value = options.mean && samples > 0 ? 1.0 / static_cast<double>(samples) : 1.0;
  const bool norm_on_device = (p.norm_counts && (!joint || samples > kCountedByBlocks)) ||
                              (options.mean && !NllProblem<T>::kFoldsNorm);
  const auto norm = p.result(norm_on_device, {1});
  if (norm_on_device) {
    p.norm = data_of<const Compute>(norm);
    check_launch("mixture_norm",
                 launch_mixture_norm(p.target, samples, data_of<Compute>(norm), stream));
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
  check_launch("mixture_finish", launch_mixture_finish(a, stream));
  return {loss, stats, dx, dweight, dbias};
}

}  // namespace

MixtureOutputs mixture_loss(const LossArguments& arguments, const SwitchObservation& observation,
                            cudaStream_t stream) {
  const MixtureSizes size = check_loss(arguments);
  ALRAO_CHECK(
      !arguments.extras.any() && (arguments.likelihood.gaussian || !is_soft(arguments.target)),
      "options: got one of row_weight, class_weight, label_smoothing, z_loss, softcap, "
      "per_sample and probabilities as targets, which the CUDA kernels do not have");
  return in_type_of(arguments.inputs, [&](auto zero) {
    return run<decltype(zero)>(arguments, size, observation, stream);
  });
}

}  // namespace alrao::cuda
