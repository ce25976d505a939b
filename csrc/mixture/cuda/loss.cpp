// Loss, statistics and gradients of the mixture: checks, outputs, the choice between the two ways
// through the clones, and the finishing kernel.
#include "common/checks.h"
#include "mixture/checks.h"
#include "mixture/cuda/problem.h"

namespace alrao::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Up to so many targets every block counts them by itself, which spares a launch.
constexpr int64_t kCountedByBlocks = 1024;
// Copies of the weights may be as large as this whatever the budget.
constexpr int64_t kSmallCopy = 1 << 20;

// What the two likelihoods do not share.
struct Likelihood {
  const Tensor& target;
  int64_t ignore_index;
  double sigma2;
  bool gaussian;
};

template <class T>
MixtureOutputs run(const MixtureInputs& inputs, const MixtureSizes& size,
                   const Likelihood& likelihood, const MixtureOptions& options,
                   const SwitchObservation& observation, cudaStream_t stream) {
  using Compute = compute_t<T>;
  const auto& [samples, features, clones, classes] = size;
  NllProblem<T> p(inputs, size, options.memory_budget, stream);
  const Gemm& gemm = p.gemm;
  const auto matrix = [&](bool needed, std::initializer_list<int64_t> sizes) {
    return needed ? gemm.template empty<Compute>(sizes) : gemm.template empty<Compute>({0});
  };
  const auto loss = gemm.template empty<Compute>({});
  const auto stats = gemm.template empty<double>({3, clones});
  auto dx = matrix(options.need_dx, {samples, features});
  auto dweight = matrix(options.need_dw, {clones, classes, features});
  auto dbias = matrix(options.need_dw, {clones, classes});
  const Tensor target = dense(likelihood.target);

  p.options = options;
  p.dx = data_of<Compute>(dx);
  p.dweight = data_of<Compute>(dweight);
  p.dbias = data_of<Compute>(dbias);
  if (likelihood.gaussian) {
    p.target = {nullptr, 0, data_of<const T>(target), 1 / likelihood.sigma2,
                gaussian_log_normaliser(classes, likelihood.sigma2)};
  } else {
    p.target = {data_of<const int64_t>(target), likelihood.ignore_index, nullptr, 0, 0};
  }

  const bool joint =
      p.is_joint() &&
      (!options.need_dx || clones * classes * features * static_cast<int64_t>(sizeof(T)) <=
                               std::max(options.memory_budget, kSmallCopy));
  p.norm_counts = options.mean && !likelihood.gaussian;
  p.norm_value = options.mean && samples > 0 ? 1.0 / static_cast<double>(samples) : 1.0;
  const bool norm_on_device = (p.norm_counts && (!joint || samples > kCountedByBlocks)) ||
                              (options.mean && !NllProblem<T>::kFoldsNorm);
  const auto norm = matrix(norm_on_device, {1});
  if (norm_on_device) {
    p.norm = data_of<const Compute>(norm);
    check_launch("mixture_norm",
                 launch_mixture_norm(p.target.classes, samples, likelihood.ignore_index,
                                     data_of<Compute>(norm), stream));
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
  a.target = p.target.classes;
  a.ignore_index = likelihood.ignore_index;
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

MixtureOutputs run_in_type(const MixtureInputs& inputs, const MixtureSizes& size,
                           const Likelihood& likelihood, const MixtureOptions& options,
                           const SwitchObservation& observation, cudaStream_t stream) {
  const ScalarType type = inputs.x.scalar_type();
  const auto function = type == ScalarType::Double     ? &run<double>
                        : type == ScalarType::Float    ? &run<float>
                        : type == ScalarType::BFloat16 ? &run<BFloat16>
                                                       : &run<Float16>;
  return function(inputs, size, likelihood, options, observation, stream);
}

MixtureSizes check(const MixtureInputs& inputs, int64_t memory_budget) {
  return check_mixture(inputs.x, inputs.weight, inputs.bias, inputs.log_posterior, memory_budget);
}

}  // namespace

MixtureOutputs mixture_nll(const MixtureInputs& inputs, const Tensor& target, int64_t ignore_index,
                           const MixtureOptions& options, const SwitchObservation& observation,
                           cudaStream_t stream) {
  const MixtureSizes size = check(inputs, options.memory_budget);
  check_class_target(target, inputs.x);
  return run_in_type(inputs, size, {target, ignore_index, 1.0, false}, options, observation,
                     stream);
}

MixtureOutputs mixture_gaussian_nll(const MixtureInputs& inputs, const Tensor& target,
                                    double sigma2, const MixtureOptions& options,
                                    const SwitchObservation& observation, cudaStream_t stream) {
  const MixtureSizes size = check(inputs, options.memory_budget);
  check_gaussian_target(target, inputs.x, size.classes, sigma2);
  return run_in_type(inputs, size, {target, 0, sigma2, true}, options, observation, stream);
}

}  // namespace alrao::cuda
