// The mixture's ops as the dispatcher calls them. `On(tensor)` makes the device ready and has its
// stream: OnDevice for torch's own, which is all that the binding adds.
#pragma once

#include <torch/csrc/stable/library.h>

#include "cuda/switch_mixture_host.h"
#include "cuda/switch_update_ops.h"

namespace alrao::cuda {

template <class On>
struct MixtureOps {
  using Tensor = torch::stable::Tensor;
  using Optional = std::optional<Tensor>;

  static MixtureOutputs nll(const Tensor& x, const Tensor& weight, const Optional& bias,
                            const Tensor& log_posterior, const Tensor& target, int64_t ignore_index,
                            bool mean, bool need_dx, bool need_dw, int64_t memory_budget) {
    const On on(x);
    return mixture_nll({x, weight, bias, log_posterior}, target, ignore_index,
                       {mean, need_dx, need_dw, memory_budget}, {}, on.stream);
  }

  static MixtureOutputs gaussian_nll(const Tensor& x, const Tensor& weight, const Optional& bias,
                                     const Tensor& log_posterior, const Tensor& target,
                                     double sigma2, bool mean, bool need_dx, bool need_dw,
                                     int64_t memory_budget) {
    const On on(x);
    return mixture_gaussian_nll({x, weight, bias, log_posterior}, target, sigma2,
                                {mean, need_dx, need_dw, memory_budget}, {}, on.stream);
  }

  static MixtureOutputs nll_observe(const Tensor& x, const Tensor& weight, const Optional& bias,
                                    const Tensor& log_posterior, const Tensor& target,
                                    int64_t ignore_index, bool mean, bool need_dx, bool need_dw,
                                    int64_t memory_budget, const Tensor& logw, const Tensor& t,
                                    const Tensor& running, bool mean_evidence, double theta) {
    check_switch_observe(logw, log_posterior, t, running, running, theta);
    const On on(x);
    return mixture_nll(
        {x, weight, bias, log_posterior}, target, ignore_index,
        {mean, need_dx, need_dw, memory_budget},
        SwitchOps<On>::observation_of(logw, log_posterior, t, running, mean_evidence, theta),
        on.stream);
  }

  static MixtureOutputs gaussian_nll_observe(const Tensor& x, const Tensor& weight,
                                             const Optional& bias, const Tensor& log_posterior,
                                             const Tensor& target, double sigma2, bool mean,
                                             bool need_dx, bool need_dw, int64_t memory_budget,
                                             const Tensor& logw, const Tensor& t,
                                             const Tensor& running, bool mean_evidence,
                                             double theta) {
    check_switch_observe(logw, log_posterior, t, running, running, theta);
    const On on(x);
    return mixture_gaussian_nll(
        {x, weight, bias, log_posterior}, target, sigma2, {mean, need_dx, need_dw, memory_budget},
        SwitchOps<On>::observation_of(logw, log_posterior, t, running, mean_evidence, theta),
        on.stream);
  }

  static Tensor log_prob(const Tensor& x, const Tensor& weight, const Optional& bias,
                         const Tensor& log_posterior, int64_t memory_budget) {
    const On on(x);
    return mixture_log_prob({x, weight, bias, log_posterior}, memory_budget, on.stream);
  }

  static std::tuple<Tensor, Tensor, Tensor> log_prob_backward(const Tensor& grad, const Tensor& x,
                                                              const Tensor& weight,
                                                              const Optional& bias,
                                                              const Tensor& log_posterior,
                                                              const Tensor& log_prob, bool need_dx,
                                                              bool need_dw, int64_t memory_budget) {
    const On on(x);
    return mixture_log_prob_backward(grad, {x, weight, bias, log_posterior}, log_prob, need_dx,
                                     need_dw, memory_budget, on.stream);
  }

  static void add_to(torch::stable::detail::StableLibrary& m) {
    m.impl("switch_mixture_nll", TORCH_BOX(&MixtureOps::nll));
    m.impl("switch_mixture_gaussian_nll", TORCH_BOX(&MixtureOps::gaussian_nll));
    m.impl("switch_mixture_nll_observe_", TORCH_BOX(&MixtureOps::nll_observe));
    m.impl("switch_mixture_gaussian_nll_observe_", TORCH_BOX(&MixtureOps::gaussian_nll_observe));
    m.impl("switch_mixture_log_prob", TORCH_BOX(&MixtureOps::log_prob));
    m.impl("switch_mixture_log_prob_backward", TORCH_BOX(&MixtureOps::log_prob_backward));
  }
};

}  // namespace alrao::cuda
